"""Mutation tests of the package's core, on a random sample: `make mutants`.

mutmut writes the mutants, records which tests reach which function, and runs those tests on each
mutant in a forked process. This script draws the sample, picks the tests of each mutant, the
fastest first, and reports. Its settings are in pyproject.toml, under [tool.mutmut].

The sample excludes mutants that change only the text of a string, and those that change
only an argument `device=`, which has no effect on a CPU. mutmut itself excludes decorated
functions (properties, context managers; not static and class methods), code outside functions,
and type annotations. A mutant of code that runs only while modules are imported always survives.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import fnmatch
import json
import os
import random
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import libcst
import pytest
import tomllib
from mutmut import __main__ as mutmut
from mutmut.configuration import config
from mutmut.mutation.diff_apply import read_functions_from_index
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.runners.harness import PytestRunner
from mutmut.state import state
from mutmut.stats import status_by_exit_code
from mutmut.workers.isolation import ForkServerRunner

EQUIVALENT = Path(__file__).with_name("equivalent_mutants.toml")
STATISTICS = Path("mutants/mutmut-stats.json")
WORKERS = os.cpu_count() or 1


class Mutant(NamedTuple):
    """A mutant by its name in mutmut, and its function before and after."""

    name: str
    before: str
    after: str

    @property
    def function(self) -> str:
        """Its module and function: `package.module.Class.method`."""
        module, _, mangled = self.name.partition("__mutmut_")[0].rpartition(".")
        return f"{module}.{mangled[2:].replace('ǁ', '.')}"  # x_function or xǁClassǁmethod

    @property
    def diff(self) -> list[str]:
        lines = difflib.unified_diff(self.before.split("\n"), self.after.split("\n"), lineterm="")
        return list(lines)[3:]

    @property
    def counts(self) -> bool:
        """Whether a mutant changes more than the text of a string or a device."""
        return bare(self.before) != bare(self.after)


def bare(function: str) -> str:
    """A function's syntax tree with empty strings and without `device=` arguments."""
    tree = ast.parse(dedent(function))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
        elif isinstance(node, ast.Call):
            node.keywords = [each for each in node.keywords if each.arg != "device"]
    return ast.dump(tree)


def changes(diff: Sequence[str]) -> list[str]:
    """The removed and added lines of a diff, without indentation."""
    return [line[0] + line[1:].strip() for line in diff if line[:1] in ("-", "+")]


@cache
def equivalents() -> list[dict[str, str]]:
    """Equivalent mutants, which no test can kill, with the reason for each."""
    return tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("mutant", [])


def is_equivalent(mutant: Mutant) -> bool:
    """Whether a mutant is listed, by its function and changed lines."""
    return any(
        each["function"] == mutant.function
        and changes(each["diff"].splitlines()) == changes(mutant.diff)
        for each in equivalents()
    )


