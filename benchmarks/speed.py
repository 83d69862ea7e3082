"""Steps per second beside CleanRL's, in pairs: ours, theirs, ours, theirs, ...

    python benchmarks/speed.py --cleanrl PATH_OF_A_CLONE

Writes docs/results/speed.csv and prints the medians. Both run on the CPU with their default
settings; torch gets one thread for the small networks and as many as it chooses for Atari.
"""

import csv
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("script", "env_id", "threads", "steps", "pair", "program", "steps_per_second", "commit")
# our script, CleanRL's, the task, its steps, torch threads
TASKS = [
    ("ppo_discrete.py", "ppo.py", "CartPole-v1", 100_000, "1"),
    ("ppo_continuous.py", "ppo_continuous_action.py", "HalfCheetah-v5", 40_960, "1"),
    ("ppo_atari.py", "ppo_atari.py", "BreakoutNoFrameskip-v4", 8_192, "default"),
]


@dataclasses.dataclass(frozen=True)
class Args:
    cleanrl: Path  # a clone of github.com/vwxyzjn/cleanrl
    pairs: int = 3  # runs of each program for each task


def commit_of(path: Path) -> str:
    git = ["git", "-C", str(path), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()


def steps_per_second(command: list, env_id: str, steps: int, seed: int, threads: str) -> float:
    """charts/SPS at the end of one run, which includes everything but the start-up."""
    flags = ["--env-id", env_id, "--total-timesteps", str(steps), "--seed", str(seed), "--no-cuda"]
    env = os.environ | ({} if threads == "default" else {"OMP_NUM_THREADS": threads})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *map(str, command), *flags]
        subprocess.run(command, check=True, cwd=folder, env=env, capture_output=True)
        (metrics,) = Path(folder).glob("runs/**/metrics.csv")
        rows = [line.split(",") for line in metrics.read_text().splitlines()]
    return float([row[-1] for row in rows if "charts/SPS" in row][-1])


def main(args: Args):
    cleanrl = args.cleanrl.resolve()
    commits = {"ours": commit_of(ROOT), "CleanRL": commit_of(cleanrl)}
    rows = []
    for ours, theirs, env_id, steps, threads in TASKS:
        programs = {
            "ours": [ROOT / ours],
            "CleanRL": [ROOT / "benchmarks" / "cleanrl_shim.py", cleanrl / "cleanrl" / theirs],
        }
        for pair in range(1, args.pairs + 1):
            for program, command in programs.items():
                speed = steps_per_second(command, env_id, steps, pair, threads)
                rows.append((ours, env_id, threads, steps, pair, program, speed, commits[program]))
                print(*rows[-1][:-1], flush=True)
        medians = [
            statistics.median(row[6] for row in rows if row[0] == ours and row[5] == program)
            for program in programs
        ]
        print(f"{ours}: {medians[0]:.0f} and {medians[1]:.0f}, {medians[0] / medians[1]:.2f} times")
    with open(ROOT / "docs" / "results" / "speed.csv", "w") as file:
        csv.writer(file, lineterminator="\n").writerows([FIELDS, *rows])


if __name__ == "__main__":
    main(tyro.cli(Args))
