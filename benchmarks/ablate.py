"""Takes each detail away, one at a time, trains, and keeps what came out.

    python benchmarks/ablate.py --hours 2 --jobs 2          # go on for two hours
    python benchmarks/ablate.py --only CartPole --only C8   # a task or a detail; what fits both
    python benchmarks/ablate.py --only Breakout --cuda --jobs 8
    python benchmarks/ablate.py --list                      # what there is and how far it has come

ablations.toml says what is taken away and what stands in its place: a flag of the script, or lines
of its text replaced, so that what runs is the script that people read. Each runs on its tasks with
as many seeds as the others, the unchanged script with twice as many. All seeds 1 come first, then
all seeds 2: a cut loses seeds, no detail.

Results go to docs/results/ablation/, two files for each task and ablation: TASK__NAME.csv.gz, of
every seed the return of every episode, or what a task of ppo_rlhf.py has in its place, and
TASK__NAME.json, the diff, and for each seed command, commit, hash of the text that ran, machine and
versions. What is there is not run again.
"""

import concurrent.futures
import csv
import dataclasses
import difflib
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from pathlib import Path
from typing import Annotated

import tyro
from speed import ROOT, commit_of, read_metrics

RESULTS = ROOT / "docs" / "results" / "ablation"
TABLE = Path(__file__).with_name("ablations.toml")
UNCHANGED = "unchanged"
LOCK = threading.Lock()  # of the files in RESULTS


EPISODES = ("charts/episodic_return",)
SCORES = ("gold/score", "objective/scores", "eval/ppo/gold/score", "eval/ppo/proxy")
HERE = "ablation_envs"  # the module with the environments of two tasks
NO_GAME = (  # in ppo_atari_lstm.py: an environment that is no game, as it is
    ("        if not isinstance(game.unwrapped, ale_py.AtariEnv):\n", "        if False:\n"),
    ("Watched(AtariPreprocessing(game), i)", "Watched(game, i)"),
)


@dataclasses.dataclass(frozen=True)
class Task:
    script: str
    flags: str
    steps: int  # of the environments, or episodes of ppo_rlhf.py
    seeds: int  # of each ablation; of the unchanged script twice as many
    about: str = ""  # what there is to learn, where the flags do not say it
    names: tuple[str, ...] = EPISODES  # the metrics that are kept
    edits: tuple = ()  # what the task itself asks for, before any ablation


NAMES = "the names of 16 things, two syllables out of 12 each; few of them are valid at a time"
RECALL = "the first of five pictures, by a script without its Atari wrappers"
GAME = "--env-id {}NoFrameskip-v4 --precision bf16"
MEMORY = "--num-envs 8 --num-steps 8 --num-minibatches 2 --learning-rate 1e-3 --vectorization sync"
TASKS = {
    "CartPole": Task("ppo_discrete.py", "--env-id CartPole-v1", 200_000, 5),
    "Acrobot": Task("ppo_discrete.py", "--env-id Acrobot-v1", 200_000, 5),
    "Names": Task("ppo_discrete.py", f"--env-id {HERE}:Names-v0", 50_000, 5, NAMES),
    "Recall": Task(
        *("ppo_atari_lstm.py", f"--env-id {HERE}:Recall-v0 {MEMORY}", 3200, 5, RECALL),
        edits=NO_GAME,
    ),
    "Reviews": Task("ppo_rlhf.py", "", 8320, 5, "the default task of docs/rlhf.md", SCORES),
    "HalfCheetah": Task("ppo_continuous.py", "--env-id HalfCheetah-v5", 300_000, 3),
    "Hopper": Task("ppo_continuous.py", "--env-id Hopper-v5", 300_000, 3),
    "Breakout": Task("ppo_atari.py", GAME.format("Breakout"), 200_000, 4),
    "UpNDown": Task("ppo_atari.py", GAME.format("UpNDown"), 50_000, 4),
}
TASKS |= {  # games on which the unchanged script was tried, to see how much of them it learns
    f"Pilot-{game}": Task("ppo_atari.py", GAME.format(game), 200_000, 1)
    for game in ("Krull", "UpNDown", "Boxing", "Assault")
}


