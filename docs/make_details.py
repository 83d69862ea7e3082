"""Writes the page docs/details.md from docs/details.toml, the scripts and the tests.

python docs/make_details.py
"""

import ast
import io
import re
import tokenize
import tomllib
from itertools import zip_longest
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import make_ablation

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "details.md"
TAG = re.compile(r"\[([CARLMXH]\d{1,2})\]")
THE_37 = {"C": 13, "A": 9, "R": 9, "L": 5, "M": 1}  # details of each group: core, Atari, ...
GROUPS = {"C": "core", "A": "Atari", "R": "robotics", "L": "LSTM", "M": "MultiDiscrete"}


class Site(NamedTuple):
    """A tag and the code it marks."""

    tag: str
    script: str  # name of the file
    line: int  # of the tag
    first: int  # line of the code
    last: int
    code: str

    def link(self, first, last, text):
        return f"[{text}](../{self.script}#L{first}{f'-L{last}' if last > first else ''})"


def table() -> dict[str, dict]:
    """tag -> entry of docs/details.toml"""
    return tomllib.loads((ROOT / "docs" / "details.toml").read_text())


def find_sites(script: Path) -> list[Site]:
    """The tags in comments behind code and in the docstrings of functions and classes.

    A docstring marks its function, a comment marks the smallest statement around it, or the keyword
    argument that has the line to itself.
    """
    source = script.read_text()
    lines = source.splitlines()
    nodes = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt)
        or (isinstance(node, ast.keyword) and not lines[node.lineno - 1][: node.col_offset].strip())
    ]
    marks = []  # (tag, line, node)
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            doc = ast.get_docstring(node, clean=False) or ""
            for match in TAG.finditer(doc):
                line = node.body[0].lineno + doc.count("\n", 0, match.start())
                marks.append((match[1], line, node))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line.lstrip().startswith("#"):
            line = token.start[0]
            around = [node for node in nodes if node.lineno <= line <= node.end_lineno]
            node = min(around, key=lambda node: node.end_lineno - node.lineno)
            marks += [(tag, line, node) for tag in TAG.findall(token.string)]
    marks.sort(key=lambda mark: mark[1])
    return [Site(tag, script.name, line, *quote(node, lines)) for tag, line, node in marks]


def quote(node: ast.AST, lines: list[str]) -> tuple[int, int, str]:
    """First line, last line and code of a node: of a docstring only its first line, of a
    class nothing behind its first method."""
    last = node.end_lineno
    if isinstance(node, ast.ClassDef):
        last = next((x.end_lineno for x in node.body if isinstance(x, ast.FunctionDef)), last)
    code = lines[node.lineno - 1 : last]
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
        start, end = (x - node.lineno for x in (node.body[0].lineno, node.body[0].end_lineno))
        if end > start:
            code[start + 1 : end] = [code[end].replace('"""', "...")]
    return node.lineno, last, dedent("\n".join(code))


