"""The figures of docs/results.md are those of the runs kept beside it, and reach their bars."""

import hashlib
import json
import re
import subprocess

import numpy as np
import pytest

import make_performance
import make_results
from conftest import ROOT

RUNS, PEERS, LONG = make_results.everything()
each_run = pytest.mark.parametrize(
    ("config", "metrics"), RUNS + PEERS, ids=[config["run_name"] for config, _ in RUNS + PEERS]
)


def test_page_is_up_to_date():
    page = make_results.page(RUNS, PEERS, LONG)
    assert (ROOT / "docs" / "results.md").read_text() == page


def test_iqm_and_its_interval_by_hand():
    """Of five the middle three, of eight the middle four; resamples of (0, 1) are 0, 1/2 or 1."""
    assert make_results.iqm(np.array([9.0, 1, 2, 3, -7])) == 2
    assert make_results.iqm(np.array([[8.0, 1, 2, 3, 4, 5, 6, 100]])) == [(3 + 4 + 5 + 6) / 4]
    assert make_results.interval([3.0, 3.0, 3.0]).tolist() == [3, 3]
    assert make_results.interval([0.0, 1.0]).tolist() == [0, 1]
    # of ten seeds, five 0 and five 1: the middle six of a resample of 10 hold max(0, k - 2) ones
    # at most 6, where k is binomial(10, 1/2), whose 2.5 % and 97.5 % quantiles are 2 and 8
    assert make_results.interval([0.0, 1.0] * 5).tolist() == [0, 1]
    # 100 seeds 0, 1, ..., 99: the deviation of the mean of the middle half is near 3.2 by theory
    low, high = make_results.interval(np.arange(100))
    assert 49.5 - low == pytest.approx(high - 49.5, rel=0.1)
    assert 11 < high - low < 16


def test_interval_is_taken_column_by_column():
    columns = np.random.default_rng(1).normal(size=(6, 3))
    together = make_results.interval(columns, resamples=500)
    for i in range(3):
        assert together[:, i].tolist() == make_results.interval(columns[:, i], 500).tolist()


def test_curve_by_hand():
    """Two episodes in the first window of a fiftieth, one in the second, none in the third."""
    episodes = np.array([[10, 20, 30, 60], [1.0, 2, 6, 5]])
    steps, means = make_results.curve(
        {"total_timesteps": 1000}, {"charts/episodic_return": episodes}
    )
    assert steps[:3].tolist() == [20, 40, 60]
    assert means[0] == 1  # the edge of a window belongs to the next
    assert means[1] == 4
    assert np.isnan(means[2])
    assert means[3] == 5


def test_misses_are_named():
    group = make_results.Group("Task-v0", {}, cleanrl=(10, 1), baselines=(30,))
    config = {"env_id": "Task-v0", "num_iterations": 2, "batch_size": 5, "steps": 10}
    metrics = {"charts/episodic_return": np.array([[1, 10], [20.0, 22.0]])}
    assert make_results.misses([group], [(config, metrics)]) == (
        "Below the mean of a reference: Task-v0, 21.0 (Baselines 30.0)."
    )
    assert make_results.misses([group._replace(baselines=None)], [(config, metrics)]) == ""


each_group = pytest.mark.parametrize("group", make_results.GROUPS, ids=lambda x: str(x[:2]))


@each_group
def test_mean_score_is_at_least_what_is_asked(group):
    runs = make_results.select(RUNS + LONG, group.env_id, group.changes)
    scores = [make_results.last_100(metrics) for _, metrics in runs]
    assert group.least_mean is None or np.mean(scores) >= group.least_mean


