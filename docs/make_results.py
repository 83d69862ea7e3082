"""Keeps the runs behind every figure of the documentation, and writes the page about them.

    python docs/make_results.py runs/*    # add finished runs to docs/results/, then the page
    python docs/make_results.py           # only the page, docs/results.md, and its picture

A run is kept as two files: {run name}.json, its config.json (command, commit, script hash,
versions) with the machine, and {run name}.csv.gz, its metrics.csv with every episode and 500 rows
of each other metric.
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
RESULTS = DOCS / "results"
EPISODE = ("charts/episodic_return", "charts/episodic_length")

# environment, what sets its runs apart, least score of a seed, least mean, CleanRL's of 3 seeds
GROUPS = [
    ("CartPole-v1", {}, 490, 490, "490.0 +- 6.1"),
    ("Acrobot-v1", {}, -88, -87, "-86.4 +- 1.3"),
    ("HalfCheetah-v5", {}, 1300, 1350, "1,443 +- 46 (v4)"),
    ("Hopper-v5", {}, 1800, 2130, "2,383 +- 272 (v4)"),
    ("InvertedPendulum-v5", {}, 950, 950, ""),
    ("Pendulum-v1", {"bootstrap_truncation": True}, None, None, ""),
    ("Pendulum-v1", {"bootstrap_truncation": False}, None, None, ""),
    ("PongNoFrameskip-v4", {"exp_name": "ppo_atari", "precision": "bf16"}, -18, -18, ""),
    ("PongNoFrameskip-v4", {"exp_name": "ppo_atari", "precision": "fp32"}, None, None, ""),
    ("PongNoFrameskip-v4", {"exp_name": "ppo_atari_lstm"}, None, None, ""),
    ("BreakoutNoFrameskip-v4", {}, None, None, ""),
]
NOTES = {  # what sets the runs of a group apart, in words
    ("bootstrap_truncation", True): "bootstrap",
    ("bootstrap_truncation", False): "no bootstrap",
    ("precision", "bf16"): "bf16",
    ("precision", "fp32"): "fp32",
    ("exp_name", "ppo_atari"): "no memory",
    ("exp_name", "ppo_atari_lstm"): "with memory, bf16",
}


INTRODUCTION = """# Results

