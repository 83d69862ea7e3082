"""Mutation testing: would the tests of a detail notice if its lines were wrong?

    python tests/mutate.py [--script ppo_atari.py] [--detail C5] [--sample 50] [--out PATH]
    python tests/mutate.py --untagged 100 --seed 1 [--out PATH]
    python tests/mutate.py --vectors [--out PATH]

A mutant is a copy of the scripts with one small mistake. Operators (below) make them of the code
that a tag such as [C5] marks: its statement, its function, its class up to `__init__`, each without
what has a tag of its own. More are written by hand in mutations.toml. A line that several scripts
share is changed in all of them at once, or their sameness would be what gives it away.

A mutant is caught if a test fails, or does not end, among those that docs/details.toml names for
the detail; it has survived if all of them pass. One that no test can tell from the original is
equivalent, and mutations.toml says why. The exit status is 1 if any other has survived. A mutant of
a line with two tags is counted for both.

Mutants of lines without a tag are drawn at random from the syntax trees of the scripts, all of them
alike. No docstring, annotation, import, f-string or text of an error is changed: they are no
behaviour. A mutant is tried against the tests that run its script, without those of learning, for
ten minutes: first the quick ones that run its very line, or no line of a script while they run.
Which lines a test runs, also in the processes it starts, is written down beforehand, without any
mutation; a test that fails then is left out.

A vector is a file of docs/vectors/; its test computes it by the scripts. Each is tried with those
mutants of the details it names whose line it runs, but for equivalent ones; the others are of
default values, of other scripts, or of what a call of one function does not need. None has to
notice all of them: each of its details has tests of its own. The exit status is 1 if one notices
nothing.

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
import math
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
UNDROPPED = ast.FunctionDef | ast.ClassDef | ast.AnnAssign | ast.Import | ast.ImportFrom
WORDS = ["fail", "fault", "notice"]  # functions that say what is wrong
DEFAULTS = ["test_defaults_"]  # tests of all default values in Args, beside those of the details
PRELOADED = ["pytest", "numpy", "gymnasium", "ale_py", "cv2", "mujoco", "stable_baselines3"]
PRELOADED += ["torch", "torch._dynamo", "torch.utils.tensorboard", "tqdm", "tyro"]
PRELOADED += ["transformers", "peft", "datasets"]
MODES = {"tagged": "Lines with a tag", "untagged": "Lines without a tag"}
MODES |= {"vectors": "What each vector notices"}
UNTAGGED = "atari continuous core discrete environments errors lstm numbers one_network placement "
UNTAGGED += "places ranks reference resume runs vectors video watched rlhf rlhf_data rlhf_group "
UNTAGGED += "rlhf_lora rlhf_models rlhf_ranks rlhf_runs"  # files that run scripts, but to learn
LIMIT = 600  # seconds of tests that a mutant of a line without a tag is tried against
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
    places: set[str] = dataclasses.field(default_factory=set)  # script:line, to be run by a test
    tried: list[str] = dataclasses.field(default_factory=list)  # tests
    noticed: list[str] = dataclasses.field(default_factory=list)  # those of them that did not pass
    verdict: str = "no test"
    why: str = ""  # why it is equivalent, then what caught it

    def __str__(self):
        (script, line), *others = self.lines.items()
        place = f"{script}:{line}" + (f" and {len(others)} more" if others else "")
        old, new = (textwrap.shorten(x, 110, placeholder=" ...") for x in (self.old, self.new))
        change = f"{old}  ->  {new or '(nothing)'}" if old else new
        tags = f" [{' '.join(self.tags)}]" * bool(self.tags)
        return f"{place}{tags} {self.operator}: {change}"


class Script:
    """The text of a script and where each node of its tree stands in it."""

    def __init__(self, path: Path):
        self.name, self.text = path.name, path.read_text()
        lengths = map(len, self.text.splitlines(keepends=True))
        self.starts = [0, *itertools.accumulate(lengths)]
        nodes = list(ast.walk(tree := ast.parse(self.text)))
        self.spans = [(node, *self.span(node)) for node in nodes if isinstance(node, ast.stmt)]
        marks = [node for node in nodes if isinstance(node, ast.stmt | ast.keyword)]
        outermost = {node.lineno: node for node in reversed(marks)}
        self.tags = {}  # node -> its tags
        for site in make_details.find_sites(path):
            self.tags.setdefault(outermost[site.first], []).append(site.tag)
        classes = [node for node in self.tags if isinstance(node, ast.ClassDef)]
        methods = [[x for x in node.body if isinstance(x, ast.FunctionDef)] for node in classes]
        self.rest = [tree, *(x for some in methods for x in some[1:])]  # with what has no tag

    def span(self, node):
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def of(self, node):
        return self.text[slice(*self.span(node))]

    def operand(self, node):
        """Its text, to stand anywhere in an expression."""
        atom = isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.Constant)
        return self.of(node) if atom else f"({self.of(node)})"

    def places(self, first: int, end: int) -> set[str]:
        """From one line to that of a character."""
        return {f"{self.name}:{i}" for i in range(first, self.text.count("\n", 0, end) + 2)}

    def around(self, start: int) -> list[ast.stmt]:
        """The statements around a character, from the outside in."""
        return [node for node, first, end in self.spans if first <= start < end]


def children(node):
    """What behaves: no docstring, annotation, index, import, no words of an error or a notice."""
    match node:
        case ast.ClassDef(body=nodes):
            pass
        case ast.FunctionDef(args=args, body=body):
            nodes = [*args.defaults, *args.kw_defaults, *body]
        case ast.AnnAssign(value=value) | ast.Subscript(value=value):
            nodes = [value]
        case ast.JoinedStr() | ast.Raise() | ast.Import() | ast.ImportFrom():
            nodes = []
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)) if name in WORDS:
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
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and not is_text(node)


def is_text(node) -> bool:
    """A text, or a sum or a product with one."""
    if isinstance(node, ast.BinOp):
        return is_text(node.left) or is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (is_constant(node) and isinstance(node.value, str))


def is_assigned(node, parent) -> bool:
    """Or returned; a number as far as can be seen: not several, no call of a name in capitals."""
    match parent:
        case ast.Assign(targets=[ast.Tuple()]):
            return False
        case ast.Assign() | ast.AugAssign() | ast.AnnAssign() | ast.Return():
            name = getattr(node, "func", None)
            name = getattr(name, "attr", getattr(name, "id", "Name"))
            number = is_constant(node) and type(node.value) in (int, float)
            arithmetic = isinstance(node, ast.BinOp | ast.UnaryOp) and not is_text(node)
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
        if not isinstance(node, UNDROPPED):
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
        case ast.Subscript(slice=index) if of(node.value) != "Annotated":
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


def automatic(scripts: list[Script], tagged: bool = True) -> list[Mutant]:
    """All mutants by operators of what has a tag, or of what has none; one of a line that several
    scripts share is one of all of them.
    """
    found = {}
    for script in scripts:
        text, seen, counts = script.text, set(), Counter()
        tops, all_tops = script.tags if tagged else script.rest, {*script.tags, *script.rest}
        nodes = [(top, *x) for top in tops for x in walk(top, all_tops - {top})]
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
                    tests = DEFAULTS if isinstance(statement, ast.AnnAssign) else []
                    mutant = Mutant(operator, *lines, [*tests])
                    mutant = found.setdefault((place, counts[place]), mutant)
                    mutant.edits[script.name] = [(start, end, new)]
                    mutant.lines[script.name] = text.count("\n", 0, start) + 1
                    mutant.places |= script.places(statement.lineno, end)
                    tags = script.tags.get(top, [])
                    mutant.tags += [x for x in tags if x not in mutant.tags]
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
                for start, end in zip(starts, ends, strict=True):
                    first = script.text.count("\n", 0, start) + 1
                    mutants[-1].places |= script.places(first, end)
    return mutants


def is_entry(entry: dict, mutant: Mutant) -> bool:
    """Whether this entry of the table of equivalent mutants means this one."""
    same = (entry["operator"], entry["old"], entry["new"])
    same = same == (mutant.operator, mutant.old, mutant.new)
    return same and f"ppo_{entry['script']}.py" in mutant.edits


def vectors() -> dict[str, tuple[list[str], str]]:
    """name -> its details and its test"""
    found = {}
    for path in sorted((ROOT / "docs" / "vectors").glob("*.json")):
        name, first = path.stem, path.stem.removeprefix("first_iterations_")
        test = f"test_up_to_date[{name}]"
        test = test if name == first else f"test_first_iterations_equal_the_vectors[{first}]"
        found[name] = json.loads(path.read_text())["detail"], test
    return found


def everything(mode: str = "tagged") -> tuple[list[Script], list[Mutant]]:
    """All scripts and all mutants of a mode, those known to be equivalent with their reason."""
    paths = sorted(ROOT.glob("ppo_*.py"), key=lambda path: (path.stem != "ppo_discrete", path))
    scripts, details = [Script(path) for path in paths], make_details.table()
    known = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text())
    mutants = automatic(scripts, mode != "untagged")
    mutants += by_hand(scripts, known["mutant"]) if mode != "untagged" else []
    files = vectors().values() if mode == "vectors" else ()
    for mutant in mutants:
        tags = [tag for tag in mutant.tags if tag in details]
        mutant.tests = [*mutant.tests, *(x for tag in tags for x in details[tag]["tests"])]
        mutant.why = next((x["why"] for x in known["equivalent"] if is_entry(x, mutant)), "")
        if mode == "vectors":
            mutant.tests = [test for detail, test in files if {*detail} & {*tags}]
    return scripts, [x for x in mutants if mode != "vectors" or (x.tests and not x.why)]


# ------------------------------------------------------------------------------------------------
# Verdicts

TRACER = """
import os, sys