@dataclasses.dataclass(frozen=True)
class Ablation:
    detail: str  # a tag, or what a choice without one is called
    instead: str  # what stands in its place
    tasks: tuple[str, ...]
    flags: str = ""
    edits: tuple = ()  # (present lines, what takes their place)
    note: str = ""  # what else changes with it
    own: bool = False  # whether these scripts decided it in their own way
    other_unit: bool = False  # whether its proxy cannot be compared

    @property
    def name(self) -> str:
        """For files: the tag, and what stands in its place."""
        words = re.sub(r"[^a-z0-9]+", "_", self.instead.lower()).strip("_")
        return f"{self.detail.replace(' ', '_')}__{words[:40].rstrip('_')}"


@dataclasses.dataclass(frozen=True)
class Args:
    hours: float = 1e9  # no run is begun after so many
    jobs: int = 1  # runs side by side, each on one thread
    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # a task or detail; repeatable
    cuda: bool = False  # on the GPU, where many runs of Atari find room side by side
    list: bool = False  # say what there is, and run nothing


def ablations() -> list[Ablation]:
    """What ablations.toml holds, behind the unchanged script."""
    entries = tomllib.loads(TABLE.read_text())["ablation"]
    found = [Ablation(**entry | {"tasks": tuple(entry["tasks"])}) for entry in entries]
    return [Ablation(UNCHANGED, "", tuple(TASKS)), *found]


def changed(text: str, edits: tuple) -> str:
    """The script's text with lines replaced; an error if one is not there exactly once."""
    for old, new in edits:
        if (count := text.count(old)) != 1:
            raise ValueError(f"{count} times in the script: {old.strip()}")
        text = text.replace(old, new)
    return text


def diff(text: str, edits: tuple) -> str:
    """What is taken away and what takes its place, as lines of a unified diff."""
    pair = text.splitlines(), changed(text, edits).splitlines()
    lines = list(difflib.unified_diff(*pair, lineterm="", n=0))[2:]
    return "\n".join(line for line in lines if not line.startswith("@@"))


def files(task: str, ablation: Ablation) -> tuple[Path, Path]:
    """The JSON and the CSV of a task and an ablation."""
    name = UNCHANGED if ablation.detail == UNCHANGED else ablation.name
    return RESULTS / f"{task}__{name}.json", RESULTS / f"{task}__{name}.csv.gz"


def stored(task: str, ablation: Ablation) -> dict:
    """What is known of a task and an ablation; `runs` has one entry a seed."""
    path, _ = files(task, ablation)
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def rows_of(task: str, ablation: Ablation) -> list[dict]:
    """The rows of its CSV."""
    _, path = files(task, ablation)
    if not path.exists():
        return []
    with gzip.open(path, "rt", newline="") as file:
        return list(csv.DictReader(file))


def jobs(found: list[Ablation], only: tuple[str, ...]) -> list[tuple[str, Ablation, int]]:
    """What is missing: task, ablation, seed. Seed by seed, in each the tasks in their order.

    With a detail comes the unchanged script on its tasks.
    """
    missing = []
    details = set(only) - TASKS.keys()
    chosen = [x for x in found if not details or x.detail in details]
    tasks = [x for x in TASKS if x in only or not set(only) & TASKS.keys()]
    tasks = [x for x in tasks if any(x in ablation.tasks for ablation in chosen)]
    for task in tasks:
        for ablation in found:
            wanted = ablation in chosen or ablation.detail == UNCHANGED
            if task not in ablation.tasks or not wanted:
                continue
            unchanged = ablation.detail == UNCHANGED
            there = {run["seed"] for run in stored(task, ablation)["runs"]}
            seeds = range(1, TASKS[task].seeds * (1 + unchanged) + 1)
            # the unchanged script's seeds 1 and 2 go with the others' first
            when = {seed: (seed + 1) // 2 if unchanged else seed for seed in seeds}
            missing += [(when[seed], task, ablation, seed) for seed in seeds if seed not in there]
    missing.sort(key=lambda job: (job[0], list(TASKS).index(job[1])))
    return [job[1:] for job in missing]


def command(task: Task, ablation: Ablation, seed: int, cuda: bool = False) -> list[str]:
    total = "--total-episodes" if task.script == "ppo_rlhf.py" else "--total-timesteps"
    flags = [*shlex.split(task.flags), total, str(task.steps), "--seed", str(seed)]
    flags += ["--cuda" if cuda else "--no-cuda", "--torch-threads", "1"]
    return [task.script, *flags, *shlex.split(ablation.flags)]


def script_of(task: Task) -> str:
    """The text of its script, as the task asks for it."""
    return changed((ROOT / task.script).read_text(), task.edits)


def run(
    name: str, ablation: Ablation, seed: int, commit: str, script: str, cuda: bool = False
) -> str:
    """Train with the script, without the detail, and keep the result; or why there is none."""
    task = TASKS[name]
    text, words = changed(script, ablation.edits), command(task, ablation, seed, cuda)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / task.script).write_text(text)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TABLE.parent)}
        process = subprocess.run(
            [sys.executable, *words], check=False, cwd=folder, env=env, **pipes
        )
        said = (process.stdout.strip().splitlines() or [""])[-1] if process.returncode else ""
        made = next(Path(folder).glob("runs/*"), None)
        # a run that the script itself has ended, with code 2, since its numbers were no longer
        # finite, is a result, too: such a detail is needed; a signal or a traceback is none
        if process.returncode not in (0, 2) or made is None:
            return f"exit code {process.returncode}, not kept: {said}"
        config = json.loads((made / "config.json").read_text())
        metrics = read_metrics(made / "metrics.csv")
    with open("/proc/cpuinfo") as file:
        cpu = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    entry = {
        "seed": seed,
        "command": shlex.join(words),
        "git_commit": commit,
        "script_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "machine": f"{config['cpus']} cores, {cpu}, device {config['device']}",
        "versions": config["versions"],
        "steps": max((step for step, *_ in metrics), default=0),
        "precision": config.get("precision"),
        "exit_code": process.returncode,
        "said": said,
    }
    rows = [(step, key, f"{x:.6g}") for step, _, key, x in metrics if key in task.names]
    keep(name, ablation, entry, rows, diff(script, ablation.edits))
    return said


