"""benchmarks/ablate.py: every ablation fits the scripts, and what is there is not run again."""

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
import types

import ablate
import numpy as np
import pytest
import torch

import make_ablation
import ppo_atari
import ppo_atari_lstm
import ppo_continuous
import ppo_discrete
import ppo_rlhf
from conftest import ROOT

TABLE = ablate.ablations()
SCRIPTS = [ppo_discrete, ppo_continuous, ppo_atari, ppo_atari_lstm, ppo_rlhf]
SCRIPTS = {f"{script.__name__}.py": script for script in SCRIPTS}
PAIRS = [(task, ablation) for ablation in TABLE for task in ablation.tasks]
each_pair = pytest.mark.parametrize(
    ("task", "ablation"), PAIRS, ids=[f"{task}-{ablation.name}" for task, ablation in PAIRS]
)


def text_of(task):
    return ablate.script_of(ablate.TASKS[task])


@functools.cache
def parsed(script, *flags):
    """What the script makes of them. Most ablations have none of their own: each command once."""
    return SCRIPTS[script].parse_args(flags)


@functools.cache
def accepted(script, args):
    SCRIPTS[script].check_args(args)
    return True


@each_pair
def test_ablation_fits_its_script(task, ablation):
    """Its lines are there once, what comes of them compiles, and its flags are the script's."""
    text = ablate.changed(text_of(task), ablation.edits)
    compile(text, task, "exec")
    assert (text == text_of(task)) == (not ablation.edits)
    assert bool(ablation.flags) + bool(ablation.edits) == (ablation.detail != ablate.UNCHANGED)
    script, *flags = ablate.command(ablate.TASKS[task], ablation, seed=3)
    args = parsed(script, *flags)
    plain = ablate.command(ablate.TASKS[task], TABLE[0], seed=3)
    assert args.seed == 3 and not args.cuda
    on_gpu = ablate.command(ablate.TASKS[task], ablation, seed=3, cuda=True)
    assert parsed(*on_gpu).cuda
    assert ablate.TASKS[task].edits or accepted(script, args)
    assert (args != parsed(*plain)) == bool(ablation.flags)


def test_every_one_of_the_37_is_there():
    details = {ablation.detail for ablation in TABLE}
    sizes = {"C": 13, "A": 9, "R": 9, "L": 5, "M": 1}
    assert {f"{kind}{i + 1}" for kind, size in sizes.items() for i in range(size)} <= details
    others = {"X1", "X3", "X4", "X5", "X6", "H28", "H34", "H43", "H44", "H47", "H52", "H54"}
    assert others <= details


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


QUICK = {  # what a task's flags become, and its steps
    "ppo_discrete.py": ("--no-compile --learning-rate 0.01", 1024),
    "ppo_continuous.py": ("--no-compile --learning-rate 0.01", 4096),
    "ppo_atari.py": ("--no-compile --update-epochs 1", 2048),
    "ppo_atari_lstm.py": ("--update-epochs 1", 192),
    "ppo_rlhf.py": ("--sft-texts 256 --rm-pairs 64 --rm-test-pairs 64 --eval-episodes 16", 1280),
}
NOTHING = ("C12", "L2")  # what they take away changes no number by construction
LATER = ("R7", "A6")  # not in so few steps: see test_what_shows_later


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """The rows of a quick run of the unchanged script, by task."""
    known = {}

    def of(task):
        if task not in known:
            folder = tmp_path_factory.mktemp(task)
            known[task] = quick(folder, task, TABLE[0])
        return known[task]

    return of


