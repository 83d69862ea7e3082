"""The whole of ppo_rlhf.py learns: a small run in the default suite, five seeds of each claim.

Bounds are below what the seeds of docs/rlhf.md reached; test_rlhf_results.py asks more of those.
"""

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import ppo_rlhf
from conftest import ROOT

SEEDS, SORT_SEEDS = range(31, 36), range(51, 56)  # those of docs/rlhf.md


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


def test_end_to_end_tiny():
    """Digits in order, after a short SFT: from one list in eight to one in three."""
    settings = {"task": "sort", "sft_texts": 12_800, "total_episodes": 2560, "eval_episodes": 256}
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    ppo_rlhf.train(ppo_rlhf.parse_args(["--no-cuda", "--torch-threads", "1", *argv]))
    (path,) = Path("runs").glob("*/metrics.csv")
    exact = [read(path)[f"eval/{name}/gold/exact"][0] for name in ("sft", "ppo")]
    assert exact[0] < 0.45
    assert exact[1] > exact[0] + 0.15


def each_seed(runs, seeds):
    """runs(seed) for each seed, as many at a time as there are CPUs."""
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        return list(executor.map(runs, seeds))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Metrics of the default runs, and of the same with --kl-coef 0, of every seed."""
    folder = tmp_path_factory.mktemp("reviews")

    def runs(seed):
        first, checkpoint = run(folder / f"{seed}", "--seed", str(seed))
        flags = ("--stages", "ppo,eval", "--load", checkpoint, "--kl-coef", "0")
        return first, run(folder / f"{seed}_free", *flags)[0]

    return list(zip(*each_seed(runs, SEEDS), strict=True))


@pytest.mark.slow
def test_end_to_end_gold_rises(results):
    gold = {
        column: np.array([metrics[f"eval/{column}/gold/score"][0] for metrics in results[0]])
        for column in ("sft", "best_of_4", "ppo")
    }
    gains = gold["ppo"] - gold["sft"]
    assert gains.mean() >= 0.75
    assert gains.min() >= 0.5
    assert gold["ppo"].mean() > gold["best_of_4"].mean()
    for metrics in results[0]:
        assert metrics["eval/ppo/missing_eos"] < 0.02
        assert abs(metrics["objective/kl"][0]) < 1e-6


@pytest.mark.slow
def test_end_to_end_reward_model(results):
    for metrics in results[0]:
        assert 0.6 <= metrics["rm/accuracy"] < metrics["rm/ceiling"]


@pytest.mark.slow
def test_end_to_end_over_optimization(results):
    for metrics in results[1]:
        gold, proxy = smooth(metrics["gold/score"]), smooth(metrics["objective/scores"])
        assert gold[-1] <= gold.max() - 0.5
        assert proxy[-1] > proxy[gold.argmax()] + 0.5


@pytest.mark.slow
def test_end_to_end_sort(tmp_path):
    def runs(seed):
        return run(tmp_path / f"{seed}", "--seed", str(seed), "--task", "sort")[0]

    for metrics in each_seed(runs, SORT_SEEDS):
        assert 0.2 < metrics["eval/sft/gold/exact"] < 0.5
        assert metrics["eval/ppo/gold/exact"] >= 0.9
