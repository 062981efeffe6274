"""The documentation's site builds without a warning, and everything in it leads somewhere."""

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
"""Where the site lies on its server."""
LOADED = {("script", "src"), ("img", "src"), ("source", "srcset"), ("iframe", "src")}
"""What a page fetches by itself; a stylesheet's `link` is one more."""


@dataclass
class Links(HTMLParser):
    """What a page of HTML points to, what it fetches, and what can be pointed to in it."""

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


def dead(folder: Path) -> list[str]:
    """Links within a folder of HTML that lead to no file, or to no such place in it."""
    pages = {path: links_of(path) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            # The page of unknown addresses is shown at any of them, so its links start at the root.
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
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stdout + built.stderr
    return folder


@pytest.mark.slow
def test_every_link_within_the_site_leads_somewhere(site):
    assert sum(len(links_of(page).targets) for page in site.rglob("*.html")) > 1000
    assert dead(site) == []


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html">1</a><a href="#top">2</a><a href="#no">3</a>'
        '<a href="folder/">4</a><img src="no.png"><a href="https://elsewhere.org/x">5</a>'
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text(
        '<a href="../a.html#top">6</a><a href="/b">7</a>'
    )
    assert dead(tmp_path) == [
        "a.html: b.html", "a.html: #no", "a.html: no.png", "folder/index.html: /b",
    ]  # fmt: skip


@pytest.mark.slow
def test_no_page_names_anything_elsewhere_to_fetch(site):
    """Of what a browser passes over as well, such as pictures for the dark scheme."""
    fetched = {
        target
        for page in site.rglob("*.html")
        for target in links_of(page).fetched
        if urlsplit(target).netloc
    }
    assert fetched == {BADGE}


@pytest.mark.slow
def test_links_to_the_repository_lead_to_files_of_it(site):
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
    """Anchors of a Markdown file's headings, as the site makes them."""
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    lines = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line).replace("`", "") for line in lines)
    return set(map(partial(slugify(case="lower"), sep="-"), plain))


def test_links_between_files_lead_somewhere():
    """To a file, and to a heading in it; the test of the built site is slow."""
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
    """The site's own hook, which mkdocs loads from its path as well."""
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def turned(hook: ModuleType, text: str, uri: str = "howto.md") -> str:
    """A page's text, or a notebook's HTML, with the links that the site has in it."""
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
def test_a_link_leads_where_the_site_has_it(link, there, hook):
    assert turned(hook, f"See [this]({link}), now.") == f"See [this]({there}), now."
    assert turned(hook, f'<img src="{link}">') == f'<img src="{there}">'


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
def test_what_looks_like_a_link_in_code_stays(code, hook):
    link = "[`name`](../Makefile) in\nthis `file`"
    own = link.replace("..", "https://repository/blob/main")
    around = "{link}\n\n{code}\n\n{link}, one lone `,\n\n{link}\n"
    found = turned(hook, around.format(link=link, code=code))
    assert found == around.format(link=own, code=code)


def test_of_a_notebook_only_links_are_turned(hook):
    html = '<a href="{}">this</a><script src="../Makefile"></script> ](../Makefile)'
    found = turned(hook, html.format("../Makefile"), "notebooks/editing.ipynb")
    assert found == html.format("https://repository/blob/main/Makefile")


def asked_for() -> set[str]:
    """Names that the pages of the reference take from docstrings: one by one, or a module's own."""
    found = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for path in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            thing = pkgutil.resolve_name(path)
            own = getattr(thing, "__all__", ()) if inspect.ismodule(thing) else ()
            found |= {path.rpartition(".")[2], *own}
    return found


def public() -> set[str]:
    """Names of the package and of its namespaces, but for modules."""
    names = {name for namespace in NAMESPACES for name in namespace.__all__}
    return names - {"analysis", "editing", "figures", "widgets"}


def test_every_public_name_is_asked_for_in_the_reference():
    errors_asked_for = {"BackwardLensError"}  # by their module, which has no __all__
    assert public() - asked_for() - errors_asked_for == set()


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site):
    anchors = set().union(*(links_of(page).anchors for page in site.glob("reference/*/*.html")))
    assert public() - {anchor.rpartition(".")[2] for anchor in anchors} == set()


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def test_every_error_leads_to_its_place_in_the_documentation():
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
    """Every text in the package but docstrings, "…" for what is put into it as the code runs."""
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


