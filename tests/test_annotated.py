"""Scripts as pages with notes, equations beside their lines, what differs between scripts."""

import ast
import functools
import html
import re
from collections import Counter
from pathlib import Path
from textwrap import dedent

import pytest

import make_annotated
import make_details
import make_diffs
import make_equations

ROOT = Path(__file__).parent.parent
SOURCES = {name: (ROOT / f"ppo_{name}.py").read_text() for name in make_annotated.SCRIPTS}
MADE = {
    f"docs/{module.__name__}.py": module.pages()
    for module in (make_annotated, make_equations, make_diffs)
}
ANNOTATED = {path.stem[4:]: text for path, text in MADE["docs/make_annotated.py"].items()}
EQUATIONS = make_equations.table()
LINE = re.compile(r'<a id="L(\d+)" href="#L(\d+)" tabindex="-1"></a>(.*)')
LATEX = "alpha bar beta cdot cdots clip delta ell epsilon frac gamma gt hat in lambda ldots left "
LATEX += (
    "leftarrow log lt mathrm max mid min mu pi qquad quad right rho sigma sim sqrt sum theta tilde "
)
LATEX += "top Vert"

each_script = pytest.mark.parametrize("name", SOURCES)


def blocks(page: str) -> list[str]:
    """What is in the blocks of code of an annotated page."""
    return re.findall(r'(?s)<pre class="lines"[^>]*>(.*?)</pre>', page)


@functools.cache
def anchors(page: str) -> list[str]:
    """All anchors of a page, those of its headings by the rule of GitHub."""
    plain = re.sub(r"(?s)```.*?```|<pre.*?</pre>", "", page)
    titles = [x.lower().replace(" ", "-") for x in re.findall(r"(?m)^#+ (.+)$", plain)]
    return re.findall(r'<a id="([^"]+)"', page) + [re.sub(r"[^\w-]", "", x) for x in titles]


@pytest.mark.parametrize("program", MADE)
def test_pages_are_up_to_date(program):
    for path, text in MADE[program].items():
        assert path.read_text() == text, f"run: python {program}"
        assert text.startswith(f"<!-- made by {program}, do not edit -->\n")
        assert len(text) < 400_000
        assert text.isascii()


def links(page: str) -> set[str]:
    """Where the links of a page lead, those in its HTML included."""
    text = re.sub(r"(?s)```.*?```|<pre.*?</pre>|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$", "", page)
    return {*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r'<a [^>]*href="([^"]+)"', page)}


@pytest.mark.parametrize("program", MADE)
def test_links_have_targets(program):
    texts = {path: text for pages in MADE.values() for path, text in pages.items()}
    length = {ROOT / f"ppo_{name}.py": source.count("\n") for name, source in SOURCES.items()}
    for path, text in MADE[program].items():
        for link in links(text):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if target in length and anchor:
                lines = [int(x) for x in re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor).groups("0")]
                assert 0 < lines[0] <= length[target]
                assert lines[1] == 0 or lines[0] < lines[1] <= length[target]
            elif not file.startswith("http"):
                assert target.exists(), link
                content = texts.get(target) or target.read_text()
                assert not anchor or anchor in anchors(content), link


@pytest.mark.parametrize("program", MADE)
def test_no_anchor_stands_twice(program):
    for path, text in MADE[program].items():
        counts = Counter(anchors(text))
        assert [x for x in counts if counts[x] > 1] == [], path.name


# ------------------------------------------------------------------------------------------------
# Annotated


@each_script
def test_all_lines_in_order_each_with_its_anchor(name):
    found = [LINE.fullmatch(x).groups() for x in "\n".join(blocks(ANNOTATED[name])).split("\n")]
    numbers = [str(i) for i in range(1, len(SOURCES[name].splitlines()) + 1)]
    assert [x[0] for x in found] == [x[1] for x in found] == numbers
    texts = [html.unescape(re.sub(r"<[^>]+>", "", text)) for _, _, text in found]
    assert "\n".join([*texts, ""]) == SOURCES[name]


