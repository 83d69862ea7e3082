"""Writes what docs/ppo.md has from the code and from runs, and keeps the runs of its failures.

    python docs/make_ppo.py           # the parts of the page between marks, links, pictures
    python docs/make_ppo.py runs/*    # keep finished runs of CASES first

Numbers of the clip and of GAE come from calls of the real ppo_loss and gae. A link to a line of a
script leads to the line on which its own words stand, so it is right after every run of this.
Runs are kept in docs/results/failures/: runs.csv.gz, a row for each iteration; runs.json, where
they come from.
"""

import csv
import gzip
import importlib
import io
import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import make_results
import ppo_discrete

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

PAGE = DOCS / "ppo.md"
PICTURES = DOCS / "pictures"
RUNS = DOCS / "results" / "failures" / "runs.json"
MARK = re.compile(r"(<!-- (\w+), by make_ppo.py -->\n).*?(<!-- end -->)", re.S)
LINK = re.compile(r"\[`([^`\n]+)`\]\(\.\./(ppo_\w+\.py)#L\d+\)")
BLUE, ORANGE, INK = "#1f77b4", "#c75a06", "#1a1a1a"
SCRIPTS = ("discrete", "continuous", "atari", "atari_lstm", "rlhf")


def table(*rows):
    """The first row is the header."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


# ------------------------------------------------------------------------------------------------
# The clip, by calls of ppo_loss

EPSILON = 0.2
CLIP_ROWS = [  # ratio, advantage, what it means
    (0.6, 1.0, "a good action has become rarer: it is brought back, however far it is"),
    (1.1, 1.0, "a good action becomes more likely"),
    (1.4, 1.0, "it is more likely by enough: nothing more to gain"),
    (0.6, -1.0, "a bad action is rarer by enough: nothing more to gain"),
    (1.1, -1.0, "a bad action becomes less likely"),
    (1.4, -1.0, "a bad action has become more likely: it is brought back, however far it is"),
]


class Ratio:
    """Stands for agent and policy: one action, whose ratio to the old policy is `ratio`."""

    def __init__(self, ratio: float):
        self.ratio = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)

    def __call__(self, obs):
        return self, torch.zeros(1, dtype=torch.float64)

    def log_prob(self, actions):
        return self.ratio.log()

    def entropy(self):
        return torch.zeros(1, dtype=torch.float64)


def clip(ratio: float, advantage: float, epsilon: float = EPSILON) -> tuple[float, float, float]:
    """Objective, its gradient with respect to the ratio, and clipfrac, of one transition."""
    agent, zero = Ratio(ratio), torch.zeros(1, dtype=torch.float64)
    minibatch = [zero, zero, zero, zero, torch.tensor([advantage], dtype=torch.float64), zero]
    coefficients = (torch.tensor(epsilon), torch.tensor(0.0), None, 0.0, False, False)
    loss, stats = ppo_discrete.ppo_loss(agent, minibatch, *coefficients)
    loss.backward()
    return -loss.item(), -agent.ratio.grad.item(), stats["clipfrac"].item()


def clip_table() -> str:
    body = [("ratio", "advantage", "objective", "gradient", "clipfrac", "what it means")]
    for ratio, advantage, words in CLIP_ROWS:
        where = "below" if ratio < 1 - EPSILON else "above" if ratio > 1 + EPSILON else "within"
        numbers = [f"{x + 0.0:.1f}" for x in clip(ratio, advantage)]  # no -0.0
        body.append((f"{where}: {ratio}", f"{advantage:+.0f}", *numbers, words))
    return table(*body)


def clip_curves() -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """advantage -> ratios and the objective there"""
    ratios = np.linspace(0.01, 2.0, 200)
    return {a: (ratios, np.array([clip(r, a)[0] for r in ratios])) for a in (1.0, -1.0)}


def clip_picture() -> str:
    """The objective over the ratio, as SVG."""
    with plt.rc_context({"svg.hashsalt": "ppo", "font.size": 12}):
        figure, axis = plt.subplots(figsize=(4.8, 4.2), layout="constrained", facecolor="white")
        axis.axvspan(1 - EPSILON, 1 + EPSILON, color="0.9")
        axis.axhline(0.0, color="0.6", lw=0.8)
        for (a, (ratios, objective)), color in zip(
            clip_curves().items(), (BLUE, ORANGE), strict=True
        ):
            axis.plot(ratios, a * ratios, color, lw=1, ls=":")
            axis.plot(ratios, objective, color, lw=3)
        axis.text(0.08, 0.75, "A = +1, good", color=BLUE)
        axis.text(0.08, -1.1, "A = -1, bad", color=ORANGE)
        axis.text(1.25, 0.9, "no gradient", color=BLUE)
        axis.text(0.08, -1.4, "no gradient", color=ORANGE)
        axis.text(
            1.0, -1.95, r"$1 - \epsilon$ to $1 + \epsilon$", color="0.3", ha="center", fontsize=10
        )
        axis.set(xlabel="ratio: new probability / old", ylabel="objective, the larger the better")
        axis.set(
            xlim=(0, 2), ylim=(-2.1, 2.1), xticks=[0, 0.8, 1, 1.2, 2], yticks=[-2, -1, 0, 1, 2]
        )
        axis.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return re.sub(r" +$", "", text.getvalue(), flags=re.M)


# ------------------------------------------------------------------------------------------------
# GAE, by calls of gae

GAMMA, REWARDS, VALUES = 0.9, (1.0, 1.0, 1.0, 1.0), (8.0, 8.0, 8.0, 8.0)
LAST = {"dies": 0.0, "is cut off": 8.0}  # how the episode ends: V of its last observation
LAMBDAS = (0.0, 0.95, 1.0)


def advantages(end: str, gae_lambda: float) -> np.ndarray:
    """Of an episode of one environment, [T]"""
    rewards, values = np.array(REWARDS)[:, None], np.array(VALUES)[:, None]
    next_values = np.append(values[1:], [[LAST[end]]], axis=0)
    dones = np.array([0.0, 0.0, 0.0, 1.0])[:, None]
    return ppo_discrete.gae(rewards, values, next_values, dones, GAMMA, gae_lambda)[:, 0]


def returns(end: str) -> np.ndarray:
    """Discounted sums of rewards, and of what is left at the end."""
    sums = [LAST[end]]
    for reward in reversed(REWARDS):
        sums.append(reward + GAMMA * sums[-1])
    return np.array(sums[:0:-1])


def gae_table() -> str:
    names = [f"lambda {x:g}" for x in LAMBDAS]
    body = [("the episode", "t", *names, "return - value")]
    for end in LAST:
        columns = [advantages(end, x) for x in LAMBDAS] + [returns(end) - VALUES]
        for t, row in enumerate(zip(*columns, strict=True)):
            body.append((end, t, *(f"{x:.2f}" for x in row)))
    return table(*body)


# ------------------------------------------------------------------------------------------------
# The loop as a picture

BOXES = [  # title, lines, height; those from the fourth on are within the two inner loops
    ("rollout: T steps in N environments", ["act(obs[t]), envs.step(actions[t])"]),
    ("the policy that acted", ["batch_values, batch_logprobs"]),
    ("advantages and value targets", ["advantages = gae(...)", "returns = advantages + values"]),
    ("one minibatch of M", ["ppo_loss, backward, clip_grad_norm_,", "optimizer.step()"]),
    ("log", ["the batch is thrown away"]),
]


def loop_picture() -> str:
    """Boxes from top to bottom, narrow enough for a phone, as SVG."""

    def text(x, y, words, size=14, color=INK, more=""):
        return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}"{more}>{words}</text>'

    def box(y, title, lines):
        rectangle = f'<rect x="62" y="{y}" width="296" height="{36 + 20 * len(lines)}" rx="6"'
        parts = [f'{rectangle} fill="#f2f6fa" stroke="{BLUE}" stroke-width="1.5"/>']
        parts.append(text(74, y + 22, title, more=' font-weight="bold"'))
        mono = ' font-family="ui-monospace, Menlo, Consolas, monospace"'
        prose = "thrown" in lines[0]
        parts += [
            text(74, y + 43 + 20 * i, line, 12 if not prose else 13, more="" if prose else mono)
            for i, line in enumerate(lines)
        ]
        return parts

    def arrow(points, color=INK):
        head = f"url(#head{color[1:]})"
        how = f'fill="none" stroke="{color}" stroke-width="1.5" marker-end="{head}"'
        return f'<polyline points="{points}" {how}/>'

    parts = []
    tops = [14, 96, 178, 312, 432]
    for y, (title, lines) in zip(tops, BOXES, strict=True):
        parts += box(y, title, lines)
    parts += [arrow("210,70 210,94"), arrow("210,152 210,176")]
    parts += [arrow("210,254 210,310"), arrow("210,388 210,430")]
    parts.append(arrow("358,365 392,365 392,332 360,332", ORANGE))
    inner = ("num_minibatches times,", "in a new order in each", "of update_epochs")
    parts += [text(222, 272 + 15 * i, line, 12, ORANGE) for i, line in enumerate(inner)]
    parts.append(arrow("62,461 28,461 28,43 60,43", BLUE))
    upright = ' transform="rotate(-90 20 256)" text-anchor="middle"'
    parts.append(text(20, 256, "num_iterations times", 13, BLUE, upright))
    size = 'markerWidth="8" markerHeight="8" refX="7" refY="4" markerUnits="userSpaceOnUse"'
    heads = [
        f'<marker id="head{x[1:]}" {size} orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{x}"/></marker>'
        for x in (INK, BLUE, ORANGE)
    ]
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 430 504" width="430"'
            ' height="504" font-family="system-ui, sans-serif" role="img">',
            "<title>The loop of PPO</title>",
            f"<defs>{''.join(heads)}</defs>",
            '<rect width="430" height="504" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


# ------------------------------------------------------------------------------------------------
# Default values

PARAMETERS = ("learning_rate", "num_envs", "num_steps", "num_minibatches", "update_epochs", "gamma")
PARAMETERS += ("gae_lambda", "clip_coef", "ent_coef", "vf_coef", "max_grad_norm", "target_kl")


def default_table() -> str:
    """Of each script, read from its Args."""
    args = {name: importlib.import_module(f"ppo_{name}").Args() for name in SCRIPTS}
    body = [("", *(f"`ppo_{name}.py`" for name in SCRIPTS))]
    for name in PARAMETERS:
        values = [getattr(x, name, "") for x in args.values()]
        values = [f"{x:g}" if isinstance(x, int | float) else x for x in values]
        values = ["none" if x is None else x for x in values]
        body.append((name, *values))
    return table(*body)


# ------------------------------------------------------------------------------------------------
# Failure modes


class Case(NamedTuple):
    title: str
    task: str  # flags of its runs and of those they are compared with
    flags: str  # that provoke it
    other: str  # in their place in the runs to compare with
    metric: str  # that shows it first
    when: str  # is looked at: the highest of all iterations, or the mean of the last ten
    turn: str  # what to turn


CARTPOLE = "--total-timesteps 102400"
ACROBOT = f"--env-id Acrobot-v1 {CARTPOLE}"
CASES = [
    Case(
        "steps far too large",
        CARTPOLE,
        "--learning-rate 0.1",
        "",
        "approx_kl",
        "highest",
        "`--learning-rate` down; `--target-kl 0.02` ends such an update",
    ),
    Case(
        "nothing limits the step",
        f"{CARTPOLE} --learning-rate 0.01 --update-epochs 10",
        "--clip-coef 1e6",
        "",
        "approx_kl",
        "highest",
        "`--clip-coef` down to 0.1 to 0.3, fewer `--update-epochs`",
    ),
    Case(
        "entropy collapse",
        f"{ACROBOT} --learning-rate 0.03",
        "--ent-coef 0",
        "--ent-coef 0.05",
        "entropy",
        "last",
        "`--ent-coef` up, `--learning-rate` down",
    ),
    Case(
        "only the entropy counts",
        CARTPOLE,
        "--ent-coef 1",
        "",
        "entropy",
        "last",
        "`--ent-coef` down, or `--anneal-ent`",
    ),
    Case(
        "the value function learns nothing",
        ACROBOT,
        "--vf-coef 0",
        "--max-grad-norm 100",
        "explained_variance",
        "last",
        "`--vf-coef` up, `--learning-rate` up, rewards of order 1, `--no-clip-vloss`",
    ),
    Case(
        "the horizon is too short",
        CARTPOLE,
        "--gamma 0",
        "",
        "value_loss",
        "last",
        "`--gamma` up: rewards count for about 1 / (1 - gamma) steps",
    ),
    Case(
        "the policy hardly moves",
        ACROBOT,
        "",
        "--max-grad-norm 100",
        "entropy",
        "last",
        "`--max-grad-norm` up, `--vf-coef` down, smaller rewards",
    ),
]
SEEDS = (1, 2, 3)
COLUMNS = ("return", "approx_kl", "old_approx_kl", "clipfrac", "entropy", "explained_variance")
COLUMNS += ("grad_norm", "policy_loss", "value_loss")


def command(case: Case, seed: int, provoked: bool = True) -> str:
    """As a user types it; if not provoked, the run to compare with."""
    words = [case.task, case.flags if provoked else case.other, f"--seed {seed}"]
    return " ".join(["python ppo_discrete.py", *filter(None, words)])


def args_of(line: str) -> ppo_discrete.Args:
    return ppo_discrete.parse_args(shlex.split(line)[2:])


def commands() -> list[str]:
    """Of all runs, each once."""
    lines = [command(x, seed, how) for x in CASES for how in (True, False) for seed in SEEDS]
    return list(dict.fromkeys(lines))


def keep(folders: list[Path]):
    """Add finished runs to docs/results/failures/; call it on the machine that ran them."""
    facts, rows = load() if RUNS.exists() else ({}, {})
    meant = {args_of(line): line for line in commands()}
    with open("/proc/cpuinfo") as file:
        cpu = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        if not re.fullmatch("[0-9a-f]{40}", config["git_commit"] or ""):
            sys.exit(f"{folder}: not from a commit, but from {config['git_commit']}")
        ran = ppo_discrete.Args(**{x.name: config[x.name] for x in fields(ppo_discrete.Args)})
        if ran not in meant:
            sys.exit(f"{folder}: no run of CASES")
        line = meant[ran]
        names = ("git_commit", "script_sha256", "device", "versions")
        facts[line] = {name: config[name] for name in names} | {"cpu": cpu}
        steps = {}
        with open(folder / "metrics.csv") as file:
            for row in csv.DictReader(file):
                name = row["name"].replace("charts/mean_episodic_return", "losses/return")
                if name.removeprefix("losses/") in COLUMNS:
                    of_step = steps.setdefault(int(row["global_step"]), {})
                    of_step[name.removeprefix("losses/")] = float(row["value"])
        rows[line] = {
            "global_step": list(steps),
            **{name: [x.get(name, np.nan) for x in steps.values()] for name in COLUMNS},
        }
    RUNS.parent.mkdir(exist_ok=True)
    order = [line for line in commands() if line in facts]
    RUNS.write_text(json.dumps({line: facts[line] for line in order}, indent=1) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["command", "global_step", *COLUMNS])
    for line in order:
        for step, *values in zip(*rows[line].values(), strict=True):
            writer.writerow([line, int(step), *(f"{x:.6g}" for x in values)])
    data = gzip.compress(text.getvalue().encode(), mtime=0)
    RUNS.with_suffix(".csv.gz").write_bytes(data)


def load() -> tuple[dict, dict]:
    """command -> where its run comes from; command -> {column: values of each iteration}"""
    rows = {}
    with gzip.open(RUNS.with_suffix(".csv.gz"), "rt") as file:
        for row in csv.DictReader(file):
            line = rows.setdefault(row.pop("command"), {name: [] for name in row})
            for name, value in row.items():
                line[name].append(float(value))
    rows = {line: {k: np.array(x) for k, x in of.items()} for line, of in rows.items()}
    return json.loads(RUNS.read_text()), rows


def looked_at(values: np.ndarray, when: str) -> float:
    return values.max() if when == "highest" else values[-10:].mean()


def spread(values: list[float], digits: int) -> str:
    """Mean, least and most."""
    mean, least, most = (f"{x:,.{digits}f}" for x in (np.mean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})"


def failure_table() -> str:
    """Means over the seeds, with the least and the most, beside those of the other runs."""
    _, rows = load()
    body = [
        ("", "what is seen first", *("there", "beside", "return there", "beside"), "what to turn")
    ]
    for number, case in enumerate(CASES, 1):
        cells = []
        for name, when in ((case.metric, case.when), ("return", "last")):
            for provoked in (True, False):
                runs = [rows[command(case, seed, provoked)][name] for seed in SEEDS]
                digits = 0 if name == "return" else DIGITS[name]
                cells.append(spread([looked_at(x, when) for x in runs], digits))
        sign = f"`{case.metric}`, {'the highest' if case.when == 'highest' else 'in the end'}"
        body.append((f"{number}. {case.title}", sign, *cells, case.turn))
    return table(*body)


def command_block() -> str:
    """The commands of the table, with that of the other runs where it needs flags of its own."""
    facts, _ = load()
    lines = []
    for number, case in enumerate(CASES, 1):
        lines += [f"# {number}", command(case, 1)]
    others = list(dict.fromkeys(command(case, 1, False) for case in CASES))
    for line in others:
        numbers = [str(n) for n, x in enumerate(CASES, 1) if command(x, 1, False) == line]
        lines += [f"# beside {', '.join(numbers)}", line]
    commits = ", ".join(sorted({x["git_commit"][:12] for x in facts.values()}))
    where = "; ".join(sorted({f"{x['cpu']}, device {x['device']}" for x in facts.values()}))
    end = f"Each with seeds {', '.join(map(str, SEEDS))}; commit {commits}; {where}."
    return "\n".join(["```sh", *lines, "```", "", end]) + "\n"


def pendulum_rows() -> str:
    """Time limits taken for death: the runs of docs/results.md, the last 100 episodes."""
    scores = {True: [], False: []}
    for config, metrics in make_results.load("Pendulum-v1"):
        scores[config["bootstrap_truncation"]].append(make_results.last_100(metrics))
    body = [("ends of episodes", "returns of seeds 1, 2, 3")]
    for bootstrap, words in ((True, "a time limit"), (False, "taken for death")):
        body.append((words, " ".join(f"{x:,.0f}" for x in scores[bootstrap])))
    return table(*body)


def kl_table() -> str:
    """How often each estimate was negative in the healthy runs."""
    _, rows = load()
    body = [("run", "iterations", "`old_approx_kl` < 0", "its lowest", "`approx_kl`, its lowest")]
    for line in dict.fromkeys(command(case, 1, False) for case in CASES if not case.other):
        k1, k3 = rows[line]["old_approx_kl"], rows[line]["approx_kl"]
        cells = (len(k1), f"{(k1 < 0).mean():.0%}", f"{k1.min():.1e}", f"{k3.min():.1e}")
        body.append((f"`{line}`", *cells))
    return table(*body)


# ------------------------------------------------------------------------------------------------
# The page

DIGITS = {"approx_kl": 3, "entropy": 2, "explained_variance": 2, "value_loss": 3, "clipfrac": 2}
PARTS = {
    "clip": clip_table,
    "gae": gae_table,
    "defaults": default_table,
    "failures": failure_table,
    "commands": command_block,
    "pendulum": pendulum_rows,
    "kl": kl_table,
}


def line_of(script: str, words: str) -> int:
    """The line of a script on which `words` stand: of a function its def, else the only one."""
    lines = (ROOT / script).read_text().splitlines()
    found = [n for n, line in enumerate(lines, 1) if line.startswith(f"def {words}(")]
    found = found or [n for n, line in enumerate(lines, 1) if words in line]
    if len(found) != 1:
        raise ValueError(f"{script}: {words!r} stands on {len(found)} lines")
    return found[0]


def page(text: str) -> str:
    """The page with its parts and links as they have to be."""
    text = MARK.sub(lambda match: f"{match[1]}\n{PARTS[match[2]]()}\n{match[3]}", text)
    return LINK.sub(lambda x: f"[`{x[1]}`](../{x[2]}#L{line_of(x[2], x[1])})", text)


def pages() -> dict[Path, str]:
    """The page and its pictures, path -> text"""
    pictures = {"ppo_clip.svg": clip_picture(), "ppo_loop.svg": loop_picture()}
    return {PAGE: page(PAGE.read_text())} | {PICTURES / k: x for k, x in pictures.items()}


if __name__ == "__main__":
    if sys.argv[1:]:
        keep([Path(argument) for argument in sys.argv[1:]])
    for path, text in pages().items():
        path.write_text(text)