Made by `python docs/make.py` from the runs in [results/](results), which hold every
episode. A score is the mean return of the last 100 training episodes of a run, played by the
stochastic policy while it learns, as everywhere in the field. CleanRL's column is what it
[publishes](https://github.com/vwxyzjn/cleanrl/tree/fe8d8a0/docs/benchmark) for its own scripts.
Tests ask for the least score of each seed and the least mean, which is about CleanRL's less 5 % or
its deviation; a seed below its least score is marked with an asterisk. Pong ran for 15 % of the
default 10M steps, with memory (ppo_atari_lstm.py) for 20 %, Breakout, a first look, for 3 %. The
runs are of several commits, see below.
In Pendulum-v1 every episode is cut off by its time limit: with bootstrapping the task is solved,
without it the return stays far below.

| environment | steps | seeds | score of each | least | mean | least mean | CleanRL |
|---|---|---|---|---|---|---|---|"""

AGAIN = """## Once more

`python benchmarks/regress.py` trains CartPole-v1, Acrobot-v1, InvertedPendulum-v5 and the default
of [ppo_rlhf.py](rlhf.md) with a seed that is not among these, a quarter of an hour on one core. For
each it says whether the score lies in the 95 % prediction interval for one more run, from the
scores of the stored ones, made wide enough for the least score above. Its exit code is 1 if one is
below. Run it after a change that should leave learning as it is, or on a machine of your own."""


def thin(rows):
    """All episodes, and of every other metric 500 rows, evenly spaced with the first and last."""
    steps = {}
    for row in rows:
        if row["name"] not in EPISODE:
            steps.setdefault(row["name"], []).append(row["global_step"])
    for name, of_name in steps.items():
        chosen = np.linspace(0, len(of_name) - 1, min(500, len(of_name))).round().astype(int)
        steps[name] = {of_name[i] for i in chosen}
    return [r for r in rows if r["name"] in EPISODE or r["global_step"] in steps[r["name"]]]


def keep(folder):
    """Copy the run in `folder` to docs/results/; call it on the machine that ran it."""
    config = json.loads((folder / "config.json").read_text())
    if not re.fullmatch("[0-9a-f]{40}", config["git_commit"] or ""):
        sys.exit(f"{folder}: not from a commit, but from {config['git_commit']}")
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    with open("/proc/cpuinfo") as file:
        cpu = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    config["run_name"] = folder.name
    iterations = [row["global_step"] for row in rows if row["name"] == "charts/SPS"]
    config["steps"] = int(iterations[-1])  # less than planned if it was stopped
    rows = [row for row in rows if int(row["global_step"]) <= config["steps"]]
    config["machine"] = f"{config['cpus']} cores, {cpu}, device {config['device']}"
    (RESULTS / f"{folder.name}.json").write_text(json.dumps(config, indent=2) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, ["global_step", "time", "name", "value"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(thin(rows))
    data = gzip.compress(text.getvalue().encode(), mtime=0)
    (RESULTS / f"{folder.name}.csv.gz").write_bytes(data)


def load(env_id="*"):
    """Every kept run, or an environment's: (config, {metric: (steps, values)}), by seed."""
    runs = []
    for path in RESULTS.glob(f"{env_id}__*.json"):
        with gzip.open(path.with_suffix(".csv.gz"), "rt") as file:
            metrics = {}
            for row in csv.DictReader(file):
                pair = (int(row["global_step"]), float(row["value"]))
                metrics.setdefault(row["name"], []).append(pair)
        metrics = {name: np.array(pairs).T for name, pairs in metrics.items()}
        runs.append((json.loads(path.read_text()), metrics))
    return sorted(runs, key=lambda run: (run[0]["env_id"], run[0]["seed"]))


def last_100(metrics, until=np.inf):
    """Mean return of the last 100 training episodes, or of those before a step."""
    steps, returns = metrics["charts/episodic_return"]
    return returns[steps <= until][-100:].mean()


def is_stopped(config):
    """Before all of its iterations were done."""
    planned = config["num_iterations"] * config["batch_size"]
    return config.get("steps", planned) < planned


def select(runs, env_id, changes):
    """The runs of a group."""
    wanted = {"env_id": env_id} | changes
    return [run for run in runs if wanted.items() <= run[0].items()]


def precisions(runs):
    """Pong where the shortest run ended, in a sentence."""
    pong = select(runs, "PongNoFrameskip-v4", {"exp_name": "ppo_atari"})
    groups = {x: [run for run in pong if run[0]["precision"] == x] for x in ("bf16", "fp32")}
    until = min(config["steps"] for group in groups.values() for config, _ in group)
    scores = {
        name: " ".join(f"{last_100(metrics, until):.1f}" for _, metrics in group)
        for name, group in groups.items()
    }
    text = f"PongNoFrameskip-v4 after {until:,} steps, where the runs in fp32 were stopped: "
    return text + f"{scores['bf16']} in bf16, {scores['fp32']} in fp32."


def page(runs):
    """docs/results.md"""
    lines = [INTRODUCTION]
    for env_id, changes, least, least_mean, peer in GROUPS:
        group = select(runs, env_id, changes)
        scores = [last_100(metrics) for _, metrics in group]
        low = -np.inf if least is None else least
        digits = 0 if abs(np.mean(scores)) > 1000 else 1
        seeds = " ".join(str(config["seed"]) for config, _ in group)
        planned = f"{group[0][0]['total_timesteps']:,}"
        stopped = [f"{config['steps']:,}" for config, _ in group if is_stopped(config)]
        cells = (
            ", ".join([env_id, *(NOTES[change] for change in changes.items())]),
            f"{planned} (stopped after {', '.join(stopped)})" if stopped else planned,
            seeds,
            " ".join(f"{x:,.{digits}f}{'*' if x < low else ''}" for x in scores),
            "" if least is None else f"{least:,}",
            f"{np.mean(scores):,.{digits}f}",
            "" if least_mean is None else f"{least_mean:,}",
            peer,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", precisions(runs)]
    lines += ["", "![learning curves](results/curves.png)", "", AGAIN, "", "## Runs", ""]
    lines += [
        "| run | command | steps/s | minutes | torch threads | commit | sha256 of the script |",
        "|---|---|---|---|---|---|---|",
    ]
    for config, metrics in runs:
        steps, speeds = metrics["charts/SPS"]
        lines.append(
            f"| {config['run_name']} | `python {config['command']}` "
            f"| {speeds[-1]:,.0f} | {steps[-1] / speeds[-1] / 60:.1f} | {config['torch_threads']} "
            f"| {config['git_commit'][:12]} | {config['script_sha256'][:12]} |"
        )
    machines = sorted({config["machine"] for config, _ in runs})
    versions = sorted({json.dumps(config["versions"]) for config, _ in runs})
    lines += ["", f"Machine: {'; '.join(machines)}, shared, with up to two other runs beside each:"]
    lines += ["these steps/s are no benchmark."]
    lines += ["", *(f"Versions: `{version}`" for version in versions)]
    lines += ["", "Speed and memory are in [performance.md](performance.md)."]
    return "\n".join(lines) + "\n"


def plot(runs, path):
    """Return of each episode, averaged over windows of 1/50 of the training."""
    tasks = list(dict.fromkeys(env_id for env_id, *_ in GROUPS))
    columns = -(-len(tasks) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(3.7 * columns, 6), layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    for axis, task in zip(axes.flat, tasks, strict=False):
        groups = [group for group in GROUPS if group[0] == task]
        for color, (env_id, changes, _, least, _) in zip(("C0", "C1", "C2"), groups, strict=False):
            for number, (config, metrics) in enumerate(select(runs, env_id, changes)):
                steps, returns = metrics["charts/episodic_return"]
                edges = np.linspace(0, config["total_timesteps"], 51)
                window = np.digitize(steps, edges[1:-1])
                curve = [
                    returns[window == i].mean() if (window == i).any() else np.nan
                    for i in range(50)
                ]
                label = ", ".join(NOTES[change] for change in changes.items())
                axis.plot(edges[1:], curve, color, lw=1, label=label if number == 0 else None)
            if least is not None:
                axis.axhline(least, color="0.7", lw=0.8, ls="--", zorder=0)
            if changes:
                axis.legend(frameon=False, fontsize="small")
        axis.set(title=task, xlabel="steps", ylabel="episodic return")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(3, 3))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def pages() -> dict[Path, str]:
    """What docs/make.py compares."""
    return {DOCS / "results.md": page(load())}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        keep(Path(argument))
    kept = load()
    (DOCS / "results.md").write_text(page(kept))
    plot(kept, RESULTS / "curves.png")