seen, file = set(), os.open(os.environ["MUTATE_LINES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def trace(frame, event, argument):
    place = frame.f_code.co_filename, frame.f_lineno
    if "/ppo_" in place[0]:
        if place not in seen:
            seen.add(place)
            os.write(file, f"{os.path.basename(place[0])}:{place[1]}\\n".encode())
        return trace

sys.settrace(trace)
"""  # which lines of the scripts are run, by this process and by those it starts


class Recorder:
    """A plugin of pytest: keeps to some names, writes down what passed, how fast, and, if traced,
    which lines of the scripts it ran; and what failed.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], traced: bool, limits: dict):
        self.names, self.limits = names, limits
        self.path, self.lines = folder / "record.json", folder / "lines"
        self.seconds, self.passed, self.failed, self.ran = Counter(), [], [], {}
        self.tracer = {"seen": set()}
        if traced:
            (folder / "trace").mkdir()
            (folder / "trace" / "sitecustomize.py").write_text(TRACER)
            paths = filter(None, (str(folder / "trace"), os.environ.get("PYTHONPATH")))
            os.environ |= {"MUTATE_LINES": str(self.lines), "PYTHONPATH": ":".join(paths)}
            exec(TRACER, self.tracer)

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.name.startswith(self.names)]

    def pytest_runtest_logstart(self, nodeid):
        signal.alarm(60 + 10 * math.ceil(self.limits.get(nodeid, 60)))  # the end, if it hangs
        self.tracer["seen"].clear()
        self.lines.write_text("")

    def pytest_runtest_logfinish(self, nodeid):
        self.ran[nodeid] = sorted(set(self.lines.read_text().split()))

    def pytest_collectreport(self, report):
        self.failed += [report.nodeid] if report.failed else []

    def pytest_runtest_logreport(self, report):
        self.pytest_collectreport(report)
        self.seconds[report.nodeid] += report.duration
        self.passed += [report.nodeid] if report.passed and report.when == "call" else []

    def pytest_sessionfinish(self):
        passed = {test: (self.seconds[test], self.ran[test]) for test in self.passed}
        self.path.write_text(json.dumps([passed, self.failed]))


