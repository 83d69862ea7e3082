"""Writes docs/ablation.md and its pictures from the runs that benchmarks/ablate.py has kept.

python docs/make_ablation.py
"""

import math
import re
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import ablate
from regress import T

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "ablation.md"
DETAILS = tomllib.loads((ROOT / "docs" / "details.toml").read_text())
PICTURES = ROOT / "docs" / "results" / "ablation"
WINDOWS = 50  # of a curve
OURS = ("time limits", "C7", "H44")  # what these scripts decided in their own way
HELD_OUT = "eval/ppo/gold/score"  # of ppo_rlhf.py after training, by the true reward

INTRODUCTION = """# Which detail matters?

<!-- made by docs/make_ablation.py, do not edit -->

Each detail is taken away, one at a time, from the script that people read: by a flag where there is
one, else by replacing its lines, which are shown. Everything else stays as it is, so a number here
says what a detail is worth beside all the others, on these tasks, at these lengths, and no more.
Most of the tasks are easy; a detail that shows nothing here may be needed elsewhere.

{tasks}

- **end**: {ends}.
  A run that ended early has what it had last.
- **area**: the mean over the whole training, which is the area under the curve by its length. Of
  ppo_rlhf.py the true reward of each rollout.
- **difference**: to the unchanged script, with the 95 % interval of Welch's t test over seeds. No
  correction for their number: of {n} intervals at the end, {chance:.0f} would leave out zero by
  chance; {found} do.
- **of what is learned**: the difference at the end as a part of what the unchanged script gains
  from its first fiftieth of the training to its end.

`python benchmarks/ablate.py` runs what is missing, [ablations.toml](../benchmarks/ablations.toml)
has all that it does, [results/ablation](results/ablation) what came out, with command, commit and
machine of every run. {progress}
"""


class Score(NamedTuple):
    end: float
    area: float
    first: float  # in the first window


class Compared(NamedTuple):
    """An ablation on a task beside the unchanged script."""

    task: str
    seeds: int
    of: int
    end: tuple  # mean of both, difference and half of its interval, None of one seed
    area: tuple
    gain: float  # of the unchanged script
    same: bool  # as the unchanged script, number for number
    stopped: int  # runs that ended early, with an error


def scores(task: str, rows: list[dict]) -> dict[int, Score]:
    """Of each seed."""
    settings, found = ablate.TASKS[task], {}
    for seed in sorted({int(row["seed"]) for row in rows}):
        own = [row for row in rows if int(row["seed"]) == seed]
        curve = windows(task, own)
        end = [float(row["value"]) for row in own if row["name"] == HELD_OUT]
        if HELD_OUT not in settings.names:
            tail = [row for row in own if int(row["global_step"]) > 0.9 * settings.steps]
            end = [float(row["value"]) for row in tail]
        end = np.mean(end or curve[-5:])  # of a run that ended early, what it had last
        found[seed] = Score(float(end), float(curve.mean()), float(curve[0]))
    return found


def windows(task: str, rows: list[dict]) -> np.ndarray:
    """Mean in each fiftieth of the training; where no episode ended, as in the one before."""
    settings = ablate.TASKS[task]
    rows = [row for row in rows if row["name"] == settings.names[0]]
    steps = np.array([int(row["global_step"]) for row in rows])
    values = np.array([float(row["value"]) for row in rows])
    where = np.ceil(steps * WINDOWS / settings.steps).astype(int) - 1
    means, last = [], values[0] if len(values) else np.nan
    for window in range(WINDOWS):
        if (chosen := values[where == window]).size:
            last = chosen.mean()
        means.append(last)
    return np.array(means)


def welch(ours, theirs) -> tuple:
    """Means, their difference, and half of its 95 % interval, None where one has a single value."""
    means = float(np.mean(theirs)), float(np.mean(ours))
    if min(len(ours), len(theirs)) < 2:
        return *means, means[0] - means[1], None
    parts = [np.var(x, ddof=1) / len(x) for x in (ours, theirs)]
    if not (variance := sum(parts)):
        return *means, means[0] - means[1], 0.0
    freedom = variance**2 / sum(
        v**2 / (len(x) - 1) for v, x in zip(parts, (ours, theirs), strict=True)
    )
    quantile = T[min(math.floor(freedom + 1e-9), len(T)) - 1]
    return *means, means[0] - means[1], quantile * variance**0.5


