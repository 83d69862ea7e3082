"""The pages as a whole: links, one order, ways to an answer, how they are rendered, staleness."""

import functools
import posixpath
import re
import tomllib
from pathlib import Path

import pytest

import make
import site_markdown

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CONFIG = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
PAGES = [
    path.relative_to(DOCS).as_posix()
    for path in sorted(DOCS.rglob("*.md"))
    if path.relative_to(DOCS).parts[0] != "results"  # tables that other pages take in
]
LINES = {path.name: path.read_text().count("\n") for path in ROOT.glob("ppo_*.py")}

# A question, where it is answered, and a word of the answer.
QUESTIONS = {
    "What is the clip for?": ("ppo.md#what-the-clip-is-for", "go too far"),
    "Where is the value loss?": ("annotated/ppo_discrete.md#C9", "value_losses"),
    "Which detail matters?": ("ablation.md", "taken away, one at a time"),
    "Which number do I change first?": ("ppo.md#what-to-tune-and-how-far", "sweep.yaml"),
    "Why is my KL negative?": ("ppo.md#why-is-my-kl-negative", "estimate"),
    "What differs for continuous actions?": ("diffs/discrete_continuous.md", "Normal"),
    "Why is my return different from CleanRL's?": (
        "migrating.md#why-is-my-return-different-from-cleanrls",
        "time limit",
    ),
    "What does my metric mean?": ("ppo_discrete.md#metrics", "`losses/explained_variance`"),
    "My run does not learn. What now?": ("ppo.md#when-it-goes-wrong", "`explained_variance`"),
    "PPO, GRPO, DPO or something else?": ("ppo.md#ppo-beside-its-relatives", "ZPPO"),
    "How do I use my own environment?": ("your_own.md", "gym.register("),
    "What do I change for 8 GPUs?": (
        "scaling.md#one-gpu-eight-gpus-several-boxes",
        "torchrun --nproc_per_node=8",
    ),
    "How do I go on with a run?": ("runs.md#it-goes-on", "--resume"),
    "Which line is which equation?": ("equations.md", "The clipped surrogate objective"),
    "How do I cite it?": ("paper.md#references", "@misc{ppo37"),
}

# Programs whose pages are compared by a test of their own, which has read the runs for more.
COMPARED = {
    "make_ablation": "test_ablation_page.py",
    "make_annotated": "test_annotated.py",
    "make_check": "test_check_page.py",
    "make_critic": "test_critic_page.py",
    "make_dashboards": "test_dashboards.py",
    "make_details": "test_details.py",
    "make_diffs": "test_annotated.py",
    "make_equations": "test_annotated.py",
    "make_larger": "test_larger_page.py",
    "make_machines": "test_contributing.py",
    "make_migrating": "test_migrating.py",
    "make_paper": "test_paper_page.py",
    "make_performance": "test_results.py",
    "make_ppo": "test_ppo_page.py",
    "make_results": "test_results.py",
    "make_rlhf": "test_rlhf_results.py",
    "make_scripts": "test_script_pages.py",
    "make_smollm2": "test_language_models_page.py",
}

each_page = pytest.mark.parametrize("page", [*PAGES, "../README.md"])


@functools.cache
def tokens_of(page: str) -> list:
    """What a page is made of, headings with their anchors."""
    tokens = site_markdown.parser().parse((DOCS / page).read_text())
    site_markdown.headings(tokens)
    return tokens


def walk(tokens):
    for token in tokens:
        yield token
        yield from walk(token.children or [])


@functools.cache
def links(page: str) -> set[str]:
    """What a page links to or shows."""
    found = set()
    for token in walk(tokens_of(page)):
        found |= {token.attrGet("href"), token.attrGet("src")} - {None}
        if token.type in ("html_inline", "html_block"):
            found |= set(re.findall(r'\b(?:href|src)="([^"]*)"', token.content))
    return found


@functools.cache
def anchors(page: str) -> list[str]:
    """Where one can go on a page."""
    found = []
    for token in walk(tokens_of(page)):
        if token.type in ("html_inline", "html_block"):
            found += re.findall(r'\bid="([^"]*)"', token.content)
        found += [token.attrGet("id")] if token.attrGet("id") else []
    return found


