"""What benchmarks/ measures, on numbers done by hand."""

import csv
import hashlib
import importlib
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cleanrl_shim
import environments
import failures
import gpu
import numpy as np
import phases
import precision
import pytest
import ranks
import rlhf_speed
import sampling
import speed
import torch
import variants

import make_performance
import ppo_rlhf

ROWS = [  # of a metrics.csv: the first iteration compiles, the others take a second each
    (100, 9.0, "charts/SPS", 11),
    (200, 9.5, "charts/episodic_return", 7),
    (200, 10.0, "charts/SPS", 20),
    (300, 11.0, "charts/SPS", 27),
    (400, 12.0, "charts/SPS", 33),
]


def table(*rows, columns="program precision threads steps_per_second"):
    """Rows of a CSV file, all values as text."""
    return [dict(zip(columns.split(), map(str, row), strict=True)) for row in rows]


def write_csv(path, rows):
    with open(path, "w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("task", speed.TASKS, ids=lambda task: task.script)
def test_every_program_is_given_our_default_values(task):
    args = importlib.import_module(Path(task.script).stem).Args()
    names = ("env_id", "num_envs", "num_steps", "num_minibatches", "update_epochs", "batch_size")
    assert {x: getattr(task, x) for x in names} == {x: getattr(args, x) for x in names}
    assert task.steps % task.batch_size == task.long % task.batch_size == 0
    flags = task.flags(seed=3)
    assert flags[0] == "--no-cuda"
    given = dict(zip(flags[1::2], flags[2::2], strict=True))
    assert given["--total-timesteps"] == str(task.steps)
    assert (given["--seed"], given["--num-steps"]) == ("3", str(args.num_steps))


# ------------------------------------------------------------------------------------------------
# One run


def test_speed_leaves_out_the_first_quarter():
    assert speed.steps_per_second(ROWS) == 300 / 3
    assert speed.steps_per_second([(50, 1.0, "charts/SPS", 50), *ROWS]) == 300 / 3
    assert speed.steps_per_second(ROWS[2:]) == 200 / 2


def test_tenths():
    """Ten steps each: in 1 s at first, in 2 s from step 50 on; two rows for each tenth."""
    rows = [(5 * i, i / 2 if i <= 10 else i - 5, "charts/SPS", 0) for i in range(1, 21)]
    steps, speeds = zip(*speed.tenths(rows), strict=True)
    assert steps == (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    assert speeds == (10,) * 5 + (5,) * 5


def test_when_the_bar_is_reached():
    """0, 2, 4, ...: the mean of the last three is 6 after 4, 6, 8 and above 6 one later."""
    rows = [(10 * i, 0.5 * i, "charts/episodic_return", 2 * i) for i in range(10)]
    rows.insert(5, (45, 2.2, "charts/SPS", 1000))
    assert speed.reach(rows, 6, episodes=3) == (40, 2.0)
    assert speed.reach(rows, 6.1, episodes=3) == (50, 2.5)
    assert speed.reach(rows, 17, episodes=3) is None
    assert speed.reach(rows, 0, episodes=11) is None


def test_shim_writes_the_columns_of_our_metrics():
    """As CleanRL uses its writer, and LeanRL its progress bar."""
    writer = cleanrl_shim.SummaryWriter("runs/a")
    writer.add_scalar("charts/SPS", 123, 512)
    writer.close()
    cleanrl_shim.Progress.init(config={"batch_size": 64}, project="any")
    bar = cleanrl_shim.Progress(range(1, 4))
    assert [bar.set_description("text") or iteration for iteration in bar] == [1, 2, 3]

    (row,) = speed.read_metrics(Path("runs/a/metrics.csv"))
    assert row[0] == 512
    assert 0 <= row[1] < 1
    assert row[2:] == ("charts/SPS", 123)
    rows = speed.read_metrics(Path("runs/leanrl/metrics.csv"))
    assert [step for step, _ in speed.clock(rows)] == [64, 128, 192]


def test_shim_writes_the_hyperparameters(monkeypatch):
    """As CleanRL hands them to its writer, with what makes the run again."""
    script = Path("clone/cleanrl/ppo.py")
    script.parent.mkdir(parents=True)
    script.write_text("pass\n")
    monkeypatch.setattr(sys, "argv", [str(script), "--seed", "7", "--no-cuda"])
    rows = ("env_id|CartPole-v1", "seed|7", "target_kl|None", "gamma|0.99", "hf_entity|")
    table = "\n".join(f"|{row}|" for row in ("param|value", "-|-", *rows))
    cleanrl_shim.SummaryWriter("runs/b").add_text("hyperparameters", table)
    config = json.loads(Path("runs/b/config.json").read_text())
    known = {"env_id": "CartPole-v1", "seed": 7, "target_kl": None, "gamma": 0.99, "hf_entity": ""}
    assert known.items() <= config.items()
    assert config["command"] == (
        "benchmarks/cleanrl_shim.py CLONE/cleanrl/ppo.py --seed 7 --no-cuda"
    )
    assert config["script_sha256"] == hashlib.sha256(b"pass\n").hexdigest()
    assert config["git_commit"] == ""  # no clone


def test_pss():
    text = (
        "55-7f ---p 00000000 00:00 0   [rollup]\nRss:   1696 kB\nPss:    217 kB\nPss_Dirty: 1 kB\n"
    )
    assert speed.pss_kb(text) == 217


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc")
def test_memory_of_descendants_counts():
    code = "x = bytearray(b'1') * 50_000_000; print(flush=True); input()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as child:
        child.stdout.readline()
        alone = speed.pss_kb(Path(f"/proc/{child.pid}/smaps_rollup").read_text())
        assert speed.tree_pss_kb(child.pid) > alone + 48_000
        child.communicate(b"\n")
    assert speed.tree_pss_kb(child.pid) == 0


def test_execute(monkeypatch):
    """A program in a folder of its own, with its number of threads, and what it leaves behind."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    Path("program.py").write_text(
        "import os, pathlib, sys, time\n"
        "path = pathlib.Path('runs/a/metrics.csv')\n"
        "path.parent.mkdir(parents=True)\n"
        "threads = os.environ.get('OMP_NUM_THREADS', 0)\n"
        "path.write_text(f'global_step,time,name,value\\n{sys.argv[1]},2,threads,{threads}\\n')\n"
        "assert os.environ['TORCHINDUCTOR_CACHE_DIR'] == 'cache'\n"
        "time.sleep(0.7)\n"
        "sys.exit('broken' if sys.argv[1] == '13' else 0)\n"
    )
    for threads, expected in (("1", 1), ("default", 0), ("2", 0)):
        program = speed.Program("any", "fp32", threads, [Path("program.py").resolve()], "")
        run = speed.execute(program, ["12"], "cache", memory=threads == "1")
        assert run.metrics == [(12, 2.0, "threads", expected)]
        assert 0.7 < run.wall_seconds < 60
        measured = threads == "1" and Path("/proc/self/smaps_rollup").exists()
        assert 1 < run.peak_pss_mb < 100 if measured else run.peak_pss_mb is None
    with pytest.raises(SystemExit, match=r"(?s)program.py 13 failed.*broken"):
        speed.execute(program, ["13"], "cache")
    assert not Path("runs").exists()


# ------------------------------------------------------------------------------------------------
# The programs and what is written


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("ppo_discrete.py", ["ours", "CleanRL", "SB3"]),
        ("ppo_continuous.py", ["ours", "CleanRL", "SB3", "LeanRL", "LeanRL --compile"]),
        ("ppo_atari.py", ["ours", "ours", "CleanRL", "SB3"]),
    ],
)
def test_programs(script, expected):
    (task,) = (task for task in speed.TASKS if task.script == script)
    args = speed.Args(cleanrl=Path("a"), leanrl=Path("b"), sb3=True)
    commits = dict.fromkeys(["ours", "CleanRL", "SB3", "LeanRL"], "c")
    found = speed.programs(task, args, commits)
    assert [program.name for program in found] == 2 * expected
    for program in found:
        default = str(os.cpu_count()) if program.name == "ours" else "default"
        assert program.threads in ("1", default)
        if program.name == "ours":
            command = program.command
            assert command[command.index("--torch-threads") + 1] == program.threads
    if script == "ppo_atari.py":
        assert [program.precision for program in found[:3]] == ["fp32", "bf16", "fp32"]


@pytest.mark.parametrize(
    ("num_envs", "num_steps", "steps"),
    [(1, 1024, 12_288), (8, 128, 12_288), (64, 16, 12_288), (128, 16, 16_384)],
)
def test_batch_grows_only_where_it_must(num_envs, num_steps, steps):
    task = speed.with_envs(speed.TASKS[2], num_envs)
    assert (task.num_envs, task.num_steps, task.steps) == (num_envs, num_steps, steps)


def test_medians():
    rows = table(("ours", "fp32", 1, 30.0), ("SB3", "fp32", 1, ""), ("ours", "fp32", 1, 10.0))
    rows += table(("ours", "fp32", 1, 11.0), ("ours", "fp32", 2, 5.0), ("ours", "fp32", 2, 6.0))
    assert speed.medians(rows, "steps_per_second") == {
        ("ours", "fp32", "1"): (11.0, 10.0, 30.0),
        ("SB3", "fp32", "1"): (None, None, None),
        ("ours", "fp32", "2"): (5.5, 5.0, 6.0),
    }


def test_ratios_are_to_the_better_median_of_a_peer():
    rows = table(("ours", "fp32", 1, 90), ("ours", "bf16", 1, 120), ("ours", "fp32", 2, 60))
    rows += table(("CleanRL", "fp32", 1, 30), ("CleanRL", "fp32", "default", 40))
    rows += table(("CleanRL", "fp32", "default", 48), ("CleanRL", "fp32", "default", 1000))
    rows += table(("SB3", "fp32", 1, 24), ("SB3", "fp32", "default", 20))
    assert speed.ratios(rows) == {
        ("fp32", "1"): {"CleanRL": (90 / 48, 48), "SB3": (90 / 24, 24)},
        ("bf16", "1"): {"CleanRL": (120 / 48, 48), "SB3": (120 / 24, 24)},
        ("fp32", "2"): {"CleanRL": (60 / 48, 48), "SB3": (60 / 24, 24)},
    }


def test_page(tmp_path):
    columns = "script env_id program precision threads round steps steps_per_second"
    columns += " wall_seconds peak_pss_mb commit"
    row = ("ppo_discrete.py", "CartPole-v1")
    rows = table(
        (*row, "ours", "fp32", 1, 1, 102400, 6000.4, 20.25, 301.2, "c"),
        (*row, "CleanRL", "fp32", "default", 1, 102400, 3000, 41, "", "d"),
        (*row, "ours", "fp32", 1, 2, 102400, 9000, 10.25, 300.2, "c"),
        ("ppo_atari.py", "Game", "ours", "bf16", 2, 1, 12288, 500, 30, 900, "c"),
        columns=columns,
    )
    write_csv(tmp_path / "speed.csv", rows)
    rows = table(
        ("s", "e", "ours", 500000, 80.0, 30.0),
        ("s", "e", "ours", 500000, 90.0, ""),
        ("s", "e", "ours", 500000, 70.0, 40.0),
        columns="script env_id program steps wall_seconds seconds_to_475",
    )
    write_csv(tmp_path / "cold.csv", rows)
    commit = 3 * "0123456789abc" + "d"
    (tmp_path / "speed.json").write_text(
        '{"speed": {"command": "python x", "date": "2026-01-02", "cpus": 2, "cpu": "Brand",'
        f'"versions": {{"torch": "2.13.0"}}, "commits": {{"ours": "{commit}-dirty"}}}}}}'
    )
    page = speed.page(tmp_path)
    assert "\n## ppo_discrete.py, CartPole-v1, 102,400 steps\n" in page
    assert "\n| ours | fp32 | 1 | 2 | 7,500 (6,000 to 9,000) | 15.2 | 301 |\n" in page
    assert "\n| CleanRL | fp32 | default | 1 | 3,000 (3,000 to 3,000) | 41.0 |  |\n" in page
    assert "\n| ppo_discrete.py | fp32 | 1 | 7,500 | 2.50 x 3,000 | 2.50 |\n" in page
    assert "\n| ppo_atari.py | bf16 | 2 | 500 |  |  |\n" in page
    assert "ours 29.1 MB, CleanRL 115.6 MB, SB3 28.9 MB.\n" in page
    assert "\n| ours | 3 | 80.0 (70.0 to 90.0) | 40.0 (30.0 to inf) | 1 |\n" in page
    assert (
        "- `python x`, 2026-01-02: 2 CPUs,\n  Brand, torch 2.13.0; ours 0123456789ab-dirty\n"
        in page
    )


def test_storage_of_observations():
    """1,024 or 1,032 observations of 28,224 numbers, of one or of four bytes."""
    atari = speed.TASKS[2]
    assert speed.observation_mb("ours", atari) == pytest.approx(29.127168)
    assert speed.observation_mb("CleanRL", atari) == pytest.approx(115.605504)
    assert speed.observation_mb("SB3", atari) == pytest.approx(28.901376)


def test_command_without_paths():
    argv = ["/a/b/benchmarks/speed.py", "--cleanrl", "/a/b c", "--leanrl=../d", "--rounds", "3"]
    expected = "python benchmarks/speed.py --cleanrl PATH --leanrl=PATH --rounds 3"
    assert speed.without_paths(argv) == expected


def test_curve_of_the_picture(tmp_path):
    columns = "script over threads num_envs default_batch round steps steps_per_second"
    values = [(2, 1, 40), (1, 1, 10), (1, 2, 30), (1, 3, 11), (2, 2, 60)]
    rows = table(
        *(("s", "num_envs", 1, n, "True", number, 512, speed) for n, number, speed in values),
        ("s", "num_envs", 2, 1, "True", 1, 512, 1000),
        ("s", "steps", 1, 1, "True", 1, 512, 2000),
        ("t", "num_envs", 1, 1, "False", 1, 512, 3000),
        columns=columns,
    )
    write_csv(tmp_path / "scaling.csv", rows)
    rows = make_performance.load(tmp_path / "scaling.csv")
    expected = ([1, 2], [11, 50], [10, 40], [30, 60])
    assert make_performance.curve(rows, "s", "num_envs", threads=1) == expected
    assert make_performance.curve(rows, "s", "steps", threads=1) == ([512], [2000], [2000], [2000])


def test_table_of_scaling(tmp_path):
    columns = "script over threads num_envs default_batch round steps steps_per_second"
    rows = table(
        *(
            ("s", "num_envs", threads, n, "True", number, 512, 1000 * threads * n + number**2)
            for threads in (1, 2)
            for n in (1, 16)
            for number in (1, 2, 3)
        ),
        *(("s", "steps", 1, 1, "True", 1, step, 90 + step) for step in (0, 10, 110)),
        *(("s", "steps", 2, 1, "True", 1, step, 50) for step in (0, 10, 110)),
        columns=columns,
    )
    write_csv(tmp_path / "scaling.csv", rows)
    assert make_performance.scaling_table(make_performance.load(tmp_path / "scaling.csv")) == [
        "Medians of rounds: 3.",
        "",
        "| environments | s, 1 thread | s, 2 threads |",
        "|---|---|---|",
        "| 1 | 1,004 | 2,004 |",
        "| 16 | 16,004 | 32,004 |",
        "| tenths of one run / their median | 0.90 to 2.00 | 1.00 to 1.00 |",
    ]


@pytest.mark.parametrize(("script", "precision", "name", "replacements"), variants.VARIANTS)
def test_variants_are_other_programs(script, precision, name, replacements):
    text = variants.replaced(script, replacements)
    assert text != (variants.ROOT / script).read_text()
    compile(text, script, "exec")


# ------------------------------------------------------------------------------------------------
# Results are kept as they come


PROGRAMS = {
    "speed": lambda out: speed.main(speed.Args(out=out)),
    "variants": lambda out: variants.main(variants.Args(out=out)),
    "environments": lambda out: environments.main(environments.Args(out=out)),
    "failures": lambda out: failures.main(failures.Args(out=out)),
    "rlhf_speed": lambda out: rlhf_speed.main(rlhf_speed.Args(out=out)),
    "sampling": lambda out: sampling.main(sampling.Args(model=Path("none"), out=out)),
    "gpu": lambda out: gpu.main(gpu.Args(out=out)),
    "phases": lambda out: phases.main(["--out", str(out)]),
    "precision": lambda out: precision.main(["--out", str(out), "--total-timesteps", "0"]),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_results_that_cannot_be_written_end_a_program_before_it_measures(program, capsys):
    Path("a file").touch()
    with pytest.raises(SystemExit) as error:
        PROGRAMS[program](Path("a file") / "results")
    assert error.value.code == 2
    assert capsys.readouterr().err == "error: --out a file/results: Not a directory\n"


def test_folder_of_results_is_made_and_nothing_left_in_it():
    assert speed.results_folder(Path("x/y")) == Path("x/y")
    assert list(Path("x/y").iterdir()) == []
    assert speed.out_first(["--out", "z", "--seed", "1"]) == (Path("z"), ["--seed", "1"])
    assert speed.out_first(["--seed", "1"]) == (speed.ROOT / "docs" / "results", ["--seed", "1"])


def interrupted(results):
    """A function that returns these one after the other, and is interrupted then."""

    def call(*args, **kwargs):
        if not results:
            raise KeyboardInterrupt
        return results.pop(0)

    return call


def left(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_an_interrupted_run_leaves_what_it_has_measured(monkeypatch):
    for name in ("environments", "variants"):
        Path(f"{name}.csv").write_text("old\n1\n")
    monkeypatch.setattr(environments, "measure", interrupted([]))
    with pytest.raises(KeyboardInterrupt):
        environments.main(environments.Args(out=Path()))
    assert Path("environments.csv").read_text() == "old\n1\n"
    monkeypatch.setattr(environments, "measure", interrupted([12.34, 5]))
    with pytest.raises(KeyboardInterrupt):
        environments.main(environments.Args(out=Path()))
    assert [row["steps_per_second"] for row in left("environments.csv")] == ["12.3", "5.0"]

    runs = [speed.Finished([(100 * i, i, "charts/SPS", 1) for i in range(1, 9)], 1, None)]
    monkeypatch.setattr(variants, "execute", interrupted(runs))
    with pytest.raises(KeyboardInterrupt):
        variants.main(variants.Args(out=Path()))
    (row,) = left("variants.csv")
    assert (row["variant"], row["round"], row["steps_per_second"]) == ("as it is", "1", "100.0")


def test_phases_of_the_scripts_before_one_that_fails_are_kept(monkeypatch):
    def measure(script, *flags):
        assert script != "ppo_continuous.py"
        return [(script, "fp32", 1, "update", "2.50", "1.00")]

    monkeypatch.setattr(phases, "measure", measure)
    with pytest.raises(EOFError):
        phases.main(["--out", "."])
    (row,) = left("phases.csv")
    assert (row["script"], row["milliseconds"]) == ("ppo_discrete.py", "2.50")


@pytest.mark.parametrize("name", failures.CASES)
def test_failures_are_provoked_by_flags_that_exist_or_one_line(name):
    case = failures.CASES[name]
    if case.line:
        assert (failures.ROOT / "ppo_rlhf.py").read_text().count(case.line[0]) == 1
    ppo_rlhf.check_args(ppo_rlhf.parse_args(shlex.split(case.flags)))
    assert case.line or case.flags


def test_failures(monkeypatch):
    """Each case beside the unchanged run, at the same number of episodes."""
    names = ["unchanged", *failures.CASES]

    def run(case, checkpoint, args, folder):
        name = names.pop(0)
        assert folder.name == (
            "unchanged" if case is None else str(list(failures.CASES).index(name))
        )
        assert checkpoint == (None if case is None else Path("found"))
        metric = "gold/score" if case is None else case.metric
        found = {"objective/scores": {128: 1.5, 256: 2.5}, metric: {128: 3.5, 256: len(names)}}
        return found, Path("found")

    monkeypatch.setattr(failures, "run", run)
    failures.main(failures.Args(out=Path()))
    assert names == []
    rows = left("failures.csv")
    assert [row["case"] for row in rows] == [x for x in failures.CASES for _ in range(2)]
    assert [row["value"] for row in rows[:4]] == ["3.5", "6", "3.5", "5"]
    assert [row["unchanged"] for row in rows[:4]] == ["3.5", "7", "", ""]
    assert {row["score"] for row in rows} == {"1.5", "2.5"}
    facts = json.loads(Path("failures.json").read_text())
    assert facts["cases"].keys() == failures.CASES.keys()
    assert str(failures.ROOT) not in json.dumps(facts)


@pytest.mark.slow
def test_a_failure_runs_the_script_with_its_line_replaced():
    """One iteration on what the unchanged run has learned, sampled at twice the temperature."""
    small = "--sft-texts 64 --rm-pairs 32 --rm-test-pairs 32 --d-model 16 --num-layers 1"
    case, args = failures.CASES["negative KL"], failures.Args(episodes=128)
    first = failures.Case("objective/kl", f"{small} --eval-episodes 32")
    _, folder = failures.run(first, None, args, Path("first").absolute())
    metrics, _ = failures.run(case, folder, args, Path("second").absolute())
    assert metrics["rollout/logp_mismatch"][128] > 0.1
    assert "/ 2.0" in (Path("second") / "ppo_rlhf.py").read_text()
    with pytest.raises(SystemExit, match="0 times 'no such line' in the script"):
        failures.run(failures.Case("x", "", ("no such line", "")), None, args, Path("third"))


def test_words_are_counted():
    count = runpy.run_path(str(failures.WORDS))["count"]
    assert count(["", "one", "the film was good ."]) == [0, 1, 5]


# ------------------------------------------------------------------------------------------------
# Atari's environments in several forms


def test_gymnasiums_steps_play_the_same_game():
    """Every number of 300 random steps, through lives and resets."""
    both = [
        environments.make_envs("BreakoutNoFrameskip-v4", 2, "sync", wrapper)
        for wrapper in (environments.ppo_atari.AtariPreprocessing, environments.GymnasiumSteps)
    ]
    rng, ends = np.random.default_rng(0), 0
    one, other = (envs.reset(seed=[1, 2])[0] for envs in both)
    assert np.array_equal(one, other)
    for _ in range(300):
        actions = rng.integers(4, size=2)
        (*one, info), (*other, their_info) = (envs.step(actions) for envs in both)
        assert all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))
        assert info.keys() == their_info.keys()
        ends += one[2].sum()
    assert ends > 4
    for envs in both:
        envs.close()


def test_forms(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    args = environments.Args(num_envs=4, steps=4, envpool=True)
    forms = environments.forms(args)
    assert list(forms) == [
        "one process",
        "one process, Gymnasium's step",
        "a process for each game",
        "a process for each game, Gymnasium's step",
        "a process for each game, 2 at a time",
        "EnvPool, threads: 1",
        "EnvPool, threads: 2",
    ]
    shapes = {}
    for name in ("one process", "a process for each game"):
        envs = forms[name]()
        shapes[name] = getattr(envs, "shape", type(envs).__name__)
        assert envs.num_envs == 4
        envs.close()
    assert shapes == {
        "one process": "SyncVectorEnv",
        "a process for each game": "Processes",
    }
    assert environments.measure(forms["one process"], args) > 0


def test_environments_on_the_page():
    rows = table(
        ("one process", 200),
        ("a process for each game", 400),
        ("a process for each game", 500),
        ("one process", 300),
        ("other", 900),
        columns="form steps_per_second",
    )
    assert make_performance.environments_table(rows)[2:] == [
        "| one process | 2 | 250 (200 to 300) | 0.56 |",
        "| a process for each game | 2 | 450 (400 to 500) | 1.00 |",
        "| other | 1 | 900 (900 to 900) | 2.00 |",
    ]


# ------------------------------------------------------------------------------------------------
# Ranks


def test_curves_of_ranks_are_compared_at_their_end():
    """Means 2 and 4, deviations 1 and 2 of three seeds: a difference of 2, its error 1.29."""
    rows = [
        {"env_id": task.env_id, "ranks": k, "seed": str(seed), "mean_return": str(value)}
        for task in ranks.CURVES
        for k, values in {"1": (1, 2, 3), "2": (2, 4, 6)}.items()
        for seed, end in enumerate(values)
        for value in (-99, end)
    ]
    _, _, *lines = ranks.curves_table(rows)
    assert [line.split(" | ", 1)[0] for line in lines] == ["| CartPole-v1", "| HalfCheetah-v5"]
    assert {line.split(" | ", 1)[1] for line in lines} == {
        "2.0 +- 1.0 | 4.0 +- 2.0 | +2.0 +- 1.3 |"
    }


def test_speed_of_ranks_is_compared_by_medians():
    speeds = {"1 x 1": (10, 20, 30), "1 x 2": (20, 40, 90), "2 x 1": (10, 60, 70)}
    rows = [
        {"script": task.script, "ranks_x_threads": kind, "steps_per_second": str(x)}
        for task in ranks.SPEED
        for kind, values in speeds.items()
        for x in values
    ]
    _, _, *lines = ranks.speed_table(rows)
    cells = "| 20 (10 to 30) | 40 (20 to 90) | 60 (10 to 70) | 1.50 |"
    assert lines == [f"| {task.script} {cells}" for task in ranks.SPEED]


def test_ranks_are_started_by_torchrun():
    one, two = (ranks.program(speed.TASKS[0], k, 1, "c") for k in (1, 2))
    assert one.command == [speed.ROOT / "ppo_discrete.py", "--torch-threads", "1"]
    assert two.command == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *one.command,
    ]


# ------------------------------------------------------------------------------------------------
# Language models


@pytest.fixture
def tiny():
    pytest.importorskip("transformers")
    return importlib.import_module("tiny")


def test_seven_of_eight_end_early_and_the_others_never(tiny):
    path = tiny.save_model("model", "llama")
    model = ppo_rlhf.pretrained("AutoModelForCausalLM", path, dtype=torch.float32)
    args = sampling.Args(model=path, batch=16, tokens=12, prompt=6)
    prompts = sampling.make_prompts(args, model.config.vocab_size)
    assert (prompts == ppo_rlhf.PAD).sum(1).tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3]
    texts = sampling.sampler("early", "ours", model, prompts, 12)()
    responses = texts[:, 6:]
    assert torch.equal(texts[:, :6], prompts)
    lengths = (responses != ppo_rlhf.PAD).sum(1).tolist()
    assert lengths == 2 * [12, 8, 8, 8, 8, 8, 8, 8]
    ends = responses == sampling.EOS
    assert ends.sum(1).tolist() == 2 * [0, 1, 1, 1, 1, 1, 1, 1]
    assert ends.nonzero()[:, 1].unique().tolist() == [7]


def test_sampling(tiny):
    """All write all tokens, whatever the model says of its end; of 8 rows 7 are short, if early."""
    path = tiny.save_model("model", "llama")
    sizes = dict(batch=8, tokens=12, prompt=6, rounds=2, threads=(1,))
    sampling.main(sampling.Args(model=path, out=Path(), **sizes))
    rows = left("sampling.csv")
    programs = [(row["case"], row["program"]) for row in rows]
    assert programs == [*sampling.PROGRAMS, *reversed(sampling.PROGRAMS)]
    for row in rows:
        tokens = float(row["seconds"]) * float(row["tokens_per_s"])
        assert tokens == pytest.approx(12 + 7 * 8 if row["case"] == "early" else 8 * 12, rel=0.05)
    origin = json.loads(Path("sampling.json").read_text())
    assert origin["generate_by_ours"].keys() == origin["early_by_all"].keys() == {"1"}
    assert origin["versions"].keys() >= {"torch", "transformers"}


def test_sampling_is_compared_within_rounds():
    seconds = {"all ours": (2, 4, 10), "all generate": (6, 4, 20), "early ours": (1, 1, 1)}
    rows = [
        dict(case=case, program=program, threads=threads, round=number, seconds=threads**i * x)
        for threads in (1, 2)
        for i, (name, values) in enumerate(seconds.items())
        for case, program in [name.split()]
        for number, x in enumerate(values)
    ]
    assert sampling.ratios(rows) == {
        "generate_by_ours": {1: 2.0, 2: 4.0},
        "early_by_all": {1: 0.25, 2: 1.0},
    }


@pytest.fixture
def trl(monkeypatch):
    """What benchmarks/trl_run.py needs of TRL; a trainer generates, scores and trains twice."""
    pytest.importorskip("datasets")
    fake = SimpleNamespace(PPOConfig=SimpleNamespace, trainers=[], second=0.001, sleep=time.sleep)

    def batch_generation(model, queries, size, pad_token_id, config):
        fake.sleep(fake.second)
        return torch.tensor([[5, 6, 1, 1, 1], [5, 6, 1, pad_token_id, pad_token_id]]), None

    def forward(model, tokens, pad_token_id):
        fake.sleep(2 * fake.second)

    class Trainer:
        def __init__(self, **given):
            vars(self).update(given)
            fake.trainers.append(self)

        def train(self):
            (metrics,), module = self.callbacks, fake.ppo_trainer
            pad = self.processing_class.pad_token_id
            for step in (1, 2):
                with torch.no_grad():
                    module.batch_generation(self.model, torch.tensor([[5, 6]] * 2), 2, pad, None)
                    module.forward(self.ref_model, None, pad)
                for _ in range(2):
                    module.forward(self.model, None, pad)
                metrics.on_step_end(None, SimpleNamespace(global_step=step), None)
            metrics.on_train_end(None, None, None)

    fake.PPOTrainer = Trainer
    fake.ppo_trainer = SimpleNamespace(batch_generation=batch_generation, forward=forward)
    monkeypatch.setitem(sys.modules, "trl.experimental.ppo", fake)
    return fake


def test_phases_of_trl(trl):
    """Generation takes a second, scoring two, training two and two."""
    clock = SimpleNamespace(now=10.0)
    trl.second, trl.sleep = 1, lambda seconds: setattr(clock, "now", clock.now + seconds)
    metrics = runpy.run_path(str(rlhf_speed.TRL))["Metrics"]
    metrics.on_step_end.__globals__["time"] = SimpleNamespace(time=lambda: clock.now)
    callback = metrics(Path("runs/trl"), batch_size=4, pad_token_id=0)
    token = SimpleNamespace(pad_token_id=0)
    trainer = trl.PPOTrainer(
        callbacks=[callback], processing_class=token, model=None, ref_model=None
    )
    trainer.train()
    found = speed.read_metrics(Path("runs/trl/metrics.csv"))
    values = {"time/gen": 1, "time/score": 2, "time/train": 4, "response/length": 2}
    for step, rows in ((1, found[:5]), (2, found[5:])):
        assert [row[:2] for row in rows] == 5 * [(4 * step, 7.0 * step)]
        assert {row[2]: row[3] for row in rows} == values | {"ppo/episode": 4 * step}


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ours_and_trl_have_the_same_settings(monkeypatch, tiny, trl, real):
    settings = []

    def execute(program, flags, cache, python):
        argv = [*map(str, program.command), *flags]
        if program.name == "TRL":
            assert python == "python of trl"
            monkeypatch.setattr(sys, "argv", argv)
            runpy.run_path(argv[0], run_name="__main__")
        else:
            settings.append(ppo_rlhf.parse_args(argv[1:]))
            ppo_rlhf.check_args(settings[-1])
            if real:
                ppo_rlhf.train(settings[-1])
        found = [*Path("runs").glob("*/metrics.csv")]
        metrics = (
            speed.read_metrics(found[0]) if found else [(i, i, "ppo/episode", i) for i in (1, 2)]
        )
        shutil.rmtree("runs", ignore_errors=True)
        return speed.Finished(metrics, 1, None)

    monkeypatch.setattr(rlhf_speed, "execute", execute)
    monkeypatch.setattr(rlhf_speed, "floor", lambda flags: {"gen": len(flags)})
    model = tiny.save_model("model", "qwen2") if real else None
    sizes = dict(rounds=1, updates=2, epochs=3)
    rlhf_speed.main(rlhf_speed.Args(trl=Path("python of trl"), model=model, out=Path(), **sizes))
    name = "rlhf_speed_smollm2" if real else "rlhf_speed"
    assert json.loads(Path(f"{name}.json").read_text())["floor_milliseconds"]["gen"] > 5
    rows = left(f"{name}.csv")
    assert [row["program"] for row in rows] == 2 * ["ours", "TRL"]
    for row in rows if real else rows[1::2]:
        assert min(float(row[x]) for x in ("time/gen", "time/score", "time/train")) > 0
    for ours, trainer in zip(settings, trl.trainers, strict=True):
        theirs, micro = trainer.args, trainer.args.per_device_train_batch_size
        assert (
            ours.batch_size == micro * theirs.gradient_accumulation_steps == (32 if real else 256)
        )
        assert theirs.local_rollout_forward_batch_size == ours.batch_size
        assert ours.total_episodes == theirs.total_episodes == 2 * ours.batch_size
        assert ours.response_length == theirs.response_length == (32 if real else 24)
        assert ours.update_epochs == theirs.num_ppo_epochs == 3
        assert ours.num_minibatches == theirs.num_mini_batches == 1
        assert ours.learning_rate == theirs.learning_rate
        assert not real or ours.micro_batch_size == micro == 8
        assert trainer.processing_class.pad_token_id != trainer.processing_class.eos_token_id
        networks = (trainer.model, trainer.ref_model, trainer.reward_model, trainer.value_model)
        sizes = {sum(x.numel() for x in network.base_model.parameters()) for network in networks}
        assert len(sizes) == 1
        assert all(x.dtype == torch.float32 for network in networks for x in network.parameters())
