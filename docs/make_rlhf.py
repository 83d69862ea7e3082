"""Keeps the runs behind docs/rlhf.md, and writes its figures.

    python docs/make_rlhf.py runs/*    # add finished runs to docs/results/rlhf/, then the figures
    python docs/make_rlhf.py           # only the figures: a part of docs/rlhf.md and its picture

A run is kept as two files: {run name}.json, its config.json with the machine, and {run
name}.csv.gz, its metrics.csv without the steps of the first two stages.
"""

import csv
import gzip
import io
import json
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
PAGE = DOCS / "rlhf.md"
RESULTS = DOCS / "results" / "rlhf"
SPEED = DOCS / "results" / "rlhf_speed.json"
PHASES = ("time/gen", "time/score", "time/train")
MARKS = "<!-- figures, by make_rlhf.py -->\n", "<!-- end of figures -->"
STEPS = re.compile(r"(sft|rm)/(loss|grad_norm|lr|train_accuracy)$|time/|perf/")
COLUMNS = {  # of the evaluation, and how many digits
    "proxy": 2,
    "gold/score": 2,
    "gold/sentiment": 2,
    "gold/topic": 2,
    "gold/repeats": 2,
    "gold/illegal": 2,
    "kl": 2,
    "length": 1,
    "missing_eos": 3,
    "wins_against_sft": 2,
}


