"""A hook for mkdocs that adds pages outside `docs/` and adapts links.

The same files are shown on GitHub and on the site. Links in them are relative to the file, as on
GitHub. This hook replaces each link by the address of the page on the site or, if there is none, by
the address of the file in the repository.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from posixpath import normpath, relpath
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "backward_lens_tl/facts_model/MODEL_CARD.md": "facts_model.md",
    "backward_lens_tl/facts_model/causal_tracing.png": "images/causal_tracing.png",
}
"""Files outside `docs/` and their paths on the site."""
NOTEBOOKS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("notebooks/*.ipynb"))]

_SOURCES = {uri: path for path, uri in PAGES.items()} | {path: path for path in NOTEBOOKS}
_FENCED = r"^[ ]*(?P<fence>```|~~~).*?^[ ]*(?P=fence)"
_INDENTED = r"(?:\A|(?<=\n\n))(?:(?:[ ]{4}|\t)[^\n]*(?:\n|\Z))+"
_SPAN = r"(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`)"
_TARGET = r"""(?P<before>\]\(|\b(?:href|src|srcset)=")(?P<target>[^)"\s]+)"""
# Code comes first, so that links in code are skipped.
_LINK = re.compile(f"{_FENCED}|{_INDENTED}|{_SPAN}|{_TARGET}", re.MULTILINE | re.DOTALL)
_ANCHOR = re.compile(r'(?P<before><a href=")(?P<target>[^"]+)')


@event_priority(100)  # before mkdocs-jupyter collects notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside `docs/`."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for path in NOTEBOOKS:
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapt the links of a Markdown page; mkdocs then checks those within the site."""

    def path_to(uri: str) -> str:
        return relpath(uri, Path(page.file.src_uri).parent.as_posix())

    return _with_links(_LINK, markdown, page, config, path_to)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapt the links of a notebook, which mkdocs-jupyter does not do."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def address_of(uri: str) -> str:
        found = files.get_file_from_path(uri)
        return found.url_relative_to(page.file) if found else uri

    return _with_links(_ANCHOR, html, page, config, address_of)


def _with_links(
    links: re.Pattern[str],
    text: str,
    page: Page,
    config: MkDocsConfig,
    address_of: Callable[[str], str],
) -> str:
    """Replace the links of a text; `address_of` returns the link to a file of the site."""

    def replaced(link: re.Match[str]) -> str:
        if not link["target"]:
            return link[0]
        place = _place(link["target"], page, config)
        if isinstance(place, tuple):
            uri, anchor = place
            place = address_of(uri) + anchor
        return link["before"] + place

    return links.sub(replaced, text)


def _place(target: str, page: Page, config: MkDocsConfig) -> str | tuple[str, str]:
    """The target of a link: an address, or a file of the site and an anchor."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc or not parts.path:
        return target
    own = _SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    path = normpath(f"{Path(own).parent.as_posix()}/{parts.path}")
    anchor = f"#{parts.fragment}" if parts.fragment else ""
    if path in PAGES or path in NOTEBOOKS:
        return PAGES.get(path, path), anchor
    is_folder = (ROOT / path).is_dir()
    if path.startswith("docs/") and not is_folder and not path.endswith((".py", ".json")):
        return path.removeprefix("docs/"), anchor
    if (ROOT / path).exists():
        kind = "tree" if is_folder else "blob"
        return f"{config.extra['repository']}/{kind}/main/{path}{anchor}"
    return target
