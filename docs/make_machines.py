"""Writes the table of docs/machines.md from docs/results/machines.csv.

python docs/make_machines.py
"""

import csv
from pathlib import Path

from make_rlhf import table

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "machines.md"
RESULTS = DOCS / "results" / "machines.csv"
MARKS = ("<!-- tried, by make_machines.py -->\n", "<!-- end -->")
SCRIPTS = {  # what was run -> its column
    "ppo_discrete.py": "discrete",
    "ppo_continuous.py": "continuous",
    "ppo_atari.py": "atari",
    "ppo_atari_lstm.py": "atari_lstm",
    "ppo_rlhf.py": "rlhf",
    "ppo_discrete.py --compile": "discrete, compiled",
}


def load() -> dict[str, list[dict[str, str]]]:
    """set of versions -> its rows, one for each script"""
    sets = {}
    with open(RESULTS, newline="") as file:
        for row in csv.DictReader(file):
            sets.setdefault(row["set"], []).append(row)
    return sets


def tried() -> list[str]:
    """A row for each set, and what was said where a script fails."""
    body, said = [], []
    for name, rows in load().items():
        found = {row["script"]: row for row in rows}
        cells = [found[x]["outcome"] if x in found else "" for x in SCRIPTS]
        first = rows[0]
        versions = [first[x] for x in ("python", "torch", "gymnasium")]
        body.append((name, *versions, first["date"], *cells))
        said += [f"- {name}, {row['script']}: `{row['said']}`" for row in rows if row["said"]]
    head = ("set", "Python", "torch", "Gymnasium", "date", *SCRIPTS.values())
    return [*table(head, *body), "", *(["What they said:", "", *said] if said else [])]


def page() -> str:
    before, rest = PAGE.read_text().split(MARKS[0])
    return "\n".join([before + MARKS[0], *tried(), "", MARKS[1] + rest.split(MARKS[1], 1)[1]])


def pages() -> dict[Path, str]:
    return {PAGE: page()}


if __name__ == "__main__":
    PAGE.write_text(page())
