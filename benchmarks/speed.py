"""Speed and memory of our scripts beside CleanRL, Stable-Baselines3 and LeanRL, run in turn.

    python benchmarks/speed.py --cleanrl PATH --sb3 --leanrl PATH    # an hour and more
    python benchmarks/speed.py --cleanrl PATH --cold                 # the default CartPole-v1 run
    python benchmarks/speed.py --scaling --rounds 3                  # environments, threads, steps
    python benchmarks/speed.py --cleanrl PATH --sb3 --quick          # a try, minutes

Every program gets the same task, number of environments, batch, minibatches and epochs, the same
CPUs and no GPU, and runs with one thread (OMP_NUM_THREADS=1) and with the number it chooses itself,
for ours --torch-threads 1 and that of all CPUs. One run follows the other, nothing beside them; the
order turns round after each round: ours, peer, peer, ours, ours, ...

steps_per_second  from the end of the iteration in which the first quarter of the steps ends to the
                  end of the run: without start-up and compilation
wall_seconds      of the whole process, from its start to its end. The compile cache is empty before
                  the first run, then shared by all; with --cold it is empty before each
peak_pss_mb       most memory (1e6 bytes) of the process and all its descendants at any one time:
                  PSS, which counts pages shared by n processes one nth in each, twice a second,
                  less often where that would take more than 1 % of a CPU

Writes {speed,cold,scaling}.csv, a row for each run, speed.json, where they come from, and speed.md,
their medians, all in docs/results/. LeanRL needs pip install --no-deps tensordict==0.13.0 pyvers;
later versions of tensordict break its script.
"""

import csv
import dataclasses
import datetime
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "benchmarks" / "cleanrl_shim.py"
ALL = str(os.cpu_count())
BAR = 475  # mean return at which CartPole-v1 counts as solved
SCALING_ENVS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Task:
    """What all programs are given; the same as their default values, except for the steps."""

    script: str  # ours
    cleanrl: str  # theirs
    env_id: str
    num_envs: int  # N
    num_steps: int  # T
    num_minibatches: int
    update_epochs: int
    steps: int  # of one run
    long: int  # of the run whose tenths are compared

    batch_size = property(lambda task: task.num_envs * task.num_steps)

    def flags(self, seed: int) -> list[str]:
        names = ("num_envs", "num_steps", "num_minibatches", "update_epochs")
        flags = {"env-id": self.env_id, "total-timesteps": self.steps, "seed": seed}
        flags |= {name.replace("_", "-"): getattr(self, name) for name in names}
        return ["--no-cuda", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]


# names, environment; N, T, minibatches, epochs; steps, long
ATARI = ("ppo_atari.py", "ppo_atari.py", "BreakoutNoFrameskip-v4")
LSTM = "ppo_atari_lstm.py"
MUJOCO = ("ppo_continuous.py", "ppo_continuous_action.py", "HalfCheetah-v5")
TASKS = [
    Task("ppo_discrete.py", "ppo.py", "CartPole-v1", 4, 128, 4, 4, 102_400, 512_000),
    Task(*MUJOCO, 1, 2048, 32, 10, 40_960, 204_800),
    Task(*ATARI, 8, 128, 4, 4, 12_288, 51_200),
    Task(LSTM, LSTM, ATARI[2], 8, 128, 4, 4, 12_288, 51_200),
]


SCRIPTS = tuple(task.script for task in TASKS)


@dataclasses.dataclass(frozen=True)
class Args:
    cleanrl: Path | None = None  # a clone of github.com/vwxyzjn/cleanrl
    sb3: bool = False  # Stable-Baselines3, as installed
    leanrl: Path | None = None  # a clone of github.com/pytorch-labs/LeanRL
    leanrl_compile: bool = True  # LeanRL with --compile, too, which takes a minute to start
    scripts: tuple[Literal[SCRIPTS], ...] = SCRIPTS  # of ours, which
    rounds: int = 5  # runs of each program with each number of threads
    threads: tuple[Literal["1", "default"], ...] = ("1", "default")  # which numbers of threads
    cold: bool = False  # instead: ours and CleanRL from an empty compile cache to the last step
    scaling: bool = False  # instead: ours by environments, threads and steps
    quick: bool = False  # one round of a few steps with one thread, into a new temporary folder
    out: Path = ROOT / "docs" / "results"  # folder of the results


