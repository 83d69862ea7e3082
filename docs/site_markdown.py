"""How the site renders a page: by the rules of a forge, so that it reads the same on both.

CommonMark with tables (markdown-it-py), headings with the anchors that GitHub gives them, formulas
as MathML, links to the code as links to its annotated pages. None of it needs JavaScript.
"""

import html
import itertools
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert as mathml
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SERVED = {".md", ".json", ".csv", ".png", ".svg", ".yaml"}  # what of docs/ is on the site
HREF = re.compile(r'(<a\b[^>]*?)\s+href="([^"]*)"')


def slug(title: str) -> str:
    """The anchor that GitHub gives a heading, but for the number of one that is there twice."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def numbered(anchor: str, taken: set[str]) -> str:
    """The same, or with the first number that is free; it is taken from now on."""
    free, number = anchor, 0
    while free in taken:
        number += 1
        free = f"{anchor}-{number}"
    taken.add(free)
    return free


def plain(tokens) -> str:
    """The text of a heading, without its markup."""
    return "".join(x.content for x in tokens if x.type in ("text", "code_inline", "math_inline"))


def parser() -> MarkdownIt:
    """Markdown as the pages are written in."""
    md = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    md.use(dollarmath_plugin, allow_labels=False, allow_space=False, allow_digits=False)
    return md


def headings(tokens) -> list[dict]:
    """Level, anchor and text of each heading, in order. The tokens get their anchors."""
    found, taken = [], set()
    for token, inline in itertools.pairwise(tokens):
        if token.type == "heading_open":
            name = plain(inline.children)
            anchor = numbered(slug(name), taken)
            token.attrSet("id", anchor)
            found.append({"level": int(token.tag[1]), "id": anchor, "name": name})
    return found


def nested(flat: list[dict]) -> list[dict]:
    """Headings within those above them, as the table of contents of Python-Markdown has them."""
    top = []
    path = []
    for heading in flat:
        text = html.escape(heading["name"])
        item = {**heading, "html": text, "data-toc-label": "", "children": []}
        while path and path[-1]["level"] >= item["level"]:
            path.pop()
        (path[-1]["children"] if path else top).append(item)
        path.append(item)
    return top


def target(link: str, page: str, forge: str = "") -> str | None:
    """Where a link of a page (its path in docs/) leads on the site: None if to nowhere.

    A script has a page of its own, with its lines as anchors. What else is not on the site is on
    the forge, if its address is known.
    """
    if re.match(r"[a-z]+:|#|$", link):
        return link
    name, _, anchor = link.partition("#")
    folder = posixpath.dirname(page)
    path = posixpath.normpath(posixpath.join("docs", folder, name))
    if re.fullmatch(r"ppo_\w+\.py", path):
        annotated = f"annotated/{Path(path).stem}.md"
        if (DOCS / annotated).exists():
            line = re.match(r"L\d+", anchor)
            here = posixpath.relpath(annotated, folder or ".")
            return here + (f"#{line[0]}" if line else "")
    is_table = path.startswith("docs/results/") and path.endswith(".md")  # part of another page
    if path.startswith("docs/") and Path(path).suffix in SERVED and not is_table:
        return link
    if forge:
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{forge}/{kind}/main/{path}" + (f"#{anchor}" if anchor else "")
    return None


def attribute(link: str | None) -> str:
    return "" if link is None else f' href="{link}"'


def relink(tokens, page: str, forge: str):
    """Let every link lead to its target, and make plain text of those that have none."""
    opened = []
    for token in tokens:
        if token.type == "link_open":
            to = target(token.attrGet("href"), page, forge)
            opened.append(to)
            if to is None:
                token.tag, token.attrs = "span", {}
            else:
                token.attrSet("href", to)
        elif token.type == "link_close" and opened.pop() is None:
            token.tag = "span"
        elif token.type in ("html_inline", "html_block"):
            token.content = HREF.sub(
                lambda found: found[1] + attribute(target(found[2], page, forge)), token.content
            )
        if token.children:
            relink(token.children, page, forge)


def code(text: str, language: str) -> str:
    """A block of code in colours, which the style sheet has."""
    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        lexer = get_lexer_by_name("text", stripnl=False)
    return highlight(text, lexer, HtmlFormatter(cssclass="highlight", wrapcode=True))


def formula(latex: str, display: str = "inline") -> str:
    """MathML, with the space that TeX leaves around the name of a function."""
    name, space = "<mi>(?:log|exp)</mi>", '<mspace width="0.17em"/>'
    text = mathml(latex, display=display)
    text = re.sub(f"(?<!</mo>)(?<!<mrow>)({name})", rf"{space}\1", text)
    return re.sub(f"({name})(?!<mo|</mrow>)", rf"\1{space}", text)


def words(text: str) -> str:
    """Code within a sentence; a line may end within a long one, never behind the -- of a flag."""
    kind = ' class="short"' if len(text) <= 24 else ""
    return f"<code{kind}>{html.escape(text)}</code>"


def render(text: str, page: str = "index.md", forge: str = "") -> tuple[str, list[dict]]:
    """HTML and headings of a page."""
    md = parser()
    tokens = md.parse(text)
    contents = headings(tokens)
    relink(tokens, page, forge)
    rules = md.renderer.rules
    rules["fence"] = lambda tokens, i, *_: code(tokens[i].content, tokens[i].info.strip())
    rules["code_block"] = lambda tokens, i, *_: code(tokens[i].content, "text")
    rules["code_inline"] = lambda tokens, i, *_: words(tokens[i].content)
    rules["math_inline"] = lambda tokens, i, *_: formula(tokens[i].content)
    rules["math_block"] = lambda tokens, i, *_: (
        f'<div class="equation">{formula(tokens[i].content, "block")}</div>\n'
    )
    # wide tables move within a box of their own, which the keyboard reaches
    rules["table_open"] = lambda *_: (
        '<div class="wide" role="region" aria-label="table" tabindex="0"><table class="table">\n'
    )
    rules["table_close"] = lambda *_: "</table></div>\n"
    rules["heading_close"] = lambda tokens, i, *_: (
        f'<a class="headerlink" href="#{tokens[i - 2].attrGet("id")}"'
        f' aria-label="link to this heading">#</a></{tokens[i].tag}>\n'
    )
    return md.renderer.render(tokens, md.options, {}), contents