def quick(folder, task, ablation):
    """What a few iterations log, times apart, and their weights; as ablate.run starts them."""
    settings = ablate.TASKS[task]
    flags, steps = QUICK[settings.script]
    few = dataclasses.replace(settings, flags=f"{settings.flags} {flags}", steps=steps)
    (folder / settings.script).write_text(ablate.changed(text_of(task), ablation.edits))
    env = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    words = [sys.executable, *ablate.command(few, ablation, seed=1)]
    done = subprocess.run(words, cwd=folder, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = ablate.read_metrics(next(folder.glob("runs/*/metrics.csv")))
    (saved,) = folder.glob("runs/*/checkpoint.pt")
    saved = torch.load(saved, weights_only=True).get("agent")
    return [(step, name, x) for step, _, name, x in rows if not name.startswith(TIMES)], saved


TIMES = ("charts/SPS", "time/", "perf/")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "ablation"),
    [(task, x) for task, x in PAIRS if x.edits],
    ids=[f"{task}-{x.name}" for task, x in PAIRS if x.edits],
)
def test_lines_that_take_its_place_run_and_do_something(task, ablation, unchanged, tmp_path):
    """In the first iterations, but for what changes no number by construction."""
    (rows, weights), (plain, plain_weights) = quick(tmp_path, task, ablation), unchanged(task)
    if ablation.detail in NOTHING:
        names = {name for _, name, _ in rows}
        assert rows == [row for row in plain if row[1] in names]
        assert all(torch.equal(x, plain_weights[name]) for name, x in weights.items())
    elif ablation.detail not in LATER:
        assert rows != plain


