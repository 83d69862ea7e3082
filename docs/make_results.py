"""Keeps the runs behind every figure of the documentation, and writes the page about them.

    python docs/make_results.py runs/*          # add finished runs to docs/results/, then the page
    python docs/make_results.py --long runs/X   # the same of a run that may go on elsewhere
    python docs/make_results.py                 # only the page, docs/results.md, and its pictures

A run is kept as two or three files: {run name}.json, its config.json (command, commit, script hash,
versions) with the machine; {run name}.csv.gz, its metrics.csv with every episode and 100 rows of
each other metric; {run name}.eval.csv, the games that --evaluate has played, if it has. Runs of
CleanRL's scripts, made by benchmarks/cleanrl_shim.py, go to results/cleanrl/. Of a long one, which
may have been trained by a copy of the script in another place, all files are kept in results/long/,
as they were at its last checkpoint; its commits are found by the hashes of the scripts.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
EPISODE = ("charts/episodic_return", "charts/episodic_length")
RESAMPLES = 50_000  # of the seeds, for an interval, as rliable's
WINDOWS = 50  # of a curve
PIPED = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}


class Group(NamedTuple):
    env_id: str
    changes: dict  # what sets its runs apart
    least: float | None = None  # score asked of every seed
    least_mean: float | None = None
    cleanrl: tuple | None = None  # published: mean and deviation of three seeds
    baselines: tuple | None = None  # published, of openai/baselines: mean and deviation, if given


SHORT = {"exp_name": "ppo_atari", "total_timesteps": 1_500_000}
PLAIN = {"gamma": 0.99, "bootstrap_truncation": True}
MEMORY, LONG, BF16, FP32 = (
    {"exp_name": "ppo_atari_lstm"},
    {"exp_name": "ppo_atari", "total_timesteps": 10_000_000},
    SHORT | {"precision": "bf16"},
    SHORT | {"precision": "fp32"},
)
SECTIONS = {
    "Classic control": [
        Group("CartPole-v1", {}, 490, 490, (490.04, 6.12), (497.54, 4.02)),
        Group("Acrobot-v1", {}, -88, -86, (-86.36, 1.32), (-81.82, 5.58)),
        Group("MountainCar-v0", {}, None, None, (-200, 0), (-200, 0)),
    ],
    "MuJoCo": [
        Group("HalfCheetah-v5", {}, 1300, 1421, (1442.64, 46.03), (1428.55, 62.40)),
        Group("Hopper-v5", {}, 1800, 2387, (2382.86, 271.74), (2158.65, 302.33)),
        Group("Walker2d-v5", {}, None, 2790, (2287.95, 571.78), (3356.49, 322.61)),
        Group("Ant-v5", {}),
        Group("Humanoid-v5", {}, None, None, (716.11, 49.08), (673.11, 53.02)),
        Group("Swimmer-v5", PLAIN, None, None, None, (111.19,)),
        Group("Reacher-v5", {}, None, None, None, (-6.71,)),
        Group("Pusher-v5", {}, None, None, (-40.38, 7.15), (-56.83, 13.33)),
        Group("InvertedPendulum-v5", {}, 950, 950, (963.09, 22.20), (901.25, 35.73)),
        Group("InvertedDoublePendulum-v5", {}, None, None, None, (7102.91,)),
    ],
    "Atari": [
        Group("BreakoutNoFrameskip-v4", LONG, None, 350, (414.66, 28.09), (405.73, 11.47)),
        Group("PongNoFrameskip-v4", LONG, None, 20, (20.36, 0.20), (20.45, 0.81)),
        Group("PongNoFrameskip-v4", BF16, -18, -18),
        Group("PongNoFrameskip-v4", FP32),
        Group("PongNoFrameskip-v4", MEMORY, None, None, (19.81, 0.62), (19.79, 0.67)),
    ],
    "Swimmer": [
        Group("Swimmer-v5", PLAIN),
        Group("Swimmer-v5", PLAIN | {"gamma": 0.999}),
        Group("Swimmer-v5", PLAIN | {"bootstrap_truncation": False}),
    ],
    "Time limits": [
        Group("Pendulum-v1", {"bootstrap_truncation": True}),
        Group("Pendulum-v1", {"bootstrap_truncation": False}),
    ],
}
GROUPS = [group for groups in SECTIONS.values() for group in groups]
SEEDS = {"Classic control": 10, "MuJoCo": 5}  # that each of their groups shall have
NOTES = {  # what sets the runs of a group apart, in words
    ("gamma", 0.99): "",
    ("gamma", 0.999): "gamma 0.999",
    ("bootstrap_truncation", True): "",
    ("bootstrap_truncation", False): "no bootstrap",
    ("precision", "bf16"): "bf16",
    ("precision", "fp32"): "fp32",
    ("exp_name", "ppo_atari"): "no memory",
    ("exp_name", "ppo_atari_lstm"): "with memory, 2M steps, bf16",
    ("total_timesteps", 1_500_000): "1.5M steps",
    ("total_timesteps", 10_000_000): "10M steps, bf16",
}
INTRODUCTION = """# Results

