"""Writes docs/annotated/ppo_*.md: each script as a page, with notes beside its lines.

python docs/make_annotated.py

A note is a quotation in Markdown, and the lines it is about follow it as HTML, so that a forge
shows the note above its code, and docs/annotated.css puts the two side by side where there is room.
The code is no fenced block, because nothing within such a block can be linked to: here each line
has an anchor (L87) and each tag has one (C8). A forge takes classes and styles away; what it keeps
are the elements, which is why keywords are <b>, names that are defined <strong> and comments <i>:
they show there, too. Line numbers come from the style sheet: whoever copies code has only code.
The section Runs is not folded away: it comes last, and a link to a line in it always works.

The anchor of a tag is at its note, and the code begins beside or below it. Where a tag is in
several places, the first one that is not in the Configuration has the note and the anchor C8; the
others are C8-2 and so on, with a link back. Lines 1 to 5 have the names that the tags of memory
would have, so these are tag-L1 and so on.
"""

import html
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Name, Operator, String

import make_details

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "annotated"
SCRIPTS = ("discrete", "continuous", "atari", "atari_lstm", "rlhf")
BANNER = re.compile(r"^# -{96}$")
PARAGRAPH = re.compile(r"    (?:    )?# \S")  # a comment that stands alone: a new paragraph
DEFINITION = re.compile(r"def |class |# /// script|import (?:asyncio|contextlib)$")
ELEMENTS = (  # kinds of tokens, and how they are shown
    (Comment, "i"),
    (String, "span"),
    (Keyword, "b"),
    (Operator.Word, "b"),
    (Name.Function, "strong"),
    (Name.Class, "strong"),
)
DIFFS = {
    "discrete_continuous": "discrete and continuous",
    "discrete_atari": "discrete and Atari",
    "atari_memory": "Atari without and with memory",
    "discrete_rlhf": "discrete and language models",
}
SECTIONS = {
    "The script": "What it is, how it is started, what its names mean, and where it comes from.",
    "Configuration": "Each field is a flag of the command line, and its comment is the help.",
    "Environment": "What is between the environment and the algorithm.",
    "Policy and value function": "The networks. Replace them with your own here.",
    "The algorithm": "The equations, as functions that read nothing but their arguments.",
    "Training": "The loop from top to bottom; its comments are a table of contents.",
    "Runs": "All around learning: folders, metrics, checkpoints, errors. PPO is complete above.",
}


def sections(lines: list[str]) -> list[tuple[str, int]]:
    """Title and first line of each section."""
    starts = [i for i in range(len(lines) - 1) if BANNER.match(lines[i])]
    return [("The script", 1)] + [(lines[i + 1].removeprefix("# "), i + 1) for i in starts]


def definitions(lines: list[str]) -> list[int]:
    """First lines of functions and classes that are in none, and of the imports."""
    found, start = [], None
    for i, line in enumerate(lines, 1):
        if line.startswith("@"):
            start = start or i
        elif DEFINITION.match(line):
            found.append(start or i)
            start = None
    return found


class Place(NamedTuple):
    """Of a tag."""

    tag: str
    anchor: str
    line: int  # of the tag
    first: int  # line of its code


def anchor_of(tag: str, number: int = 1) -> str:
    name = f"tag-{tag}" if tag.startswith("L") else tag
    return name if number == 1 else f"{name}-{number}"


def places(script: str, lines: list[str]) -> list[Place]:
    """The places of all tags with their anchors, in the order of the lines."""
    starts = sections(lines)
    config = range(starts[1][1], starts[2][1])
    found = {}
    for site in make_details.find_sites(ROOT / f"ppo_{script}.py"):
        first = site.first
        while lines[first - 2].startswith("@"):  # what decorates a function belongs to it
            first -= 1
        found.setdefault(site.tag, []).append((site.line in config, site.line, first))
    return sorted(
        (
            Place(tag, anchor_of(tag, number), line, first)
            for tag, sites in found.items()
            for number, (_, line, first) in enumerate(sorted(sites), 1)
        ),
        key=lambda place: place.line,
    )


def highlight(source: str) -> list[str]:
    """The lines as HTML."""
    parts = []
    for kind, text in PythonLexer(stripnl=False).get_tokens(source):
        element = next((name for group, name in ELEMENTS if kind in group), "")
        for piece in re.split(r"(\n)", text):
            if parts and parts[-1][0] == element and element and piece != "\n":
                parts[-1] = (element, parts[-1][1] + piece)
            elif piece:
                parts.append((element if piece.strip() else "", piece))
    shown = [(name, html.escape(text, quote=False).replace("$", "&#36;")) for name, text in parts]
    return "".join(f"<{x}>{text}</{x}>" if x else text for x, text in shown).split("\n")[:-1]


