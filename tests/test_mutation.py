"""`make mutants` draws the documented sample, and recognizes equivalent mutants."""

from __future__ import annotations

from pathlib import Path

import mutation
import pytest
from mutation import Mutant, changes, equivalents, is_equivalent
from mutmut.state import MutmutState

BEFORE = """\
def half(values, device):
    \"\"\"Half of them.\"\"\"
    return halve(values, "W_out", device=device) / 2
"""


def mutant(old: str, new: str) -> Mutant:
    assert old in BEFORE
    return Mutant("package.module.x_half__mutmut_3", BEFORE, BEFORE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("/ 2", "* 2", True),
        ("/ 2", "/ 3", True),
        ('"W_out"', "None", True),
        ("halve(values", "halve(None", True),
        ('"W_out"', '"XXW_outXX"', False),
        ("Half", "half", False),
        ("device=device", "device=None", False),
        (", device=device", "", False),
    ],
)
def test_changes_of_text_and_devices_do_not_count(old: str, new: str, counts: bool) -> None:
    assert mutant(old, new).counts is counts


def test_methods_are_mutated_within_their_class() -> None:
    method = "    def half(self):\n        return self.all / 2\n"
    assert Mutant("package.x_", method, method.replace("2", "3")).counts


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("package.module.x_half__mutmut_3", "package.module.half"),
        ("package.module.x__half__mutmut_3", "package.module._half"),
        ("package.module.xǁHostǁ__init____mutmut_12", "package.module.Host.__init__"),
    ],
)
def test_functions_have_their_own_names(name: str, function: str) -> None:
    assert Mutant(name, "", "").function == function


def test_a_sample_depends_on_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def functions(name: str, path: str) -> tuple[mutation.libcst.FunctionDef, ...]:
        is_text = int(name.rpartition("_")[2]) % 2
        sources = (
            f"def f():\n    return {each}\n" for each in (("'a'", "'b'") if is_text else "01")
        )
        return tuple(mutation.libcst.parse_module(each).body[0] for each in sources)

    monkeypatch.setattr(mutation, "read_functions_from_index", functions)
    found = [("module.py", f"module.x_f__mutmut_{i}") for i in range(40)]
    drawn = [each.name for each in mutation.draw(found, 8, seed=0)]
    assert len(set(drawn)) == 8
    assert all(int(name.rpartition("_")[2]) % 2 == 0 for name in drawn)
    assert drawn == [each.name for each in mutation.draw(found, 8, seed=0)]
    assert drawn != [each.name for each in mutation.draw(found, 8, seed=1)]
    assert [each.name for each in mutation.draw(found, 12, seed=0)][:8] == drawn
    assert len(mutation.draw(found, 100, seed=0)) == 20


def test_the_fastest_tests_come_first_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    known = MutmutState(duration_by_test={"slow": 50.0, "fast": 1.0, "other": 2.0, "none": 0.1})
    known.tests_by_mangled_function_name["package.module.x_half"] = {"slow", "fast", "other"}
    monkeypatch.setattr(mutation, "state", lambda: known)
    one = mutant("/ 2", "* 2")
    assert mutation.tests_of(one, 60) == (["fast", "other", "slow"], 3)
    assert mutation.tests_of(one, 3) == (["fast", "other"], 3)
    assert mutation.tests_of(one, 0) == (["fast"], 3)  # always at least one
    assert mutation.tests_of(Mutant("package.module.x_other__mutmut_1", "", ""), 60) == ([], 0)


def test_equivalent_mutants_are_identified_by_function_and_changed_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = mutant("/ 2", "* 2"), mutant("/ 2", "/ 3")
    listed = {"function": "package.module.half", "diff": "\n".join(changes(one.diff))}
    monkeypatch.setattr(mutation, "equivalents", lambda: [listed])
    assert changes(one.diff) == [
        '-return halve(values, "W_out", device=device) / 2',
        '+return halve(values, "W_out", device=device) * 2',
    ]
    assert is_equivalent(one)
    assert not is_equivalent(other)
    assert not is_equivalent(one._replace(name="package.module.x_other__mutmut_3"))


def source_of(function: str) -> str:
    """Source of the module that a function is in, or of a method's class."""
    folder, names = Path(mutation.__file__).parents[1], function.split(".")
    files = (folder.joinpath(*names[:n]).with_suffix(".py") for n in range(len(names), 0, -1))
    return next(file for file in files if file.is_file()).read_text(encoding="utf-8")


def is_stale(entry: dict[str, str]) -> bool:
    """Whether the lines that a mutant changes are no longer in the code."""
    lines = {line.strip() for line in source_of(entry["function"]).splitlines()}
    gone = [line[1:] for line in changes(entry["diff"].splitlines()) if line[0] == "-"]
    return not gone or not lines.issuperset(gone)


def test_equivalent_mutants_are_mutants_of_this_code() -> None:
    assert [entry for entry in equivalents() if is_stale(entry)] == []
    assert all(entry["reason"].strip() for entry in equivalents())


def test_a_mutant_of_other_code_is_stale() -> None:
    entry = {
        "function": "backward_lens_tl.models.host.Host.vocabulary",
        "diff": "-    gone\n+    x",
    }
    assert is_stale(entry)
    assert not is_stale(entry | {"diff": "-    def vocabulary(self) -> Vocabulary:\n+    x"})
