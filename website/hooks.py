"""What mkdocs calls: pages from outside ``docs/``, links, formulas."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from website import notebooks, places, reference

STYLE = Path(__file__).parent / "site.css"
STARTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):(?=<code>)")
"""What stands before a name in docstrings that another program would read."""
DIALOG = 'data-md-component="search" role="dialog"'
sources: dict[str, str] = {}
"""Place on the site → file of the repository that it shows."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is made from code, and every file of the repository that a page leads to."""
    own = [f"{places.TOP}{file.src_uri}" for file in files.documentation_pages()]
    for source in places.reached([*STARTS, *own, *notebooks.SOURCES]):
        place = places.on_site(source)
        sources[place] = source
        if not source.endswith(places.NOTEBOOK) and files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(places.REPOSITORY / source)))
    made = reference.pages() | notebooks.pages() | {"site.css": STYLE.read_text()}
    for place, content in made.items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The site's links in the place of the repository's."""
    source = sources.get(page.file.src_uri)
    return places.rewritten(source, markdown, set(sources.values())) if source else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers draw by themselves; wide ones and tables can be scrolled by the keyboard."""
    return ROLE.sub("", FORMULA.sub(_formula, html)).replace("<table", '<table tabindex="0"')


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """A name for the theme's dialog."""
    return _named(output)


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    """The same where a page is not found."""
    return _named(output_content)


def _named(output: str) -> str:
    return output.replace(DIALOG, f'{DIALOG} aria-label="Search"')


def _formula(found: re.Match[str]) -> str:
    inline, block = found[2], found[3]
    drawn = convert(html.unescape(inline or block), display="inline" if inline else "block")
    by_keyboard = "" if inline else ' tabindex="0"'
    return f'<{found[1]} class="formula"{by_keyboard}>{drawn}</{found[1]}>'
