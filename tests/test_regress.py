"""benchmarks/regress.py: intervals by hand, verdicts, and false alarms among the stored runs."""

import csv
import dataclasses
import gzip
import importlib
import json
import math
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import regress
import speed

import make_results
import make_rlhf

HALF = 4.303 * 2 / math.sqrt(3)  # of the interval of 1, 2, 3, which is -2.9687 to 6.9687
PROGRAM = regress.__file__
CLASSIC = [name for name in regress.TASKS if name != "reviews"]
each_task = pytest.mark.parametrize("name", regress.TASKS)


# ------------------------------------------------------------------------------------------------
# The interval


def test_interval_by_hand():
    assert regress.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - HALF, 2 + HALF))
    assert regress.interval([1.0, 2.0, 3.0])[0] == pytest.approx(-2.96868, abs=1e-5)
    four = regress.interval([4.0, 6.0, 6.0, 8.0])  # mean 6, variance 8 / 3
    assert four == pytest.approx((6 - 3.182 * math.sqrt(10 / 3), 6 + 3.182 * math.sqrt(10 / 3)))


def test_interval_is_never_narrower_than_the_least_score():
    """That which is asked for, or that of a stored run: the lowest of many may lie far out."""
    assert regress.interval([500.0] * 5) == (500.0, 500.0)
    assert regress.interval([500.0] * 5, least=490) == (490, 500.0)
    assert regress.interval([1.0, 2.0, 3.0], least=0.0)[0] == pytest.approx(2 - HALF)
    assert regress.interval([0.1] * 3)[0] <= 0.1 <= regress.interval([0.1] * 3)[1]
    many = [10.0] * 19
    assert regress.interval([0.0, *many])[0] == 0.0
    assert regress.interval([20.0, *many])[1] == 20.0


def test_quantiles_by_the_integral_of_the_density():
    """Of Student's t: 0.475 lies between 0 and the quantile, as far as it is rounded."""
    assert len(regress.T) == 20
    for n, quantile in enumerate(regress.T, start=1):
        x = np.linspace(0, quantile, 20_001)
        scale = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi)
        density = scale * (1 + x**2 / n) ** (-(n + 1) / 2)
        assert np.trapezoid(density, x) == pytest.approx(0.475, abs=0.00051 * density[-1])


def test_more_seeds_than_quantiles():
    """Half of 40 at 0, half at 2: mean 1, variance 40 / 39."""
    low, _ = regress.interval([0.0, 2.0] * 20)
    assert low == pytest.approx(1 - 2.086 * math.sqrt(40 / 39 * 41 / 40))


def test_verdicts():
    scores = {-0.1: "BELOW", 0.0: "inside", 1.0: "inside", 1.1: "ABOVE", math.nan: "BELOW"}
    assert {x: regress.verdict(x, 0.0, 1.0) for x in scores} == scores


# ------------------------------------------------------------------------------------------------
# The stored runs


def stored_runs(name):
    """(config, path of its metrics) of those that a task is compared with."""
    folder = make_rlhf.RESULTS if name == "reviews" else make_results.RESULTS
    paths = sorted(folder.glob(f"{name}__*.json"))
    runs = [(json.loads(path.read_text()), path.with_suffix(".csv.gz")) for path in paths]
    return [run for run in runs if run[0].get("kl_coef", 0.1) == 0.1]


def ends(name):
    return regress.interval([*regress.stored(name).values()], regress.least_asked(name))


def test_stored_scores_are_those_of_the_pages():
    text = (regress.ROOT / "docs" / "results.md").read_text()
    for name in CLASSIC:
        scores = regress.stored(name)
        found = re.findall(rf"(?m)^\| {name}__ppo_[a-z]+__(\d+)__\d+ \| [^|]+ \| (\S+) \|", text)
        of_page = {int(seed): float(score.replace(",", "")) for seed, score in found}
        assert of_page == {seed: pytest.approx(x, abs=0.051) for seed, x in scores.items()}
        assert f" of {regress.least_asked(name)} |" in text
    scores = regress.stored("reviews").values()
    mean, least, most = (f"{x:.2f}" for x in (np.mean([*scores]), min(scores), max(scores)))
    text = (regress.ROOT / "docs" / "rlhf.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| gold/score |"))
    assert row.endswith(f"| {mean} ({least} to {most}) |")


