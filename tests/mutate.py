"""Mutation testing: would the tests of a detail notice if its lines were wrong?

    python tests/mutate.py [--script ppo_atari.py] [--detail C5] [--sample 50] [--out PATH]

A mutant is a copy of the scripts with one small mistake. Operators (below) make them of the code
that a tag such as [C5] marks: its statement, its function, its class up to `__init__`, each without
what has a tag of its own. More are written by hand in mutations.toml. A line that several scripts
share is changed in all of them at once, or their sameness would be what gives it away.

A mutant is caught if a test fails, or does not end, among those that docs/details.toml names for
the detail; it has survived if all of them pass. One that no test can tell from the original is
equivalent, and mutations.toml says why. The exit status is 1 if any other has survived.

torch, gymnasium and pytest are imported once; each mutant is tried in a fork of this process, in a
private copy of the repository.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "docs"))

import make_details  # noqa: E402

OPERATORS = {
    "drop": "a statement or a keyword argument left out",
    "condition": "of an if: negated, always true, never true",
    "sign": "+ for - and - for +, a minus left out",
    "factor": "2 times a product, 2 times what is assigned or returned",
    "number": "2 c + 1 for c, 0 for 1, 1 for 0; 0 for a default value of None",
    "axis": "1 for 0, 0 for 1 and -1",
    "index": "one more, one less",
    "swap": "the operands of -, /, ** and of comparisons",
    "extreme": "max for min, min for max",
    "bound": "<= for <, >= for > and the reverse",
    "logic": "or for and, | for & and the reverse",
    "boolean": "False for True, True for False",
    "hand": "what mutations.toml says",
}
SYMBOLS = {ast.Add: "+", ast.Sub: "-", ast.Div: "/", ast.Pow: "**", ast.BitAnd: "&", ast.BitOr: "|"}
SYMBOLS |= {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.And: "and", ast.Or: "or"}
OPPOSITE = {"+": "-", "<": "<=", ">": ">=", "and": "or", "&": "|", "min": "max"}
OPPOSITE |= {there: here for here, there in OPPOSITE.items()}
DEFAULTS = ["test_defaults_"]  # tests of all default values in Args, beside those of the details
PRELOADED = ["pytest", "numpy", "gymnasium", "ale_py", "cv2", "mujoco", "stable_baselines3"]
PRELOADED += ["torch", "torch._dynamo", "torch.utils.tensorboard", "tqdm", "tyro"]
VERDICTS = ["caught", "equivalent", "survived", "no test"]

# ------------------------------------------------------------------------------------------------
# Mutants


@dataclasses.dataclass
class Mutant:
    operator: str
    old: str  # the lines in question, without comments
    new: str  # or, of one written by hand, its name
    tests: list[str]  # beginnings of the names of those that are to catch it
    tags: list[str] = dataclasses.field(default_factory=list)
    lines: dict[str, int] = dataclasses.field(default_factory=dict)  # script -> number
    edits: dict[str, list] = dataclasses.field(default_factory=dict)  # -> [(start, end, text)]
    verdict: str = "no test"
    why: str = ""  # why it is equivalent, then what caught it

    def __str__(self):
        (script, line), *others = self.lines.items()
        place = f"{script}:{line}" + (f" and {len(others)} more" if others else "")
        old, new = (textwrap.shorten(x, 110, placeholder=" ...") for x in (self.old, self.new))
        change = f"{old}  ->  {new or '(nothing)'}" if old else new
        return f"{place} [{' '.join(self.tags)}] {self.operator}: {change}"


class Script:
    """The text of a script and where each node of its tree stands in it."""

    def __init__(self, path: Path):
        self.name, self.text = path.name, path.read_text()
        lengths = map(len, self.text.splitlines(keepends=True))
        self.starts = [0, *itertools.accumulate(lengths)]
        nodes = list(ast.walk(ast.parse(self.text)))
        self.statements = [node for node in nodes if isinstance(node, ast.stmt)]
        marks = [node for node in nodes if isinstance(node, ast.stmt | ast.keyword)]
        outermost = {node.lineno: node for node in reversed(marks)}
        self.tags = {}  # node -> its tags
        for site in make_details.find_sites(path):
            self.tags.setdefault(outermost[site.first], []).append(site.tag)

    def span(self, node):
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def of(self, node):
        return self.text[slice(*self.span(node))]

    def operand(self, node):
        """Its text, to stand anywhere in an expression."""
        atom = isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.Constant)
        return self.of(node) if atom else f"({self.of(node)})"

    def around(self, start: int) -> list[ast.stmt]:
        """The statements around a character, from the outside in."""
        spans = [(node, self.span(node)) for node in self.statements]
        return [node for node, (a, b) in spans if a <= start < b]


def children(node):
    """What is code: no docstring, annotation, index; of a class nothing behind its first method."""
    match node:
        case ast.ClassDef(body=nodes):
            methods = [i for i, child in enumerate(nodes) if isinstance(child, ast.FunctionDef)]
            nodes = nodes[: methods[0] + 1] if methods else nodes
        case ast.FunctionDef(args=args, body=body):
            nodes = [*args.defaults, *args.kw_defaults, *body]
        case ast.AnnAssign(value=value) | ast.Subscript(value=value):
            nodes = [value]
        case ast.JoinedStr():
            nodes = []
        case ast.Call():
            nodes = [child for child in ast.iter_child_nodes(node) if child not in axes(node)]
        case _:
            nodes = ast.iter_child_nodes(node)
    return [x for x in nodes if x and not (isinstance(x, ast.Expr) and is_constant(x.value))]


def walk(node, others, parent=None):
    """(node, parent) for a node and all below it, without those of `others`"""
    yield node, parent
    for child in children(node):
        if child not in others:
            yield from walk(child, others, node)


def axes(call: ast.Call) -> list:
    """Its arguments that are the number of an axis."""
    names = ("sum", "mean", "std", "var", "any", "all", "min", "max", "argmin", "argmax", "squeeze")
    nodes = [keyword for keyword in call.keywords if keyword.arg in ("axis", "dim")]
    nodes += call.args if getattr(call.func, "attr", None) in names else []
    return [x for x in nodes if ast.unparse(x).split("=")[-1] in ("0", "1", "-1")]


def is_constant(node) -> bool:
    return isinstance(node, ast.Constant)


def is_product(node) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)


def is_assigned(node, parent) -> bool:
    """Or returned; a number as far as can be seen: not several, no call of a name in capitals."""
    match parent:
        case ast.Assign(targets=[ast.Tuple()]):
            return False
        case ast.Assign() | ast.AugAssign() | ast.AnnAssign() | ast.Return():
            name = getattr(node, "func", None)
            name = getattr(name, "attr", getattr(name, "id", "Name"))
            number = is_constant(node) and type(node.value) in (int, float)
            arithmetic = isinstance(node, ast.BinOp | ast.UnaryOp)
            return node is parent.value and (number or arithmetic or name[0].islower())
    return False


def changes(script: Script, node, parent):
    """(operator, start, end, text instead) for each change of this node itself"""
    of, span, operand = script.of, script.span, script.operand
    start, end = span(node) if hasattr(node, "lineno") else (0, 0)

    def opposite(operator, left, op, right):
        old = SYMBOLS[type(op)]
        at = script.text.index(old, span(left)[1], span(right)[0])
        return operator, at, at + len(old), OPPOSITE[old]

    if isinstance(node, ast.stmt):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AnnAssign):
            yield "drop", start, end, "pass"
    elif isinstance(node, ast.keyword) and not parent:
        yield "drop", start, re.compile(",?").match(script.text, end).end(), ""
    elif is_product(node) and not is_product(parent):
        yield "factor", start, end, f"2 * {of(node)}"
    elif is_assigned(node, parent):
        yield "factor", start, end, f"2 * {operand(node)}"
    match node:
        case ast.If(test=test) | ast.IfExp(test=test):
            yield "condition", *span(test), f"not {operand(test)}"
            yield "condition", *span(test), "True"
            if node.orelse:  # without it, the same as to drop the statement
                yield "condition", *span(test), "False"
        case ast.AugAssign(target=left, op=ast.Add() | ast.Sub(), value=right):
            yield opposite("sign", left, node.op, right)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
            yield opposite("sign", left, node.op, right)
        case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr(), right=right):
            yield opposite("logic", left, node.op, right)
        case ast.BoolOp(op=op, values=values):
            for left, right in itertools.pairwise(values):
                yield opposite("logic", left, op, right)
        case ast.Compare(left=left, ops=ops, comparators=others):
            for before, op, after in zip((left, *others), ops, others, strict=False):
                if type(op) in SYMBOLS:
                    yield opposite("bound", before, op, after)
        case ast.UnaryOp(op=ast.USub(), operand=positive):
            yield "sign", start, end, operand(positive)
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name) as function):
            if match := re.fullmatch(r"(?:arg|f|a)?(min|max)(?:imum)?", name):
                at = span(function)[1] - len(name) + match.start(1)
                yield "extreme", at, at + 3, OPPOSITE[match[1]]
            for axis in axes(node):
                number, (_, last) = of(axis).split("=")[-1], span(axis)
                yield "axis", last - len(number), last, "1" if number == "0" else "0"
        case ast.Subscript(slice=index):
            for part in getattr(index, "elts", [index]):
                for x in (part.lower, part.upper) if isinstance(part, ast.Slice) else (part,):
                    if isinstance(x, ast.Name | ast.Attribute | ast.BinOp | ast.UnaryOp):
                        yield "index", *span(x), f"{of(x)} + 1"
                        yield "index", *span(x), f"{of(x)} - 1"
                    elif is_constant(x) and type(x.value) is int:
                        yield "index", *span(x), str(x.value + 1)
                        yield "index", *span(x), str(x.value - 1)
        case ast.Constant(value=bool(value)):
            yield "boolean", start, end, str(not value)
        case ast.Constant(value=int(c) | float(c)):
            yield "number", start, end, str(1 - c if c in (0, 1) else 2 * c + 1)
        case ast.Constant(value=None) if isinstance(parent, ast.AnnAssign):
            yield "number", start, end, "0"
    match node:
        case ast.BinOp(left=left, op=ast.Sub() | ast.Div() | ast.Pow() as op, right=right):
            yield "swap", start, end, f"{operand(right)} {SYMBOLS[type(op)]} {operand(left)}"
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in SYMBOLS:
            yield "swap", start, end, f"{operand(right)} {SYMBOLS[type(op)]} {operand(left)}"


def clean(code: str) -> str:
    """Lines of code as one line without comments."""
    lines = [re.sub(r"(^|\s+)# .*", "", line.strip()) for line in code.splitlines()]
    return " ".join(filter(None, lines))


def automatic(scripts: list[Script]) -> list[Mutant]:
    """All mutants by operators; one of a line that several scripts share is one of all of them."""
    found = {}
    for script in scripts:
        text, seen, counts = script.text, set(), Counter()
        nodes = [(top, *x) for top in script.tags for x in walk(top, script.tags.keys() - {top})]
        for top, node, parent in nodes:
            for operator, start, end, new in changes(script, node, parent):
                *_, statement = around = script.around(start)
                a, b = script.span(statement)
                code = " " * statement.col_offset + text[a:start] + new + text[end:b]
                with contextlib.suppress(SyntaxError):  # else skip it, and what was there before
                    form = a, ast.dump(ast.parse(textwrap.dedent(code)))
                    if form in seen:
                        continue
                    seen.add(form)
                    a, b = text.rindex("\n", 0, start), text.index("\n", end)
                    lines = clean(text[a:b]), clean(text[a:start] + new + text[end:b])
                    place = tuple(getattr(x, "name", "") for x in around), operator, *lines
                    counts[place] += 1
                    tests = DEFAULTS if isinstance(top, ast.AnnAssign) else []
                    mutant = Mutant(operator, *lines, [*tests])
                    mutant = found.setdefault((place, counts[place]), mutant)
                    mutant.edits[script.name] = [(start, end, new)]
                    mutant.lines[script.name] = text.count("\n", 0, start) + 1
                    mutant.tags += [x for x in script.tags[top] if x not in mutant.tags]
    return list(found.values())


def by_hand(scripts: list[Script], table: list[dict]) -> list[Mutant]:
    """The mutants of mutations.toml."""
    mutants = []
    for entry in table:
        tests, tags = entry.get("tests", []), [entry["detail"]] if "detail" in entry else []
        mutants.append(Mutant("hand", "", entry["name"], tests, tags))
        for script in scripts:
            if script.name in [f"ppo_{name}.py" for name in entry["scripts"]]:
                olds = [change["old"] for change in entry["change"]]
                starts = [script.text.index(old) for old in olds]
                ends = [start + len(old) for start, old in zip(starts, olds, strict=True)]
                news = [change["new"] for change in entry["change"]]
                mutants[-1].edits[script.name] = list(zip(starts, ends, news, strict=True))
                mutants[-1].lines[script.name] = script.text.count("\n", 0, starts[0]) + 1
    return mutants


def is_entry(entry: dict, mutant: Mutant) -> bool:
    """Whether this entry of the table of equivalent mutants means this one."""
    same = (entry["operator"], entry["old"], entry["new"])
    same = same == (mutant.operator, mutant.old, mutant.new)
    return same and f"ppo_{entry['script']}.py" in mutant.edits


def everything() -> tuple[list[Script], list[Mutant]]:
    """All scripts and all mutants, those known to be equivalent with their reason."""
    paths = sorted(ROOT.glob("ppo_*.py"), key=lambda path: (path.stem != "ppo_discrete", path))
    scripts, details = [Script(path) for path in paths], make_details.table()
    table = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text())
    mutants = automatic(scripts) + by_hand(scripts, table["mutant"])
    for mutant in mutants:
        known = [tag for tag in mutant.tags if tag in details]
        mutant.tests = [*mutant.tests, *(x for tag in known for x in details[tag]["tests"])]
        mutant.why = next((x["why"] for x in table["equivalent"] if is_entry(x, mutant)), "")
    return scripts, mutants


# ------------------------------------------------------------------------------------------------
# Verdicts


class Recorder:
    """A plugin of pytest: keeps to some names, writes down what passed, how fast, what failed."""

    def __init__(self, path: Path, names: tuple[str, ...]):
        self.path, self.names = path, names
        self.seconds, self.passed, self.failed = Counter(), [], []

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.name.startswith(self.names)]

    def pytest_collectreport(self, report):
        self.failed += [report.nodeid] if report.failed else []

    def pytest_runtest_logreport(self, report):
        self.pytest_collectreport(report)
        self.seconds[report.nodeid] += report.duration
        self.passed += [report.nodeid] if report.passed and report.when == "call" else []

    def pytest_sessionfinish(self):
        passed = {test: self.seconds[test] for test in self.passed}
        self.path.write_text(json.dumps([passed, self.failed]))


def fork(folder: Path, tests: list[str], *flags: str, names=("",)) -> int:
    """Start pytest in a copy of the repository. Returns the id of the process."""
    sys.stdout.flush()
    (folder / "record.json").unlink(missing_ok=True)
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()  # a group of its own, so that what the tests start ends with it
        for file, number in (os.devnull, 0), (folder / "output", 1), (folder / "output", 2):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        os.chdir(folder)
        del sys.modules["make_details"]
        flags += ("-q", "-n0", "-p", "no:cacheprovider")  # in this process
        flags += (f"--rootdir={folder}", f"--basetemp={folder}/tmp")
        recorder = Recorder(folder / "record.json", names)
        status = importlib.import_module("pytest").main([*flags, *tests], plugins=[recorder])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid: int, deadline: float) -> int | None:
    """Status of a process that has ended, or has to now; None if it may go on."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if not done and time.monotonic() < deadline:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return status if done else os.waitpid(pid, 0)[1]


