"""Writes what docs/paper.md offers for copying: listings, tables, a paragraph, BibTeX.

    python docs/make_paper.py                                       # the page
    python docs/make_paper.py listing ppo_discrete.py gae ppo_loss  # functions, as LaTeX
    python docs/make_paper.py table ppo_atari.py ppo_atari_lstm.py  # default settings, as LaTeX
    python docs/make_paper.py table runs/NAME/config.json           # those of a run
    python docs/make_paper.py document ppo_discrete.py              # all of it, to be compiled
    python docs/make_paper.py bibtex                                # for that document

What stands between two marks on the page is made, from the scripts, docs/paper.toml and
CITATION.cff. All else is written by hand.
"""

import ast
import dataclasses
import importlib
import json
import re
import sys
import textwrap
import tomllib
from pathlib import Path

import numpy as np
import yaml

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.append(str(ROOT))  # where the scripts are
import make_details  # noqa: E402
import make_results  # noqa: E402
from make_rlhf import table as markdown_table  # noqa: E402

PAGE = DOCS / "paper.md"
WORDS = tomllib.loads((DOCS / "paper.toml").read_text())
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
DETAILS = make_details.table()
SCRIPTS = ("discrete", "continuous", "atari", "atari_lstm", "rlhf")
CLASSIC = SCRIPTS[:4]
PREAMBLE = r"""\documentclass{article}
\usepackage[margin=1in]{geometry}
\usepackage{booktabs}
\usepackage{listings}
\lstset{language=Python, basicstyle=\ttfamily\scriptsize, columns=fullflexible, keepspaces=true,
  showstringspaces=false, breaklines=true}
"""

# Arguments that no table has: what is learned does not depend on them, or they name files.
LEFT_OUT = {"exp_name", "seed", "torch_deterministic", "cuda", "torch_threads", "compile"}
LEFT_OUT |= {"checkpoint_every", "capture_video", "resume", "evaluate", "eval_episodes"}
LEFT_OUT |= {"deterministic", "track", "wandb_project_name", "wandb_entity", "env_id", "env_kwargs"}
LEFT_OUT |= {"vectorization", "env_timeout", "gradient_checkpointing", "logprob_chunk", "merge"}
LEFT_OUT |= {"fsdp", "plan", "task", "model", "ref_model", "reward_model", "value_model"}
LEFT_OUT |= {"sft_data", "pref_data", "prompts", "eval_prompts", "prompt_length", "stop", "stages"}
LEFT_OUT |= {"load", "rm_test_pairs", "micro_batch_size", "ptx_ratio"}
ONLY_WITH = {"kl_horizon": "kl_target"}  # arguments that mean nothing while another is off


def defaults(script: str) -> dict:
    """Every argument with its default value; precision, which follows the machine, is not one."""
    args = importlib.import_module(f"ppo_{script}").Args()
    return {name: x for name, x in dataclasses.asdict(args).items() if name != "precision"}


# ------------------------------------------------------------------------------------------------
# Listings


def functions(path: Path, names: list[str]) -> str:
    """The text of functions and classes of a script, in the order of `names`."""
    source = path.read_text()
    nodes = {getattr(node, "name", None): node for node in ast.parse(source).body}
    if unknown := [name for name in names if name not in nodes]:
        sys.exit(f"error: {path.name} has no {unknown[0]}")
    return "\n\n\n".join(ast.get_source_segment(source, nodes[name]) for name in names)


def listing(path: Path, names: list[str]) -> str:
    """The same as a LaTeX listing."""
    escaped = ", ".join(rf"\texttt{{{escape(name)}}}" for name in names)
    caption = rf"{escaped} of \texttt{{{escape(path.name)}}}, ppo37 {CITATION['version']}"
    options = f"caption={{{caption}}}, label={{lst:{path.stem.replace('_', '-')}}}"
    return f"\\begin{{lstlisting}}[{options}]\n{functions(path, names)}\n\\end{{lstlisting}}"


def escape(text: str) -> str:
    return re.sub(r"([_%&#$])", r"\\\1", text)


# ------------------------------------------------------------------------------------------------
# Tables


def cell(value) -> str:
    """A value, readable in LaTeX and in Markdown."""
    if value in (None, ()):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"${mathematical(value)}$"
    if isinstance(value, list | tuple):
        return escape(", ".join(map(str, value)))
    return f"{value:,}" if isinstance(value, int) else escape(value)