def fork(folder: Path, tests: dict[str, float], *flags: str, names=("",), traced=False) -> int:
    """Start pytest in a copy of the repository, of tests or files and the seconds they take: first
    a few, as a mistake shows soon, and fewer files are read. Returns the id of the process.
    """
    sys.stdout.flush()
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
        recorder = Recorder(folder, names, traced, tests)
        parts = [[*tests][:9], [*tests][9:]] if "-x" in flags else [[*tests]]
        for part in filter(None, parts):
            recorder.path.unlink(missing_ok=True)
            status = importlib.import_module("pytest").main([*flags, *part], plugins=[recorder])
            if status:
                break
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


def record(folder: Path) -> tuple[dict[str, tuple[float, list[str]]], list[str]]:
    """test -> seconds and lines for all that passed, and a list of what failed"""
    file = folder / "record.json"
    return json.loads(file.read_text()) if file.exists() else ({}, ["what did not end"])


def copy_repository(folder: Path):
    """What tests look at, without docs/results and whatever else is large."""
    for pattern in ("*.*", "docs/*.*", "docs/vectors/*.*", "benchmarks/*.*"):
        for path in filter(Path.is_file, ROOT.glob(pattern)):
            (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=lambda *_: ["__pycache__"])


def baseline(folders: list[Path], tests: list[tuple[str, str]], mode: str) -> dict[str, tuple]:
    """test -> seconds and lines of each (file, name); without any mutation all have to pass."""
    traced = mode != "tagged"
    files, names = sorted({f"tests/{file}" for file, _ in tests}), tuple(name for _, name in tests)
    begin, pids, known, failed = time.monotonic(), [], {}, []
    try:
        for i, folder in enumerate(folders):
            some = dict.fromkeys(files[i :: len(folders)], 0.0)
            pids += [fork(folder, some, names=names, traced=traced)] if some else []
        for pid, folder in zip(pids, folders, strict=False):
            while ended(pid, math.inf) is None:
                time.sleep(0.1)
            passed, wrong = record(folder)
            known |= passed
            failed += wrong
    finally:
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                ended(pid, 0.0)
    if failed:
        words = f"without any mutation these tests fail: {', '.join(failed)}"
        print(f"{words}; they are left out") if mode == "untagged" else sys.exit(words)
    known = {test: known[test] for test in known.keys() - set(failed)}
    print(f"{len(known)} tests pass without any mutation, in {time.monotonic() - begin:.0f} s")
    for folder in folders:  # a mutant may look like what it has
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    return {test: (seconds, set(lines)) for test, (seconds, lines) in known.items()}