@each_script
def test_numbers_of_lines_are_shown_from_the_right_one_on(name):
    for start, first in re.findall(r'counter-reset: line (\d+)"><a id="L(\d+)"', ANNOTATED[name]):
        assert int(start) == int(first) - 1


@each_script
def test_code_is_well_formed(name):
    """Elements end on the line they begin on, and are those that a forge shows."""
    for line in "\n".join(blocks(ANNOTATED[name])).split("\n"):
        opened = []
        for end, element in re.findall(r"<(/?)(\w+)[^>]*>", line):
            assert element in {"a", "b", "i", "span", "strong"}
            assert not end or opened.pop() == element
            opened += [] if end else [element]
        assert opened == []


@functools.cache
def sites(name: str) -> list[make_details.Site]:
    return make_details.find_sites(ROOT / f"ppo_{name}.py")


@each_script
def test_every_place_of_a_tag_has_an_anchor(name):
    pattern = re.compile(r"(?:tag-(L\d)|([ACRMXH]\d+))(-\d)?")
    matches = filter(None, map(pattern.fullmatch, anchors(ANNOTATED[name])))
    assert Counter(x[1] or x[2] for x in matches) == Counter(site.tag for site in sites(name))


@each_script
def test_a_note_stands_above_its_code(name):
    """The code is the first place of the tag that is not in the Configuration."""
    lines, first_of = SOURCES[name].splitlines(), {}
    for site in sites(name):
        first_of.setdefault(site.tag, []).append(site)
    tags = []
    for line in ANNOTATED[name].split("\n"):
        if match := re.match(r'> <a id="(?:tag-)?(\w+)"></a>\*\*(\w+) ', line):
            assert match[1] == match[2]
            tags.append(match[1])
        elif match := re.match(r'<pre class="lines" style="[^"]+"><a id="L(\d+)"', line):
            for tag in tags:
                mine = first_of.pop(tag)
                config = lines.index("# Environment") + 1
                site = next((x for x in mine if x.line > config), mine[0])
                above = lines[int(match[1]) - 1 : site.first - 1]
                assert all(x.startswith("@") for x in above), tag
            tags = []
    assert first_of == {}


@each_script
def test_a_tag_in_the_code_leads_to_its_note(name):
    lines = "\n".join(blocks(ANNOTATED[name])).split("\n")
    for site in sites(name):
        note = make_annotated.anchor_of(site.tag)
        found = re.findall(
            r'\[<a (?:id="([\w-]+)-\d" )?href="#([\w-]+)">(\w+)</a>\]', lines[site.line - 1]
        )
        assert [x[:2] for x in found if x[2] == site.tag] in ([("", note)], [(note, note)])


@each_script
def test_notes_begin_as_the_table_does(name):
    notes = re.findall(r'<a id="(?:tag-)?(\w+)"></a>\*\*[^*]+\*\* (.+) \[more\]', ANNOTATED[name])
    details = make_details.table()
    assert len(notes) == len({tag for tag, entry in details.items() if name in entry["scripts"]})
    for tag, text in notes:
        why = " ".join(details[tag]["why"].split())
        assert why.startswith(re.sub(r"\[(\w+)\]\([^)]+\)", r"[\1]", text))
        assert text[-1] in ".?"
        assert len(text) <= 420


def test_notes_show_equations():
    assert r"\mathrm{clip}(r, 1 - \epsilon" in ANNOTATED["discrete"]
    notes = [x for entry in EQUATIONS.values() for x in entry.get("notes", ())]
    for name, page in ANNOTATED.items():
        tags = {tag for tag, entry in make_details.table().items() if name in entry["scripts"]}
        shown = [
            tag
            for entry in EQUATIONS.values()
            for tag in set(entry.get("notes", ())) & tags
            if name in entry["scripts"]
        ]
        assert page.count("[equation](../equations.md#") == len(shown)
        assert max(Counter(notes).values()) == 1


# ------------------------------------------------------------------------------------------------
# Equations


