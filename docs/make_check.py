"""Writes what comes out for others in docs/check_your_own.md from docs/results/peers.csv.

python docs/make_check.py
"""

import json
import math
import re
import textwrap
from pathlib import Path

from make_larger import DOCS, load
from make_rlhf import table

PAGE = DOCS / "check_your_own.md"
MARKS = ("<!-- others, by make_check.py -->\n", "<!-- end of others -->")
PEERS = ("SB3", "CleanRL", "TRL")

# Whole scripts that are there, but were not run: their networks and games are made elsewhere.
NOT_RUN = {
    "SB3": ["first_iterations_atari", "first_iterations_continuous", "first_iterations_discrete"],
    "CleanRL": [
        "first_iterations_atari",
        "first_iterations_atari_lstm",
        "first_iterations_continuous",
        "first_iterations_discrete",
    ],
    "TRL": [],
}

# What `how` of peers.csv means.
MEANS = {
    "sample deviation": "Divided by the sample's standard deviation, M - 1, in place of the"
    " population's. Advantages are smaller by the root of (M - 1) / M: 13 % for four, 6.5 % for"
    " eight, 0.8 % for 64. The gradient of the policy is, too, and so it counts less beside value"
    " and entropy.",
    "time limit": "A time limit is taken for an end: nothing is added for what would have come. The"
    " same state is worth less the nearer the limit is, which an observation does not show.",
    "value loss": "The loss is the squared error of the clipped value, not the larger of both, and"
    " not half of it. A value that has moved by more than the range gets no gradient, even where it"
    " has moved the wrong way; `vf_coef` counts twice. Measured with `clip_range_vf` given: it is"
    " None by default, which clips nothing.",
    "schedule": "Schedules are asked after the steps of the rollout are counted: the first update"
    " is already an iteration down, and the last one has a learning rate and a clip range of 0.",
    "statistics": "Each environment normalizes by statistics of its own: with several, the same"
    " state looks different in each. By default there is one. The wrappers are those of the"
    " Gymnasium named below, for pictures stand-ins of the same; CleanRL asks for 0.29.1.",
    "last observations": "The last observation of an episode counts in the statistics, which the"
    " agent never acts on.",
    "returns": "The discounted sum of rewards, whose variance rewards are divided by, begins anew"
    " with the last reward of an episode, not after it, and runs on across a time limit.",
    "small in colour": "Pictures are made small before they are made grey, and so are rounded at"
    " another place. Rewards and ends are the same.",
    "first frame": "At the start of an episode all frames of the stack are its first one, not 0.",
    "norm": "The lines of `PPOTrainer.train` step right after `backward`, whatever"
    " `max_grad_norm` is; DeepSpeed, which clips by itself, was not tried. One bad batch moves the"
    " moments of Adam by all of its gradient.",
    "epsilon": "Adam as Transformers makes it by default, with 1e-8: gradients as small as 1e-5"
    " take whole steps.",
    "no bonus": "The loss has no entropy bonus; `entropy` is only logged.",
    "k2": "What is logged as the approximate KL is k2, half the mean square of the log-ratio, not"
    " k3. Its figures and thresholds are not those of others.",
    "clip fraction": "The clip fraction counts where clipping makes the loss larger, and so only"
    " the side to which the advantage points. Figures are about half as large.",
    "place of the score": "The score is on the token after the last one, unless the response is as"
    " long as it can be. It reaches the others through one more step of gamma and lambda, which are"
    " 1 and 0.95 by default.",
    "penalty": "A response without EOS keeps its score, less the penalty. A score above it still"
    " rewards going on for ever.",
    "dead groups": "There is no second score: a group is dead if its rewards are equal. A KL within"
    " the rewards keeps such groups alive, and the deviation it is divided by is that of the KL"
    " alone.",
    "floor of groups": "To the standard deviation of a group 1e-4 is added, not 1e-8: groups that"
    " hardly differ count less.",
}


def causes(row):
    """{cause: how far off it alone is}"""
    if not row["how"]:
        return {}
    names, alone = row["how"].split(", "), map(float, row["alone"].split(", "))
    return dict(zip(names, alone, strict=True))


def cell(peer, vector, rows, numbers):
    """What a peer says to a vector, and to how many of its outputs."""
    own = [row for row in rows if (row["peer"], row["vector"]) == (peer, vector)]
    if not own:
        return "not run" if vector in NOT_RUN[peer] else "not there"
    every = len(json.loads((DOCS / "vectors" / f"{vector}.json").read_text())["outputs"])
    some = f", {len(own)} of {every}" if len(own) < every else ""
    differs = [row for row in own if row["verdict"] == "differs"]
    if not differs:
        return "same" + some
    found = sorted({numbers[cause] for row in differs for cause in causes(row)})
    also = ", else same" if len(differs) < len(own) else ""
    return f"differs ({', '.join(map(str, found))}){also}{some}"


def sentence(cause, rows):
    """What it means, whose it is and how far off it is."""
    own = [row for row in rows if cause in causes(row)]
    names = [peer for peer in PEERS if any(row["peer"] == peer for row in own)]
    worst = max(own, key=lambda row: causes(row)[cause])
    where = f"`{worst['output']}` of {worst['vector']}"
    off = f"{100 * causes(worst)[cause]:.3g} %"
    text = f"{', '.join(names)}: {MEANS[cause]} "
    if "sha256" in worst["output"]:
        text += f"{off} of {where} are others"
    else:
        text += f"Off by up to {off}, {where}"
    rest = max(float(row["rest"]) for row in own)
    left = f"less than 1e{math.floor(math.log10(rest)) + 1}" if rest else "nothing"
    return f"{text}; put right, {left} is left."


def others():
    rows, origin = load("peers")
    vectors = re.findall(r"(?m)^\| \[(\w+)\]\(vectors/", PAGE.read_text())
    found = [cause for cause in MEANS if any(cause in causes(row) for row in rows)]
    numbers = {cause: number for number, cause in enumerate(found, 1)}
    body = [("vector", *(f"{peer} {origin['peers'][peer][:12]}" for peer in PEERS))]
    for vector in vectors:
        body.append((vector, *(cell(peer, vector, rows, numbers) for peer in PEERS)))
    lines = []
    for cause in found:
        first = f"{numbers[cause]}. "
        text, indent = first + sentence(cause, rows), " " * len(first)
        lines += textwrap.wrap(text, 100, subsequent_indent=indent, break_on_hyphens=False)
    versions = ", ".join(f"{name} {x}" for name, x in origin["versions"].items() if x)
    source = f"`{origin['command']}`, {origin['date']}, {versions}; commit {origin['commit'][:12]}."
    source = textwrap.wrap(source, 100, break_on_hyphens=False)
    return [*table(*body), "", *lines, "", *source]


def page():
    """The page with what comes out for others renewed."""
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    return "\n".join([before + MARKS[0], *others(), "", end + after])


def pages() -> dict[Path, str]:
    """What docs/make.py compares."""
    return {PAGE: page()}


if __name__ == "__main__":
    PAGE.write_text(page())