def named(mutant: Mutant, known: dict[str, tuple]) -> list[str]:
    """The tests of its details, quick ones first."""
    tests = [x for x in known if x.split("::")[-1].startswith(tuple(mutant.tests))]
    return sorted(tests, key=lambda test: known[test][0])


def likely(mutant: Mutant, known: dict[str, tuple]) -> list[str]:
    """Tests that run its script, or nothing, for LIMIT seconds, quick ones that run its line first;
    a tenth of them where it is known to be equivalent.
    """
    costs = {}
    for test, (seconds, lines) in known.items():
        if not lines or any(line.partition(":")[0] in mutant.edits for line in lines):
            costs[test] = seconds * (1 if not lines or lines & mutant.places else 10)
    tests = [*dict.fromkeys(named(mutant, known) + sorted(costs, key=costs.get))]
    totals = itertools.accumulate(known[test][0] for test in tests)
    limit = LIMIT / 10 if mutant.why else LIMIT
    return [test for test, total in zip(tests, totals, strict=True) if total < limit]


def of_vectors(mutant: Mutant, known: dict[str, tuple]) -> list[str]:
    """Those of vectors that name one of its details and run its line."""
    return [x for x in named(mutant, known) if known[x][1] & mutant.places]


def replaced(text: str, edits: list[tuple[int, int, str]]) -> str:
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def write(folder: Path, scripts: list[Script], edits: dict[str, list]):
    for script in scripts:
        (folder / script.name).write_text(replaced(script.text, edits.get(script.name, [])))


