"""Writes the figures of docs/language_models.md, SmolLM2-135M by benchmarks/smollm2_train.py.

python docs/make_smollm2.py
"""

import csv
import json
from pathlib import Path

import numpy as np

from make_rlhf import table

DOCS = Path(__file__).parent
PAGE = DOCS / "language_models.md"
RESULTS = DOCS / "results" / "smollm2"
MARKS = "<!-- figures, by make_smollm2.py -->\n", "<!-- end of figures -->"
POLICIES = {"before": "SmolLM2 as it is", "sft": "after SFT", "ppo": "after PPO, exported"}


def load():
    """run.json, {metric: [(global_step, seconds, value)]}, the rows of answers.csv"""
    metrics = {}
    with open(RESULTS / "metrics.csv") as file:
        for row in csv.DictReader(file):
            point = (int(row["global_step"]), float(row["time"]), float(row["value"]))
            metrics.setdefault(row["name"], []).append(point)
    with open(RESULTS / "answers.csv") as file:
        rows = list(csv.DictReader(file))
    return json.loads((RESULTS / "run.json").read_text()), metrics, rows


def median(metrics, name):
    return float(np.median([value for _, _, value in metrics[name]]))


def share(rows, policy, column):
    """How many answers of a policy have a property, and how many there are."""
    values = [row[column] == "True" for row in rows if row["policy"] == policy]
    return sum(values), len(values)


def seconds_per_step(metrics, name):
    return float(np.median(np.diff([seconds for _, seconds, _ in metrics[name]])))


def saving(run, metrics):
    """Seconds of the dearest checkpoint of PPO, and their share of the time between two."""
    phases = sum(median(metrics, f"time/{name}") for name in ("gen", "score", "train"))
    seconds = max(x["seconds"] for x in run["saves"] if x["stage"] == 2)
    return seconds, seconds / (20 * phases)


def figures(run, metrics, rows):
    """The part of the page that comes from the run."""
    body = [("of 64 questions that were not learned from", "format kept", "ended in 24 tokens")]
    for policy, name in POLICIES.items():
        cells = [share(rows, policy, column)[0] for column in ("parses", "ended")]
        body.append((name, *cells))
    minutes, machine = run["seconds"] / 60, run["machine"]
    lines = [MARKS[0], f"`{run['command']}`", ""]
    lines += [
        "A format that the model does not have, two lines with an answer and how sure it is, is"
    ]
    lines += [
        "learned from 96 demonstrations (SFT), 136 pairs (the reward model) and 64 prompts (PPO),"
    ]
    lines += [f"in {minutes:.1f} minutes, evaluation included.", "", *table(*body), ""]
    accuracy = metrics["rm/accuracy"][-1][2]
    lines += [f"The reward model tells {accuracy:.3f} of 64 pairs that it never saw.", ""]
    parts = [("step", "seconds, median")]
    parts += [("SFT, 8 demonstrations", f"{seconds_per_step(metrics, 'sft/loss'):.1f}")]
    parts += [("reward model, 8 pairs", f"{seconds_per_step(metrics, 'rm/loss'):.1f}")]
    names = {"gen": "sampling", "score": "log-probabilities, values, scores", "train": "updates"}
    for name, words in names.items():
        parts.append((f"PPO, 32 responses: {words}", f"{median(metrics, f'time/{name}'):.1f}"))
    lines += [*table(*parts), ""]
    seconds, part = saving(run, metrics)
    sizes = {x["stage"]: x["bytes"] / 2**30 for x in run["saves"] if x["stage"] < 3}
    stages = ", ".join(f"{sizes[i]:.2f} in {name}" for i, name in enumerate(("SFT", "rm", "ppo")))
    lines += [
        f"Largest memory of the process: {run['peak_gib']:.1f} GiB, for four models in fp32, two of"
    ]
    lines += [f"which learn. A checkpoint takes, in GiB, {stages}; that of PPO is written in"]
    lines += [f"{seconds:.1f} s, {part:.1%} of the time of the 20 iterations between two.", ""]
    examples = [("question", *POLICIES.values())]
    questions = [row["question"] for row in rows if row["policy"] == "before"][:3]
    for question in questions:
        answers = [row["answer"] for row in rows if row["question"] == question]
        answers = [" / ".join(x.replace("|", "").split("\n"))[:120] for x in answers]
        examples.append((question, *answers))
    lines += [*table(*examples), ""]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines += [f"Machine: {machine['cpus']} cores, {machine['cpu']}; {versions}; commit"]
    lines += [f"{run['commit'][:12]}."]
    return "\n".join([*lines, MARKS[1]])


def page(*results):
    before, rest = PAGE.read_text().split(MARKS[0])
    return before + figures(*results) + rest.split(MARKS[1])[1]


def pages() -> dict[Path, str]:
    """What docs/make.py compares."""
    return {PAGE: page(*load())}


if __name__ == "__main__":
    PAGE.write_text(page(*load()))
