"""The tags in the scripts, docs/details.toml, docs/details.md and the tests belong together."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import make_details

ROOT = Path(__file__).parent.parent

DETAILS = make_details.table()
TESTS = make_details.find_tests()
PATHS = sorted(ROOT.glob("ppo_*.py"))
BASELINES = "ea25b9e8b234e6ee1bca43083f8f3cf974143998"

each_script = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
each_detail = pytest.mark.parametrize("tag", DETAILS)


@each_script
def test_a_script_carries_the_tags_that_the_table_claims(path):
    name = path.stem.removeprefix("ppo_")
    claimed = {tag for tag, entry in DETAILS.items() if name in entry["scripts"]}
    assert {site.tag for site in make_details.find_sites(path)} == claimed


def test_the_table_names_only_scripts_that_exist():
    claimed = {f"ppo_{name}.py" for entry in DETAILS.values() for name in entry["scripts"]}
    assert claimed <= {path.name for path in PATHS}


@each_script
def test_tags_stand_behind_code_or_in_docstrings(path):
    source = path.read_text()
    explained = make_details.TAG.findall(ast.get_docstring(ast.parse(source)))
    found = [site.tag for site in make_details.find_sites(path)]
    assert Counter(make_details.TAG.findall(source)) == Counter(explained + found)
    for site in make_details.find_sites(path):
        assert f"[{site.tag}]" in source.splitlines()[site.line - 1]


@each_script
def test_a_tag_stands_in_at_most_three_places(path):
    counts = Counter(site.tag for site in make_details.find_sites(path))
    assert max(counts.values()) <= 3, counts


@each_script
def test_quotes_are_short(path):
    sites = make_details.find_sites(path)
    assert not [site for site in sites if len(site.code.splitlines()) > 20]


def test_a_tag_marks_its_statement_or_its_function(tmp_path):
    (tmp_path / "ppo_x.py").write_text(
        '"""[C1] is explained here."""\n'
        "# [C2] is on no line of code\n"
        "def f(x):\n"
        '    """[C3] Begins.\n'
        "\n"
        "    And ends.\n"
        '    """\n'
        "    if x:  # [C4]\n"
        "        x = 1  # [C5] [C6]\n"
        "    return g(\n"
        "        x,\n"
        "        y=2,  # [C7]\n"
        "    )\n"
        "class C:\n"
        '    """[C8]"""\n'
        "    def g(self):\n"
        '        return "[C9]"\n'
        "    def h(self): ...\n"
    )
    sites = make_details.find_sites(tmp_path / "ppo_x.py")
    assert [(site.tag, site.line, site.first, site.last) for site in sites] == [
        ("C3", 4, 3, 13),
        ("C4", 8, 8, 9),
        ("C5", 9, 9, 9),
        ("C6", 9, 9, 9),
        ("C7", 12, 12, 12),
        ("C8", 15, 14, 17),
    ]
    assert sites[0].code.startswith('def f(x):\n    """[C3] Begins.\n    ...\n    """\n    if x:')


def test_page_is_up_to_date():
    hint = "run: python docs/make_details.py"
    assert make_details.PAGE.read_text() == make_details.page(), hint


@each_detail
def test_every_detail_is_tested(tag):
    tests = make_details.tests_of(DETAILS[tag], TESTS)
    assert tests, f"no test in tests/ begins with {DETAILS[tag]['tests']}"


@each_detail
def test_entries_are_complete(tag):
    entry = DETAILS[tag]
    assert {"title", "why", "source", "scripts", "tests"} <= set(entry)
    assert set(entry) <= {"title", "why", "paper", "source", "scripts", "tests"}
    assert "".join(map(str, entry.values())).isascii()
    assert 2 <= len(re.findall(r"[.?](?=\s)", entry["why"])) <= 4
    pattern = r"test_[a-z0-9_]+" if tag[0] == "H" else r"test_[a-z0-9_]+_"
    assert all(re.fullmatch(pattern, prefix) for prefix in entry["tests"])


@each_detail
def test_sources_are_pinned(tag):
    """To a full commit; those of the 37 to the commit of Baselines that the scripts name."""
    link = r"https://github\.com/([\w-]+/[\w-]+)/blob/([0-9a-f]{40})/[\w/]+\.py#L(\d+)(?:-L(\d+))?"
    assert DETAILS[tag]["source"]
    for url in DETAILS[tag]["source"]:
        repository, commit, first, last = re.fullmatch(link, url).groups()
        assert last is None or int(first) < int(last)
        if tag[0] in make_details.THE_37:
            assert (repository, commit) == ("openai/baselines", BASELINES)


@each_script
def test_scripts_name_the_commit_of_the_sources(path):
    (short,) = re.findall(r"openai/baselines at commit (\w+)", path.read_text())
    assert len(short) >= 7 and BASELINES.startswith(short)


def test_how_many_of_the_37():
    sizes = make_details.THE_37
    assert sum(sizes.values()) == 37
    ours = make_details.of_the_37(DETAILS)
    complete = [f"{group}{i + 1}" for group, size in sizes.items() for i in range(size)]
    groups = {tag[0] for tag in ours}  # whole ones, in order
    assert ours == [tag for tag in complete if tag[0] in groups]
    assert f" {len(ours)} of the 37 details " in make_details.PAGE.read_text()
