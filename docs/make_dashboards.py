"""Makes the tables of docs/dashboards.md from the kept runs and from what openrlbenchmark has read.

python docs/make_dashboards.py
"""

import csv
import json
import textwrap
from pathlib import Path

import numpy as np

from make import with_parts
from make_results import is_stopped, load

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "dashboards.md"
READ = DOCS / "results" / "openrlbenchmark"
RUNS = {"CartPole-v1": ("ppo_discrete", 500_000), "HalfCheetah-v5": ("ppo_continuous", 1_000_000)}
METRICS = ("approx_kl", "clipfrac", "explained_variance", "entropy")


def tenth(metrics, name: str, number: int) -> float:
    """The mean of a metric over the 1st, 2nd, ... or 10th tenth of the steps of a run."""
    steps, values = metrics[name]
    end = steps.max() / 10
    return float(np.nanmean(values[(steps > (number - 1) * end) & (steps <= number * end)]))


def health() -> str:
    """Three tenths of runs with default settings: the mean over the seeds, their range."""
    header, columns, counts = ["metric"], [], []
    for env_id, (script, steps) in RUNS.items():
        default = {"exp_name": script, "total_timesteps": steps}
        runs = [
            metrics
            for config, metrics in load(env_id)
            if {k: config[k] for k in default} == default and not is_stopped(config)
        ]
        counts.append(f"{env_id} {len(runs)}")
        for number, words in ((1, "first"), (5, "fifth"), (10, "last")):
            header.append(f"{env_id}, {words} tenth")
            columns.append([[tenth(x, f"losses/{name}", number) for x in runs] for name in METRICS])
    rows = [header, ["---"] * len(header)]
    for i, name in enumerate(METRICS):
        cells = [f"{np.mean(x[i]):.2g} ({min(x[i]):.2g} to {max(x[i]):.2g})" for x in columns]
        rows.append([f"`losses/{name}`", *cells])
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"{text}\nRuns of [results.md](results.md) with default settings: {', '.join(counts)}.\n"


def read() -> str:
    """What openrlbenchmark found, a row for each filter."""
    origin = json.loads(READ.with_suffix(".json").read_text())
    with open(READ.with_suffix(".csv")) as file:
        rows = list(csv.DictReader(file))
    header = ["openrlbenchmark", "environment", "filter", "runs", "rows", "last 100"]
    lines = [[*header, "`metrics.csv`"], ["---"] * 7]
    for row in rows:
        if row["metric"] == "charts/episodic_return":
            names = (f"`{row['env_id']}`", f"`{row['filter']}`")
            numbers = (row["found"], row["rows"], row["score"])
            lines.append([row["version"][:12], *names, *numbers, row["ours_score"]])
    others = [row for row in rows if row["metric"] != "charts/episodic_return"]
    metrics = dict.fromkeys(row["metric"] for row in others)
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    versions = ", ".join(f"{k} {v}" for k, v in origin["reader"].items())
    words = f"The same with the other {len(metrics)} metrics of CleanRL's `ppo.py`:"
    words += f" {', '.join(f'`{x}`' for x in metrics)}."
    how = f"`{origin['command']}`, {origin['date']}; read with {versions}; run with wandb"
    how += f" {origin['versions']['wandb']}, torch {origin['versions']['torch']}; commit"
    how += f" {origin['commit'][:12]}."
    paragraphs = [textwrap.fill(x, 100, break_on_hyphens=False) for x in (words, how)]
    return "\n".join([text, f"{paragraphs[0]}\n", f"{paragraphs[1]}\n"])


PARTS = {"health": health, "read": read}


def pages() -> dict[Path, str]:
    return {PAGE: with_parts(PAGE, "make_dashboards", PARTS)}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
