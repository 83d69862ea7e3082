"""Writes docs/ablation.md and its pictures from the runs that benchmarks/ablate.py has kept.

python docs/make_ablation.py
"""

import functools
import gzip
import hashlib
import math
import re
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import ablate

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "ablation.md"
DETAILS = tomllib.loads((ROOT / "docs" / "details.toml").read_text())
PICTURES = ROOT / "docs" / "results" / "ablation"
PLAIN = ablate.ablations()[0]
WINDOWS = 50  # of a curve
# what makes a curve and, where it is not the same at its end, what is measured after it
RETURN = ("charts/episodic_return", None)
GOLD = ("gold/score", "eval/ppo/gold/score")
PROXY = ("objective/scores", "eval/ppo/proxy")
LIMITS = (-160, 100)  # of the picture, percent

INTRODUCTION = """# Which detail matters?

<!-- made by docs/make_ablation.py, do not edit -->

Each detail is taken away, one at a time, from the script that people read: by a flag where there is
one, else by replacing its lines, which are shown; what is off by default is switched on. Everything
else stays as it is, so a number here says what a change does beside all the other details, on these
tasks, at these lengths, and no more. Most of the tasks are easy; a detail that shows nothing here
may be needed elsewhere.

{tasks}

For A1 to A9 a game was wanted on which the script moves, as `learned` has it, by five deviations
within 500,000 steps. None that was tried is known to. Breakout moves by {breakout}. Pong, of which
[four runs](results) are kept, two seeds in both precisions, has moved by {pong} at 200,000 steps,
and by {pong_late} at 500,000. Four more games, `Pilot` in the table, have two seeds at most, whose
deviation says little: Boxing stays where it begins, and Krull where it is after a tenth of the
steps, when not only short games have ended. UpNDown rises at once, so A1 to A9 have it as a second
game, of 50,000 steps, at which it has moved by {upndown}. On both only large effects show.

- **end**: the mean return of the episodes that ended in the last tenth of the steps, of ppo_rlhf.py
  the true reward of 512 texts after it; in brackets the lowest and the highest seed. A run that
  ended early has what it had last.
- **area**: the mean over the whole training, which is the area under the curve by its length. Of
  ppo_rlhf.py the true reward of each rollout; its **proxy** is the reward model, which it learns
  from.
- **difference**: to the unchanged script, with the 95 % interval of Welch's t test over seeds. It
  takes them as independent, although both have seeds 1, 2, 3, ..., and as normally distributed,
  which seeds that learn nothing are not: look at the lowest one, too. With the three seeds of
  MuJoCo only large effects show.
- **learned**, in the table above: from the first fiftieth of the training to its end, in standard
  deviations of the ends of seeds.
- **of what is learned**: the difference at the end as a part of what the unchanged script gains
  from its first fiftieth of the training to its end, a mean over seeds that is taken as exact.
- **little or nothing**: the whole interval at the end is within 10 % of what is learned.

Of the {n} intervals of ends and areas, {chance} would leave out zero if no detail mattered;
{found} do. Of {sure} of them it is said that the return is lower or higher, by the procedure of
Benjamini and Hochberg over all {n}: about one in twenty of these may be chance. Of the others,
that it may be. This procedure was chosen after most of these results had been seen, in place of
Holm's, which is stricter: by that it would be {strict}. Intervals are shown without a correction.
All of a task share the unchanged runs;
where every return is the same, "unchanged" is of the same seeds only. [X2](details.md#x2) is no
choice where there is one process, [X7](details.md#x7) is compared in [rlhf.md](rlhf.md), and what
else has no row was not taken away.

`python benchmarks/ablate.py` runs what is missing, [ablations.toml](../benchmarks/ablations.toml)
has all that it does, [results/ablation](results/ablation) what came out, with command, commit and
machine of every run. {progress}
"""

OWN = """Where programs differ: what these scripts do, replaced by the other way. Of a third choice,
k3 as `approx_kl`, for which Baselines has k2 ([C12](details.md#c12)), no number depends while
[X3](details.md#x3) and [X5](details.md#x5) are off.
"""

