"""The whole of ppo_rlhf.py learns: a small run in the default suite, three seeds of each claim.

Bounds are below what the seeds of docs/rlhf.md reached; test_rlhf_results.py asks more of those.
"""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ppo_rlhf
from conftest import ROOT

SEEDS, SORT_SEEDS = (31, 32, 33), (51, 52, 53)  # of those of docs/rlhf.md


def read(path):
    """name -> values of a metrics.csv"""
    found = {}
    with open(path) as file:
        for row in csv.DictReader(file):
            found.setdefault(row["name"], []).append(float(row["value"]))
    return {name: np.array(values) for name, values in found.items()}


def run(folder, *flags):
    """`python ppo_rlhf.py flags` in a new folder. Returns its metrics and its checkpoint."""
    folder.mkdir()
    command = [sys.executable, str(ROOT / "ppo_rlhf.py"), "--no-cuda", "--torch-threads", "1"]
    subprocess.run([*command, *flags], cwd=folder, check=True, capture_output=True, timeout=1800)
    (path,) = folder.glob("runs/*/metrics.csv")
    return read(path), str(path.parent / "checkpoint.pt")


def smooth(values, width=5):
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


@pytest.mark.slow
def test_end_to_end_tiny():
    """Digits in order, after a short SFT: from one list in eight to one in three."""
    settings = {"task": "sort", "sft_texts": 12_800, "total_episodes": 2560, "eval_episodes": 256}
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    ppo_rlhf.train(ppo_rlhf.parse_args(["--no-cuda", "--torch-threads", "1", *argv]))
    (path,) = Path("runs").glob("*/metrics.csv")
    exact = [read(path)[f"eval/{name}/gold/exact"][0] for name in ("sft", "ppo")]
    assert exact[0] < 0.45
    assert exact[1] > exact[0] + 0.15


REVIEWS = [pytest.param(seed, marks=pytest.mark.xdist_group(f"reviews_{seed}")) for seed in SEEDS]


@pytest.fixture(scope="module", params=REVIEWS)
def results(request, tmp_path_factory):
    """Metrics of the default run of a seed, and of the same with --kl-coef 0."""
    folder = tmp_path_factory.mktemp("reviews")
    first, checkpoint = run(folder / "default", "--seed", str(request.param))
    flags = ("--stages", "ppo,eval", "--load", checkpoint, "--kl-coef", "0")
    return first, run(folder / "free", *flags)[0]


@pytest.mark.slow
def test_end_to_end_gold_rises(results):
    metrics, _ = results
    gold = [metrics[f"eval/{column}/gold/score"][0] for column in ("sft", "best_of_4", "ppo")]
    assert gold[2] >= gold[0] + 0.75
    assert gold[2] > gold[1]
    assert metrics["eval/ppo/missing_eos"] < 0.02
    assert abs(metrics["objective/kl"][0]) < 1e-6


@pytest.mark.slow
def test_end_to_end_reward_model(results):
    metrics, _ = results
    assert 0.6 <= metrics["rm/accuracy"] < metrics["rm/ceiling"]


@pytest.mark.slow
def test_end_to_end_over_optimization(results):
    _, metrics = results
    gold, proxy = smooth(metrics["gold/score"]), smooth(metrics["objective/scores"])
    assert gold[-1] <= gold.max() - 0.5
    assert proxy[-1] > proxy[gold.argmax()] + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", SORT_SEEDS)
def test_end_to_end_sort(seed, tmp_path):
    metrics, _ = run(tmp_path / "sort", "--seed", str(seed), "--task", "sort")
    assert 0.2 < metrics["eval/sft/gold/exact"] < 0.5
    assert metrics["eval/ppo/gold/exact"] >= 0.9
