"""benchmarks/identical.py tells scripts that do the same from those that do not."""

import json
import re

import identical
import pytest
import torch

from conftest import ROOT

SCRIPT = (ROOT / "ppo_discrete.py").read_text()
COMMAND = "ppo_discrete.py --env-id CartPole-v1 --seed 1 --no-cuda --no-compile --torch-threads 1"
CONFIG = {
    "env_id": "CartPole-v1",
    "seed": 1,
    "command": COMMAND,
    "batch_size": 512,
    "torch_threads": 1,
    "git_commit": "0" * 40,
    "run_name": "CartPole-v1__ppo_discrete__1__0",
    "script_sha256": "a",
}


def test_runs_are_compared_once_for_all_their_seeds():
    others = [
        CONFIG | {"seed": 2, "command": COMMAND.replace("--seed 1", "--seed 2")},
        CONFIG | {"seed": 3, "command": COMMAND.replace("--seed 1", "--seed 3 --gamma 0.9")},
        CONFIG | {"seed": 4, "script_sha256": "b"},
        CONFIG | {"seed": 5, "command": COMMAND.replace("--seed 1", "")},
    ]
    found = identical.comparisons([CONFIG, *others])
    assert [[x["seed"] for x in group] for group in found] == [[1, 2, 5], [3], [4]]
    assert found[0][0] is CONFIG


def test_difference():
    a = {"x": torch.tensor([1.0, 2.0]), "y": torch.zeros(2, 2)}
    assert identical.difference(a, {name: x.clone() for name, x in a.items()}) == ""
    assert identical.difference(a, a | {"x": torch.tensor([1.0, 2.25])}) == "x: by 2.5e-01"
    assert identical.difference(a, a | {"y": torch.zeros(2)}) == "y: (2, 2) and (2,)"
    assert identical.difference(a, {"x": a["x"]}) == "other weights: y"


def verdict_of(monkeypatch, config, old, new):
    """As if the run's commit had today's script with another line."""
    text = (ROOT / config["command"].split()[0]).read_text()
    assert text.count(old) == 1
    monkeypatch.setattr(identical, "committed", lambda config: text.replace(old, new).encode())
    return identical.verdict(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  # [C7]", "  # per minibatch [C7]", "identical"),
        ("gamma: Fraction = 0.99", "gamma: Fraction = 0.98", "DIFFERS, actor.0.weight: by "),
        ("import tyro\n", "raise SystemExit('no way')\n", "unknown, the script of its commit ends"),
    ],
)
def test_verdict_runs_both_scripts(monkeypatch, old, new, expected):
    """Another comment changes nothing, another discount does, and what ends early says why."""
    monkeypatch.setattr(identical, "ITERATIONS", 1)
    assert verdict_of(monkeypatch, CONFIG, old, new).startswith(expected)


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ({"x": torch.tensor([1.0, -0.5])}, "identical"),
        ({"x": torch.tensor([1.0, 0.0])}, "DIFFERS, x: by 5.0e-01"),
        ("error: no", "unknown, the script of today ends with: error: no"),
    ],
)
def test_verdict_compares_what_both_scripts_learned(monkeypatch, new, expected):
    found = {b"old": {"x": torch.tensor([1.0, -0.5])}, SCRIPT.encode(): new}
    monkeypatch.setattr(identical, "committed", lambda config: b"old")
    monkeypatch.setattr(identical, "weights", lambda text, config: found[text])
    assert identical.verdict(CONFIG) == expected


def test_verdict_of_the_same_text_and_of_an_unknown_commit(monkeypatch):
    assert identical.verdict(CONFIG).startswith("unknown, its commit is not in this history")
    monkeypatch.setattr(identical, "committed", lambda config: SCRIPT.encode())
    assert identical.verdict(CONFIG) == "identical, the same text"


@pytest.mark.parametrize(
    ("verdicts", "code"), [(["identical"], 0), (["identical", "DIFFERS, x"], 1), (["unknown"], 1)]
)
def test_exit_code(monkeypatch, capsys, verdicts, code):
    configs = [CONFIG | {"script_sha256": str(i)} for i in range(len(verdicts))]
    monkeypatch.setattr(identical, "stored", lambda: configs)
    monkeypatch.setattr(identical, "verdict", lambda config: verdicts[int(config["script_sha256"])])
    assert identical.main(identical.Args()) == code
    assert capsys.readouterr().out.count("CartPole-v1, seeds 1 (") == len(verdicts)
    assert identical.main(identical.Args(only=("Nothing-v0",))) == 2
    assert "no stored run" in capsys.readouterr().err


def test_out(monkeypatch, tmp_path, capsys):
    """What was printed, in a file."""
    configs = [CONFIG, CONFIG | {"seed": 2, "run_name": "two"}]
    monkeypatch.setattr(identical, "stored", lambda: configs)
    monkeypatch.setattr(identical, "verdict", lambda config: "DIFFERS, x")
    assert identical.main(identical.Args(out=tmp_path / "found.json")) == 1
    assert capsys.readouterr().out.endswith(": DIFFERS, x\n")
    about = json.loads((tmp_path / "found.json").read_text())
    (row,) = about["found"]
    assert row == {
        "command": COMMAND,
        "commit": "0" * 40,
        "verdict": "DIFFERS, x",
        "runs": ["CartPole-v1__ppo_discrete__1__0", "two"],
    }
    assert re.match("[0-9a-f]{40}(-dirty)?$", about["git_commit"])


def test_stored_runs_are_all_that_one_can_start_anew():
    configs = identical.stored()
    commands = [config["command"].split() for config in configs]
    assert {words[0] for words in commands} == {path.name for path in ROOT.glob("ppo_*.py")}
    assert not any("--load" in words for words in commands)
    kept = {path.stem for path in (ROOT / "docs" / "results").glob("*__*.json")}
    names = [config["run_name"] for config in configs]
    assert kept < {*names} and len({*names}) == len(names)
    assert "long/PongNoFrameskip-v4__ppo_atari__1" in names
    assert {"sort", "reviews"} < {config["env_id"] for config in configs}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("import tyro\n", "import tyro  # of arguments\n", "identical"),
        (" clip_coef: Positive = 0.2", " clip_coef: Positive = 0.001", "DIFFERS, "),
        (" learning_rate: Weight = 3e-4", " learning_rate: Weight = 1e-4", "DIFFERS, "),
    ],
)
def test_verdict_of_language_models(monkeypatch, old, new, expected):
    """PPO has begun to train the policy, or the clip range would not be noticed."""
    small = "--seed 1 --no-cuda --torch-threads 1 --sft-texts 256 --rm-pairs 64 --batch-size 16"
    config = CONFIG | {"command": f"ppo_rlhf.py {small}", "batch_size": 16}
    assert verdict_of(monkeypatch, config, old, new).startswith(expected)