def keep(task: str, ablation: Ablation, entry: dict, rows: list[tuple], difference: str):
    """Add a run to the two files of its task and ablation, by seed."""
    path, table_path = files(task, ablation)
    seed = entry["seed"]
    with LOCK:
        data = stored(task, ablation)
        of_task = {"task": task, "task_flags": TASKS[task].flags, "steps": TASKS[task].steps}
        what = {"script": TASKS[task].script, "detail": ablation.detail}
        what |= {"instead": ablation.instead, "flags": ablation.flags, "diff": difference}
        runs = [x for x in data["runs"] if x["seed"] != seed] + [entry]
        data = of_task | what | {"runs": sorted(runs, key=lambda x: x["seed"])}
        names = ("seed", "global_step", "name", "value")
        new = [dict(zip(names, (seed, *row), strict=True)) for row in rows]
        old = [row for row in rows_of(task, ablation) if int(row["seed"]) != seed]
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(old + new, key=lambda row: int(row["seed"])))
        RESULTS.mkdir(parents=True, exist_ok=True)
        write(table_path, gzip.compress(text.getvalue().encode(), mtime=0))
        write(path, (json.dumps(data, indent=2) + "\n").encode())  # last: it says what is there


def write(path: Path, data: bytes):
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def show(found: list[Ablation]):
    """How many runs of each task and ablation are there."""
    for ablation in found:
        for task in ablation.tasks:
            wanted = TASKS[task].seeds * (1 + (ablation.detail == UNCHANGED))
            there = len(stored(task, ablation)["runs"])
            print(f"{there} of {wanted}  {task}  {ablation.detail}  {ablation.instead}")


def main(args: Args) -> int:
    found = ablations()
    if unknown := set(args.only) - TASKS.keys() - {x.detail for x in found}:
        print(f"error: --only {min(unknown)}: neither a task nor a detail", file=sys.stderr)
        return 2
    if args.list:
        show(found)
        return 0
    git = ["git", "-C", str(ROOT), "status", "--porcelain", "--", "*.py", "*.toml"]
    if subprocess.run(git, check=True, capture_output=True).stdout:
        print("error: commit first, so that every run names what it ran", file=sys.stderr)
        return 2
    commit = commit_of(ROOT).removesuffix("-dirty")  # by results of earlier runs
    scripts = {name: script_of(task) for name, task in TASKS.items()}
    end = time.monotonic() + 3600 * args.hours
    missing = jobs(found, args.only)

    def one(job):
        task, ablation, seed = job
        if time.monotonic() < end:
            start = time.monotonic()
            said = run(task, ablation, seed, commit, scripts[task], args.cuda)
            words = f"seed {seed}: {time.monotonic() - start:.0f} s {said}".rstrip()
            print(task, ablation.detail, ablation.instead, words, flush=True)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, missing))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
