"""Writes docs/diffs/*.md: what really differs between two scripts, and why.

python docs/make_diffs.py

The differences are found in the scripts; why they are there is said in docs/diffs.toml, once for
each place or group of places. A place without a reason is an error, and so is a reason without a
place. Function is compared with function and method with method, line by line where they are alike,
as a whole where they are not: else a blank line or a `return` in common would tear both to pieces.

ppo_rlhf.py shares too little with the others for that: of it what corresponds is compared, and what
does not is listed, so that every function and class of both scripts is in one of the lists.
"""

import ast
import difflib
import re
import tomllib
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "diffs"
PAIRS = {  # page -> scripts
    "discrete_continuous": ("discrete", "continuous"),
    "discrete_atari": ("discrete", "atari"),
    "atari_memory": ("atari", "atari_lstm"),
}
START = "The script"  # what is above the first banner


class Chunk(NamedTuple):
    """A function, a method, or what is above the first one of a section or a class."""

    section: str
    name: str  # "Agent.forward"
    first: int  # index of its first line; blank lines above belong to it
    end: int


class Hunk(NamedTuple):
    """Lines first to end (indices) of the old script, and what the new one has in their place."""

    section: str
    name: str
    old: tuple[int, int]
    new: tuple[int, int]


def read(script: str) -> list[str]:
    return (ROOT / f"ppo_{script}.py").read_text().splitlines()


def reasons() -> dict[str, dict]:
    """page -> name of a reason -> entry of docs/diffs.toml"""
    return tomllib.loads((ROOT / "docs" / "diffs.toml").read_text())


def chunks(lines: list[str]) -> list[Chunk]:
    """All lines, in order."""
    starts = [(START, "", 0)]
    section, owner, in_class = START, "", False
    for i, line in enumerate(lines):
        definition = re.match(r"( {4})?(?:def|class) (\w+)", line)
        if re.match(r"# -{96}$", line):
            section, owner, in_class = lines[i + 1].removeprefix("# "), "", False
            name = ""
        elif definition and not definition[1]:
            name = owner = definition[2]
            in_class = line.startswith("class")
        elif definition and in_class:
            name = f"{owner}.{definition[2]}"
        else:
            continue
        first = i
        while re.match(r"\s*(@.*)?$", lines[first - 1]):
            first -= 1
        starts.append((section, name, first))
    ends = [i for _, _, i in starts[1:]] + [len(lines)]
    return [Chunk(*start, end) for start, end in zip(starts, ends, strict=True)]


def hunks_within(old: list[str], new: list[str], x: Chunk, y: Chunk, gap: int = 2) -> list[Hunk]:
    """Of two functions that correspond; with at most `gap` lines between them two hunks are one."""
    a, b = old[x.first : x.end], new[y.first : y.end]
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    spans = [code[1:] for code in matcher.get_opcodes() if code[0] != "equal"]
    if matcher.ratio() < 0.5 and min(len(a), len(b)) > 3 and gap:  # as a whole, but for its ends
        spans = [(spans[0][0], spans[-1][1], spans[0][2], spans[-1][3])]
    joined = []
    for span in spans:
        if joined and span[0] - joined[-1][1] <= gap:
            joined[-1] = (joined[-1][0], span[1], joined[-1][2], span[3])
        else:
            joined.append(span)
    return [
        Hunk(x.section, x.name, (x.first + a1, x.first + a2), (y.first + b1, y.first + b2))
        for a1, a2, b1, b2 in joined
    ]


def hunks(old: list[str], new: list[str]) -> list[Hunk]:
    """All that has to be done to the old lines to get the new ones, in order."""
    a, b = chunks(old), chunks(new)
    keys = [[(x.section, x.name) for x in side] for side in (a, b)]
    found = []
    for code, a1, a2, b1, b2 in difflib.SequenceMatcher(None, *keys, False).get_opcodes():
        if code == "equal":
            for x, y in zip(a[a1:a2], b[b1:b2], strict=True):
                found += hunks_within(old, new, x, y)
            continue
        at = a[a1].first if a1 < len(a) else len(old)
        there = b[b1].first if b1 < len(b) else len(new)
        for whole in whole_classes(a[a1:a2]):
            found.append(Hunk(whole.section, whole.name, (whole.first, whole.end), (there, there)))
            at = whole.end
        for whole in whole_classes(b[b1:b2]):
            found.append(Hunk(whole.section, whole.name, (at, at), (whole.first, whole.end)))
    return found