@dataclasses.dataclass(frozen=True)
class Program:
    name: str
    precision: str
    threads: str  # of torch: a number, or "default"
    command: list
    commit: str  # or version


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished run: the rows of its metrics.csv and what its process took."""

    metrics: list[tuple[int, float, str, float]]  # (global_step, seconds, name, value)
    wall_seconds: float
    peak_pss_mb: float | None


# ------------------------------------------------------------------------------------------------
# One run


def pss_kb(rollup: str) -> int:
    """The line Pss of a /proc/{pid}/smaps_rollup."""
    return int(re.search(r"^Pss:\s+(\d+) kB$", rollup, re.M)[1])


def tree_pss_kb(pid: int) -> int:
    """PSS of a process and its descendants; those that end meanwhile count nothing."""
    try:
        total = pss_kb(Path(f"/proc/{pid}/smaps_rollup").read_text())
        files = list(Path(f"/proc/{pid}/task").glob("*/children"))
        children = [child for file in files for child in file.read_text().split()]
    except (OSError, TypeError):  # it has ended
        return 0
    return total + sum(tree_pss_kb(int(child)) for child in children)


def execute(
    program: Program,
    flags: list[str],
    cache: str,
    memory: bool = False,
    python: str = sys.executable,
) -> Finished:
    """Run a program in an empty folder; `cache` is where torch.compile keeps what it has made."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    env.pop("OMP_NUM_THREADS", None)
    if program.threads == "1":
        env["OMP_NUM_THREADS"] = "1"
    command = [python, *map(str, program.command), *flags]
    peaks, ended = [], threading.Event()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "output", "w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output)

        def watch():
            pause = 0.5
            while not ended.wait(pause):
                since = time.thread_time()
                peaks.append(tree_pss_kb(process.pid))
                pause = max(0.5, 100 * (time.thread_time() - since))  # at most 1 % of a CPU

        watcher = threading.Thread(target=watch)
        if memory and Path("/proc/self/smaps_rollup").exists():
            watcher.start()
        status = process.wait()
        seconds = time.perf_counter() - start
        ended.set()
        if watcher.is_alive():
            watcher.join()
        if status:
            output.seek(0)
            sys.exit(f"{shlex.join(command)} failed:\n{output.read()[-3000:]}")
        (path,) = Path(folder).glob("runs/**/metrics.csv")
        metrics = read_metrics(path)
    return Finished(metrics, seconds, max(peaks) * 1024 / 1e6 if peaks else None)


def read_metrics(path: Path) -> list[tuple[int, float, str, float]]:
    """The rows of a metrics.csv, whose columns are the same for all programs."""
    with open(path) as file:
        return [
            (int(row["global_step"]), float(row["time"]), row["name"], float(row["value"]))
            for row in csv.DictReader(file)
        ]


def clock(metrics) -> list[tuple[int, float]]:
    """(global_step, seconds) at the end of each iteration, where steps per second are logged."""
    return [(step, seconds) for step, seconds, name, _ in metrics if name == "charts/SPS"]


def steps_per_second(metrics) -> float:
    """From the end of the iteration in which the first quarter ends to the end of the run."""
    points = clock(metrics)
    last_step, last = points[-1]
    step, seconds = next(point for point in points if point[0] >= last_step / 4)
    return (last_step - step) / (last - seconds)


def tenths(metrics) -> list[tuple[int, float]]:
    """(last step, steps per second) of each tenth; the first begins after the first iteration."""
    points = clock(metrics)
    edges = [next(p for p in points if p[0] >= points[-1][0] * i / 10) for i in range(11)]
    return [
        (step, (step - old_step) / (seconds - old_seconds))
        for (old_step, old_seconds), (step, seconds) in itertools.pairwise(edges)
    ]