def compare(task: str, ablation) -> Compared | None:
    """What is known; None if nothing is."""
    unchanged = ablate.rows_of(task, ablate.Ablation(ablate.UNCHANGED, "", ()))
    rows = ablate.rows_of(task, ablation)
    if not rows or not unchanged:
        return None
    ours, theirs = scores(task, unchanged), scores(task, rows)
    end, area = (
        welch(*([score[i] for score in x.values()] for x in (ours, theirs))) for i in (0, 1)
    )
    same = rows == [row for row in unchanged if int(row["seed"]) in theirs]
    gain = end[1] - float(np.mean([score.first for score in ours.values()]))
    stopped = sum(run["exit_code"] != 0 for run in ablate.stored(task, ablation)["runs"])
    return Compared(task, len(theirs), ablate.TASKS[task].seeds, end, area, gain, same, stopped)


def everything() -> list[tuple]:
    """(ablation, [Compared of each of its tasks, or None])"""
    return [(x, [compare(task, x) for task in x.tasks]) for x in ablate.table()[1:]]


# ------------------------------------------------------------------------------------------------
# In words


def number(x: float) -> str:
    """Four digits or fewer, as many as are of use."""
    digits = 0 if abs(x) >= 100 else 1 if abs(x) >= 10 else 2
    return f"{x:,.{digits}f}".replace("-0.00", "0.00")


def difference(x: tuple) -> str:
    half = "" if x[3] is None else f" ± {number(x[3])}"
    return f"{x[2]:+,.{0 if abs(x[2]) >= 100 else 1 if abs(x[2]) >= 10 else 2}f}{half}"


def part(x: Compared) -> tuple:
    """The difference at the end in percent of what is learned, from and to."""
    middle, half = 100 * x.end[2] / x.gain, 100 * (x.end[3] or 0.0) / x.gain
    return middle, middle - half, middle + half


def whole(percent: float) -> str:
    return "0" if round(percent) == 0 else f"{percent:+.0f}"


def effect(x: Compared) -> str:
    """less, more, nothing, same, or unknown where there are not two seeds."""
    if x.same:
        return "same"
    if x.end[3] is None:
        return "unknown"
    _, low, high = part(x)
    return "less" if high < 0 else "more" if low > 0 else "nothing"


def sentence(found: list[Compared]) -> str:
    """What was seen, no more than the intervals carry."""
    kinds = {kind: [x for x in found if effect(x) == kind] for kind in ("less", "more", "nothing")}
    said = []
    if kinds["less"]:
        said.append(f"Without it the return is lower on {places(kinds['less'])}.")
    if kinds["more"]:
        said.append(f"**Without it the return is higher on {places(kinds['more'])}.**")
    if kinds["nothing"]:
        said.append(f"Nothing is seen on {places(kinds['nothing'])}.")
    if same := [x.task for x in found if effect(x) == "same"]:
        said.append(f"On {listed(same)} every return is the same, bit for bit.")
    if stopped := [f"{x.stopped} of {x.seeds} on {x.task}" for x in found if x.stopped]:
        said.append(f"Runs that ended early, with an error: {listed(stopped)}.")
    if alone := [x.task for x in found if effect(x) == "unknown"]:
        said.append(f"One seed, so no interval yet, on {listed(alone)}.")
    return " ".join(said)


def places(found: list[Compared]) -> str:
    texts = []
    for x in found:
        middle, low, high = map(whole, part(x))
        texts.append(f"{x.task} ({middle} % of what is learned, {low} to {high})")
    return listed(texts)


