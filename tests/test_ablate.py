"""benchmarks/ablate.py: every ablation fits the scripts, and what is there is not run again."""

import json

import ablate
import pytest

import ppo_atari
import ppo_atari_lstm
import ppo_continuous
import ppo_discrete
import ppo_rlhf
from conftest import ROOT

TABLE = ablate.table()
SCRIPTS = [ppo_discrete, ppo_continuous, ppo_atari, ppo_atari_lstm, ppo_rlhf]
SCRIPTS = {f"{script.__name__}.py": script for script in SCRIPTS}
PAIRS = [(task, ablation) for ablation in TABLE for task in ablation.tasks]
each_pair = pytest.mark.parametrize(
    ("task", "ablation"), PAIRS, ids=[f"{task}-{ablation.name}" for task, ablation in PAIRS]
)


def text_of(task):
    task = ablate.TASKS[task]
    return ablate.changed((ROOT / task.script).read_text(), task.edits)


@each_pair
def test_ablation_fits_its_script(task, ablation):
    """Its lines are there once, what comes of them compiles, and its flags are the script's."""
    text = ablate.changed(text_of(task), ablation.edits)
    compile(text, task, "exec")
    assert (text == text_of(task)) == (not ablation.edits)
    assert bool(ablation.flags) + bool(ablation.edits) == (ablation.detail != ablate.UNCHANGED)
    script, *flags = ablate.command(ablate.TASKS[task], ablation, seed=3)
    args = SCRIPTS[script].parse_args(flags)
    plain = ablate.command(ablate.TASKS[task], TABLE[0], seed=3)[1:]
    assert args.seed == 3 and not args.cuda
    assert (args != SCRIPTS[script].parse_args(plain)) == bool(ablation.flags)


def test_every_one_of_the_37_is_there():
    details = {ablation.detail for ablation in TABLE}
    sizes = {"C": 13, "A": 9, "R": 9, "L": 5, "M": 1}
    assert {f"{kind}{i + 1}" for kind, size in sizes.items() for i in range(size)} <= details


def test_names_of_files_are_different():
    names = [ablate.files(task, ablation) for task, ablation in PAIRS]
    assert len(set(names)) == len(names)


def test_line_that_is_gone_or_there_twice_is_an_error():
    edits = (("eps", "x"),)
    assert ablate.changed("a = eps\n", edits) == "a = x\n"
    for text in ("a = 1\n", "eps = eps\n"):
        with pytest.raises(ValueError, match=r"[02] times in the script: eps"):
            ablate.changed(text, edits)


def test_diff_shows_what_is_taken_away():
    assert ablate.diff("a\nb\nc\nd\n", (("b\n", "x\ny\n"), ("d\n", ""))) == "-b\n+x\n+y\n-d"


def entry(seed):
    return {"seed": seed, "exit_code": 0}


@pytest.fixture
def empty(monkeypatch, tmp_path):
    monkeypatch.setattr(ablate, "RESULTS", tmp_path / "ablation")


def test_results_are_kept_by_seed(empty):
    ablation = next(x for x in TABLE if x.detail == "C8")
    ablate.keep("CartPole", ablation, entry(2), [(10, "a", 1.5), (20, "a", 2.5)], "-a")
    ablate.keep("CartPole", ablation, entry(1), [(10, "a", 9.0)], "-a")
    ablate.keep("CartPole", ablation, entry(2), [(30, "b", 3.5)], "-a")  # once more, in its place
    data = ablate.stored("CartPole", ablation)
    assert [run["seed"] for run in data["runs"]] == [1, 2]
    assert data["diff"] == "-a"
    assert data["script"] == "ppo_discrete.py"
    rows = [tuple(row.values()) for row in ablate.rows_of("CartPole", ablation)]
    assert rows == [("1", "10", "a", "9.0"), ("2", "30", "b", "3.5")]


