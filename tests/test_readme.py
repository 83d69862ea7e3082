"""The commands of README.md work; those that set up and test are what .ci/run executes."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from conftest import ROOT
from test_text import dependencies

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]
TRAINING = [line for line in COMMANDS if "ppo_" in line]


SHORT = "--sft-texts 256 --rm-pairs 64 --rm-test-pairs 64 --eval-episodes 16 --total-episodes 256"


@pytest.mark.parametrize(
    "command",
    [
        command
        if "CartPole" in command  # the quickest
        else pytest.param(command, marks=pytest.mark.slow)
        for command in TRAINING
    ],
)
def test_training_command(command):
    """Word for word, for a few steps, in a folder that holds nothing but the scripts."""
    for path in ROOT.glob("ppo_*.py"):
        shutil.copy(path, ".")
    steps = 1024 if "atari" in command else 2048
    done = subprocess.run(
        f"{command} {SHORT if 'rlhf' in command else f'--total-timesteps {steps}'}",
        shell=True,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    end = "   256 episodes" if "rlhf" in command else f"{steps:,} of {steps:,} steps"
    assert end in done.stdout
    (run,) = (path.parent for path in Path("runs").glob("**/config.json"))
    files = {"config.json", "metrics.csv", "checkpoint.pt", re.search(r"ppo_\w+\.py", command)[0]}
    if "rlhf" in command:
        files |= {"samples.jsonl", "reference.pt", "reward_model.pt"}
    assert {path.name for path in run.iterdir()} == files
    assert Path("wandb").exists() == ("--track" in command)


def uv(*words, timeout=120):
    """Where pip is told to look for wheels, uv looks, too: torch for the CPU may be there."""
    wheels = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    wheels = subprocess.run(wheels, check=False, capture_output=True, text=True).stdout.strip()
    return subprocess.run(
        [sys.executable, "-m", "uv", *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | ({"UV_FIND_LINKS": wheels} if wheels else {}),
    )


@pytest.mark.parametrize(
    "script", ["ppo_atari.py", pytest.param("ppo_rlhf.py", marks=pytest.mark.slow)]
)  # the others ask for the same as the first
def test_uv_resolves_what_a_script_asks_for(script):
    shutil.copy(ROOT / script, ".")
    done = uv("lock", "--script", script, "--python", sys.executable)
    if "Failed to fetch" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    lock = tomllib.loads(Path(f"{script}.lock").read_text())
    versions = {package["name"]: package["version"] for package in lock["package"]}
    for name, requirement in dependencies((ROOT / script).read_text()).items():
        assert requirement.specifier.contains(versions[name]), name
    assert len(versions) > 30  # what these need, too


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("ppo_*.py")))
def test_uv_run(script):
    """In an environment that uv makes for it, for a few steps."""
    shutil.copy(ROOT / script, ".")
    steps = SHORT.split() if "rlhf" in script else ["--total-timesteps", "2048"]
    done = uv("run", "--python", sys.executable, script, *steps, "--no-cuda", timeout=1800)
    assert done.returncode == 0, done.stderr
    assert len(list(Path("runs").glob("*/checkpoint.pt"))) == 1


def test_every_other_command_is_executed_by_ci():
    others = [line for line in COMMANDS if line not in TRAINING]
    blocks = (ROOT / ".ci" / "run").read_text()
    for line in others:
        heading = README[: README.index(line)].rsplit("\n## ", 1)[1].split("\n", 1)[0]
        assert re.search(f"block '?{heading}'?[)]", blocks), line
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_installed_packages_are_the_required_ones():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, pin = line.split("==")
            assert version(name.split("[")[0]).split("+")[0] == pin, line


@pytest.mark.xdist_group("anything")
def test_groups_reach_the_scheduler(request):
    """As the end of a test's id. Without them several processes would do what one does once."""
    is_worker = hasattr(request.config, "workerinput")
    assert request.node.nodeid.endswith("@anything") == is_worker


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / target.split("#")[0]).exists(), target


def test_speeds_are_those_of_the_page():
    """Of ours and of each peer that has such a script, on the machine that ran LeanRL, too."""
    page = (ROOT / "docs" / "performance.md").read_text().split("\n## On another processor")[1]
    rows = re.findall(r"(?m)^\| steps/s, (\w+), (one core|two cores).*?\|(.*)\|$", README)
    assert [name for name, *_ in rows] == ["CartPole", "HalfCheetah", "Breakout"]
    names = ["ours", "CleanRL", "SB3", "LeanRL", "LeanRL --compile"]
    for name, cores, cells in rows:
        section = re.search(rf"(?s)### ppo_[a-z]+\.py, {name}\S*, .*?\n\n(.*?)\n\n", page)[1]
        row = r"(?m)^\| ([\w -]+) \| (\w+) \| (\w+) \| \d+ \| ([\d,]+) "
        of_page = sorted(
            re.findall(row, section), key=lambda x: (names.index(x[0]), x[1] == "bf16")
        )
        assert {x[2] for x in of_page} <= ({"1"} if cores == "one core" else {"2", "default"})
        assert re.findall(r"\d[\d,]*\d", cells) == [speed for *_, speed in of_page]
    page = (ROOT / "docs" / "rlhf.md").read_text().split("\n### Speed\n")[1]
    pair = [re.search(rf"\n\| {x} \| 1 \| \d+ \| (\d+) ", page)[1] for x in ("ours", "TRL")]
    (cells,) = re.findall(r"(?m)^\| episodes/s, .*?\|(.*)\|$", README)
    assert re.findall(r" (\d\d+)", cells) == pair
    page = (
        (ROOT / "docs" / "larger_models.md").read_text().split("\n## An iteration beside TRL\n")[1]
    )
    pair = [re.search(rf"\n\| {x} \| 1 \| ([\d.]+) ", page)[1] for x in ("ours", "TRL")]
    assert re.findall(r" (0\.\d+)", cells) == pair


def test_fits_on_a_screen_and_a_half():
    assert len(README.splitlines()) <= 80
