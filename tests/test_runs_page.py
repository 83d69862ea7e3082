"""docs/runs.md: its commands in their order, in one folder, and its programs."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, metrics

PAGE = (ROOT / "docs" / "runs.md").read_text()
BLOCKS = re.findall(r"(?ms)^```(\w+)\n(.+?)^```$", PAGE)
COMMANDS = [line for kind, code in BLOCKS if kind == "sh" for line in code.splitlines()]
PROGRAMS = [code for kind, code in BLOCKS if kind == "python"]
FIRST = "--num-steps 32 --num-minibatches 2 --no-compile --no-cuda"


def run(command):
    """With fewer steps than on the page."""
    command = command.replace("python ppo_", f"{sys.executable} {ROOT}/ppo_")
    command = re.sub(r"steps (\d+)000\b", r"steps \1", command.replace("00000", "024"))
    done = subprocess.run(
        command, shell=True, check=False, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_commands():
    assert len(COMMANDS) == 6 and all(x.startswith("python ppo_discrete.py") for x in COMMANDS)
    first, resume, extend, *judge, film = COMMANDS
    run(f"{first} {FIRST}")
    (folder,) = Path().glob("runs/CartPole-v1__first__1__*")
    assert {x.name for x in folder.iterdir()} == {
        *("config.json", "metrics.csv", "checkpoint.pt", "ppo_discrete.py")
    }
    steps = max(step for step, *_ in metrics())
    run(resume)
    assert max(step for step, *_ in metrics()) == steps
    assert "what is annealed follows the new total" in run(extend)
    assert max(step for step, *_ in metrics()) == 1_920
    assert run(judge[0]).startswith("20 episodes, ")
    assert run(judge[1]).startswith("10 episodes, ")
    assert len((folder / "eval.csv").read_text().splitlines()) == 11
    run(film)
    assert len(list(folder.glob("videos/evaluation-*.mp4"))) >= 3
    files = re.findall(r"(?m)^\| `([\w.]+)/?` \|", PAGE)
    assert sorted(files) == sorted(x.name for x in folder.iterdir())


def test_seconds_between_two_checkpoints():
    path = ROOT / "docs" / "results" / "long" / "PongNoFrameskip-v4__ppo_atari__1" / "metrics.csv"
    with open(path) as file:
        times = [float(x["time"]) for x in csv.DictReader(file) if x["name"] == "charts/SPS"]
    seconds = np.median(np.subtract(times[100:], times[:-100]))
    assert f"there were {seconds:.0f} seconds, the median" in PAGE


def test_table_of_the_evaluation():
    """Its numbers are those of the files."""
    breakout = ("breakout_training", "../long/BreakoutNoFrameskip-v4__ppo_atari__1/eval")
    files = ("training", "still", "sampled", "mode", "fresh_statistics", *breakout)
    files = dict.fromkeys(files)
    for name in files:
        lines = (ROOT / "docs" / "results" / "evaluation" / f"{name}.csv").read_text().splitlines()
        column = lines[0].split(",").index("episodic_return")
        files[name] = np.array([float(line.split(",")[column]) for line in lines[1:]])
        assert len(files[name]) == 100
    numbers = [files["training"], files["training"][-20:]]
    numbers += [files[name] for name in ("still", "sampled", "mode", "fresh_statistics", *breakout)]
    for x in numbers:
        row = f"| {len(x)} | {x.mean():,.1f} | {x.std() / len(x) ** 0.5:.1f} |"
        assert row in PAGE
    pairs = {"still": "sampled", "fresh_statistics": "sampled", breakout[0]: breakout[1]}
    for trained, judged in pairs.items():
        x, y = files[trained], files[judged]
        errors = abs(x.mean() - y.mean()) / (np.hypot(x.std(), y.std()) / 10)
        assert (errors < 2) == (trained != "fresh_statistics")
        assert f"{errors:.1f} standard errors" in PAGE.replace("\n", " ")


MASKED = """
import gymnasium as gym
from envs import MaskedGuess

gym.register("Masked-v0", MaskedGuess)
"""


@pytest.mark.slow
def test_programs(monkeypatch):
    """Also with an environment that fails where an action is not valid."""
    Path("masked.py").write_text(MASKED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests"), "."]))
    tasks = "discrete", "continuous --env-id Pendulum-v1", "atari_lstm --env-id PongNoFrameskip-v4"
    tasks += ("discrete --env-id masked:Masked-v0",)
    for code, task in zip([*PROGRAMS, PROGRAMS[0]], tasks, strict=True):
        flags = f"--total-timesteps 256 --num-envs 2 {FIRST}"
        flags = flags.replace("--no-compile", "") if "lstm" in task else flags
        run(f"python ppo_{task.replace(' ', '.py ', 1) if ' ' in task else task + '.py'} {flags}")
        path = max(Path().glob("runs/*/checkpoint.pt"), key=os.path.getmtime)
        assert f"ppo_{task.split()[0]}" in str(path)
        counted = "print(float(envs.obs_rms.count))\n" * ("obs_rms" in code)
        Path("program.py").write_text(code + counted)
        done = subprocess.run(
            [sys.executable, "program.py", path], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        value, *counts = map(float, done.stdout.split())
        assert abs(value) < 100
        saved = torch.load(path, weights_only=True)
        assert saved["iteration"] == 4
        assert counts == ([float(saved["obs_count"])] if counted else [])  # they do not change