def resolve(page: str, link: str) -> tuple[str, str]:
    """Path relative to docs/, and anchor, of a link that leads nowhere else."""
    name, _, anchor = link.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), name)) if name else page
    return path.removeprefix("../docs/"), anchor  # README stands beside docs/


def neighbours(page: str) -> set[tuple[str, str]]:
    """Pages and anchors that a page leads to."""
    found = {resolve(page, link) for link in links(page) if not re.match(r"[a-z]+:", link)}
    return {(path, anchor) for path, anchor in found if path in PAGES}


@functools.cache
def clicks() -> dict[str, int]:
    """page -> clicks from the first page, by links within the texts"""
    distance, queue = {"index.md": 0}, ["index.md"]
    for page in queue:
        for path, _ in sorted(neighbours(page)):
            if path not in distance:
                distance[path] = distance[page] + 1
                queue.append(path)
    return distance


def section(page: str, anchor: str) -> str:
    """The text behind an anchor, up to the next heading but one that follows at once."""
    text, on, has_title = [], False, False
    for token in tokens_of(page):
        here = token.attrGet("id") == anchor
        here |= any(f'id="{anchor}"' in x.content for x in token.children or [token])
        if on and token.type == "heading_open" and has_title:
            break
        on |= here
        has_title |= on and token.type == "heading_open"
        text += [token.content] * on
    return "\n".join(text)


# ------------------------------------------------------------------------------------------------
# Links and order


@each_page
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"https?:", link):
            continue
        path, anchor = resolve(page, link)
        assert (DOCS / path).exists(), link
        assert not re.match(r"results/.*\.md$", path), f"{link} is not on the site: exclude_docs"
        if path in PAGES or path == page:
            assert not anchor or anchor in anchors(path), link
        elif anchor:
            lines = re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor)
            assert lines, link
            first, last = int(lines[1]), int(lines[2] or lines[1])
            assert 1 <= first <= last <= LINES[Path(path).name], link


@pytest.mark.parametrize("page", PAGES)
def test_anchors_are_there_once(page):
    """A browser goes to the first, and so would miss the other."""
    found = anchors(page)
    assert len(found) == len(set(found)), {x for x in found if found.count(x) > 1}


def flat(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in flat(part)]


def test_navigation_has_every_page_once():
    nav = flat(CONFIG["nav"])
    assert nav[0] == "index.md"
    assert sorted(nav) == sorted(PAGES)


def test_every_page_is_linked_from_another():
    """From the first page by links within the texts, which a forge has, too."""
    assert set(PAGES) - set(clicks()) == set()
    assert "docs/index.md" in {resolve("", x)[0] for x in links("../README.md")}


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_two_clicks_away(question):
    place, words = QUESTIONS[question]
    page, _, anchor = place.partition("#")
    assert f"| {question} |" in (DOCS / "index.md").read_text()
    ways = [clicks()[x] + 1 for x in PAGES if x in clicks() and (page, anchor) in neighbours(x)]
    assert ways and min(ways) <= 2
    assert words in (section(page, anchor) if anchor else (DOCS / page).read_text())


def test_commands_of_the_first_page_are_those_of_the_readme():
    commands = re.findall(r"```sh\n(.*?)```", (DOCS / "index.md").read_text(), re.S)
    readme = (ROOT / "README.md").read_text()
    assert commands and all(line in readme for x in commands for line in x.splitlines())


# ------------------------------------------------------------------------------------------------
# The site


def test_nothing_is_loaded_from_elsewhere():
    assert CONFIG["theme"]["font"] is False
    assert "extra_javascript" not in CONFIG
    for name in CONFIG["extra_css"]:
        assert not re.search(r"https?:|//[a-z]|@import", (DOCS / name).read_text()), name
    for page in PAGES:
        shown = {x.attrGet("src") for x in walk(tokens_of(page))} - {None}
        raw = "".join(x.content for x in walk(tokens_of(page)) if x.type.startswith("html"))
        assert not any(re.match(r"https?:", src) for src in shown), page
        assert not re.search(r"<(script|style|link|iframe)\b", raw), page