def reach(metrics, bar: float, episodes: int = 100) -> tuple[int, float] | None:
    """(global_step, seconds) when the mean return of the last 100 episodes first reaches `bar`."""
    returns = [row for row in metrics if row[2] == "charts/episodic_return"]
    for i in range(episodes, len(returns) + 1):
        if statistics.fmean(row[3] for row in returns[i - episodes : i]) >= bar:
            return returns[i - 1][:2]
    return None


# ------------------------------------------------------------------------------------------------
# The programs


def commit_of(path: Path) -> str:
    git = ["git", "-C", str(path), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()


def commits_of(args: Args) -> dict[str, str]:
    """Of ours and of each peer asked for its commit, of SB3 its version."""
    commits = {"ours": commit_of(ROOT)}
    commits |= {"CleanRL": commit_of(args.cleanrl)} if args.cleanrl else {}
    commits |= {"SB3": metadata.version("stable-baselines3")} if args.sb3 else {}
    return commits | ({"LeanRL": commit_of(args.leanrl)} if args.leanrl else {})


def ours(task: Task, threads: str, commits: dict, precision: str = "fp32") -> Program:
    command = [ROOT / task.script, "--torch-threads", threads]
    command += ["--precision", precision] if "atari" in task.script else []
    return Program("ours", precision, threads, command, commits["ours"])


def cleanrl(task: Task, args: Args, threads: str, commits: dict) -> Program:
    command = [SHIM, args.cleanrl.resolve() / "cleanrl" / task.cleanrl]
    return Program("CleanRL", "fp32", threads, command, commits["CleanRL"])


def programs(task: Task, args: Args, commits: dict) -> list[Program]:
    """All that can do the task, in the order of the first round."""
    found = []
    for threads in ("1",) if args.quick else args.threads:
        number = ALL if threads == "default" else threads
        precisions = ("fp32", "bf16") if "atari" in task.script else ("fp32",)
        found += [ours(task, number, commits, precision) for precision in precisions]
        if args.cleanrl:
            found.append(cleanrl(task, args, threads, commits))
        if args.sb3 and task.script != LSTM:  # it has none
            command = [ROOT / "benchmarks" / "sb3_run.py", task.script]
            found.append(Program("SB3", "fp32", threads, command, commits["SB3"]))
        if args.leanrl and task.script == "ppo_continuous.py":
            name = "ppo_continuous_action_torchcompile.py"
            command = [SHIM, args.leanrl.resolve() / "leanrl" / name]
            found.append(Program("LeanRL", "fp32", threads, command, commits["LeanRL"]))
            if args.leanrl_compile and not args.quick:
                command = [*command, "--compile"]
                found.append(
                    Program("LeanRL --compile", "fp32", threads, command, commits["LeanRL"])
                )
    return found


# ------------------------------------------------------------------------------------------------
# What is measured


def results_folder(path: Path) -> Path:
    """The folder of --out, made; where it cannot be written to, the program ends in one line."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        print(f"error: --out {path}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    return path


def out_first(argv: list[str]) -> tuple[Path, list[str]]:
    """The folder of --out if a command line begins with it, and the rest of the line."""
    if argv[:1] == ["--out"]:
        return results_folder(Path(argv[1])), argv[2:]
    return results_folder(ROOT / "docs" / "results"), argv


def save(path: Path, rows: list[dict], row: dict):
    """Add a row to the table and write it, so that nothing is lost if a later run fails."""
    rows.append(row)
    with open(path, "w") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(*(value for key, value in row.items() if key != "commit"), flush=True)


def measure_pairs(args: Args, tasks: list[Task], commits: dict, cache: str):
    """speed.csv"""
    rows = []
    for task in tasks:
        for number in range(1, args.rounds + 1):
            order = programs(task, args, commits)
            for program in order if number % 2 else reversed(order):
                run = execute(program, task.flags(seed=number), cache, memory=True)
                row = {
                    "script": task.script,
                    "env_id": task.env_id,
                    "program": program.name,
                    "precision": program.precision,
                    "threads": program.threads,
                    "round": number,
                    "steps": task.steps,
                    "steps_per_second": round(steps_per_second(run.metrics), 1),
                    "wall_seconds": round(run.wall_seconds, 2),
                    "peak_pss_mb": run.peak_pss_mb and round(run.peak_pss_mb, 1),
                    "commit": program.commit,
                }
                save(args.out / "speed.csv", rows, row)


def measure_cold(args: Args, commits: dict):
    """cold.csv: one thread, the compile cache empty, the default steps of CartPole-v1.

    The clock of a metrics.csv starts after the imports. What it leaves out of wall_seconds is added
    to the seconds at which the mean return reached the bar, the end of the process included.
    """
    task = dataclasses.replace(TASKS[0], steps=4096 if args.quick else 500_000)
    rows = []
    for number in range(1, args.rounds + 1):
        order = [ours(task, "1", commits), cleanrl(task, args, "1", commits)]
        for program in order if number % 2 else reversed(order):
            with tempfile.TemporaryDirectory() as empty:
                run = execute(program, task.flags(seed=number), empty, memory=True)
            step, seconds = reach(run.metrics, BAR) or (None, None)
            start_up = run.wall_seconds - run.metrics[-1][1]
            row = {
                "script": task.script,
                "env_id": task.env_id,
                "program": program.name,
                "threads": program.threads,
                "round": number,
                "steps": task.steps,
                "wall_seconds": round(run.wall_seconds, 2),
                "start_up_seconds": round(start_up, 2),
                f"steps_to_{BAR}": step,
                f"seconds_to_{BAR}": seconds and round(seconds + start_up, 2),
                "peak_pss_mb": run.peak_pss_mb and round(run.peak_pss_mb, 1),
                "commit": program.commit,
            }
            save(args.out / "cold.csv", rows, row)


def with_envs(task: Task, num_envs: int) -> Task:
    """The batch stays as it is as long as it leaves 16 steps to each environment, then it grows."""
    num_steps = max(16, task.batch_size // num_envs)
    batch = num_envs * num_steps
    steps = max(task.steps, 8 * batch) // batch * batch
    return dataclasses.replace(task, num_envs=num_envs, num_steps=num_steps, steps=steps)


def measure_scaling(args: Args, tasks: list[Task], commits: dict, cache: str):
    """scaling.csv: ours over the environments, and the tenths of one long run, by threads."""
    rows = []
    for task in tasks:
        if task.script == LSTM:
            continue  # no minibatches of less than one environment
        sizes = [with_envs(task, n) for n in (SCALING_ENVS[:2] if args.quick else SCALING_ENVS)]
        if args.quick:
            sizes = [dataclasses.replace(size, steps=4 * size.batch_size) for size in sizes]
        long = dataclasses.replace(task, steps=20 * task.batch_size if args.quick else task.long)
        kinds = [("num_envs", size) for size in sizes] + [("steps", long)]
        for number in range(1, args.rounds + 1):
            numbers = dict.fromkeys(["1"] if args.quick else ["1", ALL])
            order = [(threads, *kind) for threads in numbers for kind in kinds]
            for threads, over, size in order if number % 2 else reversed(order):
                run = execute(ours(size, threads, commits), size.flags(seed=number), cache)
                points = [(size.steps, steps_per_second(run.metrics))]
                for step, speed in tenths(run.metrics) if over == "steps" else points:
                    row = {
                        "script": task.script,
                        "env_id": task.env_id,
                        "over": over,
                        "threads": threads,
                        "num_envs": size.num_envs,
                        "num_steps": size.num_steps,
                        "batch_size": size.batch_size,
                        "default_batch": size.batch_size == task.batch_size,
                        "round": number,
                        "steps": step,
                        "steps_per_second": round(speed, 1),
                        "commit": commits["ours"],
                    }
                    save(args.out / "scaling.csv", rows, row)


# ------------------------------------------------------------------------------------------------
# What is written


def without_paths(argv: list[str]) -> str:
    """The command, PATH in place of each path; the program by its name."""
    values = [re.sub(r"^(--[a-z0-9-]+=)?.*/.*$", r"\1PATH", value) for value in argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(argv[0]).name}", *values])


def machine() -> dict:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        cpu = models[0] if models else cpu
    versions = {"python": platform.python_version()}
    for package in ("torch", "gymnasium", "numpy", "stable-baselines3", "tensordict"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "platform": platform.platform(),
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "versions": versions,
    }


def observation_mb(program: str, task: Task) -> float:
    """MB of the observations that a program stores of one rollout of Atari, by its source.

    Ours: uint8 [T + 1, N, 84, 84, 4]; CleanRL: float32 [T, N, 4, 84, 84]; SB3: uint8 of that shape.
    """
    steps = task.num_steps + (program == "ours")
    return steps * task.num_envs * 4 * 84 * 84 * (4 if program == "CleanRL" else 1) / 1e6


def medians(rows: list[dict], column: str) -> dict[tuple[str, str, str], tuple]:
    """(program, precision, threads) -> median, minimum and maximum; None where not measured."""
    values = {}
    for row in rows:
        key = (row["program"], row["precision"], row["threads"])
        values.setdefault(key, []).append(row[column])
    return {
        key: (None,) * 3
        if "" in found
        else (statistics.median(map(float, found)), min(map(float, found)), max(map(float, found)))
        for key, found in values.items()
    }


def ratios(rows: list[dict]) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """(precision, threads) of ours -> peer -> (ours / theirs, theirs), medians of one script.

    A peer's is its better median over its numbers of threads.
    """
    speeds = {key: median for key, (median, _, _) in medians(rows, "steps_per_second").items()}
    best = {}
    for (program, _, _), speed in speeds.items():
        if program != "ours":
            best[program] = max(speed, best.get(program, 0))
    return {
        key[1:]: {peer: (speed / theirs, theirs) for peer, theirs in best.items()}
        for key, speed in speeds.items()
        if key[0] == "ours"
    }


def table(*rows) -> list[str]:
    """A Markdown table, its first row the titles."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def formatted(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def spread(values: tuple[float, float, float], digits: int = 0) -> str:
    """Of median, minimum and maximum."""
    median, least, most = (formatted(value, digits) for value in values)
    return f"{median} ({least} to {most})"


def speed_section(rows: list[dict]) -> list[str]:
    """The medians of speed.csv, and ours divided by the peers'."""
    lines = ["Medians of all rounds, in brackets the lowest and the highest."]
    peers = [name for name in dict.fromkeys(row["program"] for row in rows) if name != "ours"]
    titles = ("script", "precision", "threads", "steps/s", *peers, "the fastest of them")
    compared = [titles]
    for script in dict.fromkeys(row["script"] for row in rows):
        part = [row for row in rows if row["script"] == script]
        columns = ("steps_per_second", "wall_seconds", "peak_pss_mb")
        speed, wall, pss = (medians(part, column) for column in columns)
        lines += ["", f"## {script}, {part[0]['env_id']}, {int(part[0]['steps']):,} steps", ""]
        titles = (
            "program",
            "precision",
            "threads",
            "runs",
            "steps/s",
            "whole run, s",
            "memory, MB",
        )
        body = []
        for key in speed:
            runs = sum((row["program"], row["precision"], row["threads"]) == key for row in part)
            cells = (spread(speed[key]), formatted(wall[key][0], 1), formatted(pss[key][0]))
            body.append((*key, runs, *cells))
        lines += table(titles, *body)
        if script == "ppo_atari.py":
            sizes = [
                f"{x} {observation_mb(x, TASKS[2]):.1f} MB" for x in ("ours", "CleanRL", "SB3")
            ]
            lines += ["", f"Observations of one rollout, from shape and type: {', '.join(sizes)}."]
        for (precision, threads), against in ratios(part).items():
            cells = [
                f"{against[peer][0]:.2f} x {formatted(against[peer][1])}" if peer in against else ""
                for peer in peers
            ]
            fastest = f"{min(ratio for ratio, _ in against.values()):.2f}" if against else ""
            median = formatted(speed["ours", precision, threads][0])
            compared.append((script, precision, threads, median, *cells, fastest))
    lines += ["", "## Ours beside the others", ""]
    lines += [
        "Our median as a multiple of theirs, with the number of threads that suits them best."
    ]
    return [*lines, "", *table(*compared)]


def cold_section(rows: list[dict]) -> list[str]:
    """The medians of cold.csv; runs that never reach the bar count as infinitely long."""
    titles = ("program", "runs", "whole run, s", f"s until a mean return of {BAR}", "never reached")
    body = []
    for program in dict.fromkeys(row["program"] for row in rows):
        part = [row for row in rows if row["program"] == program]
        whole = [float(row["wall_seconds"]) for row in part]
        until = [float(row[f"seconds_to_{BAR}"] or "inf") for row in part]
        cells = [spread((statistics.median(x), min(x), max(x)), 1) for x in (whole, until)]
        body.append((program, len(part), *cells, until.count(float("inf"))))
    first = rows[0]
    title = f"## {first['script']}, {first['env_id']}, {int(first['steps']):,} steps from cold"
    text = "One thread, compile cache empty, from the start of the process."
    return [title, "", text, "", *table(titles, *body)]


def short(commit: str) -> str:
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", commit)


def page(folder: Path) -> str:
    """speed.md, from what of speed.csv, cold.csv and speed.json is in the folder."""
    lines = ["# Speed", "", "Made by `benchmarks/speed.py`, which says how it measures."]
    for name, section in (("speed", speed_section), ("cold", cold_section)):
        if (folder / f"{name}.csv").exists():
            with open(folder / f"{name}.csv") as file:
                lines += ["", *section(list(csv.DictReader(file)))]
    lines += ["", "## Commands and machine", ""]
    for origin in json.loads((folder / "speed.json").read_text()).values():
        versions = ", ".join(f"{k} {v}" for k, v in origin["versions"].items() if v)
        commits = ", ".join(f"{k} {short(v)}" for k, v in origin["commits"].items())
        note = f" ({origin['note']})" if "note" in origin else ""  # by hand
        lines += [f"- `{origin['command']}`{note}, {origin['date']}: {origin['cpus']} CPUs,"]
        lines += [f"  {origin['cpu']}, {versions}; {commits}"]
    return "\n".join(lines) + "\n"


def main(args: Args):
    if args.cold and not args.cleanrl:
        sys.exit("--cold needs --cleanrl")
    if args.quick:
        args = dataclasses.replace(args, rounds=1, out=Path(tempfile.mkdtemp(prefix="speed-")))
    results_folder(args.out)
    tasks = [task for task in TASKS if task.script in args.scripts]
    if args.quick:
        tasks = [dataclasses.replace(task, steps=4 * task.batch_size) for task in tasks]
    commits = commits_of(args)
    mode = "cold" if args.cold else "scaling" if args.scaling else "speed"
    origin = {"command": without_paths(sys.argv), "date": datetime.date.today().isoformat()}
    with tempfile.TemporaryDirectory() as cache:
        if args.cold:
            measure_cold(args, commits)
        elif args.scaling:
            measure_scaling(args, tasks, commits, cache)
        else:
            measure_pairs(args, tasks, commits, cache)
    path = args.out / "speed.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record[mode] = origin | machine() | {"commits": commits}
    path.write_text(json.dumps(record, indent=2) + "\n")
    (args.out / "speed.md").write_text(page(args.out))
    print(page(args.out), f"written to {args.out}", sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