def test_quotes_are_lines_of_the_scripts():
    (page,) = MADE["docs/make_equations.py"].values()
    found = re.findall(r"(?m)^(\[ppo_.+):\n\n```python\n((?s:.+?))\n```", page)
    places = [make_equations.find(name, entry, SOURCES) for name, entry in EQUATIONS.items()]
    assert len(found) == sum(len({x.code for x in group}) for group in places)
    for links, code in found:
        spans = re.findall(r"\(\.\./ppo_(\w+)\.py#L(\d+)(?:-L(\d+))?\)", links)
        assert ("byte for byte the same" in links) == (len(spans) > 1)
        for name, first, last in spans:
            lines = SOURCES[name].splitlines()[int(first) - 1 : int(last or first)]
            assert dedent("\n".join(lines)) == code


def test_an_equation_without_its_lines_is_an_error():
    entry = EQUATIONS["clip"]
    changed = SOURCES | {"atari": SOURCES["atari"].replace("-torch.min(", "-torch.fmin(")}
    with pytest.raises(ValueError, match=r"clip: 0 matches in ppo_atari\.py"):
        make_equations.find("clip", entry, changed)
    with pytest.raises(ValueError, match=r"clip: 2 matches in ppo_discrete\.py"):
        make_equations.find("clip", entry, SOURCES | {"discrete": SOURCES["discrete"] * 2})
    fewer = entry | {"scripts": ["discrete"]}
    with pytest.raises(ValueError, match=r"clip: 1 matches in ppo_continuous\.py"):
        make_equations.find("clip", fewer, SOURCES)


def test_tags_of_equations_stand_in_their_scripts():
    details = make_details.table()
    for name, entry in EQUATIONS.items():
        for tag in entry.get("tags", ()):
            assert set(details[tag]["scripts"]) & set(entry["scripts"]), (name, tag)
        assert set(entry.get("notes", ())) <= set(entry.get("tags", ())), name


@pytest.mark.parametrize("name", EQUATIONS)
def test_equations_are_plain_latex(name):
    entry = EQUATIONS[name]
    for tex in (entry["tex"], entry.get("short", "")):
        assert set(re.findall(r"\\([a-zA-Z]+)", tex)) <= set(LATEX.split())
        assert tex.count("{") == tex.count("}")
        assert len(re.findall(r"\\left\b", tex)) == len(re.findall(r"\\right\b", tex))
        assert not set("$<>") & set(tex)
        assert re.findall(r"\\[^a-zA-Z ]", tex) == []  # Markdown takes them for its own


# ------------------------------------------------------------------------------------------------
# Differences


def shown(page: str) -> list[tuple[int, list[str], list[str]]]:
    """(index of its first line, lines of the old script, of the new one) of each hunk of a page."""
    found = []
    for head, text in re.findall(r"```diff\n(@@ .+)\n((?s:.*?))\n```", page):
        numbers = map(int, re.match(r"@@ -(\d+),(\d+) \+(\d+),(\d+) @@", head).groups())
        first, removed, there, added = numbers
        lines = text.split("\n")
        old = [line[1:] for line in lines if line[0] in " -"]
        new = [line[1:] for line in lines if line[0] in " +"]
        assert (len(old), len(new)) == (removed, added)
        found.append((first - (removed > 0), old, new, there - (added > 0)))
    return sorted(found)


def applied(page: str, lines: list[str]) -> list[str]:
    """What the hunks make of the lines. They say where they belong in both scripts."""
    result, done = [], 0
    for first, old, new, there in shown(page):
        result += lines[done:first]
        assert lines[first : first + len(old)] == old
        assert len(result) == there
        result += new
        done = first + len(old)
    return result + lines[done:]


@pytest.mark.parametrize("name", make_diffs.PAIRS)
def test_what_is_shown_is_all_that_differs(name):
    old, new = (SOURCES[script].splitlines() for script in make_diffs.PAIRS[name])
    page = MADE["docs/make_diffs.py"][make_diffs.FOLDER / f"{name}.md"]
    assert applied(page, old) == new
    kept = len(new) - sum(len(x[2]) for x in shown(page))
    assert f" {kept:,} stand in" in " ".join(page.split())


