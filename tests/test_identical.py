"""benchmarks/identical.py tells scripts that do the same from those that do not."""

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
    assert [seeds for _, seeds in found] == [[1, 2, 5], [3], [4]]
    assert found[0][0] is CONFIG


def test_difference():
    a = {"x": torch.tensor([1.0, 2.0]), "y": torch.zeros(2, 2)}
    assert identical.difference(a, {name: x.clone() for name, x in a.items()}) == ""
    assert identical.difference(a, a | {"x": torch.tensor([1.0, 2.25])}) == "x: by 2.5e-01"
    assert identical.difference(a, a | {"y": torch.zeros(2)}) == "y: (2, 2) and (2,)"
    assert identical.difference(a, {"x": a["x"]}) == "other weights: y"


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
    changed = SCRIPT.replace(old, new)
    assert changed != SCRIPT
    monkeypatch.setattr(identical, "committed", lambda config: changed.encode())
    assert identical.verdict(CONFIG).startswith(expected)


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
    monkeypatch.setattr(identical.make_results, "load", lambda: [(x, {}) for x in configs])
    monkeypatch.setattr(identical, "verdict", lambda config: verdicts[int(config["script_sha256"])])
    assert identical.main(identical.Args()) == code
    assert capsys.readouterr().out.count("CartPole-v1, seeds 1 (") == len(verdicts)
    assert identical.main(identical.Args(only=("Nothing-v0",))) == 2
    assert "no stored run" in capsys.readouterr().err
