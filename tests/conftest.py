"""What all tests share: the scripts as modules, and short runs of them in an empty folder."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_atari
import ppo_continuous
import ppo_discrete

ROOT = Path(__file__).parent.parent
SCRIPTS = {"discrete": ppo_discrete, "continuous": ppo_continuous, "atari": ppo_atari}

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile does nothing, but in test_compile.py
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start; many run side by side

gym.register("Scripted-v0", "envs:Scripted")
gym.register("ScriptedBox-v0", "envs:ScriptedBox")
gym.register("Guess-v0", "envs:Guess")
gym.register("GuessPicture-v0", "envs:GuessPicture")
gym.register("MaskedGuess-v0", "envs:MaskedGuess")
gym.register("Target-v0", "envs:Target")

LAST = ["test_readme", "test_compile", "test_rlhf_learning", "test_learning"]


def pytest_collection_modifyitems(items):
    """What takes longest comes last, and what learns comes after all the rest."""
    items.sort(key=lambda item: LAST.index(item.path.stem) if item.path.stem in LAST else -1)


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each of the three scripts in turn."""
    return SCRIPTS[request.param]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Runs of a test leave their folders in a place of their own."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def train(script, **changes):
    """`script.train` in this process with a small batch. Returns the agent."""
    small = {"num_steps": 16, "num_envs": 2, "num_minibatches": 2, "update_epochs": 2}
    plain = {"cuda": False, "compile": False, "torch_threads": 1, "vectorization": "sync"}
    exact = {"precision": "fp32"} if script is ppo_atari else {}
    changes = plain | small | exact | changes
    batch = changes["num_steps"] * changes["num_envs"]
    return script.train(script.Args(**{"total_timesteps": 2 * batch} | changes))


def command_line(script, *flags, timeout=300, **kwargs):
    """`python script flags` in the current folder. Returns the finished process with its output."""
    path = str(ROOT / f"ppo_{script}.py")
    return subprocess.run(
        [sys.executable, path, *flags],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        **kwargs,
    )


def metrics(folder="."):
    """The rows of the only metrics.csv below `folder`: (global_step, time, name, value)."""
    (path,) = Path(folder).glob("runs/**/metrics.csv")
    with open(path) as file:
        return [
            (int(row["global_step"]), float(row["time"]), row["name"], float(row["value"]))
            for row in csv.DictReader(file)
        ]


def spy(monkeypatch, owner, name):
    """Every call of owner.name from now on, as (arguments, result)."""
    original, calls = getattr(owner, name), []

    def recorder(*args, **kwargs):
        arrays = [x.copy() if isinstance(x, np.ndarray) else x for x in args]  # storage is reused
        result = original(*args, **kwargs)
        calls.append((arrays, result))
        return result

    monkeypatch.setattr(owner, name, recorder)
    return calls


def small_agent(script, **changes):
    """An untrained agent for the script's default task, and the closed environments."""
    envs = script.make_envs(script.Args(**{"num_envs": 1, "vectorization": "sync"} | changes))
    envs.close()
    return script.Agent(envs), envs


def far_from_initial(agent):
    """Weights under which every layer and bias matters and the policy is far from uniform."""
    for parameter in agent.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        torch.nn.init.normal_(parameter, std=2.0 / fan_in**0.5)
