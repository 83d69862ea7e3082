"""The mutants are as described, mutations.toml fits the scripts, and the verdicts are right."""

import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import make_vectors
import mutate
from conftest import ROOT
from test_reference import ITERATIONS

TABLE = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text())


@pytest.fixture(scope="module")
def real():
    """All scripts and all mutants of them."""
    return mutate.everything()


@pytest.fixture(scope="module")
def untagged():
    return mutate.everything("untagged")[1]


@pytest.fixture
def mutants_of(tmp_path):
    """Scripts with these texts and the mutants of them."""

    def mutants_of(*sources, tagged=True):
        paths = [tmp_path / f"ppo_{i}.py" for i in range(len(sources))]
        for path, source in zip(paths, sources, strict=True):
            path.write_text(source)
        scripts = [mutate.Script(path) for path in paths]
        return scripts, mutate.automatic(scripts, tagged)

    return mutants_of


EXAMPLES = """
x = (a + 3.0) * b
    drop: pass
    factor: x = 2 * (a + 3.0) * b
    sign: x = (a - 3.0) * b
    number: x = (a + 7.0) * b
x = a - b * c
    drop: pass
    factor: x = 2 * (a - b * c)
    factor: x = a - 2 * b * c
    sign: x = a + b * c
    swap: x = (b * c) - a
f(-(a / b))
    drop: pass
    sign: f((a / b))
    swap: f(-(b / a))
x = f(2)**a
    drop: pass
    factor: x = 2 * (f(2)**a)
    swap: x = a ** f(2)
    number: x = f(5)**a
x -= y
    drop: pass
    sign: x += y
x = y[i, 0, :n]
    drop: pass
    index: x = y[i + 1, 0, :n]
    index: x = y[i - 1, 0, :n]
    index: x = y[i, 1, :n]
    index: x = y[i, -1, :n]
    index: x = y[i, 0, :n + 1]
    index: x = y[i, 0, :n - 1]
f(y["a"], z[..., None])
    drop: pass
f(x.sum(0), y.any(dim=-1))
    drop: pass
    axis: f(x.sum(1), y.any(dim=-1))
    axis: f(x.sum(0), y.any(dim=0))
x = y.argmax(1)
    drop: pass
    factor: x = 2 * y.argmax(1)
    extreme: x = y.argmin(1)
    axis: x = y.argmax(0)
f(np.minimum(x, y), num_minibatches)
    drop: pass
    extreme: f(np.maximum(x, y), num_minibatches)
f(a < b)
    drop: pass
    bound: f(a <= b)
    swap: f(b < a)
f(0 < a >= b, a is b)
    drop: pass
    bound: f(0 <= a >= b, a is b)
    bound: f(0 < a > b, a is b)
    number: f(1 < a >= b, a is b)
f(a and b, c | d)
    drop: pass
    logic: f(a or b, c | d)
    logic: f(a and b, c & d)
f(True, "a", None)
    drop: pass
    boolean: f(False, "a", None)
f(a if b else c)
    drop: pass
    condition: f(a if not b else c)
    condition: f(a if True else c)
    condition: f(a if False else c)
x: float | None = None
    number: x: float | None = 0
x: float = 0.5
    factor: x: float = 2 * 0.5
    number: x: float = 2.0
x, y = f()
    drop: pass
x = Model()
    drop: pass
"""
EXAMPLES = [block.splitlines() for block in re.split(r"\n(?! )", EXAMPLES.strip())]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example[0])
def test_operators(mutants_of, example):
    line, *expected = map(str.strip, example)
    _, mutants = mutants_of(f"before()\n{line}  # told [C5]\nafter()\n")
    assert sorted(f"{x.operator}: {x.new}" for x in mutants) == sorted(expected)
    for mutant in mutants:
        assert (mutant.old, mutant.tags, mutant.lines) == (line, ["C5"], {"ppo_0.py": 2})
        assert mutant.operator in mutate.OPERATORS


def test_if_and_what_is_in_it(mutants_of):
    _, mutants = mutants_of("def f(a):\n    if a > 0:  # [C5]\n        g(a)\n")
    assert {(x.operator, x.old, x.new) for x in mutants} == {
        ("drop", "if a > 0: g(a)", "pass"),
        ("condition", "if a > 0:", "if not (a > 0):"),
        ("condition", "if a > 0:", "if True:"),
        ("bound", "if a > 0:", "if a >= 0:"),
        ("swap", "if a > 0:", "if 0 > a:"),
        ("number", "if a > 0:", "if a > 1:"),
        ("drop", "g(a)", "pass"),
    }


