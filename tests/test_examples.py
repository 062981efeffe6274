"""Every public function, class and method has an example, which runs as a doctest."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import backward_lens_tl
from backward_lens_tl import analysis, compat, editing, training
from backward_lens_tl.editing import EditMethod
from backward_lens_tl.views import figures, widgets

NAMESPACES = (backward_lens_tl, editing, analysis, training, figures, widgets, compat)
PACKAGE = "backward_lens_tl"
ROOT = Path(__file__).parents[1]


def exported(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Functions and classes of a namespace, by its `__all__`."""
    for name in module.__all__:
        thing = getattr(module, name)
        is_error = inspect.isclass(thing) and issubclass(thing, Exception)
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and not is_error:
            yield f"{module.__name__}.{name}", thing


def methods(kind: type) -> Iterator[tuple[str, object]]:
    """Public methods at their first definition, also in a base class that is not exported."""
    bases = [each for each in kind.__mro__ if each is kind or each.__module__.startswith(PACKAGE)]
    for each in bases:
        for name, attribute in vars(each).items():
            function = inspect.unwrap(getattr(attribute, "__func__", attribute))
            overrides = any(hasattr(base, name) for base in each.__bases__)
            if inspect.isfunction(function) and not name.startswith("_") and not overrides:
                yield f"{each.__module__}.{each.__qualname__}.{name}", attribute


def fault(name: str, thing: object) -> str | None:
    """The problem with an example, including its absence."""
    doc = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    _, heading, section = f"\n{doc}".partition("\nExamples:\n")
    if not heading:
        return f"{name} has no section 'Examples:'"
    examples = doctest.DocTestParser().get_examples(section)
    running = [each.source for each in examples if doctest.SKIP not in each.options]
    if not running:
        return f"{name}: nothing of its example runs"
    own = re.compile(rf"\b{name.rpartition('.')[2]}\b")
    if not inspect.isclass(thing) and not any(own.search(source) for source in running):
        return f"{name} is not in its own example"
    return None


@pytest.fixture(scope="session")
def given(pytestconfig: pytest.Config) -> Any:
    """The repository's `conftest.py`, which defines the names used in examples."""
    return pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py"))


def read_from_outside(given: Any, thing: object) -> set[str]:
    """Names that an example reads but does not define."""
    doc = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    examples = doctest.DocTestParser().get_examples(doc)
    return given.names_from_outside("".join(each.source for each in examples))


def all_public() -> dict[str, object]:
    found = {name: thing for module in NAMESPACES for name, thing in exported(module)}
    kinds = [thing for thing in found.values() if inspect.isclass(thing)]
    return found | {name: each for kind in kinds for name, each in methods(kind)}


def test_all_public_objects_have_an_example_that_runs():
    faults = [fault(name, thing) for name, thing in all_public().items()]
    assert [each for each in faults if each] == []


@pytest.mark.parametrize(
    "name",
    [
        "backward_lens_tl.backward_lens",
        "backward_lens_tl.editing.second_moments",  # decorated
        "backward_lens_tl.result.BackwardLensResult.load",  # a class method
        "backward_lens_tl.editing.weight_delta.WeightDelta.applied",  # a context manager
        "backward_lens_tl.runs.run.Run.load",  # inherited
        "backward_lens_tl.editing.methods.method.EditMethod.compute",  # abstract
        "backward_lens_tl.views.figures.norms",  # of a namespace whose module defines it
    ],
)
def test_names_of_every_kind_are_found(name: str):
    assert name in all_public()


def test_overrides_and_errors_need_no_example():
    names = all_public()
    assert "backward_lens_tl.editing.methods.rome.ROME.compute" not in names
    assert "backward_lens_tl.BackwardLensError" not in names


def test_examples_of_functions_and_classes_are_self_contained(given):
    things = {name: thing for module in NAMESPACES for name, thing in exported(module)}
    outside = {name: read_from_outside(given, thing) for name, thing in things.items()}
    assert {name: names for name, names in outside.items() if names} == {}


def test_examples_of_methods_read_only_the_names_that_the_reference_lists(given):
    for name, thing in all_public().items():
        assert read_from_outside(given, thing) <= given.NAMES, name
    page = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    cells = "".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", cells)) == given.NAMES


def test_an_example_that_is_not_self_contained_is_found(given):
    def alone():
        """Define all names that it reads.

        Examples:
            >>> import json
            >>> json.loads("1")
        """

    def leaning():
        """Read a name of its module, one of the fixtures, and an undefined one.

        Examples:
            >>> json.loads(alone(model))
        """

    assert read_from_outside(given, alone) == set()
    assert read_from_outside(given, leaning) == {"json", "alone", "model"}


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("load(path)", {"load", "path"}),
        ("print(len([]))", set()),
        ("import a.b, c as d\nfrom e import f, g as h\na, d, f, h", set()),
        ("import a.b as c\na", {"a"}),
        ("with opened as (a, b): a, b", {"opened"}),
        ("for a, *b in rows: a, b", {"rows"}),
        ("[a + c for a in rows if a]", {"c", "rows"}),
        ("[a for a in ()]\na", {"a"}),
        ("try: pass\nexcept ValueError as a: a", set()),
        ("(a := 1)\na += b", {"b"}),
        ("def f(a, *b, c=d, **e): return a, b, c, e, f, own, later\nlater = 1", {"d", "own"}),
        ("lambda a: (a, b)", {"b"}),
        ("class A(B):\n    c = 1\n    def d(self): return self, c", {"B", "c"}),
        ("a.b = 1\nc[0] = 1", {"a", "c"}),
    ],
)
def test_undefined_names_are_found(given, code: str, names: set[str]):
    assert given.names_from_outside(code) == names


def control() -> type[EditMethod]:
    """A class with every problem; inside a function, so its examples are not run."""

    class Control(EditMethod):
        """A class without an example."""

        def compute(self, host, requests):
            """Override a method; needs no example."""

        def no_example(self):
            """Have no example."""

        def skipped(self):
            """Have an example that does not run.

            Examples:
                >>> Control().skipped()  # doctest: +SKIP
            """

        def unnamed(self):
            """Have an example of something else.

            Examples:
                >>> unnamed_too = 1
            """

        @classmethod
        def good(cls):
            """Have an example.

            Examples:
                >>> Control.good()
            """

    return Control


def test_each_problem_is_reported():
    kind = control()
    own = dict(methods(kind))
    found = {name.rpartition(".")[2]: fault(name, each) for name, each in own.items()}
    assert fault("Control", kind) == "Control has no section 'Examples:'"
    assert "has no section 'Examples:'" in found["no_example"]
    assert "nothing of its example runs" in found["skipped"]
    assert "is not in its own example" in found["unnamed"]
    assert found["good"] is None
    assert not any(name.endswith("Control.compute") for name in own)