def listed(texts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def heading(ablation) -> str:
    return f"### {ablation.detail}: {ablation.instead}"


def anchor(ablation) -> str:
    """Of a heading, as forges make it."""
    return re.sub(r"[^\w\- ]", "", heading(ablation)[4:].lower()).replace(" ", "-")


def way_on(ablation) -> str:
    detail = f"'{ablation.detail}'" if " " in ablation.detail else ablation.detail
    return f"`python benchmarks/ablate.py --only {detail}`"


def part_of(ablation, found: list[Compared | None]) -> list[str]:
    """The part of the page about an ablation."""
    detail, text = ablation.detail, ""
    if known := DETAILS.get(detail):
        text = f"[{detail}](details.md#{detail.lower()}) {known['title']}. "
    lines = [heading(ablation), "", text]
    there = [x for x in found if x]
    if there:
        lines[-1] += sentence(there)
    missing = [x for x, y in zip(ablation.tasks, found, strict=True) if not y or y.seeds < y.of]
    if missing:
        counts = [
            f"{task} {y.seeds if y else 0}" for task, y in zip(ablation.tasks, found, strict=True)
        ]
        wanted = [f"{task} {ablate.TASKS[task].seeds}" for task in ablation.tasks]
        lines[-1] += f" So far seeds of {listed(counts)}, in the end {listed(wanted)}: "
        lines[-1] += f"{way_on(ablation)} goes on."
    lines[-1] = lines[-1].strip()
    lines.append("")
    if ablation.flags:
        lines += [f"`{ablation.flags}`", ""]
    else:
        script = ablate.TASKS[ablation.tasks[0]]
        text = ablate.changed((ROOT / script.script).read_text(), script.edits)
        lines += ["```diff", ablate.diff(text, ablation.edits), "```", ""]
    if there:
        lines += ["| task | seeds | end | unchanged | difference | area | unchanged | difference |"]
        lines += ["|---" * 8 + "|"]
        for x in there:
            cells = [x.task, x.seeds]
            for values in (x.end, x.area):
                cells += [number(values[0]), number(values[1]), difference(values)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return lines


def worth() -> dict[str, str]:
    """tag -> a line of details.md, what the detail is worth, with links."""
    lines = {}
    for ablation, found in everything():
        words = sentence([x for x in found if x]) or "not run yet."
        text = f"[{ablation.instead}](ablation.md#{anchor(ablation)}): {words}"
        lines.setdefault(ablation.detail, []).append(text)
    return {detail: " ".join(texts) for detail, texts in lines.items()}


# ------------------------------------------------------------------------------------------------
# The page


def tasks_table() -> list[str]:
    """The tasks, and the unchanged script on them."""
    lines = [
        "| task | script | steps | unchanged: seeds | end | area |",
        "|---|---|---|---|---|---|",
    ]
    for name, task in ablate.TASKS.items():
        found = scores(name, ablate.rows_of(name, ablate.Ablation(ablate.UNCHANGED, "", ())))
        cells = ["", ""]
        if found:
            cells = [number(np.mean([score[i] for score in found.values()])) for i in (0, 1)]
        words = f"[{task.script}](../{task.script}) `{task.flags}`".replace(" ``", "")
        count = f"{len(found)} of {2 * task.seeds}"
        lines.append(f"| {name} | {words} | {task.steps:,} | {count} | {cells[0]} | {cells[1]} |")
    return lines


def summary(all_of_it: list[tuple]) -> list[str]:
    """A row for each of which there is an interval, most harm first."""
    lines = ["| detail | what stands in its place | difference at the end, % of what is learned |"]
    lines += ["|---" * 3 + "|"]
    for ablation, found in sorted(all_of_it, key=order):
        cells = []
        for x in [x for x in found if x and x.end[3] is not None]:
            middle, low, high = map(whole, part(x))
            mark = "**" if effect(x) in ("less", "more") else ""
            words = f"{mark}{middle}{mark} ({low} to {high})"
            cells.append(f"{x.task} {'the same, bit for bit' if x.same else words}")
        link = f"[{ablation.detail}](#{anchor(ablation)})"
        lines += [f"| {link} | {ablation.instead} | {'; '.join(cells)} |"] if cells else []
    return [*lines, "", "Bold: the interval leaves out zero.", ""]


def order(pair) -> float:
    """Most harm first; what is not known comes last."""
    known = [part(x)[0] for x in pair[1] if x]
    return float(np.mean(known)) if known else np.inf


def by_tag(detail: str) -> tuple:
    """In the order of details.md, what has no tag last."""
    tags = list(DETAILS)
    return (tags.index(detail) if detail in tags else len(tags), detail)


def page(all_of_it: list[tuple]) -> str:
    known = [x for _, found in all_of_it for x in found if x and x.end[3] is not None]
    there = sum(min(x.seeds, x.of) for _, found in all_of_it for x in found if x)
    wanted = sum(ablate.TASKS[task].seeds for ablation, _ in all_of_it for task in ablation.tasks)
    text = INTRODUCTION.format(
        tasks="\n".join(tasks_table()),
        ends="the mean return of the episodes that ended in the last tenth of the steps, of\n"
        "  ppo_rlhf.py the true reward of 512 texts after it",
        n=len(known),
        chance=len(known) / 20,
        found=sum(effect(x) in ("less", "more") for x in known),
        progress=f"So far {there:,} of {wanted:,} runs are there.",
    )
    lines = [text, "## Our own choices", ""]
    for ablation, found in all_of_it:
        if ablation.detail in OURS:
            words = sentence([x for x in found if x]) or f"Not run yet: {way_on(ablation)}."
            lines.append(f"- [{ablation.detail}: {ablation.instead}](#{anchor(ablation)}). {words}")
    lines += ["", "## All of them, most harm first", ""]
    if known:
        lines += [*summary(all_of_it), "![the same](results/ablation/effects.png)", ""]
        lines += ["![curves](results/ablation/curves.png)", ""]
        lines += ["Black: the unchanged script. Coloured: where the interval at the end leaves out"]
        lines += ["zero, the strongest five. Grey: all others.", ""]
    lines += ["## One by one", ""]
    for pair in sorted(all_of_it, key=lambda pair: by_tag(pair[0].detail)):
        lines += part_of(*pair)
    return "\n".join(lines)


def effects(all_of_it, path: Path):
    """A row for each ablation, a mark for each of its tasks, with its interval."""
    rows = sorted((pair for pair in all_of_it if any(pair[1])), key=order, reverse=True)
    colours = {task: f"C{i}" for i, task in enumerate(ablate.TASKS)}
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.32 * len(rows)))
    for y, (_, found) in enumerate(rows):
        for i, x in enumerate([x for x in found if x]):
            middle, low, high = np.clip(part(x), -140, 60)
            at = y + 0.18 * (i - (len(found) - 1) / 2)
            axes.plot([low, high], [at, at], color=colours[x.task], lw=1.5)
            axes.plot(middle, at, "o", color=colours[x.task], ms=4)
    for task in [x for x in ablate.TASKS if any(y and y.task == x for _, z in rows for y in z)]:
        axes.plot([], [], "o-", color=colours[task], label=task, ms=4)
    axes.set_yticks(range(len(rows)), [f"{x.detail}: {x.instead[:58]}" for x, _ in rows], size=8)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlim(-145, 65)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("difference at the end, in percent of what the unchanged script learns")
    axes.legend(fontsize=8, loc="lower left")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def curves(all_of_it, path: Path):
    """A panel for each task: the mean curve of each ablation."""
    tasks = [x for x in ablate.TASKS if any(y and y.task == x for _, z in all_of_it for y in z)]
    columns = 2
    size = (11, 3.4 * math.ceil(len(tasks) / columns))
    figure, panels = plt.subplots(math.ceil(len(tasks) / columns), columns, figsize=size)
    for axes in panels.flat[len(tasks) :]:
        axes.axis("off")
    for axes, task in zip(panels.flat, tasks, strict=False):
        of_task = [(a, x) for a, found in all_of_it for x in found if x and x.task == task]
        strong = [pair for pair in of_task if effect(pair[1]) in ("less", "more")]
        strong = sorted(strong, key=lambda pair: -abs(pair[1].end[2]))[:5]
        steps = np.arange(1, WINDOWS + 1) * ablate.TASKS[task].steps / WINDOWS
        for ablation, _ in of_task:
            axes.plot(steps, mean_curve(task, ablation), color="0.8", lw=0.8)
        for ablation, _ in strong:
            label = f"{ablation.detail}: {ablation.instead[:34]}"
            axes.plot(steps, mean_curve(task, ablation), lw=1.4, label=label)
        plain = ablate.Ablation(ablate.UNCHANGED, "", ())
        axes.plot(steps, mean_curve(task, plain), color="black", lw=2)
        axes.set_title(task, size=10)
        axes.ticklabel_format(axis="x", scilimits=(0, 4))
        axes.legend(fontsize=7) if strong else None
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def mean_curve(task: str, ablation) -> np.ndarray:
    rows = ablate.rows_of(task, ablation)
    seeds = sorted({row["seed"] for row in rows})
    return np.mean([windows(task, [x for x in rows if x["seed"] == s]) for s in seeds], axis=0)


def pages() -> dict[Path, str]:
    """What docs/make.py compares."""
    return {PAGE: page(everything())}


if __name__ == "__main__":
    all_of_it = everything()
    PAGE.write_text(page(all_of_it))
    if any(any(found) for _, found in all_of_it):
        effects(all_of_it, PICTURES / "effects.png")
        curves(all_of_it, PICTURES / "curves.png")