CURVES = """Means over seeds. Black: the unchanged script. Coloured: of those whose interval at the
end leaves out zero, or of whose area it is said below that it is lower or higher, the five with the
largest difference at the end. Grey: all others."""


class Score(NamedTuple):
    """Of a run."""

    end: float
    area: float
    first: float  # mean of the first window


class Difference(NamedTuple):
    """Means over seeds, and half of the 95 % interval; None of one seed or without spread."""

    changed: float
    unchanged: float
    difference: float
    half: float | None
    p: float | None = None  # of no difference


class Compared(NamedTuple):
    """An ablation on a task beside the unchanged script."""

    task: str
    seeds: int
    wanted: int
    end: Difference
    area: Difference
    gain: float  # at the end of the unchanged script, from its first window
    same: bool  # as the unchanged script with the same seeds, in all stored digits
    stopped: int  # runs that ended early, with an error
    without: int  # runs that ended before any episode, which have no score
    seen: tuple = ()  # the ends of all seeds, changed and unchanged
    sure: tuple[bool, bool] = (False, False)  # the end and the area differ, among so many, too


@functools.cache
def read(path: Path) -> dict[int, dict[str, np.ndarray]]:
    """A CSV of ablate.py, seed -> name -> steps and values [2, n]."""
    found = {}
    for line in gzip.decompress(path.read_bytes()).decode().splitlines()[1:]:
        seed, step, name, value = line.split(",")
        found.setdefault(int(seed), {}).setdefault(name, []).append((int(step), float(value)))
    return {
        seed: {name: np.array(pairs).T for name, pairs in run.items()}
        for seed, run in found.items()
    }


def runs_of(task: str, ablation) -> dict[int, dict[str, np.ndarray]]:
    _, path = ablate.files(task, ablation)
    return read(path) if path.exists() else {}


def measure(task: str) -> tuple:
    return GOLD if ablate.TASKS[task].script == "ppo_rlhf.py" else RETURN


def windows(task: str, run: dict, name: str) -> np.ndarray:
    """Mean in each fiftieth of the training; where no episode ended, as in the one before, at the
    start as in the first one that has any. [50], empty if none has."""
    if name not in run:
        return np.zeros(0)
    steps, values = run[name]
    where = np.ceil(steps * WINDOWS / ablate.TASKS[task].steps).astype(int) - 1
    means, last = [], values[where == where[0]].mean()
    for window in range(WINDOWS):
        if (chosen := values[where == window]).size:
            last = chosen.mean()
        means.append(last)
    return np.array(means)


def score(task: str, run: dict, what: tuple) -> Score | None:
    """None if it ended before any episode. One that ended early has what it had last."""
    (name, after), curve = what, windows(task, run, what[0])
    if not curve.size:
        return None
    steps, values = run.get(after or name, np.zeros((2, 0)))
    end = values[steps > 0.9 * ablate.TASKS[task].steps]
    return Score(*(float(x.mean()) for x in (end if end.size else curve[-5:], curve, curve[:1])))


def welch(unchanged: list[float], changed: list[float]) -> Difference:
    means = float(np.mean(changed)), float(np.mean(unchanged))
    means = (*means, means[0] - means[1])
    if min(len(unchanged), len(changed)) < 2:
        return Difference(*means, None)
    pair = (unchanged, changed)
    parts = [np.var(x, ddof=1) / len(x) for x in pair]
    if not (variance := sum(parts)):
        return Difference(*means, *((None, None) if means[2] else (0.0, 1.0)))
    freedom = variance**2 / sum(v**2 / (len(x) - 1) for v, x in zip(parts, pair, strict=True))
    error = variance**0.5
    p = 2 * stats.t.sf(abs(means[2]) / error, freedom)
    return Difference(*means, float(stats.t.ppf(0.975, freedom)) * error, float(p))


