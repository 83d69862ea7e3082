"""Draws docs/results/scaling.png from docs/results/scaling.csv, which benchmarks/speed.py writes.

python docs/make_performance.py
"""

import csv
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"


def load(path):
    """The rows, numbers as numbers."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["default_batch"] = row["default_batch"] == "True"
        for name in ("threads", "num_envs", "round", "steps"):
            row[name] = int(row[name])
        row["steps_per_second"] = float(row["steps_per_second"])
    return rows


def curve(rows, script, over, threads):
    """x, and the median, minimum and maximum of steps per second there, over the rounds"""
    speeds = {}
    for row in rows:
        if (row["script"], row["over"], row["threads"]) == (script, over, threads):
            speeds.setdefault(row[over], []).append(row["steps_per_second"])
    x = sorted(speeds)
    return x, *([of(speeds[point]) for point in x] for of in (np.median, min, max))


def plot(rows, path):
    """Above: steps/s over the environments; below: in each tenth of one long run."""
    scripts = list(dict.fromkeys(row["script"] for row in rows))
    shape = {"figsize": (11, 6), "layout": "constrained", "sharey": "col", "squeeze": False}
    figure, axes = plt.subplots(2, len(scripts), **shape)
    for script, column in zip(scripts, axes.T, strict=True):
        of_script = [row for row in rows if row["script"] == script]
        for over, axis in zip(("num_envs", "steps"), column, strict=True):
            for number, threads in enumerate(sorted({row["threads"] for row in of_script})):
                x, median, least, most = curve(rows, script, over, threads)
                label = f"{threads} thread{'s'[: threads > 1]}"
                axis.plot(x, median, f"C{number}o-", lw=1, ms=3, label=label)
                axis.fill_between(x, least, most, color=f"C{number}", alpha=0.2, lw=0)
            axis.set(ylabel="steps/s")
            axis.spines[["top", "right"]].set_visible(False)
        larger = [row["num_envs"] for row in of_script if not row["default_batch"]]
        if larger:
            limits = min(larger) / 2**0.5, max(larger) * 2**0.5
            column[0].axvspan(*limits, color="0.93", zorder=0, label="batch above the default")
        column[0].set_ylim(bottom=0)  # of both, for they share it
        column[0].set_xscale("log", base=2)
        ticks = sorted({row["num_envs"] for row in of_script if row["over"] == "num_envs"})
        column[0].set_xticks(ticks, ticks)
        column[0].set(title=f"{script}\n{of_script[0]['env_id']}", xlabel="environments")
        column[1].set(xlabel="steps of one run, default environments")
        column[1].xaxis.set_major_formatter(lambda steps, _: f"{steps / 1000:.0f}k")
    axes[0, 0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    plot(load(RESULTS / "scaling.csv"), RESULTS / "scaling.png")
