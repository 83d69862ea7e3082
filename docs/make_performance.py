"""Writes docs/performance.md and docs/results/scaling.png from what benchmarks/ left in results/.

    python docs/make_performance.py

A section stands on the page once its file is there: speed.md and scaling.csv are written by
benchmarks/speed.py, the tables of gpu/ by benchmarks/gpu.py, each other by the program of its name.
"""

import csv
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"

INTRODUCTION = """# Performance

Made by `python docs/make.py` from the files in [results/](results), each written by the program
that its section names. The machines are shared and noisy: programs run in turn, figures are
medians, and ratios mean more than steps per second."""

NO_GPU = """Nothing here is of a GPU yet: none of it has been seen on one, nor has the graph of the
whole update, which torch 2.13 compiles, been seen there."""

EPYC = """## On another processor, at later commits

The same programs on two cores of an AMD EPYC, which has bf16 but no units for matrices, at the
commits below, each with the number of threads that suits it. The next two sections are of the same
machine, those after them of the first one. Atari gains less here: its update in fp32 is near the
floor already, so is what it can be beside others that multiply the same matrices."""

PHASES = """## Where the time goes

`python benchmarks/phases.py` ([raw data](results/phases.csv)): median milliseconds of an iteration
spent in each phase. The floor, in brackets: stepping the environments with random actions and
nothing else, and the multiplications of a phase at the rate of one large matrix product. In Atari,
`environments` beside its floor is the price of processes that sleep while the policy acts, and
whose games have left the caches when they wake; acting beside its floor is that of eight
observations at a time, for which all weights are read anew."""

VARIANTS = """## What it is due to

`python benchmarks/variants.py` ([raw data](results/variants.csv)): steps per second of a copy of
the script with some lines replaced, as a multiple of the script as it is, run in turn, on the
first machine, in parts chosen with `--only`; what films, later, on two cores of an AMD EPYC, where
runs differed more. Below 1, the lines that are there are worth having.
What was tried and left out is marked so: it gives too little speed for its text. Values stored
while acting would give Atari a training loop of its own, for the other scripts act in numpy, with
the policy alone."""

PRECISION = """## bf16

`python benchmarks/precision.py` ([raw data](results/precision.csv)): the gradient of the same loss
for the same minibatch and weights in both precisions. With `--precision bf16` the convolutions and
the layer after them multiply in bfloat16; weights, heads, loss and Adam stay in float32. It is the
default where there is no GPU and the CPU multiplies bfloat16; `config.json` says which ran."""

ENVIRONMENTS = """## Atari's environments alone

`python benchmarks/environments.py --envpool` ([raw data](results/environments.csv)): steps per
second of {num_envs} environments of {env_id} with random actions, on {cpus} CPUs ({cpu}).
The script has one process (`--vectorization sync`) or, by default, a process for each game, as
Gymnasium offers it; a process for each core, with several games in turn, was tried and given up.
`Gymnasium's step` fetches all four screens of a step, of which two are looked at. EnvPool is C++,
and what it shows is not the same frame by frame. It is no dependency: an environment of your own
that takes its place must reset in the step that ends an episode, and EnvPool's reset one later."""

GPU = """## On a GPU

Made by `benchmarks/gpu.py`, which says what each number is ([raw data](results/gpu/)). What ran is
`shown`: a variant that fell back to plain PyTorch is not."""

SCALING = """## By environments, threads and steps

`python benchmarks/speed.py --scaling` ([raw data](results/scaling.csv)): steps per second, Atari in
fp32. The batch is that of the defaults where it leaves 16 steps to each environment, else larger.

![steps per second over environments and over the steps of one run](results/scaling.png)"""


def read(name):
    """The rows of a file in docs/results/, all values as text."""
    with open(RESULTS / name) as file:
        return list(csv.DictReader(file))


def load(path):
    """The rows of scaling.csv, numbers as numbers."""
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