def test_messages_that_are_quoted_are_said():
    """In the first column of the tables of errors; folders are said to be of a sweep there."""
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    first = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `")]
    quoted = [text for cell in first for text in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 100
    said = messages()
    for text in quoted:
        pieces = re.split("…|(?:a )?sweep", text)
        pattern = re.compile(".{0,160}?".join(map(re.escape, pieces)), re.DOTALL)
        likely = (each for each in said if all(piece in each for piece in pieces))
        assert any(map(pattern.search, likely)), text


def test_tests_that_are_named_exist():
    named = {
        (file, test)
        for path in MARKDOWN
        for file, test in re.findall(r"`(test_\w+\.py)::(test_\w+)`", path.read_text("utf-8"))
    }
    assert len(named) > 20
    for file, test in named:
        [found] = (ROOT / "tests").rglob(file)
        assert f"def {test}(" in found.read_text(encoding="utf-8"), (file, test)


def test_snippets_are_where_they_are_run():
    """`conftest.py` runs those of README and docs/*.md; elsewhere there are none."""
    run = {ROOT / "README.md", *(ROOT / "docs").glob("*.md")}
    elsewhere = [path for path in MARKDOWN if path not in run]
    assert elsewhere
    assert [path for path in elsewhere if "```python" in path.read_text(encoding="utf-8")] == []


def texts() -> dict[Path, str]:
    """The files of Markdown, and the Markdown cells of the notebooks."""
    found = {path: path.read_text(encoding="utf-8") for path in MARKDOWN}
    for path in NOTEBOOKS:
        found[path] = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    return found


def commands() -> list[tuple[str, str]]:
    """Every call of the command in a block of shell, one line each."""
    found = []
    for path, text in texts().items():
        for block in re.findall(r"```(?:console|sh)\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                call = re.search(r"(?:backward-lens|-m backward_lens_tl(?= )) ?(.*)", line)
                if call:
                    found.append((str(path.relative_to(ROOT)), call[1]))
    return found


@pytest.mark.parametrize(("page", "call"), commands())
def test_commands_are_understood(page, call):
    cli.parser().parse_args(shlex.split(call, comments=True))


def test_there_are_commands():
    pages = [page for page, _ in commands()]
    assert len(pages) > 8
    assert {page for page in pages if page.endswith(".ipynb")} >= {"notebooks/data_set.ipynb"}


def python_of(cell: Any) -> list[str]:
    """A cell's code; of a Markdown cell, its blocks of Python, which nothing runs."""
    if cell.cell_type == "code":
        return [cell.source]
    return re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL)


def calls(code: str) -> Iterator[tuple[str, ast.Call]]:
    """Calls of what the package has at its top, by name."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name = re.fullmatch(r"blt\.([\w.]+)", ast.unparse(node.func))
            if name:
                yield name[1], node


@pytest.mark.parametrize("kind", ["code", "markdown"])
def test_notebooks_call_what_there_is(kind):
    """What they pass has to fit the signatures; the tests that run them are slow."""
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


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+(?: [a-z0-9-]+)*):", makefile, re.MULTILINE))
    targets = {name for names in targets for name in names.split()}
    for path, text in texts().items():
        assert set(re.findall(r"`make ([a-z0-9-]+)", text)) <= targets, path


def test_the_map_of_the_code_has_every_layer():
    """In the order in which they may import one another."""
    [contract] = PYPROJECT["tool"]["importlinter"]["contracts"]
    layers = [module for line in contract["layers"] for module in line.split(" : ")]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, _, table = text.partition("| in `backward_lens_tl/` |")
    rows = table.partition("\n\n")[0].splitlines()[2:]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert [name.rstrip("/") for name in named] == layers


@pytest.mark.slow
def test_every_page_shows_and_asks_for_nothing_elsewhere(site, browser):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    with opened(browser, pages[0]) as shown:
        for path in pages:
            shown.page.goto(path.as_uri())
            assert shown.page.locator("article h1").first.is_visible(), path
            shown.page.wait_for_timeout(100)  # for what scripts ask for once the page is there
            assert {url for url in shown.requests if urlsplit(url).netloc} <= {BADGE}, path