def compare(task: str, ablation, what: tuple) -> Compared | None:
    """What is known; None if nothing is."""
    runs = ablate.stored(task, ablation)["runs"]
    plain, changed = (runs_of(task, x) for x in (PLAIN, ablation))
    ours, theirs = ([score(task, x, what) for x in found.values()] for found in (plain, changed))
    ours, theirs = ([x for x in found if x] for found in (ours, theirs))
    if not ours or not theirs:
        return None
    end, area = (welch([x[i] for x in ours], [x[i] for x in theirs]) for i in (0, 1))
    gain = end.unchanged - float(np.mean([x.first for x in ours]))
    if same := all(equal(run, plain.get(seed, {})) for seed, run in changed.items()):
        end, area = (Difference(x.changed, x.changed, 0.0, 0.0) for x in (end, area))
        ours = theirs
    stopped = sum(run["exit_code"] != 0 for run in runs)
    counts = len(runs), ablate.TASKS[task].seeds
    seen = tuple([x.end for x in scores] for scores in (theirs, ours))
    return Compared(task, *counts, end, area, gain, same, stopped, len(runs) - len(theirs), seen)


def equal(run: dict, other: dict) -> bool:
    return run.keys() == other.keys() and all(np.array_equal(run[x], other[x]) for x in run)


def everything() -> list[tuple]:
    """(ablation, [Compared of each of its tasks, or None])"""
    found = ablate.ablations()[1:]
    return judged([(x, [compare(task, x, measure(task)) for task in x.tasks]) for x in found])


def judged(all_of_it: list[tuple], level: float = 0.05) -> list[tuple]:
    """The same with `sure`, by the procedure of Benjamini and Hochberg for all ends and areas."""
    known = [x for _, found in all_of_it for x in found if x and effect(x) in DECIDED]
    tests = sorted(y.p for x in known for y in (x.end, x.area) if y.p is not None)
    passed = [p for i, p in enumerate(tests, 1) if p <= level * i / len(tests)]
    limit = max(passed, default=-1.0)

    def judge(x):
        sure = tuple(y.p is not None and y.p <= limit for y in (x.end, x.area))
        return x._replace(sure=sure) if effect(x) in DECIDED else x

    return [(a, [x and judge(x) for x in found]) for a, found in all_of_it]


def holm(ps: list[float], level: float = 0.05) -> int:
    """How many differences Holm's procedure finds."""
    passed = [p <= level / (len(ps) - i) for i, p in enumerate(sorted(ps))]
    return [*passed, False].index(False)


# ------------------------------------------------------------------------------------------------
# In words


def number(x: float) -> str:
    """Three digits or more."""
    return f"{x:,.{0 if abs(x) >= 100 else 1 if abs(x) >= 10 else 2}f}".replace("-0.00", "0.00")


def difference(x: Difference) -> str:
    """With two digits of its interval, if it has one."""
    if not x.half:
        return "+" * (x.difference > 0) + number(x.difference)
    digits = min(4, max(0, 1 - math.floor(math.log10(x.half))))
    return f"{x.difference:+,.{digits}f} ± {x.half:,.{digits}f}"


def percent(x: Compared) -> tuple[float, float, float]:
    """The difference at the end in percent of what is learned, from and to."""
    half = x.end.half or 0.0
    low_to_high = (x.end.difference, x.end.difference - half, x.end.difference + half)
    return tuple(100 * value / x.gain for value in low_to_high)


def in_percent(x: Compared) -> str:
    middle, low, high = ("0" if round(value) == 0 else f"{value:+.0f}" for value in percent(x))
    return f"{middle} % of what is learned, {low} to {high}"


DECIDED = ("lower", "higher", "little", "open")  # what an interval can say


def effect(x: Compared) -> str:
    """lower, higher, little (within 10 % of what is learned), open, same, or unknown."""
    if x.same:
        return "same"
    if x.end.half is None or x.without or x.gain <= 0:
        return "unknown"
    if direction(x.end):
        return direction(x.end)
    return "little" if x.end.half + abs(x.end.difference) <= 0.1 * x.gain else "open"


def direction(x: Difference) -> str:
    """lower, higher, or nothing if zero is in the interval or there is none."""
    if x.half is None or abs(x.difference) <= x.half:
        return ""
    return "lower" if x.difference < 0 else "higher"


