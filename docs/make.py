"""Makes every page again that a program makes, with its pictures and vectors.

    python docs/make.py            # takes minutes; a page that is up to date stays as it is
    python docs/make.py --check    # writes nothing, names the pages that are stale; exit code 1

Each docs/make_*.py is run as it is run alone. Those that have `pages()`, {path: text}, are
compared. Vectors are not, for their numbers are right within a tolerance, which
tests/test_vectors.py has. Not made here: mutations.md, by tests/mutate.py in up to an hour,
and the first iterations in vectors/, by tests/test_reference.py.
"""

import importlib
import re
import runpy
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]


def names() -> list[str]:
    """The programs that make pages."""
    return sorted(path.stem for path in DOCS.glob("make_*.py"))


def stale(name: str) -> list[Path]:
    """The pages of a program that it would write otherwise now."""
    if "\ndef pages(" not in (DOCS / f"{name}.py").read_text():
        return []
    made = importlib.import_module(name).pages()
    return [path for path, text in made.items() if not path.exists() or path.read_text() != text]


def with_parts(page: Path, program: str, parts: dict) -> str:
    """The page, what stands between the marks of each part made anew by its function."""
    text = page.read_text()
    for name, part in parts.items():
        marks = (f"<!-- {name}, by {program}.py -->\n", f"<!-- end of {name} -->")
        before, _, after = re.split("|".join(map(re.escape, marks)), text)
        text = f"{before}{marks[0]}\n{part()}\n{marks[1]}{after}"
    return text


def main(arguments: list[str]):
    if arguments == ["--check"]:
        found = sorted({path for name in names() for path in stale(name)})
        for path in found:
            print(f"stale: {path.relative_to(DOCS.parent)}")
        if found:
            sys.exit(1)
    elif arguments:
        sys.exit(__doc__)
    else:
        for name in names():
            print(name)
            runpy.run_path(str(DOCS / f"{name}.py"), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