def find_tests() -> list[tuple[str, str]]:
    """(file, name) of every test function"""
    return [
        (path.name, node.name)
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def tests_of(entry: dict, tests: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(file, name) for file, name in tests if name.startswith(tuple(entry["tests"]))]


def mutants() -> dict[str, str]:
    """tag -> how many of its mutants the tests caught, by docs/mutations.md"""
    path = ROOT / "docs" / "mutations.md"
    text = path.read_text() if path.exists() else ""
    rows = re.findall(r"(?m)^\| ([A-Z]\d+) \| (\d+) \| (\d+) \| (\d+) \|", text)
    return {
        tag: f"{caught} of {total}" + (f", {equal} equivalent" if equal != "0" else "")
        for tag, total, caught, equal in rows
    }


def of_the_37(details: dict[str, dict]) -> list[str]:
    return [tag for tag in details if tag[0] in THE_37]


def introduction(details: dict[str, dict]) -> str:
    """How many of the 37 details there are, and which ones are missing."""
    ours = of_the_37(details)
    text = f"The scripts implement {len(ours)} of the {sum(THE_37.values())} details of "
    text += "[The 37 Implementation Details of PPO]"
    text += "(https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/)"
    missing = [
        f"{GROUPS[group]} ({group}1{f'-{group}{size}' if size > 1 else ''})"
        for group, size in THE_37.items()
        if not any(tag.startswith(group) for tag in ours)
    ]
    text += f"; missing: {', '.join(missing)}" if missing else ""
    others = [tag for tag in details if tag not in ours and tag[0] != "H"]
    text += f".\nNot counted among them: {', '.join(others)}.\n" if others else ".\n"
    rlhf = [tag for tag in details if tag[0] == "H"]
    text += f"Those of RLHF have numbers of our own, {len(rlhf)} of {rlhf[0]} to {rlhf[-1]}.\n"
    text += "[mutations.md](mutations.md): what a mutant is, of which commit, and what survived.\n"
    text += (
        "Worth: how the return at the end changes where something else stands in its place, in\n"
    )
    text += (
        "percent of what is learned, with a 95 % interval; bold (higher) or italic (lower) where\n"
    )
    text += (
        "it is told from chance among [all](ablation.md); little: within 10 %; open: it may be 0.\n"
    )
    return text


def summary(details, sites, tests) -> list[str]:
    """The rows of a table: tag, title, lines in each script, numbers of tests and mutants."""
    caught = mutants()
    rows = ["| " + " | ".join(["tag", "detail", *sites, "tests", "mutants caught"]) + " |"]
    rows += ["| --- " * (len(sites) + 4) + "|"]
    for tag, entry in details.items():
        cells = [f"[{tag}](#{tag.lower()})", entry["title"]]
        for found in sites.values():
            links = [site.link(site.line, site.line, site.line) for site in found[tag]]
            cells.append(", ".join(links))
        numbers = len(tests_of(entry, tests)), caught.get(tag, "")
        rows.append(f"| {' | '.join(cells)} | {numbers[0]} | {numbers[1]} |")
    return rows


def section(tag, entry, sites, tests, worth) -> list[str]:
    """All about one detail; code that is the same in several scripts is quoted once."""
    lines = [f'<a id="{tag.lower()}"></a>', "", f"## {tag} {entry['title']}", "", entry["why"]]
    if "paper" in entry:
        paper = re.sub(r"(arXiv:(\S+\d))", r"[\1](https://arxiv.org/abs/\2)", entry["paper"])
        lines += [f"- Paper: {paper}"]
    sources = [f"[{url.split('/blob/')[1].partition('/')[2]}]({url})" for url in entry["source"]]
    lines += [f"- Source: {', '.join(sources)}"]
    names = [f"[{name}](../tests/{file})" for file, name in tests_of(entry, tests)]
    lines += [f"- Tests: {', '.join(names) or 'none'}"]
    lines += [f"- Worth: {worth}"] if worth else []
    lines += [""]
    quotes = {}  # code -> sites: the first ones of all scripts, the second ones, ...
    for places in zip_longest(*(found[tag] for found in sites.values())):
        for site in filter(None, places):
            quotes.setdefault(site.code, []).append(site)
    for code, places in quotes.items():
        links = []
        for site in places:
            span = f"{site.first}-{site.last}" if site.last > site.first else site.first
            links.append(site.link(site.first, site.last, f"{site.script} {span}"))
        lines += [", ".join(links), "", "```python", code, "```", ""]
    return lines


def page() -> str:
    details, tests, worth = table(), find_tests(), make_ablation.worth()
    sites = {}  # script -> tag -> sites
    for name in dict.fromkeys(name for entry in details.values() for name in entry["scripts"]):
        found = find_sites(ROOT / f"ppo_{name}.py")
        sites[name] = {tag: [site for site in found if site.tag == tag] for tag in details}
    lines = ["# The implementation details", ""]
    lines += ["<!-- written by docs/make_details.py, do not edit -->", "<!-- fmt: off -->", ""]
    lines += [introduction(details)]
    lines += [*summary(details, sites, tests), ""]
    for tag, entry in details.items():
        lines += section(tag, entry, sites, tests, worth.get(tag))
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """What docs/make.py compares."""
    return {PAGE: page()}


if __name__ == "__main__":
    PAGE.write_text(page())