def sentence(found: list[Compared]) -> str:
    """What was seen, no more than the intervals carry."""
    words = {
        ("lower", True): "With this change the return at the end is lower on {}.",
        ("higher", True): "**With this change the return at the end is higher on {}.**",
        ("lower", False): "At the end it may be lower on {}.",
        ("higher", False): "At the end it may be higher on {}.",
        ("little", False): "It changes little or nothing at the end on {}.",
        ("open", False): "At the end it cannot be told from no change on {}.",
    }
    over_all = {
        ("lower", True): "Over the whole training, by the area, it is lower on {}.",
        ("higher", True): "**Over the whole training, by the area, it is higher on {}.**",
        ("lower", False): "Over the whole training, by the area, it may be lower on {}.",
        ("higher", False): "Over the whole training, by the area, it may be higher on {}.",
    }
    said = []
    for kind, text in words.items():
        of_kind = [x for x in found if (effect(x), x.sure[0]) == kind]
        if places := [f"{x.task} ({in_percent(x)})" for x in of_kind]:
            said.append(text.format(listed(places)))
    decided = [x for x in found if effect(x) in DECIDED]
    # an area that says no more than the end is in the table
    more = [x for x in decided if effect(x) != direction(x.area) or x.sure[1] > x.sure[0]]
    for kind, text in over_all.items():
        if places := [x.task for x in more if (direction(x.area), x.sure[1]) == kind]:
            said.append(text.format(listed(places)))
    if same := [x.task for x in found if effect(x) == "same"]:
        said.append(f"Every return is the same on {listed(same)}, in all digits that are kept.")
    if stopped := [f"{x.stopped} of {x.seeds} on {x.task}" for x in found if x.stopped]:
        said.append(f"Runs that ended early, with an error: {listed(stopped)}.")
    if without := [f"{x.without} on {x.task}" for x in found if x.without]:
        said.append(f"They ended before any episode, without a score: {listed(without)}.")
    unknown = [x for x in found if effect(x) == "unknown" and not x.without]
    if nothing := [x.task for x in unknown if x.gain <= 0]:
        said.append(f"The unchanged script learns nothing on {listed(nothing)}.")
    if alone := [x.task for x in unknown if x.gain > 0]:
        said.append(f"No interval yet on {listed(alone)}: one seed, or no spread between seeds.")
    return " ".join(said)


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


