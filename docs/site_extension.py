"""Lets zensical render pages with site_markdown.py.

Zensical calls Python-Markdown, whose rules for lists and HTML are other ones than those of forges.
This extension of it, named in zensical.toml, does all of its work.
"""

from markdown import Extension

from docs.site_markdown import nested, render


class ForgeMarkdown(Extension):
    """Renders in place of Python-Markdown."""

    def __init__(self, **settings):
        self.config = {"forge": ["", "address of the repository on its forge"]}
        super().__init__(**settings)

    def extendMarkdown(self, md):  # noqa: N802
        """Called by Python-Markdown, before zensical hands it a page."""

        def convert(text: str) -> str:
            context = next(x for x in md.preprocessors if hasattr(x, "page"))
            body, contents = render(text, context.page.path, self.getConfig("forge"))
            md.toc_tokens = nested(contents)
            return body

        md.convert = convert


def makeExtension(**settings):  # noqa: N802
    """Called by Python-Markdown."""
    return ForgeMarkdown(**settings)
