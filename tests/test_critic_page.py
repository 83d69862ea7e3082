"""GRPO beside PPO in docs/rlhf.md: its figures are those of the runs, which are comparable."""

import json
import re
import runpy

import numpy as np
import pytest

import make_critic
import ppo_rlhf
from conftest import ROOT

GROUPS = make_critic.load()
SMOLLM2 = ROOT / "benchmarks" / "smollm2"
OWN = {"seed", "group_size", "critic_warmup", "value_learning_rate", "track", "command"}
OWN |= {"run_name", "git_commit", "script_sha256", "wandb_project_name"}


def test_page_is_up_to_date():
    assert make_critic.page(GROUPS) == make_critic.PAGE.read_text()


@pytest.mark.parametrize("task", sorted({task for task, _ in GROUPS}))
def test_methods_differ_in_nothing_else(task):
    """The same flags but for groups and the value model; the same seeds, as many episodes."""
    ppo, grpo = (GROUPS[task, method] for method in ("PPO", "GRPO"))
    assert [config["seed"] for config, _ in ppo] == [config["seed"] for config, _ in grpo]
    for (one, theirs), (other, ours) in zip(ppo, grpo, strict=True):
        differing = {name for name in one if one[name] != other.get(name)}
        assert differing <= OWN
        assert (one["group_size"], other["group_size"]) == (1, 8)
        assert one["load"] == other["load"]
        assert (theirs["ppo/episode"] == ours["ppo/episode"]).all()


def test_interval_by_hand():
    """1, 2, 3: mean 2, deviation 1, 4.303 / sqrt(3) = 2.484."""
    assert make_critic.interval([1, 2, 3]) == "2.000 ± 2.484"
    assert make_critic.interval([0.25]) == "0.250"


def test_tokens_and_seconds():
    metrics = {"response/length": np.array([3.0, 5.0])}
    metrics |= {f"time/{name}": np.array([1.0, 2.0]) for name in ("gen", "score", "train")}
    assert make_critic.tokens({"batch_size": 10}, metrics) == 80
    assert make_critic.seconds(metrics) == 9


def test_kind_words():
    pytest.importorskip("vaderSentiment")
    kind = runpy.run_path(str(SMOLLM2 / "sentiment.py"))["kind"]
    good, bad, none = kind(["It was wonderful, I loved it.", "It was awful.", "It was a film."])
    assert good > 0.7 and bad < -0.3 and none == 0


def test_right_sums():
    right = runpy.run_path(str(SMOLLM2 / "sums.py"))["right"]
    assert right([" 42\n", "42", " 421", " 42 is", ""], ["42"] * 5) == [1, 1, 0, 0, 0]
    rows = [json.loads(x) for x in (SMOLLM2 / "sums.jsonl").read_text().splitlines()]
    held_out = [json.loads(x) for x in (SMOLLM2 / "sums_held_out.jsonl").read_text().splitlines()]
    assert (len(rows), len(held_out)) == (512, 128)
    prompts = [row["prompt"] for row in rows + held_out]
    assert len({*prompts}) == len(prompts)
    for row in rows + held_out:
        a, _, b, _ = row["prompt"].split("\n")[1].split()
        assert int(a) + int(b) == int(row["answer"])


def test_prompts_about_films_are_held_out():
    files = [(SMOLLM2 / f"films{x}.jsonl").read_text().splitlines() for x in ("", "_held_out")]
    assert [len(file) for file in files] == [80, 30]
    assert not {*files[0]} & {*files[1]}


def test_flags_of_the_relatives_exist():
    text = make_critic.PAGE.read_text()
    part = text[text.index("### Relatives") : text.index("## When it goes wrong")]
    flags = {*re.findall(r"[` ]--([a-z-]+)", part)}
    assert flags >= {"group-size", "kl-in", "loss-mean", "no-norm-adv", "update-epochs"}
    fields = {name.replace("_", "-") for name in vars(ppo_rlhf.Args())}
    assert {flag.removeprefix("no-") for flag in flags} <= fields