def test_least_scores_that_the_page_asks_for():
    assert [regress.least_asked(name) for name in regress.TASKS] == [490, -88, 950, math.inf]
    assert regress.least_asked("BreakoutNoFrameskip-v4") == math.inf


@pytest.mark.parametrize("widened", [True, False])
def test_at_most_one_stored_run_in_twenty_gives_a_false_alarm(widened):
    """Each is compared with the others of its task, with the least score asked and without."""
    found = []
    for name in regress.TASKS:
        scores = regress.stored(name)
        least = regress.least_asked(name) if widened else math.inf
        for seed, score in scores.items():
            others = [x for other, x in scores.items() if other != seed]
            found.append(regress.verdict(score, *regress.interval(others, least)))
    assert len(found) == 30
    assert len(found) - found.count("inside") <= len(found) / 20


@pytest.mark.parametrize("name", CLASSIC)
def test_a_tenth_of_the_training_gives_an_alarm(name):
    low, high = ends(name)
    for config, metrics in make_results.load(name):
        score = make_results.last_100(metrics, until=config["total_timesteps"] / 10)
        assert regress.verdict(score, low, high) == "BELOW"


def test_an_exploited_reward_model_gives_an_alarm():
    low, high = ends("reviews")
    runs = make_rlhf.select(make_rlhf.load(), "reviews", 0.0)
    assert len(runs) == 5
    for _, metrics in runs:
        assert regress.verdict(metrics["eval/ppo/gold/score"][-1], low, high) == "BELOW"


@each_task
def test_a_new_run_is_scored_as_the_stored_ones(name):
    found = {}
    for config, path in stored_runs(name):
        with gzip.open(path, "rt") as file:
            rows = [(0, 0.0, row["name"], float(row["value"])) for row in csv.DictReader(file)]
        found[config["seed"]] = regress.score_of(name, rows)
    assert found == pytest.approx(regress.stored(name), abs=1e-9)


@each_task
def test_commands_have_the_settings_of_the_stored_runs(name):
    """They parse and are the defaults; settings that the stored runs have not yet are newer."""
    file, *flags = regress.command(name, seed=101)
    script = importlib.import_module(Path(file).stem)
    args = script.parse_args(flags)
    script.check_args(args)
    changes = {"seed": 101, "cuda": False, "torch_threads": 1, flags[0][2:].replace("-", "_"): name}
    assert args == script.Args(**changes)
    now = json.loads(json.dumps(dataclasses.asdict(args)))
    runs = stored_runs(name)
    assert len(runs) == len(regress.stored(name))
    for config, _ in runs:
        assert config["command"].startswith(file)
        shared = now.keys() & config.keys() - {"seed"}
        assert len(shared) >= 28
        assert {x: config[x] for x in shared} == {x: now[x] for x in shared}


# ------------------------------------------------------------------------------------------------
# The program


@pytest.fixture
def toy(monkeypatch):
    """Toy scores instead of the stored ones; a run leaves the score that is set for its task."""
    scores, started = dict.fromkeys(regress.TASKS, 2.0), []

    def execute(program, flags, cache):
        started.append([program.command[0].name, *flags])
        name = flags[1]
        if scores[name] is None:
            sys.exit("python ppo.py failed:\nwhy")
        metric, count = regress.TASKS[name][2:]
        rows = [(step, 1.0, metric, scores[name]) for step in range(count)]
        other = (0, 0.5, "charts/SPS", 1e6)
        rows = [(0, 0.5, metric, 1e6), other, *rows, other]  # what is early does not count
        return speed.Finished(rows, 61.4, None)

    monkeypatch.setattr(speed, "execute", execute)
    monkeypatch.setattr(regress, "execute", execute)
    monkeypatch.setattr(regress, "stored", lambda name: {1: 1.0, 2: 2.0, 3: 3.0})
    monkeypatch.setattr(regress, "least_asked", lambda name: math.inf)
    return scores, started


def run(*only, **changes):
    return regress.main(regress.Args(only=only, **changes))


