"""Writes the figures of docs/larger_models.md from docs/results/.

python docs/make_larger.py
"""

import csv
import json
from pathlib import Path

import numpy as np

from make_rlhf import short, table

DOCS = Path(__file__).parent
PAGE = DOCS / "larger_models.md"
RESULTS = DOCS / "results"
PHASES = {"time/gen": "sampling", "time/score": "scoring", "time/train": "updates"}
CASES = {"full": "all weights", "lora": "LoRA", "frugal": "LoRA, bf16, checkpointing"}


def load(name):
    """The rows of a table of docs/results, and where it comes from."""
    with open(RESULTS / f"{name}.csv") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((RESULTS / f"{name}.json").read_text())


def source(origin):
    """Command, date, machine and versions, in one paragraph."""
    versions = ", ".join(
        f"{name} {version}" for name, version in origin["versions"].items() if version
    )
    commit = short(origin.get("commit") or origin["commits"]["ours"])
    machine = f"{origin['cpus']} CPUs, {origin['cpu']}"
    return f"`{origin['command']}`, {origin['date']}, {machine}, {versions}; commit {commit}."


def memory():
    rows, origin = load("memory")
    head = ("GB", "learns", "weights", "gradients, moments", "a micro-batch", "at most", "measured")
    body = [head]
    for row in rows:
        learning = float(row["gradients"]) + float(row["moments of AdamW"])
        numbers = (float(row["weights"]), learning, float(row["update"]), float(row["calculated"]))
        cells = [f"{x:.2f}" for x in numbers] + [row["measured"]]
        body.append((row["model"], CASES[row["case"]], *cells))
    return [*table(*body), "", source(origin)]


def sampling():
    rows, origin = load("sampling")
    body = [("threads", "ours, s", "`generate`, s", "times", "7 of 8 end after 8 tokens: share")]
    for threads in sorted({row["threads"] for row in rows}):
        seconds = {}
        for row in rows:
            if row["threads"] == threads:
                seconds.setdefault((row["case"], row["program"]), []).append(float(row["seconds"]))
        ours, theirs = (np.median(seconds["all", name]) for name in ("ours", "generate"))
        ratios = [origin[name][threads] for name in ("generate_by_ours", "early_by_all")]
        body.append(
            (threads, f"{ours:.1f}", f"{theirs:.1f}", f"{ratios[0]:.2f}", f"{ratios[1]:.0%}")
        )
    return [*table(*body), "", source(origin)]


def speed():
    rows, origin = load("rlhf_speed_smollm2")
    groups = {}
    for row in rows:
        groups.setdefault((row["program"], row["threads"]), []).append(row)
    body = [("program", "threads", "episodes/s", *(f"{x}, s" for x in PHASES.values()))]
    for key, group in groups.items():
        names = ("episodes_per_second", *PHASES)
        medians = [np.median([float(row[name]) for row in group]) for name in names]
        body.append((*key, f"{medians[0]:.3f}", *(f"{x:.1f}" for x in medians[1:])))
    least = [origin["floor_milliseconds"][name.removeprefix("time/")] / 1e3 for name in PHASES]
    body.append(("products of ours alone", "1", "", *(f"{x:.1f}" for x in least)))
    return [*table(*body), "", source(origin)]


def page():
    """The page with its figures renewed."""
    text = PAGE.read_text()
    for function in (memory, sampling, speed):
        first = f"<!-- {function.__name__}, by make_larger.py -->\n"
        before, _, rest = text.partition(first)
        _, end, after = rest.partition("<!-- end of figures -->")
        text = "\n".join([before + first, *function(), "", end + after])
    return text


def pages() -> dict[Path, str]:
    """What docs/make.py compares."""
    return {PAGE: page()}


if __name__ == "__main__":
    PAGE.write_text(page())