@pytest.mark.parametrize("name", make_diffs.PAIRS)
def test_the_answer_comes_first(name):
    page = MADE["docs/make_diffs.py"][make_diffs.FOLDER / f"{name}.md"]
    above = page[: page.index("Below is every line")]
    assert len(above.splitlines()) <= 30
    assert above.count("\n| [") >= 6


def test_sections_that_are_the_same_are_named():
    pages = MADE["docs/make_diffs.py"]
    for name in ("discrete_continuous", "discrete_atari"):
        text = " ".join(pages[make_diffs.FOLDER / f"{name}.md"].split())
        assert "The same in both, byte for byte: The algorithm and Runs." in text
    assert "byte for byte" not in pages[make_diffs.FOLDER / "atari_memory.md"]


def test_a_place_without_a_reason_is_an_error_and_the_reverse():
    entries = make_diffs.reasons()["discrete_continuous"]
    del entries["intro"]
    old, new = (SOURCES[x].splitlines() for x in ("discrete", "continuous"))
    found = make_diffs.hunks(old, new)
    assert sum(map(len, make_diffs.assign("x", entries, found, old, new).values())) == len(found)
    without = {name: entry for name, entry in entries.items() if name != "moments"}
    with pytest.raises(ValueError, match=r"(?s)x, Environment: reasons None.+class RunningMeanStd"):
        make_diffs.assign("x", without, found, old, new)
    gone = entries | {"gone": {"section": "Environment", "lines": ["a line that is in no script"]}}
    with pytest.raises(ValueError, match="x, gone: 0 places have the line 'a line that"):
        make_diffs.assign("x", gone, found, old, new)
    twice = entries | {"twice": entries["moments"]}
    with pytest.raises(
        ValueError, match=r"x, Environment: reasons .*(moments.*twice|twice.*moments)"
    ):
        make_diffs.assign("x", twice, found, old, new)


def test_functions_of_language_models_that_correspond():
    """The hunks of ppo_loss and ppo_gradient make the one of the other."""
    page = MADE["docs/make_diffs.py"][make_diffs.FOLDER / "discrete_rlhf.md"]
    nodes = [make_diffs.definitions(SOURCES[x].splitlines()) for x in ("discrete", "rlhf")]
    for name in ("ppo_loss", "ppo_gradient"):
        (a, b), (c, d) = ((side[name].lineno - 1, side[name].end_lineno) for side in nodes)
        result = SOURCES["discrete"].splitlines()
        for first, old, new, _ in reversed(shown(page)):
            assert result[first : first + len(old)] == old
            if a <= first < b:
                result[first : first + len(old)] = new
        assert result[a : a + d - c] == SOURCES["rlhf"].splitlines()[c:d]


def test_every_function_of_both_is_on_the_page_about_language_models():
    page = MADE["docs/make_diffs.py"][make_diffs.FOLDER / "discrete_rlhf.md"]
    named = re.findall(r"`(\w+)`:? \[[^]]+\]\(\S+/ppo_(\w+)\.py#L(\d+)", page)
    named += re.findall(r"`(\w+)`: \[[^]]+\]\(\S+\), \[[^]]+\]\(\S+/ppo_(\w+)\.py#L(\d+)", page)
    for script in ("discrete", "rlhf"):
        for node in ast.parse(SOURCES[script]).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert named.count((node.name, script, str(node.lineno))) == 1, node.name


def test_a_function_that_is_in_no_list_is_an_error(monkeypatch):
    table = make_diffs.reasons()
    table["discrete_rlhf"]["gone"]["the networks are Transformers"].remove("mlp")
    monkeypatch.setattr(make_diffs, "reasons", lambda: table)
    with pytest.raises(ValueError, match=r"in no list or in two.*mlp"):
        make_diffs.page_rlhf()