def test_what_is_there_is_not_run_again(empty):
    plain, c8 = TABLE[0], next(x for x in TABLE if x.detail == "C8")
    before = ablate.jobs([plain, c8], ("CartPole", "C8", ablate.UNCHANGED))
    assert before.count(("CartPole", c8, 2)) == 1
    ablate.keep("CartPole", c8, entry(2), [], "")
    after = ablate.jobs([plain, c8], ("CartPole", "C8", ablate.UNCHANGED))
    assert [job for job in before if job not in after] == [("CartPole", c8, 2)]


def test_order_loses_seeds_before_details(empty):
    """Twice the seeds for the unchanged script, in the same rounds; tasks in their order."""
    order = ablate.jobs(TABLE[:3], ())
    rounds = [(seed + 1) // 2 if a.detail == ablate.UNCHANGED else seed for _, a, seed in order]
    assert rounds == sorted(rounds)
    first = [task for (task, *_), n in zip(order, rounds, strict=True) if n == 1]
    assert first == sorted(first, key=list(ablate.TASKS).index)
    for task, settings in ablate.TASKS.items():
        for a in TABLE[:3]:
            seeds = [seed for name, x, seed in order if (name, x) == (task, a)]
            wanted = settings.seeds * (1 + (a.detail == ablate.UNCHANGED))
            assert seeds == [*range(1, wanted + 1)] * (task in a.tasks)


@pytest.mark.parametrize("code", [0, 2])
def test_run_trains_the_changed_text_and_keeps_its_returns(empty, monkeypatch, code):
    """With a script of a few lines in the place of a real one; one that fails is kept, too."""
    fake = f"""
import json, pathlib, sys
folder = pathlib.Path("runs/a")
folder.mkdir(parents=True)
(folder / "config.json").write_text(json.dumps({{"cpus": 2, "versions": {{"torch": "x"}}}}))
rows = "5,0.1,charts/episodic_return,7\\n6,0.1,losses/x,1\\n" + "9,0.2,charts/episodic_return,VALUE"
(folder / "metrics.csv").write_text("global_step,time,name,value\\n" + rows)
sys.exit({code})
"""
    monkeypatch.setattr(ablate, "ROOT", ROOT.__class__("root"))
    ablate.ROOT.mkdir()
    (ablate.ROOT / "ppo_discrete.py").write_text(fake)
    ablation = ablate.Ablation("C8", "eight", ("CartPole",), edits=(("VALUE", "8"),))
    ablate.run("CartPole", ablation, 4, "c" * 40)
    rows = [tuple(row.values()) for row in ablate.rows_of("CartPole", ablation)]
    name = "charts/episodic_return"
    assert rows == [("4", "5", name, "7"), ("4", "9", name, "8")]
    (run,) = ablate.stored("CartPole", ablation)["runs"]
    assert (run["exit_code"], run["steps"], run["git_commit"]) == (code, 9, "c" * 40)
    assert run["command"].startswith("ppo_discrete.py --env-id CartPole-v1 --total-timesteps")


def test_main_refuses_what_it_does_not_know(empty, monkeypatch, capsys):
    assert ablate.main(ablate.Args(only=("C99",))) == 2
    assert "neither a task nor a detail" in capsys.readouterr().err
    monkeypatch.setattr(ablate, "commit_of", lambda path: "abc-dirty")
    assert ablate.main(ablate.Args()) == 2
    assert "commit first" in capsys.readouterr().err
    monkeypatch.setattr(ablate, "commit_of", lambda path: "abc")
    monkeypatch.setattr(ablate, "run", lambda *job: pytest.fail("no hours"))
    assert ablate.main(ablate.Args(hours=0)) == 0


def test_list_counts(empty, capsys):
    ablate.keep("CartPole", TABLE[0], entry(1), [], "")
    assert ablate.main(ablate.Args(list=True)) == 0
    assert "1 of 10  CartPole  unchanged" in capsys.readouterr().out
    assert json.loads(ablate.files("CartPole", TABLE[0])[0].read_text())["runs"] == [entry(1)]