def section(ablation, found: list[Compared | None]) -> list[str]:
    """All about an ablation."""
    text, there = [], [x for x in found if x]
    if known := DETAILS.get(ablation.detail):
        text = [f"[{ablation.detail}](details.md#{ablation.detail.lower()}) {known['title']}."]
    text += filter(None, [ablation.note, sentence(there)])
    seeds = {task: x.seeds if x else 0 for task, x in zip(ablation.tasks, found, strict=True)}
    missing = [task for task in ablation.tasks if seeds[task] < ablate.TASKS[task].seeds]
    if missing:
        counts = [f"{seeds[task]} of {ablate.TASKS[task].seeds} on {task}" for task in missing]
        text.append(f"Seeds so far: {listed(counts)}; {way_on(ablation)} goes on.")
    lines = [heading(ablation), "", " ".join(text), ""]
    if ablation.flags:
        lines += [f"`{ablation.flags}`", ""]
    else:
        script = ablate.script_of(ablate.TASKS[ablation.tasks[0]])
        lines += ["```diff", ablate.diff(script, ablation.edits), "```", ""]
    if there:
        lines += ["| task | seeds | end | unchanged | difference | area | unchanged | difference |"]
        lines += ["|---" * 8 + "|"]
        proxies = [x for x in there if measure(x.task) == GOLD and not ablation.other_unit]
        proxies = [compare(x.task, ablation, PROXY)._replace(task="its proxy") for x in proxies]
        for x in there + proxies:
            ends = [number(x.end.changed), number(x.end.unchanged)]
            for i, seen in enumerate(x.seen):
                ends[i] += f" ({number(min(seen))} to {number(max(seen))})"
            cells = [x.task, x.seeds, *ends, difference(x.end)]
            cells += [number(x.area.changed), number(x.area.unchanged), difference(x.area)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return lines


def worth() -> dict[str, str]:
    """tag -> a line of details.md, what the detail is worth, with links."""
    lines = {}
    for ablation, found in everything():
        link = f"[{ablation.instead}](ablation.md#{anchor(ablation)})"
        words = ", ".join(f"{x.task} {in_short(x)}" for x in found if x) or "not run yet"
        tag = "C5" if ablation.detail == "time limits" else ablation.detail  # it is in the targets
        lines.setdefault(tag, []).append(f"with {link}: {words}")
    return {detail: "; ".join(texts) for detail, texts in lines.items()}


def in_short(x: Compared) -> str:
    """The difference in percent of what is learned with its interval, if that leaves out zero."""
    if effect(x) in ("lower", "higher"):
        return in_cell(x).replace(" (", " % (")
    words = {"same": "the same", "unknown": "no interval yet"}.get(effect(x), effect(x))
    return words + (f" at the end, {direction(x.area)} over all" if x.sure[1] else "")


def in_cell(x: Compared) -> str:
    """The numbers of `in_percent`, the first one marked where it is sure."""
    middle, low, high = re.findall(r"[+-]?\d+", in_percent(x))
    mark = {"lower": "*", "higher": "**"}[effect(x)] if x.sure[0] else ""
    return f"{mark}{middle}{mark} ({low} to {high})"


# ------------------------------------------------------------------------------------------------
# The page


def learned(found: list[Score]) -> float:
    """From the first windows to the ends, in standard deviations of the ends."""
    gain = np.mean([x.end for x in found]) - np.mean([x.first for x in found])
    return gain / np.std([x.end for x in found], ddof=1)


def scores(task: str) -> list[Score]:
    """Of the unchanged script, one of each seed."""
    return [score(task, run, measure(task)) for run in runs_of(task, PLAIN).values()]


def pong(steps: int) -> float:
    """What ppo_atari.py has learned of Pong in as many steps of the runs that are kept."""
    found = []
    for path in sorted(PICTURES.parent.glob("PongNoFrameskip-v4__ppo_atari__*.csv.gz")):
        lines = [line.split(",") for line in gzip.decompress(path.read_bytes()).decode().split()]
        episodes = [(int(x[0]), float(x[3])) for x in lines if x[2] == RETURN[0]]
        at, returns = np.array([x for x in episodes if x[0] <= steps]).T
        first = np.ceil(at * WINDOWS / steps)
        ends = returns[at > 0.9 * steps].mean(), 0.0, returns[first == first[0]].mean()
        found.append(Score(*ends))
    return learned(found)


def tasks_table() -> list[str]:
    """The tasks, and the unchanged script on them."""
    lines = [
        "| task | script | steps | unchanged: seeds | end | area | learned |",
        "|---" * 7 + "|",
    ]
    for name, task in ablate.TASKS.items():
        found = scores(name)
        cells = [number(np.mean([x[i] for x in found])) if found else "" for i in (0, 1)]
        ends = [x.end for x in found]
        cells.append(f"{learned(found):.1f}" if len(ends) > 1 and np.ptp(ends) else "")
        words = [f"[{task.script}](../{task.script})", f"`{task.flags}`" if task.flags else ""]
        words = " ".join(filter(None, words)) + (f": {task.about}" if task.about else "")
        count = f"{len(found)} of {2 * task.seeds}"
        lines.append(f"| {name} | {words} | {task.steps:,} | {count} | {' | '.join(cells)} |")
    for name, task in ablate.TASKS.items():
        if task.edits:
            script = (ROOT / task.script).read_text()
            lines += [
                "",
                f"{name} is no game, so its script has been changed beforehand:",
                "",
            ]
            lines += ["```diff", ablate.diff(script, task.edits), "```"]
    return lines


def summary(all_of_it: list[tuple]) -> list[str]:
    """A row for each of which something is known, in the order of what the intervals leave."""
    lines = ["| detail | what stands in its place | difference at the end, % of what is learned |"]
    lines += ["|---" * 3 + "|"]
    for ablation, found in sorted(all_of_it, key=order):
        known = [x for x in found if x and effect(x) != "unknown"]
        cells = [f"{x.task} {'the same' if x.same else in_cell(x)}" for x in known]
        link = f"[{ablation.detail}](#{anchor(ablation)})"
        lines += [f"| {link} | {ablation.instead} | {'; '.join(cells)} |"] if cells else []
    text = (
        "Bold: higher, italic: lower, as told above. The order is that of the ends of the intervals"
    )
    return [
        *lines,
        "",
        f"{text}\nnearer to zero, and zero if it is inside: their mean over tasks.",
        "",
    ]


def order(pair) -> tuple:
    """The mean of what intervals leave, then of differences by precision; what is unknown last."""
    found = [x for x in pair[1] if x and x.gain > 0]
    if not (known := [x for x in found if effect(x) != "unknown"]):
        return (True, 0.0, float(np.mean([percent(x)[0] for x in found])) if found else np.inf)
    middle, low, high = np.transpose([percent(x) for x in known])
    left = np.maximum(low, 0) + np.minimum(high, 0)
    precision = 1 / np.maximum(high - low, 1) ** 2
    return (False, float(left.mean()), float(np.average(middle, weights=precision)))


def by_tag(detail: str) -> tuple:
    """In the order of details.md, what has no tag last."""
    tags = list(DETAILS)
    return (tags.index(detail) if detail in tags else len(tags), detail)


def progress() -> str:
    pairs = [(task, ablation) for ablation in ablate.ablations() for task in ablation.tasks]
    there = sum(len(ablate.stored(*pair)["runs"]) for pair in pairs)
    wanted = sum(
        ablate.TASKS[task].seeds * (1 + (ablation.detail == ablate.UNCHANGED))
        for task, ablation in pairs
    )
    unchanged = ablate.ablations()[0]
    without = [task for task in ablate.TASKS if not ablate.stored(task, unchanged)["runs"]]
    absent = f" Nothing has run yet of {', '.join(without)}." if without else ""
    return f"{there:,} of {wanted:,} runs are there.{absent}"


def page(all_of_it: list[tuple]) -> str:
    known = [x for _, found in all_of_it for x in found if x and effect(x) in DECIDED]
    tests = [y for x in known for y in (x.end, x.area) if y.p is not None]
    n = len(tests)
    text = INTRODUCTION.format(
        tasks="\n".join(tasks_table()),
        **{x.lower(): f"{learned(scores(x)):.1f}" for x in ("Breakout", "UpNDown")},
        pong=f"{pong(ablate.TASKS['Breakout'].steps):.1f}",
        pong_late=f"{pong(500_000):.1f}",
        n=n,
        chance=f"{n / 20:.1f}",
        found=sum(direction(x) != "" for x in tests),
        sure=sum(sum(x.sure) for x in known),
        strict=holm([x.p for x in tests]),
        progress=progress(),
    )
    lines = [text, "## Our own choices", "", OWN]
    for ablation, found in all_of_it:
        if ablation.own:
            words = sentence([x for x in found if x]) or f"Not run yet: {way_on(ablation)}."
            lines.append(f"- [{ablation.detail}: {ablation.instead}](#{anchor(ablation)}). {words}")
    if n:
        lines += ["", "## All of them", "", *summary(all_of_it)]
        lines += ["![the same as a picture](results/ablation/effects.png)", ""]
        lines += ["![curves](results/ablation/curves.png)", ""]
        lines += [CURVES]
    lines += ["", "## One by one", ""]
    for pair in sorted(all_of_it, key=lambda pair: by_tag(pair[0].detail)):
        lines += section(*pair)
    return "\n".join(lines)


def source() -> str:
    """A hash of all that the pictures are drawn from. They carry it."""
    kept = sorted(path for path in PICTURES.glob("*__*") if path.is_file())
    parts = [path.read_bytes() for path in (*kept, ablate.TABLE, Path(__file__))]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def effects(all_of_it: list[tuple], path: Path):
    """A row for each ablation, a mark for each of its tasks, with its interval."""
    known = [(a, [x for x in found if x and x.gain > 0]) for a, found in all_of_it]
    rows = sorted((pair for pair in known if pair[1]), key=order, reverse=True)
    colours = {task: f"C{i}" for i, task in enumerate(ablate.TASKS)}
    figure, axes = plt.subplots(figsize=(11, 1.6 + 0.34 * len(rows)))
    for y, (_, found) in enumerate(rows):
        for i, x in enumerate(found):
            middle, low, high = percent(x)
            at, colour = y + 0.18 * (i - (len(found) - 1) / 2), colours[x.task]
            axes.plot(np.clip([low, high], *LIMITS), [at, at], color=colour, lw=1.5)
            filled = {} if x.end.half is not None else {"markerfacecolor": "white"}
            axes.plot(np.clip(middle, *LIMITS), at, "o", color=colour, ms=4, **filled)
            if low < LIMITS[0]:
                axes.plot(LIMITS[0], at, "<", color=colour, ms=6)
            if high > LIMITS[1]:
                axes.plot(LIMITS[1], at, ">", color=colour, ms=6)
    for task in [x for x in ablate.TASKS if any(y.task == x for _, z in rows for y in z)]:
        axes.plot([], [], "o-", color=colours[task], label=task, ms=4)
    names = [f"{x.detail}: {textwrap.shorten(x.instead, 60, placeholder=' ...')}" for x, _ in rows]
    axes.set_yticks(range(len(rows)), names, size=8)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlim(LIMITS[0] - 5, LIMITS[1] + 5)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(
        "difference at the end, 95 % interval, in percent of what the unchanged script learns\n"
        "(hollow: no interval yet; arrow: it goes on)"
    )
    axes.legend(fontsize=8, loc="upper right")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None, "Source": source()})
    plt.close(figure)