def test_functions_and_classes_without_what_has_a_tag_of_its_own(mutants_of):
    source = '''
class A(B):
    """[C1] Explained."""

    size: int

    def __init__(self, gain=5):
        """1 + 1"""
        self.a = gain  # note
        self.b = f(
            size=1,  # [C2]
            other=gain,
        )

    def g(self):
        return 3
'''
    _, mutants = mutants_of(source)
    assert {(*x.tags, x.operator, x.new) for x in mutants} == {
        ("C1", "number", "def __init__(self, gain=11):"),
        ("C1", "drop", "pass"),
        ("C1", "factor", "self.b = 2 * f( size=1, other=gain, )"),
        ("C2", "drop", ""),
        ("C2", "number", "size=0,"),
    }
    assert len(mutants) == 6  # two statements to drop


def test_lines_without_a_tag(mutants_of):
    """Of a class with a tag, too; nothing that is no behaviour."""
    source = '''
import os

Count = Annotated[int, 5]

class A(B):
    """[C1] 1 + 1"""

    size: int = 2

    def __init__(self, gain=5):
        self.a = gain

    def g(self, n: int = 3) -> Tuple[int, 4]:
        """1 + 1"""
        if n > x[0]:
            fail(f"not {n + 1}", n - 1)
        notice("7" * 8)
        y = "text" * n
        f(
            size=1,  # [C2]
            other=y,
        )
        if not n:
            raise Error(9 * n)
        return n  # [C3]
'''
    _, mutants = mutants_of(source, tagged=False)
    assert {(x.operator, x.old, x.new) for x in mutants if x.operator != "drop"} == {
        (
            "number",
            "def g(self, n: int = 3) -> Tuple[int, 4]:",
            "def g(self, n: int = 7) -> Tuple[int, 4]:",
        ),
        ("condition", "if n > x[0]:", "if not (n > x[0]):"),
        ("condition", "if n > x[0]:", "if True:"),
        ("bound", "if n > x[0]:", "if n >= x[0]:"),
        ("swap", "if n > x[0]:", "if x[0] > n:"),
        ("index", "if n > x[0]:", "if n > x[1]:"),
        ("index", "if n > x[0]:", "if n > x[-1]:"),
        ("condition", "if not n:", "if not (not n):"),
        ("condition", "if not n:", "if True:"),
    }
    dropped = [x.old.split()[0] for x in mutants if x.operator == "drop"]
    assert dropped == ["Count", "if", 'fail(f"not', 'notice("7"', "y", "f(", "if", "raise"]
    assert not any(x.tags for x in mutants)


def test_most_mutants_of_the_scripts_have_no_tag(real, untagged):
    """None is one of those with a tag."""
    scripts, tagged = real
    assert len(untagged) > 3 * len(tagged)
    texts = {script.name: script.text for script in scripts}
    pairs = [
        {
            (name, mutate.replaced(texts[name], edits))
            for x in some
            for name, edits in x.edits.items()
        }
        for some in (tagged[:300], untagged[:600])
    ]
    assert not pairs[0] & pairs[1]


def test_the_lines_to_be_run_are_those_of_the_statement(mutants_of):
    source = "def f(a):\n    g(\n        1,\n        a[0],\n    )\n    if a:\n        g(2)\n"
    _, mutants = mutants_of(source, tagged=False)
    lines = {x.new: sorted(int(y.split(":")[1]) for y in x.places) for x in mutants}
    assert lines["a[1],"] == [2, 3, 4]
    assert lines["if not a:"] == [6]
    assert lines["g(5)"] == [7]


def test_nothing_else_is_changed(real, untagged):
    scripts, mutants = real
    texts = {script.name: script.text for script in scripts}
    for mutant in (*mutants, *untagged[::5]):
        for name, edits in mutant.edits.items():
            source = mutate.replaced(texts[name], edits)
            assert source != texts[name]
            assert texts[name].count("\n", 0, edits[0][0]) + 1 == mutant.lines[name]
            if mutant.operator != "hand":
                ((start, end, text),) = edits
                assert source == texts[name][:start] + text + texts[name][end:]


