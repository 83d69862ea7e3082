"""docs/migrating.md, CleanRL, Stable-Baselines3, Baselines and LeanRL: flags, metrics, numbers.

TRL's part is tested by test_language_models_page.py.
"""

import csv
import dataclasses
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
from read_by_openrlbenchmark import METRICS

import make_migrating
from conftest import ROOT
from test_runs import CLEANRL, EPISODE_METRICS, ITERATION_METRICS, VARYING

PAGE = (ROOT / "docs" / "migrating.md").read_text()
CLASSIC = PAGE.partition("\n## Coming from TRL's PPOTrainer\n")[0]
COMMANDS = [
    line.replace("\\\n", " ")
    for block in re.findall(r"(?ms)^```sh\n(.+?)^```$", CLASSIC)
    for line in block.replace("\\\n", " ").splitlines()
]
OURS = ITERATION_METRICS | {*EPISODE_METRICS, "charts/mean_episodic_return"}
sb3 = pytest.importorskip("stable_baselines3")


def rows_under(heading):
    """The cells of the tables under a heading, without what stands above the line."""
    text = re.split(r"(?m)^#+ ", PAGE.partition(f"# {heading}\n")[2])[0]
    rows = [
        [x.strip() for x in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    return [row for row in rows if not set("".join(row)) <= {"-", " "}][1:]


def names(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_made_parts_are_up_to_date():
    ((path, text),) = make_migrating.pages().items()
    assert path.read_text() == text, "python docs/make_migrating.py"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command):
    """They can be run: each flag is one, and the numbers fit together."""
    python, file, *flags = shlex.split(command)
    script = importlib.import_module(file.removesuffix(".py"))
    args = script.parse_args(flags)
    script.check_args(args)
    assert python == "python"
    if "--vf-coef" in command:  # the defaults of SB3's PPO
        default = {
            name: x.default for name, x in inspect.signature(sb3.PPO.__init__).parameters.items()
        }
        assert (args.num_steps, args.num_envs) == (default["n_steps"], 1)
        assert args.minibatch_size == default["batch_size"]
        assert args.update_epochs == default["n_epochs"]
        assert args.clip_vloss == bool(default["clip_range_vf"])
        assert args.vf_coef == 2 * default["vf_coef"] and not args.anneal_lr
        same = {"clip_range": "clip_coef"} | {
            x: x for x in ("learning_rate", "gamma", "gae_lambda", "ent_coef", "max_grad_norm")
        }
        assert {x: getattr(args, same[x]) for x in same} == {x: default[x] for x in same}
    else:
        assert not args.bootstrap_truncation


def test_there_is_a_command_for_each_script_of_cleanrl():
    scripts = [shlex.split(x)[1].removesuffix(".py") for x in COMMANDS]
    assert scripts == [*make_migrating.SCRIPTS.values(), "ppo_discrete", "ppo_continuous"]


def test_cleanrls_arguments_are_those_of_the_stored_file():
    """Its defaults as test_runs.py knows them, and every name one of Args, or said to be none."""
    with open(make_migrating.ARGUMENTS) as file:
        rows = list(csv.DictReader(file))
    for column, script in enumerate(("ppo", "ppo_continuous_action", "ppo_atari")):
        found = {row["name"]: row["default"] for row in rows if row["script"] == script}
        derived = make_migrating.DERIVED
        expected = CLEANRL | {name: x[column] for name, x in VARYING.items() if name not in derived}
        if script == "ppo_continuous_action":
            expected["env_id"] = "HalfCheetah-v4"
        assert {name: eval(found[name]) for name in expected} == expected
    page = CLASSIC.partition("### Flags of CleanRL")[2].partition("###")[0]
    fields = {x.name for x in dataclasses.fields(importlib.import_module("ppo_atari").Args)}
    flags = {x[2:].replace("-", "_") for x in re.findall(r"`(--[a-z-]+)`", page)}
    assert {row["name"] for row in rows} - {*make_migrating.DERIVED} <= flags
    assert flags - fields <= {*make_migrating.CLEANRL} and fields <= flags


def test_arguments_are_read_from_a_script():
    source = "@dataclass\nclass Args:\n    a: int = 1\n    '''words'''\n    b: str = None\n"
    assert make_migrating.arguments_of(source) == [("a", "1"), ("b", "None")]


def test_flags_that_are_named_exist():
    fields = {
        x.name
        for script in make_migrating.SCRIPTS.values()
        for x in dataclasses.fields(importlib.import_module(script).Args)
    }
    flags = set(re.findall(r"`(--[a-z-]+)[ `]", CLASSIC))
    known = {x[2:].removeprefix("no-").replace("-", "_") for x in flags}
    theirs = {*make_migrating.CLEANRL, "cudagraphs", "measure_burnin"}
    assert known - fields - theirs == set()


def test_metrics():
    """SB3's are in its source; ours are written; CleanRL's are all ours."""
    folder = Path(sb3.__file__).parent
    files = [folder / "ppo" / "ppo.py", *(folder / "common").glob("*.py")]
    source = "".join(path.read_text() for path in files)
    rows = rows_under("Metrics of Stable-Baselines3")
    theirs = [name for row in rows for name in names(row[0])]
    assert len(theirs) == len(set(theirs)) >= 16
    assert [name for name in theirs if f'logger.record("{name}"' not in source] == []
    written = {
        name
        for name in re.findall(r'logger\.record\("([\w/]+)"', files[0].read_text())
        if name.startswith("train/") and name != "train/clip_range_vf"
    }
    assert written <= {*theirs}
    ours = {name for row in rows for name in names(row[1])}
    assert ours - OURS == {"global_step", "eval.csv"}
    assert {*METRICS} <= OURS
    new = re.search(r"new ones are\s(.+?)\. ", CLASSIC, re.S)[1]
    assert set(names(new)) == OURS - {*METRICS}


def test_loss_of_sb3_is_twice_ours():
    """As the page says: the whole square there, half of it here; both on the same numbers."""
    source = inspect.getsource(sb3.PPO.train)
    assert "F.mse_loss(rollout_data.returns, values_pred)" in source
    ours = (ROOT / "ppo_discrete.py").read_text()
    assert "value_loss = 0.5 * value_losses.mean()" in ours


def test_last_minibatches_are_further_away():
    """The stored run: 200 iterations, each loss in each; its KL is what the page calls larger."""
    path = ROOT / "docs" / "results" / "last_minibatch.csv"
    rows = make_migrating.read("last_minibatch")
    assert len(rows) == 200 * 5 and {int(row["iteration"]) for row in rows} == {*range(1, 201)}
    assert make_migrating.last_beside_mean("approx_kl") > 1.5
    origin = json.loads(path.with_suffix(".json").read_text())
    assert not origin["commit"].endswith("-dirty")


def test_numbers_come_from_the_stored_files():
    """One of each kind, read once more."""
    (row,) = [
        row
        for row in make_migrating.read("peers")
        if (row["peer"], row["vector"]) == ("CleanRL", "advantage_normalization")
    ]
    assert row["alone"] == "0.0646"
    assert "| 6.46 % in a minibatch of 8, 0.39 % in one of 128 |" in PAGE
    assert (
        abs(1 - (7 / 8) ** 0.5 - 0.0646) < 1e-4
        and pytest.approx(0.0039, abs=1e-4) == 1 - (127 / 128) ** 0.5
    )
    games = [float(row["episodic_return"]) for row in make_migrating.read("evaluation/mode")]
    assert f"{sum(games) / len(games):,.1f} +- " in PAGE


def test_baselines_names():
    """Each of its names beside one of ours, in the same order."""
    text = CLASSIC.partition("## Baselines and LeanRL")[2]
    theirs, ours = re.search(r"(`nsteps`.+?)\sare\s(.+?);", text, re.S).groups()
    ours = [x[2:].replace("-", "_") for x in names(ours)]
    assert dict(zip(names(theirs), ours, strict=True)) == {
        "nsteps": "num_steps",
        "noptepochs": "update_epochs",
        "nminibatches": "num_minibatches",
        "cliprange": "clip_coef",
        "lam": "gae_lambda",
        "lr": "learning_rate",
    }
