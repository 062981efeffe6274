"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import re
import resource
import subprocess
import sys
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import pytest
import torch
from models import HAS_BRIDGE, bridge_only
from transformers.utils import logging as transformers_logging

import backward_lens_tl as blt
from backward_lens_tl import cli
from backward_lens_tl.choices import Denominator, MultiToken
from backward_lens_tl.cli import main
from backward_lens_tl.cli.options import Command, add_options
from backward_lens_tl.cli.show import ShowCommand
from backward_lens_tl.errors import InputError
from backward_lens_tl.evaluation.config import EvaluationConfig
from backward_lens_tl.models import loading
from backward_lens_tl.runs.config import Config
from backward_lens_tl.settings import Positive
from backward_lens_tl.sweeps.config import SweepConfig

PROMPT = "Once upon a time, there was a little"
QUESTION = ("--prompt", "Lionel Messi plays for", "--target", " Paris")


@pytest.fixture(scope="module")
def stories_path(stories_folder: Path) -> str:
    return str(stories_folder)


@pytest.fixture(scope="module")
def _stories(stories_path: str) -> Any:
    return loading.load_model(stories_path)


@pytest.fixture
def _loaded(_stories: Any, facts_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the command a loaded model, so that it does not load one."""
    models = {"facts": facts_model}
    monkeypatch.setattr(loading, "load_model", lambda name, kind: models.get(name, _stories))


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that a failing command prints."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("backward-lens: error: ")
    return err


def test_facts_are_shown_with_an_explanation(capsys: pytest.CaptureFixture[str]):
    assert main(["show", *QUESTION]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("'Lionel Messi plays for' → ' Paris'\nThe model answers ' Miami' (")
    assert "target_nll(' Paris'): loss" in out
    assert re.search(r"^W_out shift.*^W_in imprint", out, flags=re.M | re.S)
    found = re.search(r"W_out at ' for' \(position \d\).*leads in (\d) of 8 layers", out)
    shift = out[out.index("W_out shift") : out.index("W_in imprint")]
    assert int(found[1]) == len(re.findall(r"★␣Paris *$", shift, flags=re.M)) > 0


def test_options_reach_the_lens(stories_path: str, tmp_path: Path, capsys):
    page = tmp_path / "page.html"
    options = "--layers -1 0 --positions -1 1 --k 3 --matrices W_out --projection normalized"
    options += " --direction gradient --no-bos --multi-token last"
    options += f" --kind {'bridge' if HAS_BRIDGE else 'hooked'}"
    argv = ["show", "--model", stories_path, "--prompt", PROMPT, "--target", " girl"]
    assert main([*argv, *options.split(), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert f"page: {page}" in out
    assert re.search(r"^'Once upon.*' → 'l'$", out, flags=re.M)
    assert "raw gradient, which gradient descent subtracts" in out
    html = page.read_text(encoding="utf-8")
    assert html.partition("<script")[0].count("<td") == 4
    assert html.count('class="zero"') == 1  # the other position of the last layer adds nothing
    (held,) = re.findall(r'<script type="application/json">(.*?)</script>', html)
    data = json.loads(held)
    assert list(data["panels"]) == ["W_out"]
    assert data["lenses"] == ["normalized", "logit_lens"]
    k, panel = 3, data["panels"]["W_out"]
    assert panel["zero"].count("-") == 3
    assert [lens["n"] for lens in panel["lenses"]] == [2 * k] * 2
    assert re.findall(r'scope="row">(\d)<', html) == ["4", "0"]
    assert "&lt;s&gt;" not in re.search(r"<h1>.*?</h1>", html)[0]


@pytest.mark.usefixtures("_loaded")
def test_a_jacobian_lens_is_shown_first_and_is_on_the_page(
    tmp_path: Path, facts_model: Any, capsys: pytest.CaptureFixture[str]
):
    page = tmp_path / "page.html"
    assert main(["show", *QUESTION, "--jacobian", "facts", "--html", str(page)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "(jacobian_lens, update, facts)" in out
    found = re.search(
        r"the normalized lens in .*; under the Jacobian lens, in (\d) of 8 layers", out
    )
    result = blt.backward_lens(
        facts_model, "Lionel Messi plays for", " Paris", projection=blt.jacobian_lens("facts")
    )
    assert int(found[1]) == (result.target_rank("W_out")[:, 0, -1] == 0).sum() > 0
    (held,) = re.findall(r'<script type="application/json">(.*?)</script>', page.read_text("utf-8"))
    assert json.loads(held)["lenses"] == ["jacobian_lens", "logit_lens", "normalized"]


@pytest.mark.usefixtures("_loaded")
def test_colours_can_show_the_size_of_what_is_written(capsys: pytest.CaptureFixture[str]):
    said = {
        "norm": ("‖δ_i‖ 0.", "how strongly the loss acts there"),
        "write_norm": ("‖x_i‖·‖δ_i‖ 0.", "the size of the term that is written there"),
    }
    for shade_by, texts in said.items():
        assert main(["show", *QUESTION, "--shade-by", shade_by]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert all(text in out for text in texts)


@pytest.mark.usefixtures("_loaded")
def test_the_explanation_is_about_the_last_token_in_any_order(capsys: pytest.CaptureFixture):
    argv = ["show", "--prompt", "Lionel Messi plays for", "--target", " Paris"]
    assert main([*argv, "--positions", "-1", "0"]) == 0
    assert "W_out at ' for' (position 5)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("_loaded")
def test_a_group_of_matrices_and_bos(stories_path: str, capsys):
    argv = ["show", "--model", stories_path, "--prompt", PROMPT, "--matrices", "mlp", "--bos"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(W_\w+) [is]", out, flags=re.M) == ["W_out", "W_gate", "W_in"]
    assert out.startswith("'Once upon")
    assert re.search(r"^layer +<s> ", out, flags=re.M)


@pytest.mark.usefixtures("_loaded")
def test_w_out_is_mentioned_only_if_analysed(stories_path: str, capsys):
    argv = ["show", "--model", stories_path, "--prompt", PROMPT, "--matrices", "W_in"]
    assert main(argv) == 0
    assert "W_out" not in capsys.readouterr().out


def test_libraries_are_quiet_and_their_settings_unchanged(stories_path: str, capfd):
    transformers_logging.enable_progress_bar()
    assert main(["show", "--model", stories_path, "--prompt", PROMPT, "--layers", "0"]) == 0
    assert capfd.readouterr().err == ""
    assert transformers_logging.is_progress_bar_enabled()


def test_messages_of_libraries_while_loading_are_hidden(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
):
    def noisy(name: str, kind: str | None) -> None:
        sys.stdout.write("Loaded pretrained model")
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
        logging.getLogger("a library").warning("You are using a model")
        raise InputError("refused")

    monkeypatch.setattr(loading, "load_model", noisy)
    said = f"backward-lens: error: refused (see {InputError().documentation})\n"
    assert error_of(["show", "--prompt", "a"], capsys) == said
    assert not caplog.records
    assert not recwarn.list


def test_a_hub_name_without_network_points_to_facts(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = error_of(["show", "--model", "nobody/nothing", "--prompt", "a"], capsys)
    assert "'nobody/nothing'" in error
    assert "'facts'" in error


@pytest.mark.usefixtures("_loaded")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", " some words that make many tokens"], "multi_token"),
        (["--layers", "99"], "layer 99"),
        (["--positions", "99"], "position 99"),
        (["--matrices", "W_Z"], "unknown matrix 'W_Z'"),
        (["--k", "0"], "k is 0"),
    ],
)
def test_refusals_are_one_line(options: list[str], message: str, stories_path: str, capsys):
    argv = ["show", "--model", stories_path, "--prompt", PROMPT, *options]
    assert message in error_of(argv, capsys)


@pytest.mark.usefixtures("_loaded")
def test_a_page_that_cannot_be_written_is_one_line(stories_path: str, tmp_path: Path, capsys):
    path = str(tmp_path / "missing" / "page.html")
    argv = ["show", "--model", stories_path, "--prompt", PROMPT, "--html", path]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert path in err


@pytest.mark.parametrize(
    ("argv", "status"),
    [(["--help"], 0), (["show", "--help"], 0), (["--version"], 0), ([], 2)],
)
def test_the_parser_answers_without_a_model(argv: list[str], status: int, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == status
    out, err = capsys.readouterr()
    assert bool(out) == (status == 0)
    assert bool(err) == (status != 0)


def test_the_command_imports_heavy_modules_late():
    """Neither the package nor the command and its help."""
    code = (
        "import sys\n"
        "from backward_lens_tl import cli\n"
        "for argv in (['--help'], ['sweep', '--help'], ['evaluate', '--nothing']):\n"
        "    try:\n"
        "        cli.main(argv)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "heavy = ('torch', 'transformers', 'transformer_lens', 'pandas', 'datasets', 'rich')\n"
        "found = [name for name in heavy if name in sys.modules]\n"
        "sys.exit(f'imported: {found}' if found else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: backward-lens" in done.stdout


def test_the_package_and_its_help_start_quickly():
    """Minimum CPU time of three runs, since the machine may be busy."""
    for arguments, most in (
        (["-c", "import backward_lens_tl"], 0.3),
        (["-m", "backward_lens_tl", "--help"], 1.0),
        (["-m", "backward_lens_tl", "sweep", "--nothing"], 1.0),
    ):
        seconds = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], check=False, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert min(seconds) < most


def test_options_match_the_fields_of_the_settings():
    """With their choices, help and defaults; omitted options leave fields unset."""
    required = {"sweep": ["--out", "x"], "evaluate": ["--out", "x"], "show": ["--prompt", "a"]}
    for command, config, left_out in (
        ("sweep", SweepConfig, {"memory"}),
        ("evaluate", EvaluationConfig, set()),
        ("show", SweepConfig, {*ShowCommand.NO_OPTIONS}),
    ):
        [commands] = [each for each in cli.parser()._actions if each.dest == "command"]
        actions = {each.dest: each for each in commands.choices[command]._actions}
        names = {field.name for field in fields(config)}
        assert names & {*actions} == names - left_out
        assert all(action.help for action in actions.values())
        given = vars(cli.parser().parse_args([command, *required[command]]))
        own = {field.name for field in fields(cli.COMMANDS[command])} - {"settings"}
        assert {*given} == own | {"command"}
        name, choices = (
            ("multi_token", MultiToken) if "k" in names else ("denominator", Denominator)
        )
        assert tuple(actions[name].choices) == get_args(choices)
    assert "(default: 10)" in actions["k"].help
    assert actions["layers"].type is int


@dataclass(frozen=True)
class Learning(Config):
    """Settings.

    Attributes:
        rate: The rate.
        memory: The limits.
    """

    rate: Positive = 0.5
    memory: blt.Memory | None = None


@dataclass(frozen=True, kw_only=True)
class Learn(Command):
    """Learn."""

    SETTINGS = Learning
    NO_OPTIONS = ("memory",)


def test_options_of_numbers():
    parser = argparse.ArgumentParser()
    add_options(parser, Learn)
    assert parser.parse_args(["--rate", "0.25"]).rate == 0.25
    assert "The rate (default: 0.5)" in parser.format_help()


def test_a_setting_without_an_option_is_not_dropped_silently():
    class Careless(Learn):
        NO_OPTIONS = ()

    with pytest.raises(InputError, match=r"^memory of Learning is a .*Memory.*NO_OPTIONS"):
        add_options(argparse.ArgumentParser(), Careless)


@pytest.mark.slow
def test_a_fresh_process_prints_the_table_and_nothing_else():
    command = [sys.executable, "-m", "backward_lens_tl", "show", *QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert done.stdout.startswith("'")


def test_a_chat_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model = blt.load_facts_model()
    model.tokenizer.chat_template = "{{ messages[0]['content'] }} for {{ messages[1]['content'] }}"
    monkeypatch.setattr(loading, "load_model", lambda *args: model)
    chat = tmp_path / "chat.json"
    messages = [{"role": "user", "content": "Messi plays"}, {"role": "user", "content": "the"}]
    chat.write_text(json.dumps(messages), encoding="utf-8")
    assert main(["show", "--chat", str(chat), "--target", " Paris", "--layers", "6"]) == 0
    assert capsys.readouterr().out.startswith("user: 'Messi plays' user: 'the' → ' Paris'")
    chat.write_text("{}", encoding="utf-8")
    assert "holds dict; write a list of messages" in error_of(["show", "--chat", str(chat)], capsys)


@pytest.mark.usefixtures("_loaded")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "pass either a prompt, as in --prompt 'Messi plays for', or a --chat"),
        (["--prompt", "Messi", "--chat", "x.json"], "pass either a prompt"),
        (["--chat", "nowhere.json"], "chat is 'nowhere.json', which cannot be read: "),
    ],
)
def test_either_a_prompt_or_a_chat(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert message in error_of(["show", *options], capsys)


@pytest.mark.usefixtures("_loaded")
def test_the_packages_own_warnings_are_shown(capsys: pytest.CaptureFixture[str]):
    options = ["--target", "Paris", "--multi-token", "first", "--layers", "6"]
    assert main(["show", "--prompt", "Messi plays for", *options]) == 0
    err = capsys.readouterr().err
    assert err.startswith("backward-lens: warning: target 'Paris' of prompt 0 is read without")


@bridge_only
def test_a_jacobian_lens_is_fitted_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("transformer_lens.tools.analysis")
    bridge = blt.load_facts_model("bridge")
    monkeypatch.setattr(loading, "load_model", lambda name, kind, device: bridge)
    texts, out = tmp_path / "texts.txt", tmp_path / "lens.pt"
    texts.write_text("Rome\nMessi plays for Barcelona.\nThe capital of Italy is Rome.\n")
    argv = ["fit-jacobian", "--texts", str(texts), "--out", str(out), "--skip", "3"]
    argv += ["--max-length", "8", "--quiet"]
    assert main([*argv, "--prompts", "1"]) == 0
    assert capsys.readouterr().out.startswith("fitted on 1 of the texts in texts.txt (too short")
    assert main([*argv, "--prompts", "5"]) == 0
    said = "fitted on 2 of the texts in texts.txt (too short, with fewer than 5 tokens: 1): "
    assert capsys.readouterr().out == f"{said}{out}\n"
    lens = torch.load(out, weights_only=True)
    assert (lens["n_prompts"], lens["metadata"]["max_seq_len"]) == (2, 8)
    assert "another skip: it was 3, and is 2" in error_of([*argv, "--skip", "2"], capsys)
    assert "'nowhere.txt' cannot be read" in error_of([*argv, "--texts", "nowhere.txt"], capsys)


def test_defaults_of_a_fit_are_those_of_the_function():
    options = cli.parser().parse_args(["fit-jacobian", "--texts", "facts", "--out", "lens.pt"])
    parameters = inspect.signature(blt.fit_jacobian_lens).parameters
    shared = {"prompts", "max_length", "skip", "seed", "dim_batch"}
    assert {name: getattr(options, name) for name in shared} == {
        name: parameters[name].default for name in shared
    }
