"""Keeps the runs of GRPO beside PPO; writes their part of docs/rlhf.md, and that of failures.

    python docs/make_critic.py runs/*    # add finished runs to docs/results/critic/, then figures
    python docs/make_critic.py           # only the figures

Kept as the runs of make_rlhf.py are, with their seconds; of language models also samples.jsonl.
"""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from make_rlhf import PAGE, read, smooth, table
from make_rlhf import keep as keep_run

RESULTS = Path(__file__).parent / "results" / "critic"
FAILURES = Path(__file__).parent / "results" / "rlhf" / "failures.csv"
STEPS = re.compile(r"(sft|rm)/(loss|grad_norm|lr|train_accuracy)$")
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, n = 2 to 10
TASKS = {  # what a run is about: how it is called, what is measured, in words
    "sort": ("`--task sort`", "gold/exact", "exactly right"),
    "reviews": ("the default task", "gold/score", "gold"),
    "films": ("SmolLM2, kind words about films", "proxy", "kindness"),
    "sums": ("SmolLM2, sums", "proxy", "right"),
}
COSTS = ("episodes", "tokens", "seconds")
METHODS = {"PPO": "C0", "GRPO": "C1", "PPO without KL": "C2", "GRPO without KL": "C3"}


def task_of(config):
    return Path(config["prompts"]).stem if config["prompts"] else config["task"]


def method_of(config):
    name = "GRPO" if config["group_size"] > 1 else "PPO"
    free = config["kl_coef"] == 0 and task_of(config) == "films"
    return f"{name} without KL" if free else name


def keep(folder):
    keep_run(folder, RESULTS, STEPS)
    if json.loads((folder / "config.json").read_text())["model"]:
        shutil.copy(folder / "samples.jsonl", RESULTS / f"{folder.name}.jsonl")


def load():
    """{(task, method): [(config, metrics), ...]} in the order of TASKS, METHODS and seeds."""
    runs = sorted(read(RESULTS), key=lambda run: run[0]["seed"])
    groups = {(task, method): [] for task in TASKS for method in METHODS}
    for run in [run for run in runs if run[0]["stages"] != "eval"]:
        groups[task_of(run[0]), method_of(run[0])].append(run)
    return {key: group for key, group in groups.items() if group}


def interval(values, digits=3):
    """Mean and, of two values or more, its 95 % interval by Student's t."""
    mean, n = np.mean(values), len(values)
    if n == 1:
        return f"{mean:.{digits}f}"
    half = T95[n - 2] * np.std(values, ddof=1) / n**0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def seconds(metrics):
    return sum(metrics[f"time/{name}"].sum() for name in ("gen", "score", "train"))


def tokens(config, metrics):
    return config["batch_size"] * metrics["response/length"].sum()


def those(group):
    return ", ".join(str(config["seed"]) for config, _ in group)


def critic(groups):
    """Tables and pictures of all runs, by task."""
    lines = []
    for task, (title, name, words) in TASKS.items():
        runs = {method: group for (of, method), group in groups.items() if of == task}
        if not runs:
            continue
        lines += [f"### {title[0].upper()}{title[1:]}", ""]
        shown = {"proxy": "proxy", "kl": "KL", "length": "length"}
        shown = {name: "after"} | {k: v for k, v in shown.items() if k != name}
        body = [("", f"{words}, before", *shown.values(), *COSTS)]
        for method, group in runs.items():
            metrics = [x for _, x in group]
            cells = [interval([x[f"eval/sft/{name}"][-1] for x in metrics])]
            for column in shown:
                cells.append(interval([x[f"eval/ppo/{column}"][-1] for x in metrics]))
            cells += [f"{group[0][1]['ppo/episode'][-1]:,.0f}"]
            cells += [f"{np.median([tokens(*run) for run in group]):,.0f}"]
            cells += [f"{np.median([seconds(x) for x in metrics]):,.0f}"]
            body.append((method, *cells))
        lines += [*table(*body), ""]
        for method, group in runs.items():
            command = re.sub(r" --seed \d+| --load \S+| --track", "", group[0][0]["command"])
            commits = ", ".join(sorted({config["git_commit"][:12] for config, _ in group}))
            command = command.replace("\n", "\\n")
            lines += [f"{method}, seeds {those(group)}: `python {command}`; commit {commits}.", ""]
        lines += [f"![{title}](results/critic/{task}.png)", ""]
    lines += ["After ±: half of the 95 % interval, by Student's t over seeds.", ""]
    machines = "; ".join(sorted({x["machine"] for group in groups.values() for x, _ in group}))
    return [*lines, f"Machine: {machines}; other work ran on the same cores.", ""]