def test_what_was_not_run_is_named(monkeypatch):
    groups = [make_results.Group("Task-v0", {}), make_results.Group("Other-v0", {"gamma": 0.999})]
    monkeypatch.setitem(make_results.SECTIONS, "MuJoCo", groups)
    runs = [({"env_id": "Task-v0", "seed": seed}, {}) for seed in (1, 2, 4)]
    names = ["Task-v0, seed 3, 5", "Other-v0, gamma 0.999"]
    assert make_results.absent("MuJoCo", runs) == names
    runs += [({"env_id": "Task-v0", "seed": seed}, {}) for seed in (3, 5)]
    assert make_results.absent("MuJoCo", runs) == names[1:]
    page = (ROOT / "docs" / "results.md").read_text()
    monkeypatch.undo()
    for section in make_results.SECTIONS:
        names = "; ".join(make_results.absent(section, RUNS + LONG))
        assert not names or f"Not run yet: {names}." in page


def test_every_evaluation_has_a_hundred_games():
    """Where there is one: the oldest runs of Pong have none, their checkpoints were not kept."""
    games = [make_results.evaluated(config) for config, _ in RUNS + LONG]
    assert {len(returns) for returns in games if returns is not None} == {100}
    without = [run for run, returns in zip(RUNS + LONG, games, strict=True) if returns is None]
    assert {config["env_id"] for config, _ in without} <= {"PongNoFrameskip-v4"}
    assert len(without) == 5


@each_group
def test_every_seed_reaches_its_least_score(group):
    env_id, changes, least, *_ = group
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
    folder = "cleanrl" if config.get("program") else ""
    path = make_results.RESULTS / folder / f"{config['run_name']}.csv.gz"
    assert path.stat().st_size <= 300_000
    steps, lengths = metrics["charts/episodic_length"]
    assert (np.diff(steps) >= 0).all()
    played = config.get("steps", config["num_iterations"] * config["batch_size"])
    longest = lengths.max() * config["num_envs"]
    if "NoFrameskip" not in config["env_id"]:  # there, lengths are raw frames
        assert played - longest < lengths.sum() <= played  # all but the unfinished episodes
    for name, (steps, _) in metrics.items():
        if name not in make_results.EPISODE:
            assert len(steps) == min(100, played // config["batch_size"])
            assert steps[-1] == played


@pytest.mark.parametrize(
    "config", [config for config, _ in RUNS + LONG], ids=lambda x: x["run_name"]
)
def test_script_of_a_run_is_the_one_of_its_commit(config):
    """Where the history is at hand; an archive or a shallow clone has none."""
    for part in (config, *config.get("resumed", ())):
        script = part["command"].split()[0]
        show = ["git", "-C", str(ROOT), "show", f"{part['git_commit']}:{script}"]
        process = subprocess.run(show, check=False, capture_output=True)
        if process.returncode:
            pytest.skip("this commit is not here")
        assert hashlib.sha256(process.stdout).hexdigest() == part["script_sha256"]


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


def test_what_identical_has_found(tmp_path):
    """Of three comparisons one differs; one run is newer."""
    rows = [("identical, the same text", ["a", "b"]), ("identical", ["c"]), ("DIFFERS, x", ["d"])]
    found = [{"command": "ppo_x.py", "verdict": verdict, "runs": runs} for verdict, runs in rows]
    path = tmp_path / "identical.json"
    path.write_text(json.dumps({"git_commit": "0123456789abcdef", "found": found}))
    text = "The scripts of commit 0123456789ab do the same as those of 3 runs, bit for bit, "
    text += "in 2 of 3 comparisons. `ppo_x.py`: DIFFERS, x."
    assert make_results.same("abcd", path) == text
    assert make_results.same("abcde", path) == text + " Not compared yet: e."


def test_all_runs_were_compared():
    """By docs/results/identical.json, which benchmarks/identical.py writes; none is unknown."""
    about = json.loads((make_results.RESULTS / "identical.json").read_text())
    assert about["command"] == "python benchmarks/identical.py --out docs/results/identical.json"
    assert re.fullmatch("[0-9a-f]{40}", about["git_commit"])
    assert not [row for row in about["found"] if row["verdict"].startswith("unknown")]
    compared = {name for row in about["found"] for name in row["runs"]}
    assert {config["run_name"] for config, _ in RUNS + LONG} <= compared