def keep(folder, results=RESULTS, left_out=STEPS):
    """Copy the run in `folder` to docs/results/rlhf/; call it on the machine that ran it."""
    config = json.loads((folder / "config.json").read_text())
    if not re.fullmatch("[0-9a-f]{40}", config["git_commit"] or ""):
        sys.exit(f"{folder}: not from a commit, but from {config['git_commit']}")
    with open("/proc/cpuinfo") as file:
        cpu = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    config["machine"] = f"{config['cpus']} cores, {cpu}, device {config['device']}"
    config["command"] = re.sub(r"(?<!\S)/\S*/(?=\S)", "", config["command"])  # of the machine
    config["load"] = config["load"] and Path(config["load"]).parent.name
    with open(folder / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if not left_out.match(row["name"])]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["global_step", "time", "name", "value"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    results.mkdir(exist_ok=True)
    (results / f"{folder.name}.json").write_text(json.dumps(config, indent=2) + "\n")
    data = gzip.compress(text.getvalue().encode(), mtime=0)
    (results / f"{folder.name}.csv.gz").write_bytes(data)


def read(results):
    """Every run kept there: (config, {metric: values})."""
    runs = []
    for path in sorted(results.glob("*__*.json")):
        metrics = {}
        with gzip.open(path.with_suffix(".csv.gz"), "rt") as file:
            for row in csv.DictReader(file):
                metrics.setdefault(row["name"], []).append(float(row["value"]))
        metrics = {name: np.array(values) for name, values in metrics.items()}
        runs.append((json.loads(path.read_text()) | {"run_name": path.stem}, metrics))
    return runs


def load():
    """Those of docs/results/rlhf/, by task, coefficient and seed."""
    runs, order = read(RESULTS), {"reviews": 0, "sort": 1}
    return sorted(runs, key=lambda run: (order[run[0]["task"]], -run[0]["kl_coef"], run[0]["seed"]))


def select(runs, task, kl_coef):
    return [run for run in runs if run[0]["task"] == task and run[0]["kl_coef"] == kl_coef]


def coefficients(runs):
    return sorted({config["kl_coef"] for config, _ in runs if config["task"] == "reviews"})[::-1]


def smooth(values, width=5):
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def spread(values, digits=2):
    """Mean, least and most."""
    mean, least, most = (f"{x:.{digits}f}" for x in (np.mean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})"


def table(*rows):
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def figures(runs):
    """The part of docs/rlhf.md that comes from runs."""
    lines = [MARKS[0]]
    for kl_coef in coefficients(runs):
        group = select(runs, "reviews", kl_coef)
        seeds = ", ".join(str(config["seed"]) for config, _ in group)
        lines += [f"### Reviews, `--kl-coef {kl_coef:g}`, seeds {seeds}", ""]
        lines += ["512 prompts, mean over the seeds, in brackets the lowest and the highest.", ""]
        body = []
        for row, digits in COLUMNS.items():
            cells = []
            for column in ("sft", "best_of_4", "best_of_16", "ppo"):
                values = [metrics[f"eval/{column}/{row}"][-1] for _, metrics in group]
                cells.append(spread(values, digits))
            body.append((row, *cells))
        lines += [*table(("", "SFT", "best of 4", "best of 16", "PPO"), *body), ""]
        curves = [smooth(metrics["gold/score"]) for _, metrics in group]
        proxies = [smooth(metrics["objective/scores"]) for _, metrics in group]
        peaks, ends = [x.max() for x in curves], [x[-1] for x in curves]
        lines += [f"Gold in the rollouts, means of five: at its peak {spread(peaks)},"]
        lines += [
            f"in the end {spread(ends)}; proxy in the end {spread([x[-1] for x in proxies])}."
        ]
        lines += [""]
    models = [metrics for config, metrics in runs if "rm/accuracy" in metrics]
    lines += ["### Reward models", ""]
    accuracy, ceiling, gold = (
        spread([metrics[f"rm/{name}"][-1] for metrics in models], 3)
        for name in ("accuracy", "ceiling", "accuracy_gold")
    )
    lines += [f"Of the labels of 1,500 pairs that they never saw, {len(models)} reward models tell"]
    lines += [
        f"{accuracy}. The gold reward itself would tell {ceiling} of them, for the labels are"
    ]
    lines += [f"noisy. Of the pairs without the noise they tell {gold}.", ""]
    group = [run for run in runs if run[0]["task"] == "sort"]
    seeds = ", ".join(str(config["seed"]) for config, _ in group)
    exact = {
        column: spread([metrics[f"eval/{column}/gold/exact"][-1] for _, metrics in group], 3)
        for column in ("sft", "ppo")
    }
    lines += [f"### `--task sort`, seeds {seeds}", ""]
    lines += [f"Exactly right before PPO {exact['sft']}, after it {exact['ppo']}.", ""]
    lines += ["![proxy and gold](results/rlhf/curves.png)", "", "### Runs", ""]
    body = [
        (config["run_name"], f"`python {config['command']}`", config["git_commit"][:12])
        for config, _ in runs
    ]
    lines += table(("run", "command", "commit"), *body)
    machines = "; ".join(sorted({config["machine"] for config, _ in runs}))
    versions = "; ".join(sorted({json.dumps(config["versions"]) for config, _ in runs}))
    lines += ["", f"Machine: {machines}. Versions: `{versions}`.", ""]
    if (SPEED.with_suffix(".csv")).exists():
        with open(SPEED.with_suffix(".csv")) as file:
            rows = list(csv.DictReader(file))
        lines += speed(rows, json.loads(SPEED.with_suffix(".json").read_text()))
    return "\n".join([*lines, MARKS[1]])


def speed(rows, origin):
    """Medians of benchmarks/rlhf_speed.py: beside TRL, and where our time goes."""
    groups = {}
    for row in rows:
        groups.setdefault((row["program"], row["threads"]), []).append(row)
    medians = {
        key: {
            name: np.median([float(row[name]) for row in group if row[name]] or [np.nan])
            for name in ("episodes_per_second", *PHASES, "perf/tokens_per_s", "response/length")
        }
        for key, group in groups.items()
    }
    peers = [x["episodes_per_second"] for (name, _), x in medians.items() if name != "ours"]
    lines = ["### Speed", "", "Made by `benchmarks/rlhf_speed.py`, which says how it measures:"]
    lines += ["episodes per second of an update with batches of 256, medians.", ""]
    body = [("program", "threads", "runs", "episodes/s", "times the best of TRL")]
    for (name, threads), values in medians.items():
        value = values["episodes_per_second"]
        ratio = f"{value / max(peers):.2f}" if name == "ours" and peers else ""
        body.append((name, threads, len(groups[name, threads]), f"{value:,.0f}", ratio))
    lines += [*table(*body), ""]
    ours = medians["ours", "1"]
    total = sum(ours[name] for name in PHASES)
    body = [("phase, one thread", "ms", "share", "floor, ms")]
    for name in PHASES:
        floor = origin["floor_milliseconds"][name.removeprefix("time/")]
        cells = (f"{1e3 * ours[name]:,.0f}", f"{ours[name] / total:.0%}", f"{floor:,.0f}")
        body.append((name, *cells))
    tokens, length = ours["perf/tokens_per_s"], ours["response/length"]
    lines += [
        *table(*body),
        "",
        f"{tokens:,.0f} tokens of responses a second, {length:.1f} in each.",
    ]
    lines += ["The floor is the time of the multiplications, padding included, at the rate of one"]
    lines += [
        "large matrix product. The longer the responses, the less padding there is to leave out and"
    ]
    lines += ["the smaller our lead: TRL runs all columns."]
    versions = ", ".join(f"{k} {v}" for k, v in origin["versions"].items() if v)
    commits = ", ".join(f"{k} {short(v)}" for k, v in origin["commits"].items() if v)
    lines += [f"Command: `{origin['command']}`, {origin['date']}, {origin['cpus']} CPUs,"]
    return [*lines, f"{origin['cpu']}, {versions}; {commits}.", ""]


def short(commit):
    """Its first digits, and whether files had been changed since."""
    return commit[:12] + "-dirty" * commit.endswith("-dirty")


def page(runs):
    """docs/rlhf.md with the figures of these runs"""
    before, rest = PAGE.read_text().split(MARKS[0])
    return before + figures(runs) + rest.split(MARKS[1])[1]


def plot(runs, path):
    """Proxy and gold over the distance from the SFT policy; the share of exactly sorted lists."""
    coefs = coefficients(runs)
    figure, axes = plt.subplots(1, len(coefs) + 1, figsize=(15, 3.6), layout="constrained")
    for axis, kl_coef in zip(axes, coefs, strict=False):
        for number, (_, metrics) in enumerate(select(runs, "reviews", kl_coef)):
            distance = smooth(np.maximum(metrics["objective/kl"], 0.0)) ** 0.5
            for name, color in (("objective/scores", "C1"), ("gold/score", "C0")):
                label = {"C1": "proxy", "C0": "gold"}[color] if number == 0 else None
                axis.plot(distance, smooth(metrics[name]), color, lw=1, label=label)
        axis.axhline(0.0, color="0.7", lw=0.8, zorder=0)
        axis.set(title=f"reviews, kl_coef {kl_coef:g}", xlabel="square root of the KL")
        axis.set(ylabel="standard deviations of SFT samples")
        axis.legend(frameon=False)
    for config, metrics in runs:
        if config["task"] == "sort":
            axes[-1].plot(metrics["ppo/episode"], metrics["gold/exact"], "C0", lw=1)
    axes[-1].set(title="sort", xlabel="episodes", ylabel="exactly right", ylim=(0, 1))
    axes[-1].xaxis.set_major_formatter(lambda episodes, _: f"{episodes / 1000:.0f}k")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def pages() -> dict[Path, str]:
    """What docs/make.py compares."""
    return {PAGE: page(load())}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        keep(Path(argument))
    kept = load()
    PAGE.write_text(page(kept))
    plot(kept, RESULTS / "curves.png")
