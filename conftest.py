"""Runs the Python snippets of README and docs, page by page, each in one namespace."""

from importlib.util import find_spec

import pytest
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

BRIDGE = "transformer_lens.model_bridge"
run = PythonEvaluator()


def run_if_possible(snippet: Example) -> None:
    """Skip what imports a TransformerBridge where the installed TransformerLens has none."""
    if BRIDGE in snippet.parsed and find_spec(BRIDGE) is None:
        pytest.skip("TransformerBridge came with TransformerLens 3")
    run(snippet)


python = CodeBlockParser("python", run_if_possible)
pytest_collect_file = Sybil(parsers=[python], patterns=["README.md", "docs/*.md"]).pytest()
