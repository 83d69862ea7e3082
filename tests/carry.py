"""Carries a change in a section that the scripts share from one script to the others.

    python tests/carry.py ppo_discrete.py

What changed in that script since the last commit is merged into the same section of each classic
script, which keeps the lines in which it differs, and replaces functions of ppo_rlhf.py that had
the same text. A section in which change and difference meet stays as it is and is named; the exit
code is their number.
"""

import ast
import subprocess
import sys
import tempfile
from pathlib import Path

from test_text import function, sections

ROOT = Path(__file__).resolve().parent.parent
SHARED = ("Configuration", "The algorithm", "Training", "Runs")


def merge(text: str, old: str, new: str) -> str | None:
    """`text` with what changed from `old` to `new`; None where the two meet."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("text", "old", "new")]
        for path, content in zip(paths, (text, old, new), strict=True):
            path.write_text(content + "\n")
        result = subprocess.run(
            ["git", "merge-file", "-p", *paths], capture_output=True, text=True, check=False
        )
    return None if result.returncode else result.stdout[:-1]


def carry_sections(other: str, old: str, new: str) -> tuple[str, list[str]]:
    """`other` with the changes of all shared sections, and the titles of those left out."""
    texts, left_out = [sections(source) for source in (other, old, new)], []
    for title in SHARED:
        before, *change = [text[title] for text in texts]
        after = merge(before, *change)
        if after is None:
            left_out.append(title)
        else:
            other = other.replace(before, after)
    return other, left_out


def carry_functions(other: str, old: str, new: str) -> tuple[str, list[str]]:
    """`other` with each changed function that it had in the same text; nothing is left out."""
    for node in ast.parse(new).body:
        if isinstance(node, ast.FunctionDef) and f"\ndef {node.name}(" in old:
            before, after = function(old, node.name), function(new, node.name)
            other = other.replace(f"\n{before}\n", f"\n{after}\n")
    return other, []


def main(name: str) -> int:
    old = subprocess.check_output(["git", "show", f"HEAD:./{name}"], cwd=ROOT, text=True)
    new, count = (ROOT / name).read_text(), 0
    for path in sorted(ROOT.glob("ppo_*.py")):
        if path.name != name:
            carry = carry_functions if path.stem == "ppo_rlhf" else carry_sections
            before = path.read_text()
            after, left_out = carry(before, old, new)
            path.write_text(after)
            print(path.name, "changed" if after != before else "as it was", end="")
            print("".join(f"; by hand: {title}" for title in left_out))
            count += len(left_out)
    return count


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