def test_strict_and_everywhere_the_same_versions():
    assert CONFIG["strict"] is True
    site, tests = (
        [x for x in (folder / "requirements.txt").read_text().splitlines() if x[:1] != "#"]
        for folder in (DOCS, ROOT)
    )
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in site)
    assert [line for line in site if line not in tests] == ["zensical==0.0.73"]
    assert "docs.site_extension" in CONFIG["markdown_extensions"]


@pytest.mark.parametrize(
    ("title", "anchor"),
    [
        ("It goes on", "it-goes-on"),
        ("Without a critic: GRPO", "without-a-critic-grpo"),
        ("`--task sort`, seeds 51, 52", "--task-sort-seeds-51-52"),
        ("A1 x 2 - what_is `next_values[t]`?", "a1-x-2---what_is-next_valuest"),
        ("The *loss* of [Bradley](https://x.org/y)", "the-loss-of-bradley"),
        ("Größe, 84 + 84", "größe-84--84"),
    ],
)
def test_anchors_are_those_of_github(title, anchor):
    text, contents = site_markdown.render(f"# {title}\n\n## {title}\n\n## {title}\n")
    assert [x["id"] for x in contents] == [anchor, f"{anchor}-1", f"{anchor}-2"]
    assert [x["level"] for x in contents] == [1, 2, 2]
    assert f'<h2 id="{anchor}-1">' in text


def test_numbers_of_anchors_skip_what_is_taken():
    _, contents = site_markdown.render("# a\n\n# a-1\n\n# a\n")
    assert [x["id"] for x in contents] == ["a", "a-1", "a-2"]


def test_headings_within_headings():
    def shape(items):
        return [(x["name"], shape(x["children"])) for x in items]

    flat = site_markdown.render("# a\n## b\n### c\n## d\n# e <f>\n")[1]
    nested = site_markdown.nested(flat)
    assert shape(nested) == [("a", [("b", [("c", [])]), ("d", [])]), ("e ", [])]
    assert {"level", "id", "name", "html", "data-toc-label", "children"} == set(nested[0])


def test_formulas_become_mathml():
    text, _ = site_markdown.render(
        "The ratio $r_t = \\frac{a}{b}$ costs 5$, 3$a$ or `$x$`.\n\n"
        "$$\n\\min(r, 1) \\leq \\mathrm{clip}\n$$\n\n"
        "```sh\necho $HOME $x$\n```\n\n| a | b |\n|---|---|\n| $\\epsilon$ | 1 |\n"
    )
    assert text.count("<math ") == 3 and text.count('display="block"') == 1
    assert "<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac>" in text
    assert 'costs 5$, 3$a$ or <code class="short">$x$</code>' in text
    assert "$HOME" in re.sub("<[^>]+>", "", text)
    assert "script" not in text


def test_functions_keep_their_distance():
    space = '<mspace width="0.17em"/>'
    assert f"<mi>a</mi>{space}<mi>log</mi>{space}<mi>b</mi>" in site_markdown.formula("a \\log b")
    assert "mspace" not in site_markdown.formula("\\log(b)")


def test_tables_and_code_have_boxes_of_their_own():
    text, _ = site_markdown.render("| a |\n|---|\n| 1 |\n\n```python\nif x < 1: pass\n```\n")
    assert re.search(r'<div class="wide"[^>]*tabindex="0"><table class="table">', text)
    assert text.count("<div") == text.count("</div>") == 2
    assert '<span class="k">if</span>' in text and "&lt;" in text
    assert "<span" not in site_markdown.code("a < b\n", "mermaid").replace("<span></span>", "")


def test_flags_stay_in_one_piece():
    text, _ = site_markdown.render("`--target-kl <x>` and `loss = policy_loss + vf_coef * x`")
    assert '<code class="short">--target-kl &lt;x&gt;</code>' in text
    assert "<code>loss = policy_loss" in text


def test_lists_are_read_as_on_a_forge():
    """Python-Markdown would want an empty line before the list and four columns within it."""
    text, _ = site_markdown.render("A text:\n- one\n- two\n  - three\n\n1. a\n\n   b\n")
    assert text.count("<ul>") == 2 and text.count("<li>") == 4
    assert "<p>b</p>\n</li>\n</ol>" in text