def record(folder: Path) -> tuple[dict[str, float], list[str]]:
    """test -> seconds for all that passed, and a list of what failed"""
    file = folder / "record.json"
    return json.loads(file.read_text()) if file.exists() else ({}, ["what did not end"])


def copy_repository(folder: Path):
    """What tests look at, without docs/results and whatever else is large."""
    for pattern in ("*.*", "docs/*.*", "docs/vectors/*.*", "benchmarks/*.*"):
        for path in filter(Path.is_file, ROOT.glob(pattern)):
            (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=lambda *_: ["__pycache__"])


def baseline(folder: Path, names: tuple[str, ...]) -> dict[str, float]:
    """Seconds of each test whose name begins so; without any mutation all have to pass."""
    files = {f"tests/{file}" for file, name in make_details.find_tests() if name.startswith(names)}
    if not files:
        return {}
    pid, begin = fork(folder, sorted(files), names=names), time.monotonic()
    try:
        while ended(pid, time.monotonic() + 1) is None:
            time.sleep(0.1)
    except BaseException:
        ended(pid, 0.0)
        raise
    seconds, failed = record(folder)
    if failed:
        sys.exit(f"without any mutation these tests fail: {', '.join(failed)}")
    print(f"{len(seconds)} tests pass without any mutation, in {time.monotonic() - begin:.0f} s")
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)  # a mutant may look like what it has
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    return seconds