def module_of(ablation, name):
    """The script without the detail."""
    module = types.ModuleType(name)
    module.__file__ = str(ROOT / f"{name}.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)  # where its dataclass looks
        exec(ablate.changed((ROOT / f"{name}.py").read_text(), ablation.edits), vars(module))
    return module


@pytest.mark.parametrize("detail", LATER)
def test_what_shows_later(detail):
    """A jump of the observation by 1000 deviations; a game that pays 25 and 300."""
    (ablation,) = [x for x in TABLE if x.detail == detail]
    plain, seen = TABLE[0], []
    for change in (plain, ablation):
        if detail == "R7":
            script = module_of(change, "ppo_continuous")
            envs = script.make_envs(script.Args(env_id="Pendulum-v1", num_envs=1))
            envs.obs_rms.mean[:], envs.obs_rms.var[:] = 0.0, 1.0
            seen.append(envs.normalize(np.array([[1000.0, -1000.0, 5.0]])).tolist()[0])
        else:
            script = module_of(change, "ppo_atari")
            settings = {"env_id": "QbertNoFrameskip-v4", "num_envs": 1, "vectorization": "sync"}
            envs = script.make_envs(script.Args(**settings))
            envs.reset(seed=[1])
            envs.action_space.seed(1)
            rewards = [envs.step(envs.action_space.sample())[1][0] for _ in range(200)]
            seen.append(sorted({*rewards} - {0}))
        envs.close()
    expected = {"R7": [[10, -10, 5], [1000, -1000, 5]], "A6": [[1], [25, 300]]}
    for x, y in zip(seen, expected[detail], strict=True):
        assert x == pytest.approx(y)


def test_what_is_kept_is_of_the_table():
    """Diff, flags and steps as they are today, each run with the text of its day, no other file."""
    names, runs = set(), []
    for task, ablation in PAIRS:
        path, table = ablate.files(task, ablation)
        if not path.exists():
            continue
        names |= {path.name, table.name}
        data, settings = ablate.stored(task, ablation), ablate.TASKS[task]
        assert data["diff"] == ablate.diff(text_of(task), ablation.edits)
        assert [data[x] for x in ("instead", "flags")] == [ablation.instead, ablation.flags]
        assert (data["task_flags"], data["steps"]) == (settings.flags, settings.steps)
        for run in data["runs"]:
            on = "device cpu" not in run["machine"]
            words = ablate.command(settings, ablation, run["seed"], cuda=on)
            assert run["command"] == ablate.shlex.join(words)
            assert len(run["git_commit"]) == 40
            runs.append((run, settings, ablation))
        seeds = [run["seed"] for run in data["runs"]]
        assert seeds == sorted(set(seeds))
        assert make_ablation.runs_of(task, ablation).keys() <= set(seeds)
    kept = {path.name for path in ablate.RESULTS.glob("*__*")}
    assert kept == names
    if any(show(run["git_commit"], settings.script) is None for run, settings, _ in runs):
        pytest.skip("not all commits are in this clone")
    for run, settings, ablation in runs:
        text = show(run["git_commit"], settings.script)
        text = ablate.changed(ablate.changed(text, settings.edits), ablation.edits)
        assert run["script_sha256"] == hashlib.sha256(text.encode()).hexdigest(), run["command"]


@functools.cache
def show(commit, script):
    """A script as it was, or None."""
    git = ["git", "-C", ROOT, "show", f"{commit}:{script}"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout


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


def test_with_a_detail_comes_the_unchanged_script_on_its_tasks(empty):
    found = ablate.jobs(TABLE, ("L3",))
    assert {task for task, *_ in found} == {"Recall"}
    assert {x.detail for _, x, _ in found} == {"L3", ablate.UNCHANGED}
    assert len(found) == 15


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


FAKE = """
import json, pathlib, sys
print("error: losses not finite" if CODE == 2 else "done")
if MADE:
    folder = pathlib.Path("runs/a")
    folder.mkdir(parents=True)
    config = {"cpus": 2, "versions": {"torch": "x"}, "precision": "bf16", "device": "cpu"}
    (folder / "config.json").write_text(json.dumps(config))
    rows = "5,0.1,charts/episodic_return,7\\n6,0.1,losses/x,1\\n9,0.2,charts/episodic_return,VALUE"
    (folder / "metrics.csv").write_text("global_step,time,name,value\\n" + rows)
sys.exit(CODE)
"""
EIGHT = ablate.Ablation("C8", "eight", ("CartPole",), edits=(("VALUE", "8"),))


@pytest.mark.parametrize(("code", "said"), [(0, ""), (2, "error: losses not finite")])
def test_run_trains_the_changed_text_and_keeps_its_returns(empty, code, said):
    """With a script of a few lines in place of a real one; one that ends itself is kept, too."""
    fake = FAKE.replace("CODE", str(code)).replace("MADE", "True")
    assert ablate.run("CartPole", EIGHT, 4, "c" * 40, fake) == said
    rows = [tuple(row.values()) for row in ablate.rows_of("CartPole", EIGHT)]
    name = "charts/episodic_return"
    assert rows == [("4", "5", name, "7"), ("4", "9", name, "8")]
    (run,) = ablate.stored("CartPole", EIGHT)["runs"]
    assert (run["exit_code"], run["said"], run["steps"]) == (code, said, 9)
    assert (run["git_commit"], run["precision"]) == ("c" * 40, "bf16")
    assert run["command"].startswith("ppo_discrete.py --env-id CartPole-v1 --total-timesteps")


@pytest.mark.parametrize(
    ("code", "made"), [(1, True), (130, True), (-9, True), (2, False)], ids=str
)
def test_what_ends_for_another_reason_is_no_result(empty, code, made):
    """A traceback, Ctrl-C, a kill, wrong flags: named, and to be run again."""
    end = f"__import__('os').kill(__import__('os').getpid(), {-code})" if code < 0 else "pass"
    fake = FAKE.replace("MADE", str(made)).replace("sys.exit", f"{end}\nsys.exit")
    fake = fake.replace("CODE", str(code))
    said = ablate.run("CartPole", EIGHT, 4, "c" * 40, fake)
    assert said.startswith(f"exit code {code}, not kept: ")
    assert ablate.stored("CartPole", EIGHT) == {"runs": []}
    assert not ablate.RESULTS.exists()


def test_main_refuses_what_it_does_not_know(empty, monkeypatch, capsys, tmp_path):
    assert ablate.main(ablate.Args(only=("C99",))) == 2
    assert "neither a task nor a detail" in capsys.readouterr().err
    copy = tmp_path / "clone"
    subprocess.run(["git", "init", "-q", copy], check=True)
    for path in ROOT.glob("ppo_*.py"):
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(ablate, "ROOT", copy)
    monkeypatch.setattr(ablate, "run", lambda *job: pytest.fail("no hours"))
    assert ablate.main(ablate.Args(hours=0)) == 2
    assert "commit first" in capsys.readouterr().err
    git = ["git", "-C", copy, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    (copy / "rows.csv.gz").write_text("results of earlier runs are no change of a script")
    assert ablate.main(ablate.Args(hours=0)) == 0


def test_list_counts(empty, capsys):
    ablate.keep("CartPole", TABLE[0], entry(1), [], "")
    assert ablate.main(ablate.Args(list=True)) == 0
    assert "1 of 10  CartPole  unchanged" in capsys.readouterr().out
    assert json.loads(ablate.files("CartPole", TABLE[0])[0].read_text())["runs"] == [entry(1)]