def texts(groups):
    """What the policies of one seed say of the same prompts, before and after."""
    said = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        config = json.loads(path.with_suffix(".json").read_text())
        for row in map(json.loads, path.read_text().splitlines()):
            if "policy" in row and task_of(config) == "films" and config["seed"] == 1:
                policy = "SFT" if row["policy"] == "SFT" else method_of(config)
                text = " ".join(row["response"].replace("|", "\\|").split())
                said.setdefault(policy, {})[row["prompt"]] = f"{text} ({row['score']:.2f})"
    policies = ["SFT", *METHODS]
    body = [("prompt", "SmolLM2 as it is", *METHODS)]
    body += [(x, *(said[policy][x] for policy in policies)) for x in said["SFT"]]
    return [*table(*body), "", "In brackets the score.", ""]


def failures(groups):
    """A table of what benchmarks/failures.py has seen."""
    with open(FAILURES) as file:
        rows = list(csv.DictReader(file))
    facts = json.loads(FAILURES.with_suffix(".json").read_text())
    body = [("what was provoked", "by", "metric", "first", "lowest", "last", "last, unchanged")]
    for name, case in facts["cases"].items():
        group = [row for row in rows if row["case"] == name]
        values = np.array([float(row["value"]) for row in group])
        means = [values[:5].mean(), values.min(), values[-5:].mean()]
        other = [float(row["unchanged"]) for row in group[-5:] if row["unchanged"]]
        how = f"`{case['flags']}`" if case["flags"] else f"`{case['line'][1]}`"
        cells = [f"{x:.2f}" for x in means] + [f"{np.mean(other):.2f}" if other else ""]
        body.append((name, how, f"`{group[0]['metric']}`", *cells))
    origin = (
        f"`{facts['command']}`, {facts['date']}, {facts['cpu']}; commit {facts['commit'][:12]}."
    )
    return [*table(*body), "", "First and last: means of five iterations.", origin, ""]


def page(groups):
    """docs/rlhf.md with the figures of these runs"""
    text = PAGE.read_text()
    for function in (critic, texts, failures):
        first, end = f"<!-- {function.__name__}, by make_critic.py -->\n", "<!-- end -->"
        before, rest = text.split(first)
        text = "\n".join([before + first, *function(groups), end + rest.partition(end)[2]])
    return text


def plot(groups, task, path):
    """Means over the seeds, with the band between the lowest and the highest."""
    _, name, words = TASKS[task]
    name = name.replace("proxy", "objective/scores")
    panels = {name: words, "objective/kl": "KL, nats"}
    if any("objective/dead_groups" in metrics for _, metrics in groups.get((task, "GRPO"), [])):
        panels["objective/dead_groups"] = "groups of equal scores"
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained"
    )
    for axis, (metric, label) in zip(axes, panels.items(), strict=True):
        for method, color in METHODS.items():
            group = [metrics for _, metrics in groups.get((task, method), []) if metric in metrics]
            if group:
                curves = np.array([smooth(metrics[metric]) for metrics in group])
                episodes = smooth(group[0]["ppo/episode"])
                axis.plot(episodes, curves.mean(0), color, lw=1.2, label=method)
                axis.fill_between(episodes, curves.min(0), curves.max(0), color=color, alpha=0.2)
        axis.set(xlabel="episodes", ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def pages() -> dict[Path, str]:
    """What docs/make.py compares."""
    return {PAGE: page(load())}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        keep(Path(argument))
    kept = load()
    PAGE.write_text(page(kept))
    for task in {task for task, _ in kept}:
        plot(kept, task, RESULTS / f"{task}.png")