def whole_classes(parts: list[Chunk]) -> list[Chunk]:
    """A class with all of its methods as one."""
    groups = [list(x) for _, x in groupby(parts, lambda part: part.name.partition(".")[0])]
    return [x[0]._replace(end=x[-1].end) for x in groups]


def unified(hunk: Hunk, old: list[str], new: list[str]) -> list[str]:
    """The hunk as `diff` writes it. Lines in common are shown once."""
    a, b = old[slice(*hunk.old)], new[slice(*hunk.new)]
    lines = []
    for code, a1, a2, b1, b2 in difflib.SequenceMatcher(None, a, b, False).get_opcodes():
        if code == "equal":
            lines += [f" {x}" for x in a[a1:a2]]
        else:
            lines += [f"-{x}" for x in a[a1:a2]] + [f"+{x}" for x in b[b1:b2]]
    spans = [f"{x + (x < y)},{y - x}" for x, y in (hunk.old, hunk.new)]
    return [f"@@ -{spans[0]} +{spans[1]} @@ {hunk.name}".rstrip(), *lines]


def link(script: str, first: int, end: int) -> str:
    """To lines of a script, given as indices."""
    span = f"L{first + 1}" + (f"-L{end}" if end > first + 1 else "")
    text = f"{first + 1}" + (f"-{end}" if end > first + 1 else "")
    return f"[ppo_{script}.py {text}](../../ppo_{script}.py#{span})"


def where(hunk: Hunk, scripts: tuple[str, str]) -> str:
    sides = zip(scripts, (hunk.old, hunk.new), strict=True)
    return ", ".join(link(script, *span) for script, span in sides if span[0] < span[1])


def assign(page: str, entries: dict, found: list[Hunk], old, new) -> dict[str, list[Hunk]]:
    """Name of a reason -> its hunks. A hunk has one reason, a line of a reason one hunk."""
    texts = [[*old[slice(*hunk.old)], *new[slice(*hunk.new)]] for hunk in found]
    lines = [{line.strip() for line in text} for text in texts]
    reason = {}  # number of a hunk -> names
    for name, entry in entries.items():
        for line in entry["lines"]:
            hits = [
                i
                for i, hunk in enumerate(found)
                if hunk.section == entry["section"] and line in lines[i]
            ]
            if len(hits) != 1:
                raise ValueError(f"{page}, {name}: {len(hits)} places have the line {line!r}")
            reason.setdefault(hits[0], set()).add(name)
    for i, hunk in enumerate(found):
        if len(reason.get(i, ())) != 1:
            text = "\n".join(unified(hunk, old, new))
            raise ValueError(f"{page}, {hunk.section}: reasons {reason.get(i)} for\n{text}")
    return {name: [h for i, h in enumerate(found) if name in reason[i]] for name in entries}


def summary(entries: dict, scripts: tuple[str, str]) -> list[str]:
    """A table of what matters; reasons without a word for either side are not in it."""
    rows = ["| what | " + " | ".join(f"ppo_{x}.py" for x in scripts) + " |", "| --- | --- | --- |"]
    for name, entry in entries.items():
        if "old" in entry:
            rows.append(f"| [{entry['title']}](#{name}) | {entry['old']} | {entry['new']} |")
    return rows


def head(scripts: tuple[str, str], intro: str) -> list[str]:
    made = "<!-- made by docs/make_diffs.py, do not edit -->"
    title = " to ".join(f"ppo_{script}.py" for script in scripts)
    notes = " and ".join(f"[ppo_{x}.py](../annotated/ppo_{x}.md)" for x in scripts)
    text = wrapped(f"{intro} With notes: {notes}.")
    return [made, "", f"# From {title}", "", text, ""]