def scaling_table(rows):
    """Steps per second by environments; the tenths of the long run as shares of their median."""
    rounds = max(row["round"] for row in rows)
    columns = list(dict.fromkeys((row["script"], row["threads"]) for row in rows))
    titles = [f"{script}, {threads} thread{'s'[: threads > 1]}" for script, threads in columns]
    lines = [f"Medians of rounds: {rounds}.", "", f"| environments | {' | '.join(titles)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    curves = [curve(rows, script, "num_envs", threads) for script, threads in columns]
    for num_envs, *medians in zip(curves[0][0], *(found[1] for found in curves), strict=True):
        lines.append(f"| {num_envs} | {' | '.join(f'{x:,.0f}' for x in medians)} |")
    tenths = [np.array(curve(rows, script, "steps", threads)[1]) for script, threads in columns]
    shares = [x / np.median(x) for x in tenths]
    spreads = [f"{x.min():.2f} to {x.max():.2f}" for x in shares]
    return [*lines, f"| tenths of one run / their median | {' | '.join(spreads)} |"]


def phases_table(rows):
    """One row for each phase, one column for each script and precision."""
    columns = list(dict.fromkeys((row["script"], row["precision"]) for row in rows))
    cells = {(row["script"], row["precision"], row["phase"]): row for row in rows}
    titles = [f"{script}, {precision}" for script, precision in columns]
    lines = [f"| ms | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for phase in dict.fromkeys(row["phase"] for row in rows):
        line = [phase]
        for column in columns:
            row = cells[(*column, phase)]
            floor = row["floor_milliseconds"]
            line.append(f"{float(row['milliseconds']):,.1f}" + (f" ({floor})" if floor else ""))
        lines.append(f"| {' | '.join(line)} |")
    sums = [
        sum(float(row["milliseconds"]) for row in rows if (row["script"], row["precision"]) == x)
        for x in columns
    ]
    return [*lines, f"| sum | {' | '.join(f'{x:,.1f}' for x in sums)} |"]


def variants_table(rows):
    """The median ratio of each variant to the script beside it, lowest and highest."""
    lines = ["| script | precision | variant | runs | steps/s |", "|---|---|---|---|---|"]
    speeds, pairs = None, {}
    for row in rows:  # the script as it is stands before each run of a variant
        if row["variant"] == "as it is":
            speeds = float(row["steps_per_second"])
        else:
            key = (row["script"], row["precision"], row["variant"])
            pairs.setdefault(key, []).append(float(row["steps_per_second"]) / speeds)
    for key, ratios in pairs.items():
        spread = f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {' | '.join(key)} | {len(ratios)} | {spread} |")
    return lines


def precision_text(rows):
    """The cosines of precision.csv in a sentence."""
    cosines = [float(row["cosine"]) for row in rows]
    cosine = f"at least {min(cosines):.5f}, median {np.median(cosines):.5f}"
    return [
        f"Cosine of the two gradients over {len(cosines)} minibatches: {cosine}.",
        f"Command: `{rows[0]['command']}`, commit {rows[0]['commit'][:12]}.",
    ]


def environments_table(rows):
    """The median of each form, lowest and highest, and as a multiple of the script's default."""
    speeds = {}
    for row in rows:
        speeds.setdefault(row["form"], []).append(float(row["steps_per_second"]))
    default = np.median(speeds["a process for each game"])
    lines = ["| form | runs | steps/s | x |", "|---|---|---|---|"]
    for form, found in speeds.items():
        spread = f"{np.median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f})"
        lines.append(f"| {form} | {len(found)} | {spread} | {np.median(found) / default:.2f} |")
    return lines


def gpu_table(rows, points=20):
    """A row for each script and case, a column for each metric; what failed, by its last line."""
    cases, curves = {}, {}
    for row in rows:
        case = (row["script"], row["case"])
        if row["step"]:
            curves.setdefault((*case, row["metric"]), []).append(row)
        else:
            cases.setdefault(case, {})[row["metric"]] = row["value"].strip().split("\n")[-1]
    metrics = list(dict.fromkeys(metric for found in cases.values() for metric in found))
    lines = [f"| script | case | {' | '.join(metrics)} |", "|---" * (len(metrics) + 2) + "|"]
    for case, found in cases.items():
        lines.append(f"| {' | '.join([*case, *(found.get(x, '') for x in metrics)])} |")
    lines = lines if cases else []
    for (script, case, metric), found in curves.items():
        last = max(found, key=lambda row: int(row["step"]))
        seconds = float(last["seconds"])
        lines += ["" if lines else None, f"{script}, {case}: {metric} {last['value']} at step "]
        lines[-1] += f"{int(last['step']):,}, after {seconds:,.0f} s."
    return [line for line in lines if line is not None]


def gpu_section(folder):
    """What benchmarks/gpu.py left in a folder."""
    lines = [GPU]
    for name in ("facts", "right", "ranks", "variants", "fast", "learn", "words"):
        if (folder / f"{name}.csv").exists():
            with open(folder / f"{name}.csv") as file:
                rows = list(csv.DictReader(file))
            if name == "facts":
                facts = [f"{row['metric']} {row['value']}".replace('"', "") for row in rows]
                lines += ["", f"{'; '.join(facts)}."]
            elif rows:
                lines += ["", f"### {name}", "", *gpu_table(rows)]
    return lines


def page():
    """docs/performance.md"""
    has_gpu = (RESULTS / "gpu" / "facts.csv").exists()
    lines = [INTRODUCTION if has_gpu else f"{INTRODUCTION}\n{NO_GPU}"]
    if (RESULTS / "speed.md").exists():
        text = (RESULTS / "speed.md").read_text().strip().split("\n", 1)[1]
        lines += [
            "",
            "## Beside CleanRL, Stable-Baselines3 and LeanRL",
            text.replace("\n## ", "\n### "),
        ]
    if (RESULTS / "epyc" / "speed.md").exists():
        text = (RESULTS / "epyc" / "speed.md").read_text().strip().split("\n", 3)[3]
        lines += ["", EPYC, "", text.replace("\n## ", "\n### ").strip()]
    sections = [
        ("phases.csv", PHASES, phases_table),
        ("environments.csv", ENVIRONMENTS, environments_table),
        ("variants.csv", VARIANTS, variants_table),
        ("precision.csv", PRECISION, precision_text),
    ]
    for name, text, table in sections:
        if (RESULTS / name).exists():
            rows = read(name)
            first = rows[0] if name == "environments.csv" else {}
            lines += ["", text.format_map(first) if first else text, "", *table(rows)]
    if (RESULTS / "scaling.csv").exists():
        lines += ["", SCALING, "", *scaling_table(load(RESULTS / "scaling.csv"))]
    if has_gpu:
        lines += ["", *gpu_section(RESULTS / "gpu")]
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """What docs/make.py compares."""
    return {DOCS / "performance.md": page()}


if __name__ == "__main__":
    if (RESULTS / "scaling.csv").exists():
        plot(load(RESULTS / "scaling.csv"), RESULTS / "scaling.png")
    (DOCS / "performance.md").write_text(page())
