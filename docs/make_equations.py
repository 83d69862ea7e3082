"""Writes docs/equations.md: the equations of the papers beside the lines that are them.

python docs/make_equations.py

What an equation is and which lines are it says docs/equations.toml; the lines themselves come from
the scripts. Code that is the same text in several scripts is quoted once.
"""

import re
import tomllib
from pathlib import Path
from textwrap import dedent, fill
from typing import NamedTuple

import make_details

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "equations.md"
SCRIPTS = ("discrete", "continuous", "atari", "atari_lstm", "rlhf")
GROUPS = {
    "The objective": "ratio clip penalty beta total value-loss value-clip entropy",
    "Advantages": "delta gae bootstrap returns normalized",
    "What is watched": "kl kl-1 explained-variance",
    "Policy, network and optimizer": "sum-of-components orthogonal annealing adam gradient-norm",
    "Continuous actions": "running-moments observations reward-scaling",
    "Memory": "lstm",
    "Language models": "sft bradley-terry rlhf-reward kl-estimate rlhf-beta ptx group grpo grpo-kl",
}
INTRODUCTION = """
Each equation, where it stands, and the lines of the scripts that are it. The code is quoted from
the scripts, and the line numbers are found by a program: an equation whose lines are gone is an
error. Where several scripts have the same text it is quoted once. The letters are those of the
papers; the names in the code are in the docstring of each script.

[PPO] is Schulman et al. 2017, [GAE] Schulman et al. 2016, [ppo2] the code of openai/baselines,
[LHP] Ziegler et al. 2019, [IGPT] Ouyang et al. 2022, [GRPO] Shao et al. 2024, [DR] Liu et al. 2025,
[LSTM] Hochreiter and Schmidhuber 1997.
"""


class Place(NamedTuple):
    """The lines of a script that are an equation."""

    script: str
    first: int
    last: int
    code: str

    def link(self) -> str:
        name = f"ppo_{self.script}.py"
        span = f"{self.first}-{self.last}" if self.last > self.first else self.first
        anchor = f"L{self.first}" + (f"-L{self.last}" if self.last > self.first else "")
        return f"[{name} {span}](../{name}#{anchor})"


def table() -> dict[str, dict]:
    """name -> entry of docs/equations.toml"""
    return tomllib.loads((ROOT / "docs" / "equations.toml").read_text())


def find(name: str, entry: dict, sources: dict[str, str]) -> list[Place]:
    """Its lines in each script that has them; a mistake if there are none, or too many."""
    places = []
    for script, source in sources.items():
        pattern = entry.get("other", {}).get(script, entry["pattern"])
        matches = list(re.finditer(pattern, source, re.M))
        if len(matches) != (script in entry["scripts"]):
            raise ValueError(f"{name}: {len(matches)} matches in ppo_{script}.py")
        for match in matches:
            first = source.count("\n", 0, match.start()) + 1
            last = source.count("\n", 0, match.end()) + 1
            lines = source.splitlines()[first - 1 : last]
            places.append(Place(script, first, last, dedent("\n".join(lines))))
    return places


def section(name: str, entry: dict, places: list[Place], details: dict) -> list[str]:
    """All about one equation."""
    source = re.sub(r"(arXiv:([\d.]+\d))", r"[\1](https://arxiv.org/abs/\2)", entry["source"])
    source = re.sub(r"joschu\.net/\S+\.html", r"[\g<0>](http://\g<0>)", source)
    title = entry["title"]
    lines = [] if title.lower().replace(" ", "-") == name else [f'<a id="{name}"></a>', ""]
    lines += [f"### {title}", "", "$$", entry["tex"], "$$", ""]
    lines += [f"Where: {source}.", "", fill(" ".join(entry["text"].split()), 100), ""]
    if "tags" in entry:
        links = [
            f"[{tag}](details.md#{tag.lower()}) {details[tag]['title']}" for tag in entry["tags"]
        ]
        lines += [f"Details: {'; '.join(links)}.", ""]
    quotes = {}
    for place in places:
        quotes.setdefault(place.code, []).append(place)
    for code, same in quotes.items():
        links = ", ".join(place.link() for place in same)
        words = ", byte for byte the same:" if len(same) > 1 else ":"
        lines += [links + words, "", "```python", code, "```", ""]
    return lines


def page() -> str:
    entries, details = table(), make_details.table()
    sources = {script: (ROOT / f"ppo_{script}.py").read_text() for script in SCRIPTS}
    places = {name: find(name, entry, sources) for name, entry in entries.items()}
    order = [name for names in GROUPS.values() for name in names.split()]
    if sorted(order) != sorted(entries):
        raise ValueError(f"in no group, or in no table: {set(order) ^ set(entries)}")
    lines = ["<!-- made by docs/make_equations.py, do not edit -->", "", "# The equations"]
    lines += [INTRODUCTION, "| equation | where | " + " | ".join(SCRIPTS) + " |"]
    lines += ["| --- " * (len(SCRIPTS) + 2) + "|"]
    for name in order:
        entry = entries[name]
        cells = [f"[{entry['title']}](#{name})", entry["source"].split(";")[0]]
        found = {place.script: place for place in places[name]}
        for script in SCRIPTS:
            place = found.get(script)
            link = place and f"[{place.first}](../ppo_{script}.py#L{place.first})"
            cells.append(link or "")
        lines.append(f"| {' | '.join(cells)} |")
    for title, names in GROUPS.items():
        lines += ["", f"## {title}", ""]
        for name in names.split():
            lines += section(name, entries[name], places[name], details)
        lines.pop()
    return "\n".join([*lines, ""])


def pages() -> dict[Path, str]:
    return {PAGE: page()}


if __name__ == "__main__":
    PAGE.write_text(page())