def test_inside_its_interval(toy, capsys):
    scores, started = toy
    scores["Acrobot-v1"] = 2 - HALF + 0.001
    assert run("Acrobot-v1") == 0
    expected = "Acrobot-v1: -2.97, interval -2.97 to 6.97 from 3 seeds: inside, 61 s\n"
    assert capsys.readouterr().out == expected
    flags = ["--seed", "101", "--no-cuda", "--torch-threads", "1"]
    assert started == [["ppo_discrete.py", "--env-id", "Acrobot-v1", *flags]]
    assert list(Path().iterdir()) == []


def test_below_its_interval(toy, capsys):
    """One of all four, which are run to the end; nothing of a score that is no number is inside."""
    scores, started = toy
    scores["Acrobot-v1"] = 2 - HALF - 0.01
    assert run() == 1
    words = [line.split()[-3] for line in capsys.readouterr().out.splitlines()]
    assert words == ["inside,", "BELOW,", "inside,", "inside,"]
    assert [command[2] for command in started] == list(regress.TASKS)
    scores["reviews"] = math.nan
    assert run("reviews") == 1
    assert "reviews: nan, " in capsys.readouterr().out


def test_above_its_interval(toy, capsys):
    toy[0]["reviews"] = 2 + HALF + 0.01
    assert run("reviews") == 1
    assert capsys.readouterr().out.endswith(" from 3 seeds: ABOVE, 61 s\n")


def test_least_score_asked_widens_the_interval(toy, monkeypatch):
    toy[0]["CartPole-v1"] = -4.0
    assert run("CartPole-v1") == 1
    monkeypatch.setattr(regress, "least_asked", lambda name: -4.0)
    assert run("CartPole-v1") == 0


def test_a_run_that_ends_in_an_error_fails_and_the_others_go_on(toy, capsys):
    scores, started = toy
    scores["CartPole-v1"] = None
    assert run("reviews", "CartPole-v1", "reviews", seed=7) == 1
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first == "CartPole-v1: no score, interval -2.97 to 6.97 from 3 seeds: FAILED"
    assert second.startswith("reviews: 2.00, ")
    assert err == "python ppo.py failed:\nwhy\n"
    assert [command[3:5] for command in started] == [["--seed", "7"]] * 2


@pytest.mark.parametrize(
    ("only", "seed", "message"),
    [
        (("Pong",), 101, "--only Pong: it must be one of " + ", ".join(regress.TASKS)),
        ((), -1, "--seed is -1, it must be from 0 to 2^63 - 1"),
        ((), 2**63, "--seed is 9223372036854775808, it must be from 0 to 2^63 - 1"),
        (("reviews",), 3, "--seed 3: a stored run of reviews has it, give another"),
    ],
)
def test_wrong_input_in_one_line(toy, capsys, only, seed, message):
    with pytest.raises(SystemExit) as error:
        run(*only, seed=seed)
    assert error.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert toy[1] == []


def test_without_stored_runs(toy, monkeypatch, capsys):
    monkeypatch.setattr(regress, "stored", lambda name: {1: 1.0})
    with pytest.raises(SystemExit) as error:
        run("reviews")
    assert error.value.code == 2
    expected = "error: reviews: an interval needs two stored runs in docs/results/, not 1\n"
    assert capsys.readouterr().err == expected


def test_default_seed_is_no_stored_one():
    assert all(regress.Args().seed not in regress.stored(name) for name in regress.TASKS)


@pytest.mark.parametrize(("score", "code"), [(500.0, 0), (490.0, 0), (489.9, 1), (None, 1)])
def test_exit_code_of_the_program(toy, monkeypatch, capsys, score, code):
    """From its command line, with the stored runs."""
    toy[0]["CartPole-v1"] = score
    monkeypatch.setattr(sys, "argv", [PROGRAM, "--only", "CartPole-v1", "--seed", "11"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(PROGRAM, run_name="__main__")
    assert end.value.code == code
    assert "interval 490.00 to 500.00 from 10 seeds: " in capsys.readouterr().out


def test_exit_code_of_a_wrong_command(monkeypatch, capsys):
    for flags in (["--only", "x"], ["--seed", "x"], ["--x"]):
        monkeypatch.setattr(sys, "argv", [PROGRAM, *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(PROGRAM, run_name="__main__")
        assert end.value.code == 2
