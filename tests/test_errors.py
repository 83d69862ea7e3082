"""What cannot work stops with one line that says what is wrong and what to do, exit code 2."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import SCRIPTS, command_line, train

WORKING = {
    "ppo_discrete": "CartPole-v1",
    "ppo_continuous": "Pendulum-v1",
    "ppo_atari": "PongNoFrameskip-v4",
}

WANDB = """
from pathlib import Path
from unittest.mock import MagicMock
Error = type("Error", (Exception,), {})
def init(**kwargs):
    Path("contacted").touch()
    return MagicMock()
"""

BROKEN = """
import gymnasium as gym
import numpy as np

class Broken(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def __init__(self, action_space, **broken):
        self.action_space, self.broken, self.t = action_space, broken, 0

    def reset(self, *, seed=None, options=None):
        return np.ones(2), {}

    def step(self, action):
        assert np.isfinite(action).all(), "acted with what is not finite"
        self.t += 1
        values = {"obs": 1.0, "final_obs": 1.0, "reward": 1.0}
        if self.t >= 30:
            values |= self.broken
        truncated = self.t % 5 == 0
        obs = np.full(2, values["final_obs" if truncated else "obs"])
        return obs, values["reward"], False, truncated, {}

spaces = {"discrete": gym.spaces.Discrete(2), "continuous": gym.spaces.Box(-1.0, 1.0, (2,))}
for script, space in spaces.items():
    gym.register(f"{script}-v0", Broken, kwargs={"action_space": space})
    for where in ("obs", "final_obs", "reward"):
        for name, value in {"nan": np.nan, "inf": np.inf, "huge": 1e200}.items():
            kwargs = {"action_space": space, where: value}
            gym.register(f"{script}_{where}_{name}-v0", Broken, kwargs=kwargs)
"""


@pytest.fixture
def error(tmp_path):
    """The error line of a command that fails, which leaves nothing and has not contacted W&B."""

    def error(script, flags, wandb=WANDB):
        (tmp_path / "wandb.py").write_text(wandb)
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        process = command_line(script, "--track", *flags.split(), cwd=tmp_path, env=env, timeout=60)
        assert process.returncode == 2, process.stderr
        assert "Traceback" not in process.stderr
        (line,) = process.stderr.splitlines()
        assert line.startswith("error: ")
        assert process.stdout == ""
        assert not (tmp_path / "runs").exists()
        assert not (tmp_path / "contacted").exists()
        return line

    return error


# ------------------------------------------------------------------------------------------------
# Before training


@pytest.mark.parametrize(
    "script, flags, hints",
    [
        ("discrete", "--env-id CartPoll-v1", ["unknown", "CartPoll-v1", "CartPole-v1"]),
        ("atari", "--env-id BrekoutNoFrameskip-v4", ["unknown", "BreakoutNoFrameskip-v4"]),
        ("discrete", "--env-id ALE/Pong-v5", ["unknown", "ppo_atari.py"]),
        ("continuous", "--env-id PongNoFrameskip-v4", ["unknown", "ppo_atari.py"]),
    ],
)
def test_command_line(error, script, flags, hints):
    line = error(script, flags)
    assert all(hint in line for hint in hints), line
    assert "None" not in line


@pytest.mark.parametrize(
    "script, flags, hints",
    [
        ("discrete", "--env-id no_such_module:Env-v0", ["no_such_module"]),
        ("continuous", "--env-id CartPole-v1", ["CartPole-v1", "Discrete", "ppo_discrete.py"]),
        ("discrete", "--env-id Pendulum-v1", ["Pendulum-v1", "Box", "ppo_continuous.py"]),
        ("atari", "--env-id CartPole-v1", ["no Atari game", "ppo_discrete.py"]),
        ("continuous", "--num-minibatches 7", ["2048", "7", "--num-minibatches"]),
        ("discrete", "--total-timesteps 511", ["--total-timesteps 511", "512"]),
    ],
)
def test_flags_refused(script, flags, hints, capsys):
    """Without a process of its own, which is most of the time that a test above takes."""
    module = SCRIPTS[script]
    refused(module, module.parse_args(flags.split()), hints, capsys)


def refused(script, args, hints, capsys):
    """`check_args` says so in one line that holds the hints, and leaves nothing."""
    with pytest.raises(SystemExit) as error:
        script.check_args(args)
    output = capsys.readouterr()
    assert error.value.code == 2
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    assert all(hint in line for hint in hints), line
    assert "None" not in line
    assert not list(Path().iterdir())


def test_one_checkpoint_for_one_purpose(script, capsys):
    args = script.Args(resume="runs/one", evaluate="runs/other")
    refused(script, args, ["--evaluate", "without --resume"], capsys)


def test_missing_package_of_the_environment(error):
    """The line has the command that installs it."""
    try:
        import Box2D  # noqa: F401
    except ImportError:
        assert re.search(
            r"Box2D.*pip install .*box2d", error("discrete", "--env-id LunarLander-v3")
        )
    else:
        pytest.skip("Box2D is installed")


def test_track_without_wandb(script, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(script, script.parse_args(["--track"]), ["--track", "pip install wandb"], capsys)


@pytest.mark.parametrize(
    "flags, hints",
    [
        ({"num_envs": 0}, ["--num-envs", "0"]),
        ({"num_steps": 0}, ["--num-steps", "0"]),
        ({"num_envs": -1}, ["--num-envs", "-1"]),
        ({"num_minibatches": 0}, ["--num-minibatches", "0"]),
        ({"update_epochs": 0}, ["--update-epochs", "0"]),
        ({"checkpoint_every": 0}, ["--checkpoint-every", "0"]),
        ({"torch_threads": 0}, ["--torch-threads", "0"]),
        ({"seed": -1}, ["--seed", "-1", "from 0 to 2^63 - 1"]),
        ({"learning_rate": -1.0}, ["--learning-rate", "-1.0"]),
        ({"penalty_kl": 0.0}, ["--penalty-kl", "0.0", "above 0"]),
        ({"penalty_kl": float("nan")}, ["--penalty-kl", "nan", "above 0"]),
        ({"learning_rate": float("nan")}, ["--learning-rate", "nan"]),
        ({"num_envs": 3, "num_steps": 5}, ["batch of 15", "equal --num-minibatches"]),
        ({"num_minibatches": 1024, "num_envs": 1, "num_steps": 512}, ["512", "1024"]),
        ({"total_timesteps": 0}, ["--total-timesteps", "0", "at least 1"]),
        ({"env_id": "no_such_module:Env-v0"}, ["no_such_module"]),
        ({"env_id": "no/such/id"}, ["no/such/id"]),
        ({"env_id": "Zzz-v0"}, ["Zzz"]),
    ],
)
def test_refused(script, flags, hints, capsys):
    """`check_args` of each script; the command line of one is tested above."""
    refused(script, script.Args(**{"num_minibatches": 4} | flags), hints, capsys)


def test_accepted(script, capsys):
    """The smallest run; nothing is printed and nothing left behind."""
    sizes = {"num_envs": 1, "num_steps": 1, "num_minibatches": 1, "total_timesteps": 1}
    script.check_args(script.Args(env_id=WORKING[script.__name__], **sizes))
    assert capsys.readouterr() == ("", "")
    assert not list(Path().iterdir())


def test_wandb_that_refuses(script, monkeypatch, capsys):
    """Its reason is in our line."""

    class RefusedError(Exception):
        pass

    def init(**kwargs):
        raise RefusedError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RefusedError))
    with pytest.raises(SystemExit) as error:
        train(script, track=True, env_id=WORKING[script.__name__])
    assert error.value.code == 2
    assert capsys.readouterr() == ("", "error: Weights & Biases: no API key\n")


# ------------------------------------------------------------------------------------------------
# While training


def numbers(state):
    """All tensors and numbers in a checkpoint."""
    if isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from numbers(value)
    elif isinstance(state, torch.Tensor | int | float):
        yield torch.as_tensor(state)


def read(line):
    """Metric, step and iteration of the last good checkpoint, which holds only finite numbers."""
    match = re.fullmatch(r"error: (.+) not finite at step (\d+); last good checkpoint: (.+)", line)
    assert match, line
    saved = list(Path("runs").rglob("checkpoint*"))
    if match[3] == "none yet":
        assert not saved
        return match[1], int(match[2]), None
    assert saved == [Path(match[3])]
    checkpoint = torch.load(saved[0], weights_only=True)
    assert all(number.isfinite().all() for number in numbers(checkpoint))
    return match[1], int(match[2]), checkpoint["iteration"]


def stops(capsys, script, **flags):
    """What the line of a run that stops says, as `read` gives it."""
    with pytest.raises(SystemExit) as error:
        train(script, **flags)
    assert error.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    return read(line)


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """The module with Broken: episodes of 5 steps of ones, from step 30 on with another value."""
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["discrete", "continuous"])
@pytest.mark.parametrize(
    "where, value, metric",
    [
        ("obs", "nan", "observations"),
        ("obs", "inf", "observations"),
        ("obs", "huge", "observations"),  # inf in float32 and in a variance
        ("final_obs", "nan", ".*"),
        ("final_obs", "inf", ".*"),
        ("reward", "nan", "rewards"),
        ("reward", "inf", "rewards"),
        ("reward", "huge", "rewards"),
    ],
)
def test_data_that_is_not_finite(broken, capsys, name, where, value, metric):
    """From step 30 of each of 2 environments on, in the second rollout of 16 steps."""
    flags = {"env_id": f"broken:{name}_{where}_{value}-v0", "total_timesteps": 128}
    found, step, iteration = stops(capsys, SCRIPTS[name], checkpoint_every=1, **flags)
    assert re.fullmatch(metric, found)
    assert 60 <= step <= 64
    assert iteration == 1


def test_data_that_is_not_finite_on_the_command_line(broken, tmp_path):
    """W&B is asked for a run here, unlike above; before the first checkpoint there is none."""
    (tmp_path / "wandb.py").write_text(WANDB)
    flags = ["--env-id=broken:discrete_obs_nan-v0", "--num-envs=2", "--num-steps=16", "--track"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = command_line("discrete", *flags, cwd=tmp_path, env=env)
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    assert (tmp_path / "contacted").exists()
    assert read(process.stderr.splitlines()[-1]) == ("observations", 62, None)


@pytest.mark.parametrize("metric, minibatch", [("loss", 5), ("grad_norm", 8)])
def test_loss_that_is_not_finite(script, metric, minibatch, monkeypatch, capsys):
    """The loss in the first minibatch of the second iteration, or only its gradient in the last."""
    calls, ppo_loss = [], script.ppo_loss

    def spoiled(*args, **kwargs):
        loss, stats = ppo_loss(*args, **kwargs)
        calls.append(loss)
        if len(calls) == minibatch:
            loss = loss * torch.nan
            if metric == "loss":
                stats = stats | {"loss": loss.detach()}
        return loss, stats

    monkeypatch.setattr(script, "ppo_loss", spoiled)
    flags = {"env_id": WORKING[script.__name__], "total_timesteps": 128}
    stopped = stops(capsys, script, checkpoint_every=1, **flags)
    assert stopped == (f"losses/{metric}", 64, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("learning_rate", [1e30, 1e38])
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("name", ["discrete", "continuous"])
def test_learning_rate_that_is_too_large(broken, capsys, name, learning_rate, updates):
    """Found in the iteration, or in the next, after whose weights nothing is saved."""
    flags = {"learning_rate": learning_rate, "num_minibatches": updates, "update_epochs": updates}
    stops(capsys, SCRIPTS[name], env_id=f"broken:{name}-v0", total_timesteps=128, **flags)
