"""docs/your_own.md: every block is run, in the order of the page."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, metrics

PAGE = (ROOT / "docs" / "your_own.md").read_text()
BLOCKS = re.findall(r"(?ms)^```(\w+)\n(.+?)^```$", PAGE)
MODULES = dict(
    zip(
        re.findall(r"`(\w+)\.py`:", PAGE),
        [code for kind, code in BLOCKS if kind == "python"],
        strict=True,
    )
)
COMMANDS = [code for kind, code in BLOCKS if kind == "sh"]
DIFFS = [code for kind, code in BLOCKS if kind == "diff"]
SMALL = ["--num-steps", "32", "--num-minibatches", "2", "--no-compile", "--no-cuda"]


def run(command, **changes):
    """A command of the page with other sizes, in a folder with the modules of the page."""
    for name, code in MODULES.items():
        Path(f"{name}.py").write_text(code)
    python, script, *flags = shlex.split(command)
    assert python == "python"
    path = script if Path(script).exists() else ROOT / script
    done = subprocess.run(
        [sys.executable, path, *flags, *SMALL, "--total-timesteps", "1024"],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
        **changes,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [x for *_, name, x in metrics() if name == "charts/episodic_return"]


def test_all_blocks_are_run_here():
    kinds = [kind for kind, _ in BLOCKS]
    assert sorted(kinds) == ["diff"] * 2 + ["python"] * 3 + ["sh"] * 4
    assert list(MODULES) == ["catch", "aim", "grid"]
    assert [name in command for name, command in zip(("catch", "aim"), COMMANDS, strict=False)]


@pytest.mark.parametrize("name", ["catch", "aim"])
def test_environments_written_from_nothing(name):
    (command,) = [x for x in COMMANDS if f" {name}:" in x]
    returns = run(command)
    assert len(returns) >= 100
    assert set(returns) == {"catch": {-1.0, 1.0}, "aim": {0.0, 1.0}}[name]


@pytest.fixture(scope="module")
def minigrid(tmp_path_factory):
    """The package, installed by the command of the page into a folder of its own."""
    (command,) = [x for x in COMMANDS if x.startswith("pip install")]
    folder = tmp_path_factory.mktemp("packages")
    how = ["--quiet", "--no-deps", "--target", folder]  # it would take another pygame along
    pip = [sys.executable, "-m", *shlex.split(command), *how]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip("no package index")
    return folder


def test_minigrid(minigrid):
    (command,) = [x for x in COMMANDS if " grid:" in x]
    returns = run(command, env={"PYTHONPATH": str(minigrid), "OMP_NUM_THREADS": "1"})
    assert len(returns) >= 5
    assert min(returns) >= 0 and max(returns) <= 1


def test_minigrid_as_it_is_is_refused(minigrid):
    script = [sys.executable, ROOT / "ppo_discrete.py", "--env-id"]
    done = subprocess.run(
        [*script, "minigrid:MiniGrid-Empty-5x5-v0"],
        env={"PYTHONPATH": str(minigrid)},
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert "observation['mission'] is MissionSpace" in line
    assert "docs/your_own.md" in line


@pytest.mark.slow
@pytest.mark.parametrize("diff", DIFFS, ids=["network", "wrappers"])
def test_edits(diff):
    """Lines that are there once, and a script that still runs, with the same network acting."""
    name = re.match(r"--- (ppo_\w+\.py)\n", diff)[1]
    lines = diff.split("@@\n")[1].splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    text = (ROOT / name).read_text()
    assert text.count(old) == 1
    Path(name).write_text(text.replace(old, new))
    run(f"python {name} " + ("--env-id Pendulum-v1" if "continuous" in name else ""))