FORGE = "https://forge.example/ppo37"


@pytest.mark.parametrize(
    ("link", "page", "expected"),
    [
        ("https://arxiv.org/abs/1707.06347", "a.md", "https://arxiv.org/abs/1707.06347"),
        ("#c1", "a.md", "#c1"),
        ("runs.md#it-goes-on", "a.md", "runs.md#it-goes-on"),
        ("vectors/gae.json", "a.md", "vectors/gae.json"),
        ("../ppo_discrete.py#L87", "a.md", "annotated/ppo_discrete.md#L87"),
        ("../ppo_discrete.py#L87-L90", "a.md", "annotated/ppo_discrete.md#L87"),
        ("../ppo_discrete.py", "a.md", "annotated/ppo_discrete.md"),
        ("../../ppo_discrete.py#L87", "diffs/a.md", "../annotated/ppo_discrete.md#L87"),
        ("../../ppo_discrete.py#L8", "annotated/a.md", "ppo_discrete.md#L8"),
        ("../ppo_atari.py#L87", "a.md", f"{FORGE}/blob/main/ppo_atari.py#L87"),
        ("../tests/test_core.py", "a.md", f"{FORGE}/blob/main/tests/test_core.py"),
        ("results", "a.md", f"{FORGE}/tree/main/docs/results"),
        ("results/speed.md", "a.md", f"{FORGE}/blob/main/docs/results/speed.md"),
    ],
)
def test_where_links_lead_on_the_site(link, page, expected, tmp_path, monkeypatch):
    (tmp_path / "annotated").mkdir()
    (tmp_path / "annotated" / "ppo_discrete.md").touch()
    monkeypatch.setattr(site_markdown, "DOCS", tmp_path)
    assert site_markdown.target(link, page, FORGE) == expected
    text, _ = site_markdown.render(f'[a]({link}) <a class="b" href="{link}">c</a>', page, FORGE)
    assert text == f'<p><a href="{expected}">a</a> <a class="b" href="{expected}">c</a></p>\n'


def test_links_to_nowhere_are_plain_text():
    page = '[a](../tests/tiny.py) [b](runs.md) <a href="../tests/tiny.py">c</a>'
    text, _ = site_markdown.render(page)
    assert text == '<p><span>a</span> <a href="runs.md">b</a> <a>c</a></p>\n'


# ------------------------------------------------------------------------------------------------
# What is made is up to date


@pytest.mark.parametrize("name", [name for name in make.names() if name not in COMPARED])
def test_no_page_is_stale(name):
    assert make.stale(name) == [], "run: python docs/make.py"


@pytest.mark.parametrize("name", COMPARED)
def test_all_other_pages_are_compared(name):
    assert (DOCS / f"{name}.py").exists()
    text = (Path(__file__).parent / COMPARED[name]).read_text()
    own = rf"(?s)\bimport {name}\n.*(\b{name}|\bmodule)\.pages?\("
    assert re.search(own, text), f"no test compares what {name} makes"


def test_stale_pages_are_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "make_it.py").write_text(
        "from pathlib import Path\n"
        "HERE = Path(__file__).parent\n"
        "def pages():\n"
        "    return {HERE / 'docs' / f'{x}.md': x for x in 'abc'}\n"
        "if __name__ == '__main__':\n"
        "    for path, text in pages().items():\n"
        "        path.write_text(text)\n"
    )
    (tmp_path / "make_slow.py").write_text("raise SystemExit('imported')\n")
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, text in {"a": "a", "b": "old"}.items():
        (docs / f"{name}.md").write_text(text)
    monkeypatch.setattr(make, "DOCS", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert make.names() == ["make_it", "make_slow"]
    assert make.stale("make_slow") == []
    assert make.stale("make_it") == [docs / "b.md", docs / "c.md"]
    (tmp_path / "make_slow.py").write_text("")
    make.main([])
    assert [path.read_text() for path in sorted(docs.iterdir())] == ["a", "b", "c"]
    make.main(["--check"])
    (docs / "c.md").unlink()
    with pytest.raises(SystemExit) as end:
        make.main(["--check"])
    assert end.value.code == 1
    assert "c.md" in capsys.readouterr().out