def sentences(text: str) -> str:
    """The first two sentences, or one if two are too long for a margin."""
    parts = re.split(r"(?<=[.?])\s+", " ".join(text.split()))
    return parts[0] if len(" ".join(parts[:2])) > 330 else " ".join(parts[:2])


def equations(script: str) -> dict[str, tuple[str, str]]:
    """tag -> equation for its note, and the anchor in equations.md"""
    table = tomllib.loads((ROOT / "docs" / "equations.toml").read_text())
    return {
        tag: (" ".join(entry.get("short", entry["tex"]).split()), name)
        for name, entry in table.items()
        for tag in entry.get("notes", ())
        if script in entry["scripts"]
    }


def note(tag: str, entry: dict, formulas: dict, here: set[str]) -> list[str]:
    """The lines of a note: title, why, equation, and where there is more."""

    def link(match):
        tag = match[1]
        target = f"#{anchor_of(tag)}" if tag in here else f"../details.md#{tag.lower()}"
        return f"[{tag}]({target})"

    text = make_details.TAG.sub(link, sentences(entry["why"]))
    more = f"[more](../details.md#{tag.lower()})"
    lines = [f'> <a id="{anchor_of(tag)}"></a>**{tag} {entry["title"]}.** {text} {more}']
    if tag in formulas:
        tex, name = formulas[tag]
        lines += [">", f"> ${tex}$ [equation](../equations.md#{name})"]
    return lines


def block(first: int, end: int, code: list[str], tags: dict[int, list[Place]]) -> str:
    """Lines of code, each with its anchor, and with links at its tags."""
    rows = []
    for i in range(first, end):
        row = code[i - 1]
        for place in tags.get(i, ()):
            note = anchor_of(place.tag)
            own = f'id="{place.anchor}" ' if place.anchor != note else ""
            link = f'[<a {own}href="#{note}">{place.tag}</a>]'
            row = row.replace(f"[{place.tag}]", link, 1)
        rows.append(f'<a id="L{i}" href="#L{i}" tabindex="-1"></a>{row}')
    start = f'<pre class="lines" style="counter-reset: line {first - 1}">'
    return start + "\n".join(rows) + "</pre>"


def head(name: str, titles: list[str]) -> list[str]:
    """What stands above the first section."""
    diffs = [f"[{text}](../diffs/{page}.md)" for page, text in DIFFS.items()]
    links = [f"[{x}](#{re.sub('[^a-z]+', '-', x.lower())})" for x in titles]
    return [
        "<!-- made by docs/make_annotated.py, do not edit -->",
        "",
        f"# {name} with notes",
        "",
        f"The whole of [{name}](../../{name}), every line in order. Each tag, such as `[C4]`, has",
        "a note beside its code, and a tag in the code is a link to it. What is said of all",
        "details, with sources and tests, is in [details.md](../details.md); the equations beside",
        "their lines in all scripts are in [equations.md](../equations.md). What differs between",
        f"two scripts: {', '.join(diffs)}.",
        "",
        f"Sections: {', '.join(links)}.",
        "",
    ]


def page(script: str) -> str:
    """The text of a page."""
    name = f"ppo_{script}.py"
    source = (ROOT / name).read_text()
    lines, details, formulas = source.splitlines(), make_details.table(), equations(script)
    code, titles = highlight(source), {line: title for title, line in sections(lines)}
    starts = {title: line for line, title in titles.items()}
    noted, tags = {}, {}  # line -> tags whose notes stand there, places of the tags on it
    for place in places(script, lines):
        tags.setdefault(place.line, []).append(place)
        if place.anchor == anchor_of(place.tag):
            noted.setdefault(place.first, []).append(place.tag)
    here = {tag for group in noted.values() for tag in group}
    loop = range(starts["Training"], starts["Runs"])
    paragraphs = [i for i in loop if PARAGRAPH.match(lines[i - 1]) and not lines[i - 2].strip()]
    cuts = {*titles, *definitions(lines), *paragraphs}
    cuts = {i for i in cuts if i <= starts["Runs"]} | set(noted)
    text = head(name, list(starts))
    for first, end in pairwise([*sorted(cuts), len(lines) + 1]):
        if first in titles:
            text += [f"## {titles[first]}", "", f"> {SECTIONS[titles[first]]}", ""]
        for number, tag in enumerate(noted.get(first, ())):
            text += [">"] * (number > 0) + note(tag, details[tag], formulas, here)
        text += [""] * (first in noted) + [block(first, end, code, tags), ""]
    return "\n".join(text)


def pages() -> dict[Path, str]:
    return {FOLDER / f"ppo_{script}.md": page(script) for script in SCRIPTS}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text)