def wrapped(text: str) -> str:
    return fill(" ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False)


def explained(name: str, entry: dict) -> list[str]:
    return [f'<a id="{name}"></a>', "", f"### {entry['title']}", "", wrapped(entry["why"]), ""]


def page(name: str) -> str:
    """The text of the page about two scripts that have the same sections."""
    scripts, entries = PAIRS[name], reasons()[name]
    intro = entries.pop("intro")
    old, new = map(read, scripts)
    found = hunks(old, new)
    assigned = assign(name, entries, found, old, new)
    same = len(new) - sum(hunk.new[1] - hunk.new[0] for hunk in found)
    sections = list(dict.fromkeys(chunk.section for chunk in chunks(new)))
    equal = [x for x in sections if x not in {hunk.section for hunk in found}]
    numbers = f"Of the {len(new):,} lines of ppo_{scripts[1]}.py, {same:,} stand in"
    numbers += f" ppo_{scripts[0]}.py as they are, in the same order."
    if equal:
        numbers += f" The same in both, byte for byte: {' and '.join(equal)}."
    text = [*head(scripts, f"{intro} {numbers}"), *summary(entries, scripts), ""]
    text += ["Below is every line that differs: with `-` those of the first script, with `+` those"]
    text += ["of the second.", ""]
    for section in [*sections[1:], START]:  # names of things come last
        if section in equal:
            continue
        text += [f"## {section}", ""]
        here = [x for x, entry in entries.items() if entry["section"] == section]
        for reason in sorted(here, key=lambda x: found.index(assigned[x][0])):
            text += explained(reason, entries[reason])
            for hunk in assigned[reason]:
                text += [where(hunk, scripts), "", "```diff", *unified(hunk, old, new), "```", ""]
    return "\n".join(text)


def definitions(lines: list[str]) -> dict[str, ast.AST]:
    """name -> function or class of a script, and Agent.rollout_policy and the like"""
    nodes = {}
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            nodes[node.name] = node
            for x in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(x, ast.FunctionDef):
                    nodes[f"{node.name}.{x.name}"] = x
    return nodes


def place(script: str, node: ast.AST) -> str:
    return link(script, node.lineno - 1, node.end_lineno)


def defaults(node: ast.ClassDef) -> dict[str, str]:
    """flag -> default value, as it is written"""
    fields = [x for x in node.body if isinstance(x, ast.AnnAssign)]
    return {f"--{x.target.id.replace('_', '-')}": ast.unparse(x.value) for x in fields}


def paragraphs(lines: list[str], name: str) -> dict[str, Chunk]:
    """The parts of a training loop, by what its comments say up to a colon."""
    loop = next(chunk for chunk in chunks(lines) if chunk.name == name)
    starts = [
        i
        for i in range(loop.first, loop.end)
        if re.match(r" {8}# \w| {4}# setup", lines[i])
        and (not lines[i - 1].strip() or "setup" in lines[i])
    ]
    parts = {}
    for first, end in zip(starts, [*starts[1:], loop.end], strict=True):
        title = lines[first].strip(" #").partition(":")[0]
        parts[title] = Chunk(title, name, first, end)
    return parts


def flags(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """Which flags the two scripts share, and which they do not."""
    both = [x for x in a if x in b]
    text = ["Flags of both, with the same default: "]
    text[0] += ", ".join(f"`{x}`" for x in both if a[x] == b[x]) + "."
    text += ["", "| flag of both | ppo_discrete.py | ppo_rlhf.py |", "| --- | --- | --- |"]
    text += [f"| `{x}` | `{a[x]}` | `{b[x]}` |" for x in both if a[x] != b[x]]
    text += ["", "Only in ppo_discrete.py: " + ", ".join(f"`{x}`" for x in a if x not in b) + "."]
    text += ["", "Only in ppo_rlhf.py: " + ", ".join(f"`{x}`" for x in b if x not in a) + "."]
    return [wrapped(x) if x and x[0] != "|" else x for x in text] + [""]


def page_rlhf() -> str:
    """The text of the page about language models."""
    name, scripts = "discrete_rlhf", ("discrete", "rlhf")
    entries = reasons()[name]
    intro, pairs, gone, loop = (entries.pop(x) for x in ("intro", "pairs", "gone", "parts"))
    old, new = map(read, scripts)
    a, b = definitions(old), definitions(new)
    texts = [
        {x: side[i.lineno - 1 : i.end_lineno] for x, i in nodes.items()}
        for side, nodes in ((old, a), (new, b))
    ]
    same = [x for x in a if "." not in x and texts[0][x] == texts[1].get(x)]
    lost = [x for names in gone.values() for x in names]
    if sorted([*same, *lost, *pairs]) != sorted({x for x in a if "." not in x} | set(pairs)):
        raise ValueError(f"{name}: in no list or in two: {set(a) ^ {*same, *lost, *pairs}}")
    added = [x for x in b if "." not in x and x not in same and x not in dict(pairs.values())]
    parts_a, parts_b = paragraphs(old, "train"), paragraphs(new, "train_ppo")
    if list(parts_b) != list(loop):
        raise ValueError(f"{name}: parts of the loop are {list(parts_b)}")
    chunk = [{x.name: x for x in chunks(lines)} for lines in (old, new)]
    couples = {
        x: tuple(side[x]._replace(section=x) for side in chunk)
        for x in ("ppo_loss", "ppo_gradient")
    }
    couples |= {x: (parts_a[x], parts_b[x]) for x in ("advantages and value targets", "update")}
    found = [h for x, y in couples.values() for h in hunks_within(old, new, x, y, gap=0)]
    assigned = assign(name, entries, found, old, new)

    text = [*head(scripts, intro), *summary(entries, scripts), ""]
    text += ["## The same text", "", "Byte for byte the same function in both:", ""]
    text += [f"- `{x}`: {place('discrete', a[x])}, {place('rlhf', b[x])}" for x in same]
    text += [
        "",
        "## What corresponds",
        "",
        "| ppo_discrete.py | ppo_rlhf.py | |",
        "| --- | --- | --- |",
    ]
    for x, (y, why) in pairs.items():
        links = [place("discrete", a[x]), place("rlhf", b[y])]
        text.append(f"| `{x}` {short(links[0])} | `{y}` {short(links[1])} | {why} |")
    text += ["", "The parts of the training loop, by their comments:", ""]
    text += ["| part | ppo_discrete.py | ppo_rlhf.py | |", "| --- | --- | --- | --- |"]
    for x, why in loop.items():
        links = [
            short(link(script, parts[x].first, parts[x].end)) if x in parts else ""
            for script, parts in zip(scripts, (parts_a, parts_b), strict=True)
        ]
        text.append(f"| {x} | {links[0]} | {links[1]} | {why} |")
    for section in couples:
        code = f"`{section}`" if "_" in section else section.capitalize()
        text += ["", f"## {code}", ""]
        for reason in [x for x, entry in entries.items() if entry["section"] == section]:
            text += explained(reason, entries[reason])
            for hunk in assigned[reason]:
                text += [where(hunk, scripts), "", "```diff", *unified(hunk, old, new), "```", ""]
        text.pop()
    text += ["", "## Flags", "", *flags(defaults(a["Args"]), defaults(b["Args"]))]
    text += ["## Only in ppo_discrete.py", ""]
    for why, names in gone.items():
        text.append(
            f"- {why}: " + ", ".join(f"`{x}` {short(place('discrete', a[x]))}" for x in names)
        )
    text += ["", "## Only in ppo_rlhf.py", ""]
    sections = {x.name: x.section for x in chunks(new)}
    for section, names in groupby(added, sections.get):
        text += [f"{section}:", ""]
        for x in names:
            text.append(f"- `{x}` {short(place('rlhf', b[x]))}" + first_words(b[x]))
        text.append("")
    return "\n".join(text)


def first_words(node: ast.AST) -> str:
    """The first sentence or so of a docstring, in Markdown, without the tags it begins with."""
    doc = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    parts = re.split("(`[^`]*`)", re.sub(r"^(\[\w+\] )+", "", doc))
    parts[::2] = [re.sub(r"[\\*_<>\[\]|]", r"\\\g<0>", part) for part in parts[::2]]
    return ": " + "".join(parts) if doc else ""


def short(text: str) -> str:
    """A link without the name of its script."""
    return re.sub(r"\[ppo_\w+\.py ", "[", text)


def pages() -> dict[Path, str]:
    texts = {name: page(name) for name in PAIRS} | {"discrete_rlhf": page_rlhf()}
    return {FOLDER / f"{name}.md": text for name, text in texts.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text)
