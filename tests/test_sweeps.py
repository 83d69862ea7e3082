"""Sweeps: each flag as W&B's agent writes it, docs/sweep.yaml, and the one without an account."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import ppo_atari
import ppo_atari_lstm
import ppo_continuous
import ppo_discrete
import ppo_rlhf
from conftest import ROOT, metrics
from test_runs import wandb_records

pytest.importorskip("wandb")
import yaml
from wandb.sdk.launch.sweeps import utils

SCRIPTS = [ppo_discrete, ppo_continuous, ppo_atari, ppo_atari_lstm, ppo_rlhf]
SWEEP = ROOT / "docs" / "sweep.yaml"


def agent_command(values, command=("${args}",)):
    """The command that W&B's agent runs for such values of the parameters."""
    args = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})
    command = utils.create_sweep_command(list(command))
    places = {"${env}": [], "${program}": [values.get("program")], "${args}": args["args"]}
    return [word for part in command for word in places.get(part, [part])]


def another(value, kind):
    """Another value than the default that a field of this type can have."""
    if isinstance(value, bool):
        return not value
    choices = [x for part in (kind, *get_args(kind)) for x in get_args(part)]
    if isinstance(value, str) and choices and isinstance(choices[-1], str):
        return next(x for x in reversed(choices) if x != value)
    if isinstance(value, str | None):
        return (
            0.25 if float in choices or "float" in str(kind) else 2 if "int" in str(kind) else "a"
        )
    return value / 2 or 0.5 if isinstance(value, float) else value + 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_flag_as_an_agent_writes_it(script):
    default, kinds = script.Args(), get_type_hints(script.Args)
    values = {x.name: getattr(default, x.name) for x in dataclasses.fields(default)}
    values = {name: x for name, x in values.items() if not isinstance(x, tuple)}  # no sweep's value
    assert script.parse_args(agent_command(values)) == script.parse_args([])
    for name in values.keys() - {"resume", "evaluate", "load", "task"}:
        value = another(values[name], kinds[name])
        assert value != values[name]
        parsed = getattr(script.parse_args(agent_command({name: value})), name)
        assert (parsed, type(parsed)) == (value, type(value)), name


@pytest.mark.slow
def test_the_sweep_of_the_page_runs(tmp_path):
    """A run with values of each kind, its objective in every row of an iteration."""
    sweep = yaml.safe_load(SWEEP.read_text())
    values = {k: x["values"][-1] for k, x in sweep["parameters"].items() if "values" in x}
    assert values == {"seed": 3, "num_envs": 8, "anneal_lr": False, "target_kl": 0.01}
    values |= {"learning_rate": sweep["parameters"]["learning_rate"]["min"]}
    values |= {"env_id": "CartPole-v1", "total_timesteps": 4096}
    command = agent_command(values | {"program": str(ROOT / sweep["program"])}, sweep["command"])
    command = [sys.executable if x == "python" else x for x in command]
    command = [x for x in command if not x.startswith("--program")]
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    histories = [x.history for x in wandb_records(path) if x.WhichOneof("record_type") == "history"]
    rows = [{(i.key or i.nested_key[0]): i.value_json for i in x.item} for x in histories]
    objective = [float(row[sweep["metric"]["name"]]) for row in rows if "charts/SPS" in row]
    returns = [float(r["charts/episodic_return"]) for r in rows if "charts/episodic_return" in r]
    assert len(objective) == 4
    last = returns[-100:]
    assert objective[-1] == pytest.approx(sum(last) / len(last), rel=1e-6)
    saved = [value for *_, name, value in metrics() if name == sweep["metric"]["name"]]
    assert saved == pytest.approx(objective, rel=1e-6)


@pytest.mark.slow
def test_the_sweep_without_an_account(tmp_path):
    """The blocks of docs/scaling.md, with fewer steps: all runs are there, the best is named."""
    page = (ROOT / "docs" / "scaling.md").read_text().split("## Sweeps")[1]
    shell, program = re.findall(r"(?ms)^```(?:sh|python)\n(.+?)^```$", page)[-2:]
    assert "for lr in" in shell
    shell = shell.replace("python ppo_discrete.py", f"{sys.executable} {ROOT / 'ppo_discrete.py'}")
    shell = shell.replace("--env-id Acrobot-v1", "--total-timesteps 1024 --no-compile")
    subprocess.run(["bash", "-c", shell], check=True, capture_output=True, timeout=300)
    folders = list(Path("runs").iterdir())
    assert len(folders) == 6
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(re.fullmatch(r"lr-\S+ +[\d.]+ in 2 runs", x) for x in lines)
    assert sorted(lines, key=lambda x: -float(x.split()[1])) == lines