def test_a_line_shared_by_scripts_is_changed_in_all_at_once(mutants_of):
    shared = "def f(a):\n    g(a)\n    g(a)  # once [C5]\n"
    scripts, mutants = mutants_of(shared, "x = 1\n" + shared, shared.replace("f(", "h("))
    assert [x.lines for x in mutants] == [{"ppo_0.py": 3, "ppo_1.py": 4}, {"ppo_2.py": 3}]
    for script in scripts[:2]:
        source = mutate.replaced(script.text, mutants[0].edits[script.name])
        assert source == script.text.replace("g(a)  # once", "pass  # once")


def test_every_detail_of_the_scripts_has_mutants(real):
    scripts, mutants = real
    tags = {tag for script in scripts for tags in script.tags.values() for tag in tags}
    assert tags == {tag for mutant in mutants for tag in mutant.tags}


@pytest.mark.parametrize("entry", TABLE["mutant"], ids=lambda entry: entry["name"])
def test_what_is_written_by_hand_fits_the_scripts(entry):
    assert set(entry) <= {"name", "why", "detail", "tests", "scripts", "change"}
    assert ("detail" in entry) != ("tests" in entry)
    assert entry["why"].endswith(".")
    for name in entry["scripts"]:
        text = (ROOT / f"ppo_{name}.py").read_text()
        for change in entry["change"]:
            assert text.count(change["old"]) == 1
            text = text.replace(change["old"], change["new"])
        compile(text, name, "exec")


def test_names_are_unique():
    assert len({entry["name"] for entry in TABLE["mutant"]}) == len(TABLE["mutant"])


@pytest.mark.parametrize("entry", TABLE["equivalent"], ids=lambda entry: entry["new"])
def test_equivalent_mutants_exist(entry, real, untagged):
    (mutant,) = [x for x in (*real[1], *untagged) if mutate.is_entry(entry, x)]
    assert mutant.why == entry["why"]


def test_a_process_past_its_time_is_ended():
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    assert mutate.ended(process.pid, time.monotonic() + 60) is None
    assert mutate.ended(process.pid, time.monotonic()) != 0
    process.returncode = 0  # it is no more


def test_selection(monkeypatch, real):
    tried = []
    monkeypatch.setattr(mutate, "everything", lambda mode: real)
    monkeypatch.setattr(mutate, "attempt", lambda mutants, *_: tried.append(mutants))
    for _ in range(2):
        assert mutate.main(["--script", "ppo_atari.py", "--detail", "C5", "--sample", "3"]) == 0
    assert [str(x) for x in tried[0]] == [str(x) for x in tried[1]]
    assert len(tried[0]) == 3
    assert all("ppo_atari.py" in x.edits and "C5" in x.tags for x in tried[0])
    mutate.main([])
    assert len(tried[2]) > 100
    for seed in ("1", "1", "2"):
        mutate.main(["--untagged", "5", "--seed", seed])
    first, again, other = ([str(x) for x in some] for some in tried[3:])
    assert first == again != other
    assert len(first) == len(other) == 5


def test_tests_that_run_the_line_and_are_quick_come_first():
    """As do those that run nothing. Others of the script cost ten times as much; those of another
    script are not tried. Where it is known to be equivalent, a tenth of them is.
    """
    mutant = mutate.Mutant("drop", "x", "pass", ["test_d"], edits={"ppo_a.py": []})
    mutant.places = {"ppo_a.py:3", "ppo_a.py:4"}
    known = {
        "test_x.py::test_a": (5.0, {"ppo_a.py:4"}),
        "test_x.py::test_b[1]": (0.4, {"ppo_a.py:5"}),
        "test_x.py::test_c": (0.1, {"ppo_b.py:4"}),
        "test_x.py::test_d": (50.0, set()),
        "test_x.py::test_e": (540.0, {"ppo_a.py:3", "ppo_b.py:3"}),
        "test_x.py::test_f": (5.0, {"ppo_a.py:1"}),
        "test_x.py::test_g": (2.0, set()),
    }
    assert [x[-1] for x in mutate.likely(mutant, known)] == ["d", "g", "]", "a", "f"]
    mutant.why = "It is squared."
    assert [x[-1] for x in mutate.likely(mutant, known)] == ["d", "g", "]", "a"]
    mutant.tests = ["test_a", "test_b[1]", "test_e"]
    assert [x[11:] for x in mutate.named(mutant, known)] == ["test_b[1]", "test_a", "test_e"]
    assert [x[11:] for x in mutate.of_vectors(mutant, known)] == ["test_a", "test_e"]