def mathematical(value: float) -> str:
    """A number within a formula."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:g}"
    digits, exponent = f"{value:e}".split("e")
    return rf"{float(digits):g} \cdot 10^{{{int(exponent)}}}"


def rows(columns: dict[str, dict]) -> list[tuple[str, ...]]:
    """column -> {argument: value} as rows of cells; what is off in all columns is left out."""
    found = [("", *columns)]
    for name, words in WORDS["names"].items():
        having = [name in x and bool(x.get(ONLY_WITH.get(name), True)) for x in columns.values()]
        values = [x.get(name) for x in columns.values()]
        if any(has and is_on(x) for has, x in zip(having, values, strict=True)):
            cells = [cell(x) if has else "" for has, x in zip(having, values, strict=True)]
            found.append((words, *cells))
    return found


def is_on(value) -> bool:
    """Whether it is worth a row: a weight of 0.0 is; what is not set or switched off is not."""
    return isinstance(value, float) or bool(value)


def booktabs(columns: dict[str, dict]) -> str:
    """A table for LaTeX's package of that name."""
    head, *body = [" & ".join(row) + r" \\" for row in rows(columns)]
    lines = [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*lines, *body, r"\bottomrule", r"\end{tabular}"])


def columns_of(paths: list[Path]) -> dict[str, dict]:
    """Of scripts their defaults, of runs what config.json says."""
    found = {}
    for path in paths:
        if path.suffix == ".json":
            config = json.loads(path.read_text())
            found[escape(config.get("env_id") or config.get("task") or path.parent.name)] = config
        else:
            name = path.stem.removeprefix("ppo_")
            found[name.replace("_", " ")] = defaults(name)
    return found


# ------------------------------------------------------------------------------------------------
# Paragraphs


def sentences(script: str) -> list[dict]:
    """Those of the paragraph of a script."""
    return [x for x in WORDS["sentence"] if script in x["scripts"]]


def numbers(script: str) -> dict[str, str]:
    """name -> what stands in its place in a sentence."""
    values = defaults(script)
    found = {name: mathematical(x) for name, x in values.items() if isinstance(x, float)}
    found |= {name: f"{x:,}" for name, x in values.items() if type(x) is int}
    n = values.get("num_envs")
    found["environments"] = "One environment takes" if n == 1 else f"{n} environments take"
    of_the_37 = {tag for x in sentences(script) for tag in x.get("tags", []) if tag[0] in "CARLM"}
    found |= {"count": str(len(of_the_37)), "version": CITATION["version"], "software": "ppo37"}
    found |= dict(zip(("ppo", "gae", "details", "rlhf"), keys(), strict=True))
    return found | {"file": escape(f"ppo_{script}.py")}


def holds(sentence: dict, values: dict) -> bool:
    """Whether a sentence is true of these settings; "none" stands for None."""
    return all(
        values[name] == (None if x == "none" else x)
        for name, x in sentence.get("needs", {}).items()
    )


def paragraph(script: str) -> str:
    """What to say of a training with the default settings."""
    values, found = defaults(script), []
    for sentence in sentences(script):
        if not holds(sentence, values):
            raise ValueError(f"of ppo_{script}.py this is not true any more: {sentence['text']}")
        found.append(" ".join(sentence["text"].format_map(numbers(script)).split()))
    return "\n".join(
        textwrap.wrap(" ".join(found), 100, break_on_hyphens=False, break_long_words=False)
    )


# ------------------------------------------------------------------------------------------------
# References


def key(reference: dict) -> str:
    return f"{reference['authors'][0]['family-names'].lower()}{reference['year']}"


def keys() -> list[str]:
    """Of PPO, GAE, the 37 details, those of RLHF: the references of CITATION.cff in their order."""
    return [key(reference) for reference in CITATION["references"]]


def entry(kind: str, name: str, fields: dict[str, str]) -> str:
    lines = [f"  {field} = {{{value}}}," for field, value in fields.items()]
    return "\n".join([f"@{kind}{{{name},", *lines, "}"])