def attempt(mutants: list[Mutant], scripts: list[Script], jobs: int, mode: str):
    """Reach a verdict on each mutant, `jobs` of them at a time."""
    names = tuple({x.partition("[")[0] for mutant in mutants for x in mutant.tests})
    tests = [x for x in make_details.find_tests() if x[1].startswith(names)]
    if mode == "untagged":
        tests = [x for x in make_details.find_tests() if x[0][5:-3] in UNTAGGED.split()]
    choose = {"tagged": named, "untagged": likely, "vectors": of_vectors}[mode]
    flags = [] if mode == "vectors" else ["-x"]
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as in conftest.py; read by the imports that follow
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as top:
        folders = [Path(top) / str(i) for i in range(jobs)]
        for folder in folders:
            copy_repository(folder)
            write(folder, scripts, {})
        known = baseline(folders, tests, mode)
        waiting, running = mutants[::-1], {}
        try:
            while waiting or running:
                over = []
                if waiting and folders:
                    mutant = waiting.pop()
                    mutant.tried = choose(mutant, known)
                    if tests := {test: known[test][0] for test in mutant.tried}:
                        write(folders[-1], scripts, mutant.edits)
                        deadline = time.monotonic() + 30 + 5 * sum(tests.values())
                        pid = fork(folders[-1], tests, *flags)
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
                            passed, failed = record(folder)
                            mutant.noticed = [test for test in mutant.tried if test not in passed]
                            wrong = ", and is listed as equivalent" if mutant.why else ""
                            mutant.verdict = "caught"
                            mutant.why = f"by {''.join(failed[:1])}{wrong}"
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


def table(header: list[str], rows: list[list]) -> list[str]:
    """Of Markdown."""
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def report(mutants: list[Mutant]) -> list[str]:
    """A row for each detail or script, then the survivors and the equivalent ones, in Markdown."""
    names = [*make_details.table(), *(tag for mutant in mutants for tag in mutant.tags)]
    groups = {name: [x for x in mutants if name in x.tags] for name in names}
    for mutant in mutants:
        if not mutant.tags:
            (script, *others), kind = mutant.edits, "none"
            if mutant.operator != "hand":
                kind = f"{script} and others" if others else script
            groups.setdefault(kind, []).append(mutant)
    rows = []
    for name, group in (groups | {"all": mutants}).items():
        counts = Counter(mutant.verdict for mutant in group)
        rows += [[name, len(group), *(counts[x] for x in VERDICTS)]] if group else []
    kind = "detail" if any(mutant.tags for mutant in mutants) else "script"
    lines = table([kind, "mutants", *VERDICTS], rows)
    for verdict in ("survived", "equivalent"):
        some = [mutant for mutant in mutants if mutant.verdict == verdict]
        lines += ["", f"{verdict.capitalize()}: {len(some) or 'none'}", ""][: 3 if some else 2]
        lines += [f"- `{mutant}`{mutant.why and '<br>'}{mutant.why}" for mutant in some]
    return lines