def test_lines_are_traced_in_processes_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(mutate.TRACER)
    code = """
import os, subprocess, sys
if sys.argv[1:]:
    if os.fork() == 0:
        os._exit(0)
    os.wait()
else:
    subprocess.run([sys.executable, __file__, "1"])
def f():
    return 1
"""
    (tmp_path / "ppo_x.py").write_text(code)
    env = os.environ | {"PYTHONPATH": str(tmp_path), "MUTATE_LINES": str(tmp_path / "lines")}
    subprocess.run([sys.executable, tmp_path / "ppo_x.py"], env=env, check=True)
    lines = set((tmp_path / "lines").read_text().split())
    assert lines - {"ppo_x.py:0", "ppo_x.py:1"} == {f"ppo_x.py:{i}" for i in (2, 3, 4, 5, 6, 8, 9)}


# ------------------------------------------------------------------------------------------------
# Vectors


def test_each_vector_has_its_test():
    names = {name: test for name, (_, test) in mutate.vectors().items()}
    expected = {name: f"test_up_to_date[{name}]" for name in make_vectors.VECTORS}
    first = "test_first_iterations_equal_the_vectors"
    expected |= {f"first_iterations_{name}": f"{first}[{name}]" for name in ITERATIONS}
    assert names == expected


def test_vectors_are_tried_with_mutants_of_their_details():
    _, mutants = mutate.everything("vectors")
    details = {test: {*detail} for detail, test in mutate.vectors().values()}
    assert {test for x in mutants for test in x.tests} == details.keys()
    for mutant in mutants:
        for test, detail in details.items():
            assert (test in mutant.tests) == bool(detail & {*mutant.tags})
    assert not any(mutant.why for mutant in mutants)


def test_report_of_vectors():
    gae, one = (f"test_vectors.py::test_up_to_date[{name}]" for name in ("gae", "gae_lambda_1"))
    mutants = [mutate.Mutant("drop", f"x{i}", "pass", [], ["C5"], {"a.py": i}) for i in range(4)]
    for mutant, tried, noticed in zip(
        mutants, ([gae, one], [gae], [gae], []), ([gae], [gae], [], []), strict=True
    ):
        mutant.tried, mutant.noticed = tried, noticed
        mutant.verdict = "caught" if noticed else "survived" if tried else "no test"
    lines = mutate.report_vectors(mutants)
    assert "| gae.json | C5 | 4 | 3 | 2 | 1 |" in lines
    assert "| gae_lambda_1.json | C5 | 4 | 1 | 0 | 1 |" in lines
    text = "\n".join(lines)
    *_, nothing, some, each = re.split(r"\n\nNoticed by .+\n\n", text)
    assert nothing == "- `a.py:2 [C5] drop: x2  ->  pass`<br>not by gae"
    assert some == "- `a.py:0 [C5] drop: x0  ->  pass`<br>by gae; not by gae_lambda_1"
    assert each == "- `a.py:1 [C5] drop: x1  ->  pass`<br>by gae"


def test_a_section_takes_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "page.md"
    mutate.write_section(path, "vectors", "`made`", ["| a |"])
    mutate.write_section(path, "tagged", "`by`", ["| b |"])
    before = path.read_text()
    titles = [*mutate.MODES.values(), "Operators"]
    assert re.findall("(?m)^## (.+)", before) == [titles[0], *titles[2:]]
    mutate.write_section(path, "vectors", "`made`", ["| c |", "", "| d |"])
    assert path.read_text() == before.replace("| a |", "| c |\n\n| d |")


PAGE = (ROOT / "docs" / "mutations.md").read_text()
SECTIONS = dict(re.findall(r"(?ms)^## (.+?)\n\n(.+?)\n(?=\n## |\Z)", PAGE))


def test_each_vector_notices_mutants_of_its_details():
    """By the page; and all are tried that there are."""
    section = SECTIONS[mutate.MODES["vectors"]]
    assert "`python tests/mutate.py --vectors --" in section and "--sample" not in section
    rows = re.findall(
        r"(?m)^\| (\w+)\.json \| (.+?) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", section
    )
    assert {name: detail.split() for name, detail, *_ in rows} == {
        name: detail for name, (detail, _) in mutate.vectors().items()
    }
    for name, _, *numbers in rows:
        mutants, tried, noticed, unnoticed = map(int, numbers)
        assert mutants >= tried == noticed + unnoticed, name
        assert noticed > 0, name


