"""Runs in places that are not as at home: pipes that close, other locales, folders as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

TINY = (
    "--total-timesteps 256 --num-envs 2 --num-steps 32 --num-minibatches 2 --no-compile --no-cuda"
)
TINY = {
    "discrete": TINY,
    "continuous": f"{TINY} --env-id Pendulum-v1",
    "atari": f"{TINY} --precision fp32 --torch-threads 1 --env-id PongNoFrameskip-v4",
    "atari_lstm": "--total-timesteps 32 --num-envs 2 --num-steps 8 --num-minibatches 2 --no-cuda "
    "--precision fp32 --torch-threads 1 --env-id PongNoFrameskip-v4",
    "rlhf": "--task sort --total-episodes 32 --batch-size 16 --sft-texts 128 --eval-episodes 4 "
    "--no-cuda",
}


def start(script, folder=".", *flags, python=(), **kwargs):
    """The command as people start it, in a folder."""
    command = [sys.executable, *python, ROOT / f"ppo_{script}.py", *TINY[script].split(), *flags]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | kwargs
    return subprocess.Popen(command, cwd=folder, **how)


def noise(stderr):
    """What stderr has beside the banner of the emulator."""
    return [line for line in stderr.splitlines() if "A.L.E" not in line and "Stella" not in line]


SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in ("continuous", "atari", "atari_lstm")]


@pytest.mark.parametrize("script", ["discrete", "rlhf", *SLOW])
def test_output_that_is_closed_does_not_stop_a_run(script):
    """As by `| head -1`: it goes on to the end and the checkpoint is there."""
    process = start(script)
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=100) == 0, stderr
    assert len(list(Path().glob("runs/*/checkpoint.pt"))) == 1
    bars = [line for line in noise(stderr) if "step" not in line]
    assert [line for line in bars if line.strip()] == []


@pytest.mark.parametrize("script", ["discrete", "rlhf"])
def test_bare_surroundings(script, tmp_path):
    """No HOME, locale C, a folder with spaces, python -O."""
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    process = start(script, folder, python=["-O"], env=env)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    (saved,) = folder.glob("runs/*/checkpoint.pt")
    assert stdout.splitlines()[-1] == f"written to {saved.parent.relative_to(folder)}"


@pytest.mark.parametrize("script", ["discrete", "rlhf", SLOW[1]])
def test_a_place_that_cannot_be_written_to(script):
    """One line. The administrator may write anywhere, so a file stands where the folder would."""
    Path("runs").write_text("")
    process = start(script)
    stdout, stderr = process.communicate(timeout=100)
    assert (process.returncode, stdout) == (2, "")
    (line,) = [line for line in noise(stderr) if not line.startswith("sft")]
    assert line.startswith("error: a run needs a folder to write to: ")
    assert "runs" in line


def test_two_runs_started_together_do_not_meet():
    """The same seed, so the same numbers, in two folders."""
    processes = [start("discrete") for _ in range(2)]
    assert [process.wait(timeout=100) for process in processes] == [0, 0]
    folders = [path.parent for path in Path().glob("runs/*/checkpoint.pt")]
    assert len(folders) == 2
    rows = [read(folder) for folder in folders]
    assert rows[0] == rows[1]


def read(folder):
    lines = (folder / "metrics.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines]
    return [(step, name, x) for step, _, name, x in rows if name != "charts/SPS"]


@pytest.mark.parametrize(
    ("script", "vectorization"),
    [
        ("discrete", "async"),
        pytest.param("continuous", "sync", marks=pytest.mark.slow),
        pytest.param("discrete", "sync", marks=pytest.mark.slow),
        pytest.param("continuous", "async", marks=pytest.mark.slow),
    ],
)
def test_nothing_on_stderr_in_a_normal_run(script, vectorization):
    """HalfCheetah's model has what MuJoCo calls deprecated. The others are above."""
    flags = ["--vectorization", vectorization]
    flags += ["--env-id", "HalfCheetah-v5"] if script == "continuous" else []
    process = start(script, ".", *flags)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    assert noise(stderr) == []
    assert [path.name for path in Path().iterdir()] == ["runs"]