def report_vectors(mutants: list[Mutant]) -> list[str]:
    """A row for each vector, then what each mutant is noticed by, and by which that run it not."""
    rows, seen = [], {}
    for name, (detail, test) in vectors().items():
        group = [x for x in mutants if {*x.tags} & {*detail}]
        tried = [x for x in group if any(y.endswith(test) for y in x.tried)]
        unnoticed = [x for x in tried if not any(y.endswith(test) for y in x.noticed)]
        numbers = len(group), len(tried), len(tried) - len(unnoticed), len(unnoticed)
        rows.append([f"{name}.json", " ".join(detail), *numbers])
        for mutant in tried:
            by = seen.setdefault(str(mutant), ([], []))
            by[mutant in unnoticed].append(name)
    lines = table(["vector", "details", "mutants", "tried", "noticed", "not noticed"], rows)
    for title, kind in (
        ("Noticed by no vector", (False, True)),
        ("Noticed by some and not by others", (True, True)),
        ("Noticed by each that runs them", (True, False)),
    ):
        some = {x: by for x, by in seen.items() if tuple(map(bool, by)) == kind}
        lines += ["", f"{title}: {len(some) or 'none'}", ""]
        for mutant, (noticed, unnoticed) in some.items():
            parts = [f"by {', '.join(noticed)}"] if noticed else []
            parts += [f"not by {', '.join(unnoticed)}"] if unnoticed else []
            lines.append(f"- `{mutant}`<br>{'; '.join(parts)}")
    return lines


def head() -> str:
    """The commit the mutants are of, and whether anything but the page has changed since."""

    def git(*command):
        command = ["git", "-C", str(ROOT), *command]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!docs/mutations.md")
    return (git("rev-parse", "HEAD") or "unknown") + "-dirty" * bool(changed)


def write_section(path: Path, mode: str, made: str, lines: list[str]):
    """Of a page that may have others, each made by a command of its own."""
    words = __doc__.split("\n\n")
    paragraph = dict(zip(MODES, ("\n\n".join(words[2:4]), *words[4:6]), strict=True))[mode]
    text = "\n".join([paragraph, "", made, "", *lines])
    old = path.read_text() if path.exists() else ""
    sections = dict(re.findall(r"(?ms)^## (.+?)\n\n(.+?)\n(?=\n## |\Z)", old)) | {MODES[mode]: text}
    sections["Operators"] = "\n".join(f"- {name}: `{text}`" for name, text in OPERATORS.items())
    parts = [f"## {x}\n\n{sections[x]}\n" for x in (*MODES.values(), "Operators") if x in sections]
    top = "# Mutation testing\n\n<!-- written by tests/mutate.py, do not edit -->\n"
    path.write_text("\n".join([top, *parts]))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", help="only mutants of this one, as ppo_atari.py")
    parser.add_argument("--detail", help="only mutants of this one, as C5")
    parser.add_argument("--sample", type=int, help="only so many, drawn at random")
    parser.add_argument("--untagged", type=int, help="so many of lines without a tag instead")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--vectors", action="store_true", help="try vectors instead of tests")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, help="Markdown page to write a section of")
    args, begin, commit = parser.parse_args(argv), time.monotonic(), head()
    mode = "vectors" if args.vectors else "tagged" if args.untagged is None else "untagged"
    scripts, mutants = everything(mode)
    mutants = [x for x in mutants if args.script in (None, *x.edits)]
    mutants = [x for x in mutants if args.detail in (None, *x.tags)]
    if (size := args.sample if args.untagged is None else args.untagged) is not None:
        chosen = random.Random(args.seed).sample(range(len(mutants)), min(size, len(mutants)))
        mutants = [mutants[i] for i in sorted(chosen)]
    attempt(mutants, scripts, args.jobs, mode)
    lines = report_vectors(mutants) if args.vectors else report(mutants)
    print("", *lines, sep="\n")
    if args.out:
        command, minutes = ["python", "tests/mutate.py", *argv], (time.monotonic() - begin) / 60
        made = f"`{shlex.join(command)}` took {minutes:.0f} minutes\nat commit {commit}."
        write_section(args.out, mode, made, lines)
    if args.vectors:
        seen = {test.partition("[")[2] for mutant in mutants for test in mutant.noticed}
        return int(len(seen) < len(vectors()))
    return int(any(mutant.verdict == "survived" for mutant in mutants))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and what it started with it
    sys.exit(main(sys.argv[1:]))