def test_mutants_of_every_detail_are_caught(real):
    """By the page, of all the details that the scripts have today."""
    section = SECTIONS[mutate.MODES["tagged"]]
    assert "`python tests/mutate.py --jobs " in section and "--sample" not in section
    rows = re.findall(r"(?m)^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| 0 \| 0 \|$", section)
    counts = {tag: list(map(int, numbers)) for tag, *numbers in rows}
    assert {*counts} - {"none", "all"} == {tag for mutant in real[1] for tag in mutant.tags}
    for tag, (mutants, caught, equivalent) in counts.items():
        assert mutants == caught + equivalent and caught > 0, tag


def test_95_of_100_mutants_without_a_tag_are_caught():
    """By the page. The others are listed with the reason why nothing can tell them apart."""
    section = SECTIONS[mutate.MODES["untagged"]]
    assert "--untagged 100 --seed 1 " in section
    (row,) = re.findall(r"(?m)^\| all \| (.+) \|$", section)
    mutants, caught, equivalent, survived, untested = map(int, row.split(" | "))
    assert (mutants, survived, untested) == (100, 0, 0)
    assert caught >= 95 and caught + equivalent == 100


TRIAL = """
import sys
import mutate

scripts, mutants = mutate.everything()
kinds = {x.operator: x for x in mutants if x.tags == ["C7"]}  # whose tests are few
chosen = [kinds["drop"], kinds["condition"], kinds["sign"], kinds["swap"]]
chosen += [x for x in mutants if x.new == "standard deviation of a sample, not of a population"]
end = {x.name: [(len(x.text), len(x.text), "# harmless")] for x in scripts}
lines = {x.name: 600 for x in scripts}
chosen.append(mutate.Mutant("hand", "", "a comment", ["test_c7_"], ["C7"], lines, end))
chosen.append(mutate.Mutant("hand", "", "another", ["test_c7_"], ["C7"], lines, end, why="None."))
chosen.append(mutate.Mutant("hand", "", "unseen", ["test_none_"], ["L0"], lines, end))
mutate.everything = lambda mode: (scripts, chosen)
sys.exit(mutate.main(["--jobs", "1", "--out", "page.md"]))
"""


@pytest.mark.slow
def test_verdicts(tmp_path):
    """Four mutants by operators and one by hand, two comments, one known as such, no test."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", TRIAL]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    verdicts = re.findall(r"(?m)^\d/8 (.+?): (.+)", result.stdout)
    assert [verdict for verdict, _ in verdicts] == ["caught"] * 5 + [
        *("survived", "equivalent", "no test")
    ]
    for text in (result.stdout, Path("page.md").read_text()):
        for row in ("| C7 | 7 | 5 | 1 | 1 | 0 |", "| L0 | 1 | 0 | 0 | 0 | 1 |"):
            assert row in text
        assert "| all | 8 | 5 | 1 | 1 | 1 |" in text
        survived, equivalent = text.split("Survived: 1")[1].split("Equivalent: 1")
        assert survived.strip() == "- `ppo_discrete.py:600 and 4 more [C7] hand: a comment`"
        assert equivalent.split("\n")[2].endswith("[C7] hand: another`<br>None.")


def test_nothing_is_tried_where_a_test_fails_anyway(monkeypatch, tmp_path):
    monkeypatch.setattr(mutate, "fork", lambda *_, **__: os.spawnlp(os.P_NOWAIT, "true", "true"))
    monkeypatch.setattr(mutate, "record", lambda _: ({}, ["test_c7_equal"]))
    with pytest.raises(SystemExit, match=r"^without .* these tests fail: test_c7_equal$"):
        mutate.baseline([tmp_path], [("test_core.py", "test_c7_")], "tagged")


def test_what_fails_anyway_is_left_out_of_many(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mutate, "fork", lambda *_, **__: os.spawnlp(os.P_NOWAIT, "true", "true"))
    known = {"test_a": (1.0, ["ppo_a.py:1"]), "test_b": (1.0, [])}
    monkeypatch.setattr(mutate, "record", lambda _: (known, ["test_b"]))
    found = mutate.baseline([tmp_path], [("test_core.py", "test_")], "untagged")
    assert found == {"test_a": (1.0, {"ppo_a.py:1"})}
    assert "these tests fail: test_b; they are left out" in capsys.readouterr().out