class Watch:
    """Record which tests fail, and which functions the setup of a fixture reaches.

    mutmut counts the latter only for the first test; here it counts for every test that
    uses the fixture.
    """

    def __init__(self) -> None:
        self.failed: set[str] = set()
        self._reached: defaultdict[Any, set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        reached = state()._stats
        earlier = set(reached)
        reached.clear()
        try:
            return (yield)
        finally:
            self._reached[fixturedef] |= reached
            reached |= earlier

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        for fixture in item._request._fixture_defs.values():
            state()._stats.update(self._reached[fixture])


class Runner(PytestRunner):
    """pytest as mutmut runs it; a test that fails without a mutant is excluded afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self._watch = Watch()

    def execute_pytest(self, params: list[str], **options: Any) -> int:
        plugins = [*options.pop("plugins", []), self._watch]
        return super().execute_pytest(params, plugins=plugins, **options)

    def run_stats(self, *, tests: Iterable[str]) -> int:
        self._pytest_add_cli_args = [*self._pytest_add_cli_args, "--maxfail=1000000"]
        code = super().run_stats(tests=tests)
        for test in sorted(self._watch.failed):
            print("left out, fails without a mutant:", test, file=sys.__stderr__)
            state().duration_by_test.pop(test, None)
            for reach in state().tests_by_mangled_function_name.values():
                reach.discard(test)
        return 0 if code == pytest.ExitCode.TESTS_FAILED else code


def read(modules: Sequence[str]) -> list[tuple[str, str]]:
    """Names of all mutants of some modules, and the modules' paths, in a fixed order."""
    mutants, _ = mutmut.collect_source_file_mutation_data(mutant_names=())
    of = [(str(data.path), name) for data, name, _ in mutants]
    for module in modules:
        if not any(fnmatch.fnmatch(path, module) for path, _ in of):
            raise SystemExit(f"{module}: no mutants; is it among only_mutate in pyproject.toml?")
    return sorted(each for each in of if any(fnmatch.fnmatch(each[0], m) for m in modules))


def draw(found: Sequence[tuple[str, str]], size: int, seed: int) -> list[Mutant]:
    """A random sample of the mutants that count, the same for the same code and seed."""
    shuffled = random.Random(seed).sample(found, len(found))
    code = libcst.Module([]).code_for_node
    every = (Mutant(n, *map(code, read_functions_from_index(n, path))) for path, n in shuffled)
    return list(islice((each for each in every if each.counts), size))


def tests_of(mutant: Mutant, seconds: float) -> tuple[list[str], int]:
    """The tests that reach a mutant's function, fastest first, up to `seconds` in total.

    Also return their number without that limit.
    """
    reach = state().tests_by_mangled_function_name[mutant.name.partition("__mutmut_")[0]]
    duration = state().duration_by_test
    ordered = sorted(reach, key=lambda test: (duration[test], test))
    total, chosen = 0.0, []
    for test in ordered:
        total += duration[test]
        if chosen and total > seconds:
            break
        chosen.append(test)
    return chosen, len(ordered)


def run(runner: ForkServerRunner, tests: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Run the tests of each mutant; yield its name and outcome."""
    waiting = [name for name in tests if tests[name]]
    yield from ((name, "no tests") for name in tests if not tests[name])
    runner.startup()
    try:
        while waiting or runner.pending_count():
            if waiting and runner.has_capacity():
                name = waiting.pop(0)
                expected = sum(state().duration_by_test[test] for test in tests[name])
                limit = (expected + config().timeout_constant) * config().timeout_multiplier
                runner.submit(
                    name, tests[name], int(2 * limit), expected
                )  # CPU time, of two threads
            else:
                result = runner.wait_for_result()
                yield result.mutant_name, status_by_exit_code[result.exit_code]
    finally:
        runner.stop_all_workers()
        runner.shutdown()


def prepare(runner: ForkServerRunner) -> None:
    """Write the mutants, and record which tests reach which function unless that is known."""
    Path("mutants").mkdir(exist_ok=True)
    shutil.rmtree("mutants/tests", ignore_errors=True)  # otherwise deleted tests stay there
    set_mutant_under_test("mutant_generation")
    with mutmut.CatchOutput():
        mutmut.copy_src_dir()
        mutmut.copy_also_copy_files()
        mutmut.setup_source_paths()
        mutmut.create_mutants(1)
    if STATISTICS.exists():
        known = json.loads(STATISTICS.read_text(encoding="utf-8"))["function_hashes"]
        if state().current_function_hashes.keys() - known.keys():
            STATISTICS.unlink()  # mutmut would report that no test reaches new functions
    # Import it once here; otherwise mutmut would import it in every forked process.
    set_mutant_under_test("list_all_tests")
    with mutmut.CatchOutput():
        Runner().warm_up()
    mutmut.collect_or_load_stats(runner, apply_config_invalidation=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", default=["*"], help="paths or patterns; all if none")
    parser.add_argument("--sample", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=60, help="seconds of tests for a mutant")
    parser.add_argument("--tests", nargs="+", help="instead of the whole quick tier")
    options = parser.parse_args(arguments)
    # There must be no threads at a fork.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("BACKWARD_LENS_SHARED", str(Path("../shared").resolve()))
    if options.tests:
        config().pytest_add_cli_args_test_selection = options.tests

    mutmut.print_status = lambda *_, **__: None  # its spinner would fill a log
    clock = time.monotonic()
    runner = ForkServerRunner(WORKERS, Runner, {})
    prepare(runner)
    print(f"ready after {time.monotonic() - clock:.0f} s")
    found = read(options.modules)
    sample = {each.name: each for each in draw(found, options.sample, options.seed)}
    asked = {name: tests_of(each, options.limit) for name, each in sample.items()}
    chosen = {n: tests for n, (tests, _) in asked.items() if not is_equivalent(sample[n])}

    set_mutant_under_test("")
    every = sorted(set().union(*chosen.values()))
    if every and runner.run_clean_tests(every):
        sys.exit("tests fail without a mutant; delete mutants/mutmut-stats.json to leave them out")
    print(f"{len(every)} tests pass without a mutant, after {time.monotonic() - clock:.0f} s")

    found_out = dict.fromkeys(sample.keys() - chosen.keys(), "equivalent")
    for name, outcome in run(runner, chosen):
        found_out[name] = outcome
        print(f"{time.monotonic() - clock:6.0f} s  {outcome:9} {name}", flush=True)
    for name in sorted(name for name in sample if found_out[name] not in ("killed", "equivalent")):
        tests, reach = asked[name]
        print(f"\n{found_out[name]}: {sample[name].function}, {len(tests)} of {reach} tests")
        print(f"  {name}", *sample[name].diff, sep="\n")
    counts = Counter(found_out.values())
    tried = len(sample) - counts["equivalent"]
    caught = counts["killed"] + counts["timeout"] + counts["segfault"]
    print(f"\n{len(sample)} of {len(found)} mutants, seed {options.seed}:", end=" ")
    print(", ".join(f"{n} {outcome}" for outcome, n in counts.most_common()))
    print(f"share killed: {caught / max(tried, 1):.1%} of {tried}, those that timed out included")


if __name__ == "__main__":
    main()
