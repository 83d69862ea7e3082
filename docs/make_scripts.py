"""Writes the tables of the pages of the scripts, docs/ppo_*.md.

    python docs/make_scripts.py

What stands between two marks on a page is made: flags from Args, results and figures from the kept
runs, metrics and places to edit from docs/scripts.toml and the script. All else is written by hand.
"""

import dataclasses
import functools
import importlib
import re
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np

import make_results
import make_rlhf
from make_rlhf import table

DOCS = Path(__file__).resolve().parent
sys.path.append(str(DOCS.parent))  # where the scripts are

WORDS = tomllib.loads((DOCS / "scripts.toml").read_text())
SCRIPTS = ("discrete", "continuous", "atari", "atari_lstm", "rlhf")
CLASSIC = SCRIPTS[:4]
TAG = re.compile(r" ?\[([A-Z]\d{1,2})\]")
PERIODS = {"start": 0.0, "middle": 0.475, "end": 0.95}  # where the twentieth of a run begins
MACHINE = {"seed", "exp_name", "total_timesteps", "cuda", "torch_threads", "compile", "env_id"}
MACHINE |= {"precision", "vectorization", "env_timeout", "checkpoint_every", "track"}
MACHINE |= {"wandb_project_name", "wandb_entity", "capture_video", "stages", "load", "resume"}


def source(script: str) -> str:
    return (DOCS.parent / f"ppo_{script}.py").read_text()


def line_of(script: str, text: str) -> int:
    """The line of a function or class of that name, or the only one with this text."""
    whole = source(script)
    name = re.escape(text)
    found = [*re.finditer(rf"(?m)^(?:def|class) {name}\b", whole)] if text.isidentifier() else []
    found = found or [*re.finditer(name, whole)]
    if len(found) != 1:
        raise ValueError(f"{text!r} is {len(found)} times in ppo_{script}.py")
    return whole.count("\n", 0, found[0].start()) + 1


def link(script: str, text: str, words: str | None = None) -> str:
    """To this line, by these words or the text itself."""
    return f"[`{words or text.strip()}`](../ppo_{script}.py#L{line_of(script, text)})"


def with_details(text: str) -> str:
    """Tags lead to docs/details.md."""
    return re.sub(
        r"\[([A-Z]\d{1,2})\](?!\()", lambda x: f"[{x[1]}](details.md#{x[1].lower()})", text
    )


def note(name: str, script: str) -> list[str]:
    """What stands before a table."""
    return [(WORDS["notes"] | WORDS["notes"].get(script, {}))[name].lstrip()]


def rows_of(kind: list[dict], script: str) -> list[dict]:
    """Those for this script, with what is said otherwise there."""
    rows = [row for row in kind if script in row.get("scripts", CLASSIC)]
    return [row | row.get(script, {}) for row in rows]


# ------------------------------------------------------------------------------------------------
# Flags


