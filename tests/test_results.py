"""The figures of docs/results.md are those of the runs kept beside it, and reach their bars."""

import hashlib
import subprocess

import numpy as np
import pytest

import make_performance
import make_results
from conftest import ROOT

RUNS = make_results.load()
each_run = pytest.mark.parametrize(
    ("config", "metrics"), RUNS, ids=[config["run_name"] for config, _ in RUNS]
)


def test_page_is_up_to_date():
    assert (ROOT / "docs" / "results.md").read_text() == make_results.page(RUNS)


each_group = pytest.mark.parametrize("group", make_results.GROUPS, ids=lambda x: str(x[:2]))


@each_group
def test_mean_score_is_at_least_what_is_asked(group):
    env_id, changes, _, least, _ = group
    scores = [make_results.last_100(m) for _, m in make_results.select(RUNS, env_id, changes)]
    assert scores
    assert least is None or np.mean(scores) >= least


@each_group
def test_every_seed_reaches_its_least_score(group, request):
    """Known to miss: seed 2 of Hopper-v5. Strict, so that a better run takes the mark away."""
    env_id, changes, least, *_ = group
    if env_id == "Hopper-v5":
        request.applymarker(pytest.mark.xfail(reason="seed 2 ends at 1,653", strict=True))
    scores = [make_results.last_100(m) for _, m in make_results.select(RUNS, env_id, changes)]
    assert least is None or min(scores) >= least


def test_bootstrapping_truncations_is_worth_it():
    """Every episode of Pendulum-v1 is cut off by its time limit."""
    with_it, without = (
        np.mean([make_results.last_100(m) for _, m in make_results.select(RUNS, env_id, changes)])
        for env_id, changes, *_ in make_results.GROUPS
        if env_id == "Pendulum-v1"
    )
    assert with_it > without + 300


@each_run
def test_run_is_kept_whole_and_small(config, metrics):
    path = make_results.RESULTS / f"{config['run_name']}.csv.gz"
    assert path.stat().st_size <= 300_000
    steps, lengths = metrics["charts/episodic_length"]
    assert (np.diff(steps) >= 0).all()
    played = config.get("steps", config["num_iterations"] * config["batch_size"])
    longest = lengths.max() * config["num_envs"]
    if "NoFrameskip" not in config["env_id"]:  # there, lengths are raw frames
        assert played - longest < lengths.sum() <= played  # all but the unfinished episodes
    for name, (steps, _) in metrics.items():
        if name not in make_results.EPISODE:
            assert len(steps) == min(500, played // config["batch_size"])
            assert steps[-1] == played


@each_run
def test_script_of_a_run_is_the_one_of_its_commit(config, metrics):
    """Where the history is at hand; an archive or a shallow clone has none."""
    script = config["command"].split()[0]
    show = ["git", "-C", str(ROOT), "show", f"{config['git_commit']}:{script}"]
    process = subprocess.run(show, check=False, capture_output=True)
    if process.returncode:
        pytest.skip("this commit is not here")
    assert hashlib.sha256(process.stdout).hexdigest() == config["script_sha256"]


def test_performance_page_is_up_to_date():
    assert (ROOT / "docs" / "performance.md").read_text() == make_performance.page()


def test_tables_of_performance_by_hand():
    rows = [("as it is", 100), ("slow", 50), ("as it is", 200), ("slow", 180)]
    rows = [
        {"script": "a.py", "precision": "", "variant": variant, "steps_per_second": str(speed)}
        for variant, speed in rows
    ]
    assert make_performance.variants_table(rows)[2:] == [
        "| a.py |  | slow | 2 | 0.70 (0.50 to 0.90) |"
    ]
    rows = [("environments", "10.25", "8.00"), ("log", "1.00", "")]
    names = ("phase", "milliseconds", "floor_milliseconds")
    rows = [
        dict(zip(names, r, strict=True)) | {"script": "a.py", "precision": "fp32"} for r in rows
    ]
    assert make_performance.phases_table(rows)[2:] == [
        "| environments | 10.2 (8.00) |",
        "| log | 1.0 |",
        "| sum | 11.2 |",
    ]