def bibtex() -> str:
    """This software and the papers behind it, from CITATION.cff."""
    own = {"author": f"{{{CITATION['authors'][0]['name']}}}", "title": f"{{{CITATION['title']}}}"}
    own |= {"year": str(CITATION["date-released"].year), "note": f"Version {CITATION['version']}"}
    found = [entry("misc", "ppo37", own)]
    for reference in CITATION["references"]:
        names = [f"{x['family-names']}, {x['given-names']}" for x in reference["authors"]]
        fields = {"author": " and ".join(names), "title": f"{{{reference['title']}}}"}
        fields["year"] = str(reference["year"])
        if number := re.search(r"arXiv:([\d.]+)", reference["notes"]):
            fields |= {"eprint": number[1], "archivePrefix": "arXiv"}
        found.append(entry("misc", key(reference), fields | {"note": reference["notes"]}))
    return "\n\n".join(found)


# ------------------------------------------------------------------------------------------------
# The page


def document(script: str) -> str:
    """A whole LaTeX document with all of it."""
    path = ROOT / f"ppo_{script}.py"
    parts = [PREAMBLE + r"\begin{document}", paragraph(script)]
    parts += [
        rf"\begin{{center}}\small{chr(10)}{booktabs(columns_of([path]))}{chr(10)}\end{{center}}"
    ]
    parts += [listing(path, ["gae", "ppo_loss"])]
    parts += ["\\bibliographystyle{plain}\n\\bibliography{ppo37}", r"\end{document}"]
    return "\n\n".join(parts)


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def both(*scripts: str) -> str:
    """A table of these scripts, in Markdown and in LaTeX."""
    columns = columns_of([ROOT / f"ppo_{script}.py" for script in scripts])
    return "\n".join([*markdown_table(*rows(columns)), "", fenced("latex", booktabs(columns))])


def paragraphs() -> str:
    parts = []
    for script in SCRIPTS:
        parts += [f"### ppo_{script}.py", fenced("latex", paragraph(script)), named(script)]
    return "\n\n".join(parts)


def named(script: str) -> str:
    """The details behind a paragraph, and what it takes for granted."""
    tags = {tag for x in sentences(script) for tag in x.get("tags", [])}
    tags = [tag for tag in DETAILS if tag in tags]
    links = ", ".join(f"[{tag}](details.md#{tag.lower()})" for tag in tags)
    needs = {
        name: x for sentence in sentences(script) for name, x in sentence.get("needs", {}).items()
    }
    flags = ", ".join(f"`{flag(name, x)}`" for name, x in needs.items())
    text = f"It names {links}. It is true while these are as by default: {flags}."
    return "\n".join(textwrap.wrap(text, 100, break_on_hyphens=False, break_long_words=False))


def flag(name: str, value) -> str:
    """An argument as it is typed."""
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{words}" if value else f"--no-{words}"
    return f"--{words} {value}"


def scores() -> str:
    """What the program on the page prints of the kept runs of Acrobot-v1."""
    found = np.array([make_results.last_100(x) for _, x in make_results.load("Acrobot-v1")])
    low, high = make_results.interval(found)
    first = f"{len(found)} seeds, mean {found.mean():.1f} +- {found.std():.1f}"
    return f"{first}\nIQM {make_results.iqm(found):.1f} [{low:.1f}, {high:.1f}]"


PARTS = {
    "listing": lambda: fenced("latex", listing(ROOT / "ppo_discrete.py", ["gae", "ppo_loss"])),
    "preamble": lambda: fenced("latex", PREAMBLE.rstrip()),
    "table": lambda: both(*CLASSIC),
    "table of rlhf": lambda: both("rlhf"),
    "paragraphs": paragraphs,
    "bibtex": lambda: fenced("bibtex", bibtex()),
    "scores": lambda: fenced("", scores()),
}


def page() -> str:
    """The page with its parts made anew."""
    text = PAGE.read_text()
    for name, make in PARTS.items():
        first, last = f"<!-- {name}, by make_paper.py -->\n", "<!-- end -->"
        before, rest = text.split(first)
        text = before + first + "\n" + make() + "\n\n" + last + rest.split(last, 1)[1]
    return text


def pages() -> dict[Path, str]:
    return {PAGE: page()}


def main(arguments: list[str]):
    match arguments:
        case []:
            PAGE.write_text(page())
        case ["listing", script, *names] if names:
            print(listing(Path(script), names))
        case ["table", *paths] if paths:
            print(booktabs(columns_of([*map(Path, paths)])))
        case ["document", script]:
            print(document(Path(script).stem.removeprefix("ppo_")))
        case ["bibtex"]:
            print(bibtex())
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