def allowed(kind) -> str:
    """What a flag of this type takes."""
    if kind is bool:
        return "on, off"
    parts = [x for x in get_args(kind) if x is not type(None)]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{x}`" for x in parts)
    if hasattr(kind, "__metadata__"):
        return next((x for x in kind.__metadata__ if isinstance(x, str)), "text, repeatable")
    return allowed(parts[0]) if parts else "text"


def shown(value, expression: str) -> str:
    """A default, in words where it depends on the machine."""
    if expression in WORDS["defaults"]:
        return WORDS["defaults"][expression]
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value in (None, ()) else f"`{expression.strip(chr(34)).replace('_', '')}`"


def fields(script: str) -> list[list[dict]]:
    """The groups of Args, each a list of its fields."""
    module = importlib.import_module(f"ppo_{script}")
    kinds = get_type_hints(module.Args, include_extras=True)
    values = {x.name: x.default for x in dataclasses.fields(module.Args)}
    body = source(script).split("class Args:\n")[1].split("\n\n\n")[0]
    groups = []
    for paragraph in body.split("\n\n"):
        lines = re.findall(r"(?m)^    (\w+): .+? = (.+?)  # (.+)$", paragraph)
        groups.append(
            [
                {
                    "name": name,
                    "flag": f"--{name.replace('_', '-')}",
                    "default": shown(values[name], expression),
                    "is": TAG.sub("", comment).strip(),
                    "takes": allowed(kinds[name]),
                    "tags": TAG.findall(comment),
                }
                for name, expression, comment in lines
            ]
        )
    return [group for group in groups if group]


def flags(script: str) -> str:
    """A table for each group of Args."""
    lines = note("flags", script)
    for group in fields(script):
        body = []
        for row in group:
            words = re.sub(r"(--[a-z][a-z-]+)", r"`\1`", row["is"])
            tags = " ".join(f"[{tag}](details.md#{tag.lower()})" for tag in row["tags"])
            body.append((f"`{row['flag']}`", row["default"], words, row["takes"], tags))
        lines += [f"### {WORDS['groups'][group[0]['name']]}", ""]
        lines += [*table(("flag", "default", "what it is", "takes", "detail"), *body), ""]
    return "\n".join(lines + (other_defaults() if script == "rlhf" else []))


def plain(value) -> str:
    """A default in a cell; so many texts are all there are."""
    if value is None or value == 10**9:
        return "all" if value else "none"
    return f"`{value}`" if isinstance(value, int) else f"`{value:g}`"


def other_defaults() -> list[str]:
    """What ppo_rlhf.py takes as defaults with other flags."""
    module = importlib.import_module("ppo_rlhf")
    columns = {"`--task sort`": module.SORT, "`--model`": module.REAL}
    columns["`--model --lora-rank`"] = module.REAL | module.LORA
    default = vars(module.Args())
    body = []
    for name in [x for x in default if x != "task" and any(x in y for y in columns.values())]:
        cells = [column.get(name, default[name]) for column in columns.values()]
        cells = [plain(x) for x in (default[name], *cells)]
        body.append((f"`--{name.replace('_', '-')}`", *cells))
    return [
        "### Other defaults",
        "",
        *note("other_defaults", "rlhf"),
        *table(("flag", "default", *columns), *body),
        "",
    ]


# ------------------------------------------------------------------------------------------------
# Runs


@functools.cache
def kept_results() -> tuple[list, list, list]:
    """Of the classic scripts: all kept runs, CleanRL's, and long ones as far as they have come."""
    return make_results.everything()


@functools.cache
def kept_rlhf() -> list:
    return make_rlhf.load()


def runs_of(script: str) -> list:
    """(configuration, {metric: values}, flags that are not at their default)"""
    if script == "rlhf":
        runs = kept_rlhf()
    else:
        runs = [x for x in kept_results()[0] if x[0]["command"].split()[0] == f"ppo_{script}.py"]
        runs = [(config, {k: v for k, (_, v) in metrics.items()}) for config, metrics in runs]
    default = vars(importlib.import_module(f"ppo_{script}").Args())
    default = {k: v for k, v in default.items() if k not in MACHINE}
    found = []
    for config, metrics in runs:
        usual = default | (importlib.import_module("ppo_rlhf").SORT if is_sort(config) else {})
        usual = {k: [*x] if isinstance(x, tuple) else x for k, x in usual.items()}  # as in JSON
        changed = {k: config[k] for k in default if k in config if config[k] != usual[k]}
        found.append((config, metrics, changed))
    return found


def is_sort(config: dict) -> bool:
    return config.get("task") == "sort"


def mean_and_deviation(values) -> str:
    """Over seeds, the population's deviation, as those who publish such tables do."""
    return f"{np.mean(values):.2f} ± {np.std(values):.2f}"


def results(script: str) -> str:
    """Scores of the kept runs beside published ones, and their curves."""
    lines = rlhf_results() if script == "rlhf" else classic_results(script)
    return "\n".join([*lines, ""])


def classic_results(script: str) -> list[str]:
    """The rows of docs/results.md that are of this script."""
    runs, peers, long = kept_results()
    own = [x for x in runs + long if x[0]["command"].split()[0] == f"ppo_{script}.py"]
    lines = []
    for section in make_results.SECTIONS:
        if rows := make_results.table(section, own, peers):
            picture = f"![{section}](results/{make_results.picture(section)})"
            text = make_results.TEXTS[section]
            lines += [f"### {section}", "", text, "", *rows, "", picture, ""]
    lines += [
        "The page of [results](results.md) says what the columns and curves are, and has every"
    ]
    lines += ["finished run with its command."]
    return lines


def rlhf_results() -> list[str]:
    groups = {}
    for config, metrics, _ in runs_of("rlhf"):
        groups.setdefault((config["task"], config["kl_coef"]), []).append(metrics)
    body = []
    for (task, kl_coef), runs in groups.items():
        rows = {"exactly right": "gold/exact"}
        if task == "reviews":
            rows = {"gold reward": "gold/score", "proxy": "proxy", "KL": "kl"}
        for words, name in rows.items():
            cells = [
                mean_and_deviation([run[f"eval/{stage}/{name}"][-1] for run in runs])
                for stage in ("sft", "ppo")
            ]
            what = f"`--task {task} --kl-coef {kl_coef:g}`"
            body.append((what, len(runs), words, *cells))
    lines = [*table(("settings", "seeds", "what", "after SFT", "after PPO"), *body), ""]
    lines += ["512 new prompts; ± is the standard deviation over seeds. There is no"]
    lines += [
        "published reference: the tasks are the script's own. The page on [RLHF](rlhf.md) has"
    ]
    lines += ["all runs, best-of-n samples beside them, GRPO, and a real language model.", ""]
    return [*lines, "![proxy and gold](results/rlhf/curves.png)"]


# ------------------------------------------------------------------------------------------------
# Metrics


def metrics_of(script: str) -> dict[str, dict]:
    """name -> words about it; an entry that is the same as another has its words."""
    all_of_them = WORDS["metrics"]

    def complete(entry):
        return (complete(all_of_them[entry["as"]]) if "as" in entry else {}) | entry

    named = [{"name": name, **complete(entry)} for name, entry in all_of_them.items()]
    own = [row for row in named if script in all_of_them[row["name"]].get("scripts", CLASSIC)]
    return {row["name"]: row | row.get(script, {}) for row in own}


def anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9_-]", "", name.lower().replace("/", "-"))


def metrics(script: str) -> str:
    """What each is, what is healthy, what is not, and what to turn then."""
    groups = {}
    for name, row in metrics_of(script).items():
        cell = f'<a id="{anchor(name)}"></a>{link(script, row["line"], name)}'
        cell += f", with `{row['flag']}`" if "flag" in row else ""
        cells = (cell, *(with_details(row[x]) for x in ("what", "healthy", "unhealthy")))
        groups.setdefault(row["group"], []).append(cells)
    lines = note("metrics", script)
    for title, body in groups.items():
        lines += [f"### {title}", ""]
        lines += [
            *table(("metric", "what it is", "healthy", "not healthy: what to turn"), *body),
            "",
        ]
    return "\n".join(lines)


def rounded(x: float) -> str:
    """Two digits that count."""
    x = x + 0.0  # no -0
    if x == 0 or abs(x) >= 10:
        return f"{float(f'{x:.2g}'):,.0f}"
    return f"{x:.1e}".replace("e-0", "e-") if abs(x) < 1e-3 else f"{float(f'{x:.2g}'):g}"


def ranges(runs: list[dict], name: str) -> list[tuple[float, float]]:
    """In each period, between what 5 % and 95 % of the values lie."""
    found = []
    for begin in PERIODS.values():
        parts = []
        for values in (run[name] for run in runs):
            first = int(begin * len(values))
            parts.append(values[first : first + max(1, len(values) // 20)])
        found.append(tuple(np.nanquantile(np.concatenate(parts), (0.05, 0.95))))
    return found


def figures(script: str) -> str:
    """Ranges of the metrics in kept runs with default settings."""
    groups = {}
    for config, run, changed in runs_of(script):
        if not changed:
            groups.setdefault(config["task" if script == "rlhf" else "env_id"], []).append(run)
    first = importlib.import_module(f"ppo_{script}").Args().env_id if script != "rlhf" else ""
    tables = [[first]] if first in groups and len(groups) > 1 else []
    tables = [[task] for task in groups] if script == "rlhf" else [*tables, [*groups]]
    lines = note("figures", script)
    for tasks in tables:
        body = []
        for name, row in metrics_of(script).items():
            having = [[run for run in groups[x] if name in run] for x in tasks]
            having = [runs for runs in having if runs] if row.get("figures", True) else []
            if having:
                spans = zip(*(ranges(runs, name) for runs in having), strict=True)
                ends = [(min(a for a, _ in x), max(b for _, b in x)) for x in spans]
                cells = [" to ".join(dict.fromkeys(map(rounded, x))) for x in ends]
                once = all(len(run[name]) == 1 for runs in having for run in runs)
                body.append((f"`{name}`", *(["", "", cells[-1]] if once else cells)))
        runs = ", ".join(f"{x} ({len(groups[x])})" for x in tasks)
        lines += [*textwrap.wrap(f"Runs, in brackets how many: {runs}.", 100), ""]
        lines += [*table(("metric", *PERIODS), *body), ""]
    return "\n".join(lines)


def edits(script: str) -> str:
    """What to change for a problem of one's own, and where it stands."""
    body = []
    for row in rows_of(WORDS["edits"], script):
        places = ", ".join(link(script, text, label(text)) for text in row["where"])
        body.append((row["what"], places, with_details(row["how"])))
    return "\n".join([*note("edits", script), *table(("what", "where", "how"), *body), ""])


def label(text: str) -> str:
    """A name, or the left side of a line."""
    return text.split("#")[0].strip().removeprefix("def ").split("(self")[0].rstrip("({[ |=")


# ------------------------------------------------------------------------------------------------
# Pages

PARTS: dict[str, Callable[[str], str]] = {
    "flags": flags,
    "results": results,
    "metrics": metrics,
    "figures": figures,
    "edits": edits,
}


def page(script: str) -> str:
    """A page with its parts made anew."""
    text = (DOCS / f"ppo_{script}.md").read_text()
    for name, make in PARTS.items():
        first, last = f"<!-- {name}, by make_scripts.py -->\n", "<!-- end -->"
        before, rest = text.split(first)
        text = before + first + "\n" + make(script) + "\n" + last + rest.split(last, 1)[1]
    return text


def pages() -> dict[Path, str]:
    """All five, where they are."""
    return {DOCS / f"ppo_{script}.md": page(script) for script in SCRIPTS}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
