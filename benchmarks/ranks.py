"""Two ranks on one machine beside one process: what they learn, and how fast.

    python benchmarks/ranks.py --curves    # CartPole-v1 and HalfCheetah-v5, an hour
    python benchmarks/ranks.py --speed     # CartPole-v1 and Breakout, with nothing else running

With --curves both play the same environments with the same settings, five seeds each; HalfCheetah
with --num-envs 2 --num-steps 1024, which is the default batch, for 300,000 steps. With --speed, two
ranks of one thread and one process with two threads and with one run in turn, the order turning
round after each round; speed is counted as in benchmarks/speed.py.

Writes ranks_curves.csv: the mean return of the last 100 episodes, 50 times a run; ranks_speed.csv:
a row for each run; and ranks.json: where they come from, all in docs/results/. Prints the tables of
docs/scaling.md, which is all it does without a flag.
"""

import csv
import dataclasses
import datetime
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

import tyro
from speed import (
    ROOT,
    TASKS,
    Program,
    Task,
    commit_of,
    execute,
    machine,
    results_folder,
    save,
    steps_per_second,
    without_paths,
)

SEEDS = (1, 2, 3, 4, 5)
CURVES = [
    dataclasses.replace(TASKS[0], steps=500_000),
    dataclasses.replace(TASKS[1], num_envs=2, num_steps=1024, steps=300_000),
]
SPEED = [TASKS[0], TASKS[2]]


@dataclasses.dataclass(frozen=True)
class Args:
    curves: bool = False  # what is learned
    speed: bool = False  # how fast
    rounds: int = 5  # of --speed
    out: Path = ROOT / "docs" / "results"  # folder of the results


def program(task: Task, ranks: int, threads: int, commit: str) -> Program:
    """Our script in so many ranks with so many threads each."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [ROOT / task.script, "--torch-threads", str(threads)]
    name = f"{ranks} x {threads}"
    return Program(name, "", str(threads), [*torchrun * (ranks > 1), *command], commit)


def measure_curves(args: Args, commit: str, cache: str):
    rows = []
    for task in CURVES:
        for seed in SEEDS:
            for ranks in (1, 2):
                run = execute(program(task, ranks, 1, commit), task.flags(seed), cache)
                name = "charts/mean_episodic_return"
                points = [(step, value) for step, _, key, value in run.metrics if key == name]
                every = len(points) / 50
                for step, value in [points[round((i + 1) * every) - 1] for i in range(50)]:
                    row = {"env_id": task.env_id, "ranks": ranks, "seed": seed}
                    row |= {"global_step": step, "mean_return": round(value, 2)}
                    save(args.out / "ranks_curves.csv", rows, row | {"commit": commit})


def measure_speed(args: Args, commit: str, cache: str):
    rows = []
    for task in SPEED:
        for number in range(1, args.rounds + 1):
            order = [program(task, *kind, commit) for kind in ((1, 1), (1, 2), (2, 1))]
            for one in order if number % 2 else reversed(order):
                run = execute(one, task.flags(seed=number), cache)
                row = {"script": task.script, "ranks_x_threads": one.name, "round": number}
                row |= {"steps": task.steps}
                row |= {"steps_per_second": round(steps_per_second(run.metrics), 1)}
                save(args.out / "ranks_speed.csv", rows, row | {"commit": commit})


def read(path: Path) -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


def curves_table(rows: list[dict]) -> list[str]:
    """Mean return at the end, over the seeds; the difference, and its standard error."""
    lines = ["| environment | one process | two ranks | difference |", "|---|---|---|---|"]
    for task in CURVES:
        last = {}
        for row in rows:  # the later row of a run replaces the earlier
            if row["env_id"] == task.env_id:
                last[row["ranks"], row["seed"]] = float(row["mean_return"])
        one, two = ([x for (ranks, _), x in last.items() if ranks == k] for k in "12")
        means = [statistics.fmean(x) for x in (one, two)]
        error = math.hypot(*(statistics.stdev(x) / len(x) ** 0.5 for x in (one, two)))
        cells = [f"{statistics.fmean(x):,.1f} +- {statistics.stdev(x):,.1f}" for x in (one, two)]
        cells.append(f"{means[1] - means[0]:+,.1f} +- {error:,.1f}")
        lines.append(f"| {task.env_id} | {' | '.join(cells)} |")
    return lines


def speed_table(rows: list[dict]) -> list[str]:
    """Median steps per second, in brackets the lowest and the highest; the ratio of medians."""
    kinds = {"1 x 1": "one process, one thread", "1 x 2": "two threads", "2 x 1": "two ranks"}
    lines = [
        f"| script | {' | '.join(kinds.values())} | ranks / threads |",
        "|---|---|---|---|---|",
    ]
    for task in SPEED:
        found = {
            kind: sorted(
                float(row["steps_per_second"])
                for row in rows
                if (row["script"], row["ranks_x_threads"]) == (task.script, kind)
            )
            for kind in kinds
        }
        medians = {kind: statistics.median(x) for kind, x in found.items()}
        cells = [f"{medians[kind]:,.0f} ({x[0]:,.0f} to {x[-1]:,.0f})" for kind, x in found.items()]
        cells.append(f"{medians['2 x 1'] / medians['1 x 2']:.2f}")
        lines.append(f"| {task.script} | {' | '.join(cells)} |")
    return lines


def tables(folder: Path) -> str:
    """Those of docs/scaling.md."""
    curves = curves_table(read(folder / "ranks_curves.csv"))
    return "\n".join([*curves, "", *speed_table(read(folder / "ranks_speed.csv"))])


def main(args: Args):
    path, commit = results_folder(args.out) / "ranks.json", commit_of(ROOT)
    origin = {"command": without_paths(sys.argv), "date": datetime.date.today().isoformat()}
    origin |= machine() | {"commit": commit}
    for name, measure in {"curves": measure_curves, "speed": measure_speed}.items():
        if getattr(args, name):
            with tempfile.TemporaryDirectory() as cache:
                measure(args, commit, cache)
            record = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(record | {name: origin}, indent=2) + "\n")
    print(tables(args.out))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