def replaced(text: str, edits: list[tuple[int, int, str]]) -> str:
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def write(folder: Path, scripts: list[Script], edits: dict[str, list]):
    for script in scripts:
        (folder / script.name).write_text(replaced(script.text, edits.get(script.name, [])))


def attempt(mutants: list[Mutant], scripts: list[Script], jobs: int):
    """Reach a verdict on each mutant, `jobs` of them at a time."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as in conftest.py; read by the imports that follow
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as top:
        folders = [Path(top) / str(i) for i in range(jobs)]
        copy_repository(folders[0])
        write(folders[0], scripts, {})
        seconds = baseline(folders[0], tuple({x for mutant in mutants for x in mutant.tests}))
        for folder in folders[1:]:
            shutil.copytree(folders[0], folder)
        waiting, running = mutants[::-1], {}
        try:
            while waiting or running:
                over = []
                if waiting and folders:
                    mutant, some = waiting[-1], tuple(waiting.pop().tests)
                    tests = [test for test in seconds if test.split("::")[-1].startswith(some)]
                    if tests:
                        write(folders[-1], scripts, mutant.edits)
                        deadline = time.monotonic() + 30 + 5 * sum(map(seconds.get, tests))
                        pid = fork(folders[-1], sorted(tests, key=seconds.get), "-x")
                        running[pid] = mutant, folders.pop(), deadline
                    else:
                        over.append(mutant)
                for pid, (mutant, folder, deadline) in list(running.items()):
                    if (status := ended(pid, deadline)) is not None:
                        del running[pid]
                        folders.append(folder)
                        over.append(mutant)
                        mutant.verdict = "equivalent" if mutant.why else "survived"
                        if status:
                            wrong = ", and is listed as equivalent" if mutant.why else ""
                            mutant.verdict = "caught"
                            mutant.why = f"by {''.join(record(folder)[1][:1])}{wrong}"
                for mutant in over:
                    done = len(mutants) - len(waiting) - len(running)
                    print(
                        f"{done}/{len(mutants)} {mutant.verdict}: {mutant}  {mutant.why}",
                        flush=True,
                    )
                time.sleep(0.02)
        finally:
            for pid in running:
                ended(pid, 0.0)


def report(mutants: list[Mutant]) -> list[str]:
    """A row for each detail, then the survivors and the equivalent ones, in Markdown."""
    tags = [*make_details.table(), *(tag for mutant in mutants for tag in mutant.tags)]
    groups = {tag: [x for x in mutants if tag in x.tags] for tag in tags}
    groups |= {"none": [x for x in mutants if not x.tags], "all": mutants}
    rows = [["detail", "mutants", *VERDICTS], ["---"] * (2 + len(VERDICTS))]
    for name, group in groups.items():
        counts = Counter(mutant.verdict for mutant in group)
        rows += [[name, len(group), *(counts[x] for x in VERDICTS)]] if group else []
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    for verdict in ("survived", "equivalent"):
        some = [mutant for mutant in mutants if mutant.verdict == verdict]
        lines += ["", f"{verdict.capitalize()}: {len(some) or 'none'}", ""][: 3 if some else 2]
        lines += [f"- `{mutant}`{mutant.why and '<br>'}{mutant.why}" for mutant in some]
    return lines


def page(mutants: list[Mutant], argv: list[str], minutes: float) -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    _, _, what, verdicts, _ = __doc__.split("\n\n")
    lines = ["# Mutation testing", "", "<!-- written by tests/mutate.py, do not edit -->", ""]
    lines += [f"`{shlex.join(['python', 'tests/mutate.py', *argv])}` took {minutes:.0f} minutes"]
    lines += [f"at commit {commit or 'unknown'}.", "", what, "", verdicts, ""]
    lines += ["A mutant of a line with two tags is counted for both.", "", *report(mutants), ""]
    lines += ["Operators:", "", *(f"- {name}: `{text}`" for name, text in OPERATORS.items()), ""]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", help="only mutants of this one, as ppo_atari.py")
    parser.add_argument("--detail", help="only mutants of this one, as C5")
    parser.add_argument("--sample", type=int, help="only so many, the same ones every time")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    args, begin = parser.parse_args(argv), time.monotonic()
    scripts, mutants = everything()
    mutants = [x for x in mutants if args.script in (None, *x.edits)]
    mutants = [x for x in mutants if args.detail in (None, *x.tags)]
    if args.sample is not None:
        chosen = random.Random(0).sample(range(len(mutants)), min(args.sample, len(mutants)))
        mutants = [mutants[i] for i in sorted(chosen)]
    attempt(mutants, scripts, args.jobs)
    print("", *report(mutants), sep="\n")
    if args.out:
        args.out.write_text(page(mutants, argv, (time.monotonic() - begin) / 60))
    return int(any(mutant.verdict == "survived" for mutant in mutants))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and what it started with it
    sys.exit(main(sys.argv[1:]))