<!-- made by docs/make_results.py, do not edit -->

Made from the runs in [results/](results), which hold every episode. What the columns are:

- **score**: the mean return of the last 100 training episodes of a run, played by the policy while
  it still learns, as everywhere in the field; then mean and standard deviation over seeds, divided
  by their number, as CleanRL does it.
- **IQM**: the mean of the middle half of the seeds (of 3 all, of 5 the middle 3, of 10 the middle
  6), with a 95 % bootstrap interval, as [rliable](https://arxiv.org/abs/2108.13264) defines both:
  percentiles of 50,000 resamples of the seeds. Of three seeds it reaches from the lowest to the
  highest.
- **evaluated**: the same from 100 games of each policy that was kept, played by `--evaluate` with
  new environment seeds.
- **lowest seed**: with the least score that a test asks of every seed, where it asks for one.
- **CleanRL**: what it [publishes](https://github.com/vwxyzjn/cleanrl/tree/fe8d8a0/docs/benchmark),
  three seeds, MuJoCo v4. **here**: its script, run with the same Gymnasium and torch by
  [cleanrl_shim.py](../benchmarks/cleanrl_shim.py).
- **Baselines**: openai/baselines' ppo2 with MuJoCo v2, from
  [the blog post](https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/) for
  classic control, from [Open RL Benchmark](https://github.com/openrlbenchmark/openrlbenchmark) for
  MuJoCo and Atari, from Baselines'
  [own table](https://github.com/openai/baselines/blob/ea25b9e8b234e6ee1bca43083f8f3cf974143998/benchmarks_mujoco1M.htm)
  where no deviation is given.
- **minutes**: median of the runs, on one thread, beside another one and other work: no benchmark,
  that is on [performance.md](performance.md). Of a run that was resumed there are none, it has
  waited.

Curves are the IQM over seeds in windows of a fiftieth of the training with its interval, or each
seed where there are fewer than three. Dashed, but for Atari: CleanRL's published mean."""

TEXTS = {
    "Classic control": "500,000 steps. "
    "`python ppo_discrete.py --env-id ENV --seed SEED --no-cuda --torch-threads 1`\n\n"
    "MountainCar-v0 pays -1 a step until the car is on the hill. Whoever never comes there sees\n"
    "the same return in every episode, so there is nothing to learn from. The references end at\n"
    "-200, too.",
    "MuJoCo": "1,000,000 steps. "
    "`python ppo_continuous.py --env-id ENV --seed SEED --no-cuda --torch-threads 1`\n\n"
    "CleanRL's v4 and Baselines' v2 are not quite the same tasks: v5 has fixed rewards and\n"
    "observations of several, among them a bonus for being healthy that the fallen got, too,\n"
    "Humanoid's contact cost that was lost in v4, and what Pusher pushes was lighter than air\n"
    "([list](https://gymnasium.farama.org/environments/mujoco/)). CleanRL has other figures, too:\n"
    "HalfCheetah 2,906 +- 1,129 (v4 of 2023) and 2,263 +- 1,197 (v2), and the blog post has\n"
    "2,149 +- 1,166 for Baselines: with such deviations some of the three seeds run much faster\n"
    "than others. Of 8,000,000 steps it has (v4, ten seeds, PPO beside its RPO) Ant 1,824,\n"
    "Swimmer 124.9, Reacher -4.65 and InvertedDoublePendulum 5,626.",
    "Atari": "Agent steps of four frames; the references are of 10,000,000, as are the runs of\n"
    "Breakout and Pong in bf16, `python ppo_atari.py --env-id ENV --seed 1`, resumed again and\n"
    "again, on one thread or two: [results/long](results/long) has their checkpoints, all their\n"
    "commands and how to play them. Other runs of Pong are shorter and of older commits, whose\n"
    "random numbers were others; they stay as the only ones in fp32 and with memory, without\n"
    "their policies: they say that it learns, not where it ends. Not run: Breakout with memory,\n"
    "BeamRider, Qbert.",
    "Swimmer": "The first seeds, with other flags. Baselines takes a time limit for the end of an\n"
    "episode; to do so here, `--no-bootstrap-truncation`, does not raise their score. With\n"
    "`--gamma 0.999` they come much further: episodes have 1,000 steps, and 0.99 counts on some\n"
    "hundred of them. That holds for Baselines, too, so it does not say why its mean is higher;\n"
    "seeds here lie on both sides of it and differ by a factor of 2.5.",
    "Time limits": "300,000 steps. `python ppo_continuous.py --env-id Pendulum-v1\n"
    "--total-timesteps 300000 --seed SEED --no-cuda --torch-threads 1`, once with\n"
    "`--no-bootstrap-truncation`. Every episode of Pendulum-v1 is cut off by its time limit. With\n"
    "the value of the state behind it the task is solved, without it the return stays far below.",
}

AGAIN = """## Once more

`python benchmarks/regress.py` trains CartPole-v1, Acrobot-v1, InvertedPendulum-v5 and the default
of [ppo_rlhf.py](rlhf.md) with a seed that is not among these; the stored runs took ten minutes. For
each it says whether the score lies in the 95 % prediction interval for one more run, from the
scores of the stored ones, made wide enough for the least score above. Its exit code is 1 if one
does not. Run it after a change that should leave learning as it is, or on a machine of your own.

`python benchmarks/identical.py` says of these runs, and of those of [ppo_rlhf.py](rlhf.md) that
begin with its first stage, whether today's script still does the same bit for bit: it runs the
script of the run's commit, the first if it was resumed, and today's for three iterations each,
eight of ppo_rlhf.py, and compares all weights, of ppo_rlhf.py the policy's. What it found last,
docs/results/identical.json:"""


OF_CLEANRL = """commit: of CleanRL's runs its own. Most ran beside more other work than ours, so
their times are left out; how fast it is stands on [performance.md](performance.md)."""


def same(names, path=RESULTS / "identical.json"):
    """What benchmarks/identical.py has found, and which of the runs are newer."""
    about = json.loads(path.read_text())
    good = [x for x in about["found"] if x["verdict"].startswith("identical")]
    runs = [name for row in good for name in row["runs"]]
    text = f"The scripts of commit {about['git_commit'][:12]} do the same as those of {len(runs)} "
    text += f"runs, bit for bit, in {len(good)} of {len(about['found'])} comparisons."
    lines = [text, *(f"`{x['command']}`: {x['verdict']}." for x in about["found"] if x not in good)]
    compared = {name for row in about["found"] for name in row["runs"]}
    newer = sorted(set(names) - compared)
    return " ".join(lines + [f"Not compared yet: {', '.join(newer)}."] * bool(newer))


def thin(rows):
    """All episodes, and of every other metric 100 rows, evenly spaced with the first and last."""
    steps = {}
    for row in rows:
        if row["name"] not in EPISODE:
            steps.setdefault(row["name"], []).append(row["global_step"])
    for name, of_name in steps.items():
        chosen = np.linspace(0, len(of_name) - 1, min(100, len(of_name))).round().astype(int)
        steps[name] = {of_name[i] for i in chosen}
    return [r for r in rows if r["name"] in EPISODE or r["global_step"] in steps[r["name"]]]


def machine_of(config):
    """Of a run that was made here."""
    with open("/proc/cpuinfo") as file:
        cpu = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    return f"{config['cpus']} cores, {cpu}, device {config['device']}"


def commit_of(script, sha256):
    """The commit that made a script what it is; None if it is not in the history."""
    git = ["git", "-C", str(DOCS.parent)]
    log = subprocess.run([*git, "log", "--format=%H", "--", script], check=True, **PIPED)
    for commit in log.stdout.decode().split():
        show = subprocess.run([*git, "show", f"{commit}:{script}"], check=False, **PIPED)
        if hashlib.sha256(show.stdout).hexdigest() == sha256:
            return commit
    return None


def keep_long(folder):
    """Copy a run that was trained here to docs/results/long/, in place of what is there of it."""
    data = torch.load(folder / "checkpoint.pt", weights_only=True)
    config = json.loads((folder / "config.json").read_text())
    kept = RESULTS / "long" / data["name"].rpartition("__")[0]
    kept.mkdir(parents=True, exist_ok=True)
    for part in (config, *config.get("resumed", ())):
        script = Path(part["command"].split()[0]).name
        part["git_commit"] = commit_of(script, part["script_sha256"])
        part["machine"] = machine_of(part)
    (kept / "config.json").write_text(json.dumps(config, indent=2))
    rows = (folder / "metrics.csv").read_bytes()[: data["metrics_bytes"]]
    (kept / "metrics.csv").write_bytes(rows)
    for name in ("checkpoint.pt", "eval.csv"):
        if (folder / name).exists():
            shutil.copy(folder / name, kept)


def keep(folder):
    """Copy the run in `folder` to docs/results/; call it on the machine that ran it."""
    config = json.loads((folder / "config.json").read_text())
    if not re.fullmatch("[0-9a-f]{40}", config["git_commit"] or ""):
        sys.exit(f"{folder}: not from a commit, but from {config['git_commit']}")
    results = RESULTS / "cleanrl" if config.get("program") == "CleanRL" else RESULTS
    results.mkdir(exist_ok=True)
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    config["run_name"] = folder.name
    iterations = [row["global_step"] for row in rows if row["name"] == "charts/SPS"]
    config["steps"] = int(iterations[-1])  # less than planned if it was stopped
    rows = [row for row in rows if int(row["global_step"]) <= config["steps"]]
    config["machine"] = machine_of(config)
    (results / f"{folder.name}.json").write_text(json.dumps(config, indent=2) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, ["global_step", "time", "name", "value"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(thin(rows))
    data = gzip.compress(text.getvalue().encode(), mtime=0)
    (results / f"{folder.name}.csv.gz").write_bytes(data)
    if (folder / "eval.csv").exists():
        (results / f"{folder.name}.eval.csv").write_bytes((folder / "eval.csv").read_bytes())


def columns(file):
    """{metric: (steps, values)} of a metrics.csv; `seconds`: the time at each charts/SPS."""
    metrics = {}
    for row in csv.DictReader(file):
        step, value = int(row["global_step"]), float(row["value"])
        metrics.setdefault(row["name"], []).append((step, value))
        if row["name"] == "charts/SPS":
            metrics.setdefault("seconds", []).append((step, float(row["time"])))
    return {name: np.array(pairs).T for name, pairs in metrics.items()}


def load(env_id="*", results=RESULTS):
    """Every kept run, or an environment's: (config, {metric: (steps, values)}), by seed."""
    runs = []
    for path in results.glob(f"{env_id}__*.json"):
        with gzip.open(path.with_suffix(".csv.gz"), "rt") as file:
            runs.append((json.loads(path.read_text()), columns(file)))
    return sorted(runs, key=lambda run: (run[0]["env_id"], run[0]["seed"]))


def load_long():
    """The runs of docs/results/long/, as far as they have come, as `load` does."""
    runs = []
    for path in sorted((RESULTS / "long").glob("*/config.json")):
        with open(path.with_name("metrics.csv")) as file:
            metrics = columns(file)
        about = {"steps": int(metrics["charts/SPS"][0][-1]), "games": path.with_name("eval.csv")}
        about["run_name"] = f"long/{path.parent.name}"
        runs.append((json.loads(path.read_text()) | about, metrics))
    return runs


def evaluated(config):
    """The returns that --evaluate has counted for a run, if it was called."""
    path = config.get("games", RESULTS / f"{config.get('run_name')}.eval.csv")
    if not path.exists():
        return None
    with open(path) as file:
        return np.array([float(row["episodic_return"]) for row in csv.DictReader(file)])


def last_100(metrics, until=np.inf):
    """Mean return of the last 100 training episodes, or of those before a step."""
    steps, returns = metrics["charts/episodic_return"]
    return returns[steps <= until][-100:].mean()


def iqm(scores):
    """[..., n] -> [...]: the mean without the lowest and the highest quarter, rounded down."""
    cut = scores.shape[-1] // 4
    return np.sort(scores)[..., cut : scores.shape[-1] - cut].mean(-1)


def interval(scores, resamples=RESAMPLES):
    """scores [n] or [n, columns] -> the 95 % percentile bootstrap interval of the IQM over n."""
    scores = np.asarray(scores, float)
    seeds = np.random.default_rng(0).integers(len(scores), size=(resamples, len(scores)))
    means = iqm(np.moveaxis(scores[seeds], 1, -1))
    return np.percentile(means, [2.5, 97.5], axis=0)


def is_stopped(config):
    """Before all of its iterations were done."""
    planned = config["num_iterations"] * config["batch_size"]
    return config.get("steps", planned) < planned


def timed(runs):
    """Whether none was interrupted and waited, or is CleanRL's: their minutes say nothing."""
    return not any("resumed" in x or x.get("program") == "CleanRL" for x, _ in runs)


def select(runs, env_id, changes):
    """The runs of a group."""
    wanted = {"env_id": env_id} | changes
    return [run for run in runs if wanted.items() <= run[0].items()]


def precisions(runs):
    """Pong where the shortest run ended, in a sentence."""
    pong = select(runs, "PongNoFrameskip-v4", SHORT)
    groups = {x: [run for run in pong if run[0]["precision"] == x] for x in ("bf16", "fp32")}
    until = min(config["steps"] for group in groups.values() for config, _ in group)
    scores = {
        name: " ".join(f"{last_100(metrics, until):.1f}" for _, metrics in group)
        for name, group in groups.items()
    }
    text = f"PongNoFrameskip-v4 after {until:,} steps, where the runs in fp32 were stopped: "
    return text + f"{scores['bf16']} in bf16, {scores['fp32']} in fp32."


def number(x):
    return f"{x:,.{0 if abs(x) >= 1000 else 1}f}"


def published(reference):
    """Mean and deviation, or the mean alone."""
    return " +- ".join(number(x) for x in reference or ())


def spread(scores):
    """Mean and deviation over seeds; of one seed its score."""
    deviation = f" +- {number(np.std(scores))}" if len(scores) > 1 else ""
    return number(np.mean(scores)) + deviation


def note_of(group):
    """What sets its runs apart."""
    return ", ".join(note for change in group.changes.items() if (note := NOTES[change]))


def name_of(group, runs=()):
    """With how far its runs came that were stopped."""
    stopped = " and ".join(f"{config['steps']:,}" for config, _ in runs if is_stopped(config))
    name = ", ".join(x for x in (group.env_id, note_of(group)) if x)
    return name + (f", stopped after {stopped} steps" if stopped else "")


def seeds_of(runs):
    seeds = [config["seed"] for config, _ in runs]
    return f"{seeds[0]}-{seeds[-1]}" if len(seeds) > 2 else " ".join(map(str, seeds))


def cells_of(group, runs, peers):
    scores = np.array([last_100(metrics) for _, metrics in runs])
    games = [returns for config, _ in runs if (returns := evaluated(config)) is not None]
    lowest = f"{number(scores.min())}"
    if group.least is not None:
        lowest += f" of {group.least:,}" + ("*" if scores.min() < group.least else "")
    low, high = interval(scores)
    here = [last_100(metrics) for _, metrics in select(peers, group.env_id, {})]
    durations = [metrics["seconds"][1][-1] for _, metrics in runs]
    return (
        name_of(group, runs),
        seeds_of(runs),
        spread(scores),
        f"{number(iqm(scores))} [{number(low)}, {number(high)}]" if len(scores) > 2 else "",
        spread([returns.mean() for returns in games]) if len(games) == len(runs) else "",
        lowest,
        published(group.cleanrl),
        f"{spread(here)} ({len(here)})" if here else "",
        published(group.baselines),
        f"{np.median(durations) / 60:.1f}" if timed(runs) else "",
    )


def misses(groups, runs):
    """What lies below the mean of a reference, in a sentence."""
    found = []
    for group in groups:
        of_group = select(runs, group.env_id, group.changes)
        if not of_group:
            continue
        mean = np.mean([last_100(metrics) for _, metrics in of_group])
        below = [
            f"{name} {number(reference[0])}"
            for name, reference in (("CleanRL", group.cleanrl), ("Baselines", group.baselines))
            if reference and mean < reference[0]
        ]
        if below:
            found.append(f"{name_of(group, of_group)}, {number(mean)} ({', '.join(below)})")
    return f"Below the mean of a reference: {'; '.join(found)}." if found else ""


def absent(section, runs):
    """Groups, and seeds of groups, that have no run."""
    names = []
    for group in SECTIONS[section]:
        seeds = {config["seed"] for config, _ in select(runs, group.env_id, group.changes)}
        missing = sorted({*range(1, SEEDS.get(section, 0) + 1)} - seeds) if seeds else []
        if missing or not seeds:
            numbers = ", ".join(map(str, missing))
            names.append(name_of(group) + (f", seed {numbers}" if missing else ""))
    return names


def table(section, runs, peers):
    """The groups of a section that have runs, without columns that have nothing in any row."""
    rows = [("environment", "seeds", "score", "IQM", "evaluated", "lowest seed")]
    rows[0] += ("CleanRL", "here (seeds)", "Baselines", "minutes")
    for group in SECTIONS[section]:
        if of_group := select(runs, group.env_id, group.changes):
            rows.append(cells_of(group, of_group, peers))
    rows = list(zip(*[x for x in zip(*rows, strict=True) if any(x[1:])], strict=True))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]] if lines else []


def picture(section):
    return f"curves_{section.lower().replace(' ', '_')}.png"


def page(runs, peers, long):
    """docs/results.md"""
    lines = [INTRODUCTION]
    for section, groups in SECTIONS.items():
        of_section = runs + long if section == "Atari" else runs
        lines += ["", f"## {section}", "", TEXTS[section], "", *table(section, of_section, peers)]
        if missed := misses(groups, of_section):
            lines += ["", missed]
        if section == "Atari":
            lines += ["", precisions(runs)]
        if names := absent(section, of_section):
            lines += ["", f"Not run yet: {'; '.join(names)}."]
        lines += ["", f"![{section}: return over steps and time](results/{picture(section)})"]
    lines += [
        "",
        AGAIN,
        same([config["run_name"] for config, _ in runs + long]),
        "",
        "## Runs",
        "",
        "The score, and the mean of 100 evaluated games where the policy was kept:",
    ]
    lines += [
        "",
        "| run | command | score | evaluated | steps/s | minutes | threads | commit | script |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for config, metrics in runs + long + peers:
        games = evaluated(config)
        cells = (
            config["run_name"],
            f"`python {config['command']}`",
            number(last_100(metrics)),
            "" if games is None else number(games.mean()),
            f"{metrics['charts/SPS'][1][-1]:,.0f}" if timed([(config, metrics)]) else "",
            f"{metrics['seconds'][1][-1] / 60:.1f}" if timed([(config, metrics)]) else "",
            *(" ".join(values) for values in parts_of(config)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "script: the first digits of its SHA-256. A run with several was resumed."]
    lines += [OF_CLEANRL] if peers else []
    parts = [part for config, _ in long for part in (config, *config.get("resumed", ()))]
    known = [config.get("machine") for config in [*(x for x, _ in runs + peers), *parts]]
    machines = sorted({x or "those of the run of Breakout were not written down" for x in known})
    versions = sorted({json.dumps(config["versions"]) for config, _ in runs + peers})
    lines += ["", f"Machines: {'; '.join(machines)}."]
    lines += ["", "Versions:", "", *(f"- `{version}`" for version in versions)]
    return "\n".join(lines) + "\n"


def parts_of(config):
    """Threads, commits and scripts of a run, each once, in the order in which it was gone on."""
    parts = (config, *config.get("resumed", ()))
    threads = dict.fromkeys(str(part["torch_threads"]) for part in parts)
    commits = dict.fromkeys(part["git_commit"][:12] for part in parts)
    return threads, commits, dict.fromkeys(part["script_sha256"][:12] for part in parts)


def curve(config, metrics):
    """Mean return in each window of the training, NaN where no episode ended."""
    steps, returns = metrics["charts/episodic_return"]
    edges = np.linspace(0, config["total_timesteps"], WINDOWS + 1)
    window = np.digitize(steps, edges[1:-1])
    counts = np.bincount(window, minlength=WINDOWS)
    sums = np.bincount(window, returns, minlength=WINDOWS)
    return edges[1:], np.divide(sums, counts, np.full(WINDOWS, np.nan), where=counts > 0)


def draw(axes, runs, color, label):
    """The IQM over seeds with its interval, against steps and, if they are known, minutes."""
    curves = np.array([curve(*run)[1] for run in runs])
    steps = curve(*runs[0])[0]
    seconds = [np.interp(steps, *metrics["seconds"], right=np.nan) for _, metrics in runs]
    pairs = zip(axes, (steps, np.median(seconds, 0) / 60), strict=True)
    for axis, x in [*pairs][: 2 if timed(runs) else 1]:
        axis.plot(x, iqm(curves.T), color, lw=1.5, label=label)
        if len(runs) > 2:
            axis.fill_between(x, *interval(curves, 2000), color=color, alpha=0.25, lw=0)
        else:
            axis.plot(x, curves.T, color, lw=0.5)


def plot(section, runs, peers):
    """A column an environment: return over steps above, over minutes below."""
    groups = [group for group in SECTIONS[section] if select(runs, group.env_id, group.changes)]
    tasks = list(dict.fromkeys(group.env_id for group in groups))
    wide = min(5, len(tasks))
    high = -(-len(tasks) // wide)
    size = (3.1 * wide + 0.4, 4.6 * high)
    figure, grid = plt.subplots(2 * high, wide, figsize=size, layout="constrained", squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for i, task in enumerate(tasks):
        axes = grid[2 * (i // wide) : 2 * (i // wide) + 2, i % wide]
        for axis, label in zip(axes, ("steps", "minutes"), strict=True):
            axis.set_axis_on()
            axis.set(xlabel=label, ylabel="episodic return" if i % wide == 0 else None)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_title(task)
        axes[0].ticklabel_format(axis="x", style="sci", scilimits=(3, 3))
        for color, group in zip(
            ("C0", "C1", "C2", "C3"), [g for g in groups if g.env_id == task], strict=False
        ):
            label = note_of(group) or "ppo37"
            draw(axes, select(runs, task, group.changes), color, label)
            if group.cleanrl and section != "Atari":
                axes[0].axhline(group.cleanrl[0], color="0.6", lw=0.8, ls="--", zorder=0)
        if here := select(peers, task, {}):
            draw(axes, here, "C7", "CleanRL")
        if not axes[1].lines:
            axes[1].set_axis_off()
        if len(axes[0].lines) > 2 and len(axes[0].get_legend_handles_labels()[1]) > 1:
            axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(RESULTS / picture(section), dpi=100, metadata={"Software": None})
    plt.close(figure)


def everything():
    """All runs, CleanRL's, and the long ones as far as they have come."""
    return load(), load(results=RESULTS / "cleanrl"), load_long()


def pages() -> dict[Path, str]:
    """What docs/make.py compares."""
    return {DOCS / "results.md": page(*everything())}


if __name__ == "__main__":
    put = keep_long if sys.argv[1:2] == ["--long"] else keep
    for argument in sys.argv[1 + (put is keep_long) :]:
        put(Path(argument))
    kept, theirs, unfinished = everything()
    (DOCS / "results.md").write_text(page(kept, theirs, unfinished))
    for title in SECTIONS:
        plot(title, kept + unfinished if title == "Atari" else kept, theirs)
