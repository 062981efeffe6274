"""The documentation builds without warnings, and its links work."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from operator import attrgetter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import tomllib
from browser import opened
from pymdownx.slugs import slugify
from test_examples import NAMESPACES
from test_notebooks import BADGE, NOTEBOOKS, cells

import backward_lens_tl
from backward_lens_tl import cli, errors
from backward_lens_tl.compat import errors as compat_errors

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
MARKDOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
AT = urlsplit(errors.DOCUMENTATION).path
"""Path of the site on its server."""
LOADED = {("script", "src"), ("img", "src"), ("source", "srcset"), ("iframe", "src")}
"""Elements that a page loads, in addition to the `link` of a stylesheet."""


@dataclass
class Links(HTMLParser):
    """The links, loaded resources and anchors of an HTML page."""

    targets: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.anchors |= {str(own[name]) for name in ("id", "name") if own.get(name)}
        self.targets += [str(own[name]) for name in ("href", "src", "srcset") if own.get(name)]
        self.fetched += [str(value) for name, value in attrs if (tag, name) in LOADED]
        if tag == "link" and own.get("rel") in ("stylesheet", "preload", "preconnect"):
            self.fetched.append(str(own.get("href")))


def links_of(path: Path) -> Links:
    links = Links()
    links.feed(path.read_text(encoding="utf-8"))
    return links


def broken_links(folder: Path) -> list[str]:
    """Links within a folder of HTML whose file or anchor does not exist."""
    pages = {path: links_of(path) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            # The 404 page is shown at any address, so its links start at the root.
            base = folder if parts.path.startswith(AT) else path.parent
            place = (base / unquote(parts.path).removeprefix(AT)).resolve() if parts.path else path
            place = place / "index.html" if place.is_dir() else place
            is_there = place.is_file()
            if is_there and parts.fragment and place in pages:
                is_there = unquote(parts.fragment) in pages[place].anchors
            if not is_there:
                found.append(f"{path.relative_to(folder)}: {target}")
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as in `make docs`."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stdout + built.stderr
    return folder


@pytest.mark.slow
def test_links_within_the_site_work(site):
    assert sum(len(links_of(page).targets) for page in site.rglob("*.html")) > 1000
    assert broken_links(site) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html">1</a><a href="#top">2</a><a href="#no">3</a>'
        '<a href="folder/">4</a><img src="no.png"><a href="https://elsewhere.org/x">5</a>'
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text(
        '<a href="../a.html#top">6</a><a href="/b">7</a>'
    )
    assert broken_links(tmp_path) == [
        "a.html: b.html", "a.html: #no", "a.html: no.png", "folder/index.html: /b",
    ]  # fmt: skip


@pytest.mark.slow
def test_pages_load_nothing_from_other_sites(site):
    """Including resources that a browser may skip, such as images for dark mode."""
    fetched = {
        target
        for page in site.rglob("*.html")
        for target in links_of(page).fetched
        if urlsplit(target).netloc
    }
    assert fetched == {BADGE}


@pytest.mark.slow
def test_links_to_the_repository_lead_to_existing_files(site):
    found = {
        urlsplit(target)._replace(fragment="").geturl()
        for page in site.rglob("*.html")
        for target in links_of(page).targets
    }
    there = {"blob": Path.is_file, "tree": Path.is_dir}
    for kind, is_there in there.items():
        prefix = f"{REPOSITORY}/{kind}/main/"
        paths = {each.removeprefix(prefix) for each in found if each.startswith(prefix)}
        assert paths or kind == "tree"
        assert {path for path in paths if not is_there(ROOT / path)} == set()


FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
CODE = re.compile(rf"{FENCED.pattern}|(?<!`)`[^`\n]+`", FENCED.flags)


def headings(path: Path) -> set[str]:
    """Anchors of the headings of a Markdown file, as on the site."""
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    lines = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line).replace("`", "") for line in lines)
    return set(map(partial(slugify(case="lower"), sep="-"), plain))


def test_links_between_files_work():
    """Checks files and headings; the test of the built site is slow."""
    checked = 0
    for path, text in texts().items():
        for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", text)):
            parts = urlsplit(target)
            if parts.scheme:
                continue
            place = path.parent / unquote(parts.path) if parts.path else path
            assert place.exists(), (path, target)
            if parts.fragment and place.suffix == ".md":
                assert parts.fragment in headings(place), (path, target)
            checked += 1
    assert checked > 200


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """The hook of the site, loaded from its path as mkdocs does."""
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def adapted(hook: ModuleType, text: str, uri: str = "howto.md") -> str:
    """The text of a page, or the HTML of a notebook, with its links adapted."""
    page = SimpleNamespace(file=SimpleNamespace(src_uri=uri))
    config = SimpleNamespace(extra={"repository": "https://repository"})
    files = SimpleNamespace(get_file_from_path=lambda uri: None)
    if uri.endswith(".ipynb"):
        return hook.on_page_content(text, page, config, files)
    return hook.on_page_markdown(text, page, config, files)


@pytest.mark.parametrize(
    ("link", "there"),
    [
        ("../README.md#the-anchor", "index.md#the-anchor"),
        ("sweeps.md#tables", "sweeps.md#tables"),
        ("../notebooks/editing.ipynb", "notebooks/editing.ipynb"),
        ("../Makefile", "https://repository/blob/main/Makefile"),
        ("../tests/conftest.py#L10", "https://repository/blob/main/tests/conftest.py#L10"),
        ("site_pages.py", "https://repository/blob/main/docs/site_pages.py"),
        ("../tests/", "https://repository/tree/main/tests"),
        ("../docs/images", "https://repository/tree/main/docs/images"),
        ("#here", "#here"),
        ("https://elsewhere.org/README.md#x", "https://elsewhere.org/README.md#x"),
        ("../nothing.txt", "../nothing.txt"),
    ],
)
def test_links_are_adapted_to_the_site(link, there, hook):
    assert adapted(hook, f"See [this]({link}), now.") == f"See [this]({there}), now."
    assert adapted(hook, f'<img src="{link}">') == f'<img src="{there}">'


@pytest.mark.parametrize(
    "code",
    [
        "`[this](../Makefile)`",
        "``a ` and [this](../Makefile)``",
        "`over two\nlines [this](../Makefile)`",
        "```python\n[this](../Makefile)\n```",
        "1. In a list:\n\n   ```python\n   [this](../Makefile)\n   ```",
        "    [this](../Makefile)\n\tand [this](../Makefile)\n",
    ],
)
def test_links_in_code_are_unchanged(code, hook):
    link = "[`name`](../Makefile) in\nthis `file`"
    own = link.replace("..", "https://repository/blob/main")
    around = "{link}\n\n{code}\n\n{link}, one lone `,\n\n{link}\n"
    found = adapted(hook, around.format(link=link, code=code))
    assert found == around.format(link=own, code=code)


def test_only_links_of_a_notebook_are_adapted(hook):
    html = '<a href="{}">this</a><script src="../Makefile"></script> ](../Makefile)'
    found = adapted(hook, html.format("../Makefile"), "notebooks/editing.ipynb")
    assert found == html.format("https://repository/blob/main/Makefile")


def named_in_reference() -> set[str]:
    """Names in the reference pages, and the names of modules in them."""
    found = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for path in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            thing = pkgutil.resolve_name(path)
            own = getattr(thing, "__all__", ()) if inspect.ismodule(thing) else ()
            found |= {path.rpartition(".")[2], *own}
    return found


def public() -> set[str]:
    """Public names of the package and its namespaces, except modules."""
    names = {name for namespace in NAMESPACES for name in namespace.__all__}
    return names - {"analysis", "editing", "figures", "training", "widgets"}


def test_reference_pages_name_every_public_name():
    errors_in_reference = {
        "BackwardLensError"
    }  # included through their module, which has no __all__
    assert public() - named_in_reference() - errors_in_reference == set()


@pytest.mark.slow
def test_built_reference_has_every_public_name(site):
    anchors = set().union(*(links_of(page).anchors for page in site.glob("reference/*/*.html")))
    assert public() - {anchor.rpartition(".")[2] for anchor in anchors} == set()


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def test_every_error_links_to_its_section():
    public = {
        kind
        for kind in subclasses(errors.BackwardLensError)
        if kind.__module__ in (errors.__name__, compat_errors.__name__)
    }
    assert len(public) > 10
    assert PROJECT["urls"]["Documentation"] == errors.DOCUMENTATION
    for kind in public:
        page, _, anchor = kind().documentation.removeprefix(errors.DOCUMENTATION).partition("/#")
        assert anchor in headings(ROOT / "docs" / f"{page}.md"), kind.__name__


def messages() -> list[str]:
    """All strings of the package except docstrings, with "…" for placeholders."""
    found = []
    for path in sorted((ROOT / "backward_lens_tl").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                found.append("".join(part if isinstance(part, str) else "…" for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_quoted_messages_exist_in_the_code():
    """In the first column of the tables, where folders are those of a sweep."""
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    first = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `")]
    quoted = [text for cell in first for text in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 100
    existing = messages()
    for text in quoted:
        pieces = re.split("…|(?:a )?sweep", text)
        pattern = re.compile(".{0,160}?".join(map(re.escape, pieces)), re.DOTALL)
        likely = (each for each in existing if all(piece in each for piece in pieces))
        assert any(map(pattern.search, likely)), text


def test_named_tests_exist():
    named = {
        (file, test)
        for path in MARKDOWN
        for file, test in re.findall(r"`(test_\w+\.py)::(test_\w+)`", path.read_text("utf-8"))
    }
    assert len(named) > 20
    for file, test in named:
        [found] = (ROOT / "tests").rglob(file)
        assert f"def {test}(" in found.read_text(encoding="utf-8"), (file, test)


def test_snippets_are_only_in_files_that_run_them():
    """`conftest.py` runs those of README and docs/*.md."""
    run = {ROOT / "README.md", *(ROOT / "docs").glob("*.md")}
    elsewhere = [path for path in MARKDOWN if path not in run]
    assert elsewhere
    assert [path for path in elsewhere if "```python" in path.read_text(encoding="utf-8")] == []


def texts() -> dict[Path, str]:
    """The Markdown files, and the Markdown cells of the notebooks."""
    found = {path: path.read_text(encoding="utf-8") for path in MARKDOWN}
    for path in NOTEBOOKS:
        found[path] = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    return found


def commands() -> list[tuple[str, str]]:
    """All calls of the command in shell blocks, one per line."""
    found = []
    for path, text in texts().items():
        for block in re.findall(r"```(?:console|sh)\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                call = re.search(r"(?:backward-lens|-m backward_lens_tl(?= )) ?(.*)", line)
                if call:
                    found.append((str(path.relative_to(ROOT)), call[1]))
    return found


@pytest.mark.parametrize(("page", "call"), commands())
def test_commands_can_be_parsed(page, call):
    cli.parser().parse_args(shlex.split(call, comments=True))


def test_there_are_commands():
    pages = [page for page, _ in commands()]
    assert len(pages) > 8
    assert {page for page in pages if page.endswith(".ipynb")} >= {"notebooks/data_set.ipynb"}


def python_of(cell: Any) -> list[str]:
    """The code of a cell, or the Python blocks of a Markdown cell, which do not run."""
    if cell.cell_type == "code":
        return [cell.source]
    return re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL)


def calls(code: str) -> Iterator[tuple[str, ast.Call]]:
    """Calls of top-level names of the package."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name = re.fullmatch(r"blt\.([\w.]+)", ast.unparse(node.func))
            if name:
                yield name[1], node


@pytest.mark.parametrize("kind", ["code", "markdown"])
def test_calls_in_notebooks_match_the_signatures(kind):
    """The tests that run the notebooks are slow."""
    found = [
        call
        for path in NOTEBOOKS
        for cell in cells(path, kind)
        for code in python_of(cell)
        for call in calls(code)
    ]
    assert found
    for name, call in found:
        keywords = {str(keyword.arg): keyword.value for keyword in call.keywords}
        inspect.signature(attrgetter(name)(backward_lens_tl)).bind(*call.args, **keywords)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+(?: [a-z0-9-]+)*):", makefile, re.MULTILINE))
    targets = {name for names in targets for name in names.split()}
    for path, text in texts().items():
        assert set(re.findall(r"`make ([a-z0-9-]+)", text)) <= targets, path


def test_the_map_of_the_code_matches_the_import_contract():
    """In the same order."""
    [contract] = PYPROJECT["tool"]["importlinter"]["contracts"]
    layers = [module for line in contract["layers"] for module in line.split(" : ")]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, _, table = text.partition("| in `backward_lens_tl/` |")
    rows = table.partition("\n\n")[0].splitlines()[2:]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert [name.rstrip("/") for name in named] == layers


@pytest.mark.slow
def test_pages_are_shown_without_requests_to_other_sites(site, browser):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    with opened(browser, pages[0]) as shown:
        for path in pages:
            shown.page.goto(path.as_uri())
            assert shown.page.locator("article h1").first.is_visible(), path
            shown.page.wait_for_timeout(100)  # for requests by scripts after loading
            assert {url for url in shown.requests if urlsplit(url).netloc} <= {BADGE}, path