def curves(all_of_it: list[tuple], path: Path):
    """A panel for each task: the mean curve of each ablation."""
    tasks = [x for x in ablate.TASKS if any(y and y.task == x for _, z in all_of_it for y in z)]
    rows = math.ceil(len(tasks) / 2)
    figure, panels = plt.subplots(rows, 2, figsize=(11, 3.6 * rows), squeeze=False)
    for axes in panels.flat[len(tasks) :]:
        axes.axis("off")
    for axes, task in zip(panels.flat, tasks, strict=False):
        of_task = [(a, x) for a, found in all_of_it for x in found if x and x.task == task]
        strong = [(a, x) for a, x in of_task if effect(x) in ("lower", "higher") or x.sure[1]]
        strong = sorted(strong, key=lambda pair: -abs(pair[1].end.difference))[:5]
        steps = np.arange(1, WINDOWS + 1) * ablate.TASKS[task].steps / WINDOWS
        for ablation, _ in of_task:
            axes.plot(steps, mean_curve(task, ablation), color="0.8", lw=0.8)
        for ablation, _ in strong:
            label = (
                f"{ablation.detail}: {textwrap.shorten(ablation.instead, 36, placeholder=' ...')}"
            )
            axes.plot(steps, mean_curve(task, ablation), lw=1.4, label=label)
        axes.plot(steps, mean_curve(task, PLAIN), color="black", lw=2)
        language = measure(task) == GOLD
        axes.set_xlabel("episodes" if language else "steps")
        axes.set_ylabel("true reward" if language else "return")
        axes.set_title(task, size=10)
        axes.ticklabel_format(axis="x", scilimits=(0, 4))
        if strong:
            axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None, "Source": source()})
    plt.close(figure)


def mean_curve(task: str, ablation) -> np.ndarray:
    name = measure(task)[0]
    found = [windows(task, run, name) for run in runs_of(task, ablation).values()]
    return np.mean([curve for curve in found if curve.size], axis=0)


def pages() -> dict[Path, str]:
    """What docs/make.py compares."""
    return {PAGE: page(everything())}


if __name__ == "__main__":
    all_of_it = everything()
    PAGE.write_text(page(all_of_it))
    if any(any(found) for _, found in all_of_it):
        effects(all_of_it, PICTURES / "effects.png")
        curves(all_of_it, PICTURES / "curves.png")
