"""Run the Python snippets of README and docs; each page has one namespace.

Examples of methods can use the names of `Examples`, so that they need not load a model each time.
"""

from __future__ import annotations

import builtins
import os
import symtable
from collections import defaultdict
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

# One torch thread, also in child processes; torch reads this when it is imported. Small models are
# slower with several threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

BRIDGE = "transformer_lens.model_bridge"
NEEDS_BRIDGE = 'load_facts_model("bridge")'
run = PythonEvaluator()
STARTED: defaultdict[str, set[int]] = defaultdict(set)
"""By page, the start of the snippets that this process has run."""


def is_possible(snippet: Example) -> bool:
    """Whether the installed TransformerLens supports a snippet's imports."""
    needs_bridge = any(text in snippet.parsed for text in (BRIDGE, NEEDS_BRIDGE))
    return not needs_bridge or find_spec(BRIDGE) is not None


def run_with_those_before(snippet: Example) -> None:
    """Run a snippet after all earlier ones on its page.

    Parallel tests may run the snippets of a page in several processes, which all need the names
    that earlier snippets define.
    """
    started = STARTED[snippet.path]
    for each in snippet.document.examples():
        if each.start <= snippet.start and each.start not in started and is_possible(each):
            run(each)
            started.add(each.start)
    if not is_possible(snippet):
        pytest.skip("TransformerBridge came with TransformerLens 3")


python = CodeBlockParser("python", run_with_those_before)
pytest_collect_file = Sybil(parsers=[python], patterns=["README.md", "docs/*.md"]).pytest()


class Examples:
    """Names that examples of methods may use; each is created once, when first needed.

    The package is imported only then, because run-time type checks are installed after this file is
    imported.
    """

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders

    @property
    def folder(self) -> Path:
        """A new one for each example."""
        return self._folders.mktemp("example")

    @cached_property
    def blt(self) -> ModuleType:
        import backward_lens_tl

        return backward_lens_tl

    @cached_property
    def torch(self) -> ModuleType:
        import torch

        return torch

    @cached_property
    def model(self) -> Any:
        return self.blt.load_facts_model()

    @cached_property
    def result(self) -> Any:
        return self.blt.backward_lens(self.model, "Lionel Messi plays for", " Paris")

    @cached_property
    def capture(self) -> Any:
        return self.result.capture

    @cached_property
    def gradient(self) -> Any:
        return self.capture["W_out", 6]

    @cached_property
    def request(self) -> Any:
        subject = "Lionel Messi"
        return self.blt.editing.EditRequest(f"{subject} plays for", " Paris", subject=subject)

    @cached_property
    def delta(self) -> Any:
        return self._shift(layer=5)(self.model, self.request)

    @cached_property
    def moments(self) -> Any:
        return self.blt.editing.facts_moments()

    @cached_property
    def statistics(self) -> Any:
        editing = self.blt.editing
        requests = [editing.EditRequest("Obama grew up in", " Paris"), self.request]
        return editing.pair_statistics(self.model, requests, layers=[-1], progress=False)

    @cached_property
    def editor(self) -> Any:
        return self.blt.editing.MENDEditor.untrained(self.statistics)

    @cached_property
    def sweep(self) -> Any:
        config = self.blt.SweepConfig(prompts=20)
        return self.blt.sweep(self.model, "facts", self.folder, config, progress=False)

    @cached_property
    def evaluation(self) -> Any:
        config = self.blt.EvaluationConfig(records=2, generation_length=12, n_texts=5)
        methods = {"shift": self._shift(layer=7)}
        return self.blt.evaluate(self.model, "facts", self.folder, methods, config, progress=False)

    @cached_property
    def analyzed(self) -> Any:
        from backward_lens_tl.compat import BackwardLens

        return BackwardLens(self.model).analyze("Lionel Messi plays for", " Paris", [5, 6])

    def _shift(self, layer: int) -> Any:
        return self.blt.editing.ForwardPassShift(layer=layer)


NAMES = frozenset(name for name in vars(Examples) if not name.startswith("_"))


@pytest.fixture(scope="session")
def _examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return Examples(tmp_path_factory)


@pytest.fixture(autouse=True)
def _names_of_examples(request: pytest.FixtureRequest) -> None:
    """Hide the names of a module from its doctests, and add names for those of methods."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    test = request.node.dtest
    if NEEDS_BRIDGE in "".join(each.source for each in test.examples) and not find_spec(BRIDGE):
        pytest.skip("TransformerBridge came with TransformerLens 3")
    within = test.name.removeprefix(test.globs["__name__"])  # ".function", ".Class.method"
    test.globs = {"__name__": "__main__"}
    examples = request.getfixturevalue("_examples")
    namespace = request.getfixturevalue("doctest_namespace")
    namespace.clear()
    if within.count(".") < 2:
        return
    source = "".join(each.source for each in test.examples)
    for name in names_from_outside(source) & NAMES:
        namespace[name] = getattr(examples, name)


def names_from_outside(source: str) -> set[str]:
    """Names that code reads but does not bind, except builtins."""
    top = symtable.symtable(source, "<example>", "exec")
    read, bound, scopes = set(), set(), [top]
    for scope in scopes:
        scopes += scope.get_children()
        for name in scope.get_symbols():
            if scope is top and (name.is_assigned() or name.is_imported()):
                bound.add(name.get_name())
            if name.is_referenced() and (scope is top or name.is_global()):
                read.add(name.get_name())
    return read - bound - set(dir(builtins))
