"""`backward-lens adapter` and `backward-lens diff`, and the page of a weight change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import backward_lens_tl as blt
from backward_lens_tl.cli import main
from backward_lens_tl.editing import MatrixDelta, WeightDelta, delta_tokens
from backward_lens_tl.errors import InputError
from backward_lens_tl.models import loading
from backward_lens_tl.views.weight_changes import (
    discarded_share,
    summary,
    weight_change_page,
    weight_change_table,
)
from conftest import FACTS_FOLDER


@pytest.fixture
def _loaded(facts_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the command the loaded facts model, so that it does not load one."""
    monkeypatch.setattr(loading, "load_model", lambda name, kind: facts_model)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def change(facts_model: Any) -> WeightDelta:
    """Neuron 17 of layer 6 writes `" Paris"`, and one of layer 2 writes less of something else."""
    unembedding = facts_model.W_U.detach()
    changes = []
    for layer, size, token in ((2, 0.1, " Rome"), (6, 1.0, " Paris")):
        left = torch.zeros(512, 1)
        left[17] = size
        written = unembedding[:, facts_model.to_single_token(token)][None]
        changes.append(MatrixDelta("W_out", layer, left, written / written.norm()))
    return WeightDelta(tuple(changes), {})


@pytest.mark.usefixtures("_loaded")
def test_an_adapter(change: WeightDelta, facts_model: Any, tmp_path: Path, capsys: Any) -> None:
    change.to_lora(tmp_path / "a", facts_model, str(FACTS_FOLDER))
    html, save = tmp_path / "page.html", tmp_path / "delta.safetensors"
    argv = ["adapter", str(tmp_path / "a"), "--html", str(html), "--save", str(save), "--k", "3"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "What the adapter a adds to facts_model\n" in out
    rows = [line.split() for line in out.splitlines() if re.match(r" *[26] +W_out", line)]
    assert [row[:3] for row in rows] == [["6", "W_out", "99"], ["2", "W_out", "0.99"]]
    assert "␣Paris" in rows[0]
    assert "␣Rome" in rows[1]
    assert "<bdi><u> </u>Paris</bdi>" in html.read_text(encoding="utf-8")
    loaded = WeightDelta.load(save)
    assert [each.layer for each in loaded] == [2, 6]


@pytest.mark.usefixtures("_loaded")
def test_two_checkpoints(change: WeightDelta, tmp_path: Path, capsys: Any) -> None:
    tuned = AutoModelForCausalLM.from_pretrained(FACTS_FOLDER)
    with torch.no_grad():
        for each in change:
            tuned.transformer.h[each.layer].mlp.c_proj.weight += each.dense()
        tuned.transformer.ln_f.bias += 1
    tuned.save_pretrained(tmp_path / "tuned")
    assert main(["diff", "facts", str(tmp_path / "tuned"), "--rank", "2", "--most", "1"]) == 0
    out, _ = capsys.readouterr()
    assert "What tuned adds to facts\n" in out
    assert "2 matrices, norm 1.005." in out
    assert "Not shown, but changed too: ln_f.bias." in out
    assert re.search(r"^ *6 +W_out +99 % .*␣Paris", out, re.MULTILINE)


@pytest.mark.usefixtures("_loaded")
def test_errors_are_one_line(tmp_path: Path, capsys: Any) -> None:
    for argv, message in (
        (["adapter", str(tmp_path)], "is not the folder of an adapter"),
        (["diff", "facts", str(tmp_path)], "has neither model.safetensors"),
        (["diff", "facts", "facts"], "what differs: nothing"),
        (["diff", "facts", "facts", "--rank", "0"], "rank is 0"),
    ):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert message in err


def test_options_are_checked_before_the_change_is_computed(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightDelta, "between", lambda *_: pytest.fail("computed"))
    nowhere = tmp_path / "nowhere"
    for options, message in (
        (["--most", "0"], "most is 0"),
        (["--k", "0"], "k is 0"),
        (["--html", str(nowhere / "page.html")], f"folder {str(nowhere)!r} does not exist"),
        (["--save", str(tmp_path)], "it is a folder"),
    ):
        assert main(["diff", "facts", str(nowhere), *options]) == 2
        assert message in capsys.readouterr().err


def test_what_a_rank_discards() -> None:
    """By hand: 3 of 4 and 1 of 1, so one fifth of the squared norm is left out."""
    left, right = torch.eye(4)[:, :1], torch.eye(5)[:1]
    matrices = (
        MatrixDelta("W_in", 0, 3**0.5 * left, right),
        MatrixDelta("W_in", 1, left, right),
    )
    discarded = {"W_in of layer 0": 0.25, "W_in of layer 1": 0.0}
    delta = WeightDelta(
        matrices, {"rank": 1, "discarded": discarded, "left_out": tuple("abcdefgh")}
    )
    assert discarded_share(delta) == pytest.approx(0.2)
    told = list(summary(delta))
    assert told[1] == ("Rank 1 leaves out 20 % of the squared norm; most in W_in of layer 0: 25 %.")
    assert told[2] == "Not shown, but changed too: a, b, c, d, e, f and 2 more."


def test_rounding_is_stated(change: WeightDelta) -> None:
    rounded = WeightDelta(change.matrices, {"rounded": ("float32", "bfloat16")})
    assert list(summary(rounded))[1] == (
        "The base is rounded from float32 to bfloat16, as the other is stored."
    )
    shares = {"W_out of layer 2": 0.125, "W_out of layer 6": 0.5}
    explained = list(summary(WeightDelta(change.matrices, {"rounding": shares})))[1]
    assert "at most 50 % of the squared norm of a matrix (W_out of layer 6)" in explained


def test_a_change_of_biases_alone() -> None:
    nothing = torch.zeros(4, 0), torch.zeros(0, 5)
    moved = MatrixDelta("W_in", 0, *nothing, bias=torch.ones(5))
    delta = WeightDelta((moved,), {"rank": 2, "discarded": {"W_in of layer 0": 0.0}})
    assert discarded_share(delta) == 0
    assert list(summary(delta))[1] == "In 1 of them the bias changes too."
    assert discarded_share(delta.scale(0)) == 0
    assert not any("bias" in each for each in summary(delta.scale(0)))


def test_text_of_the_model_is_escaped(facts_model: Any, change: WeightDelta) -> None:
    table = delta_tokens(facts_model, change, k=2, components="singular")
    table["top_tokens"] = [["<script>", "&amp;"]] * len(table)
    about = {"adapter": "<b>", "base": "a&b"}
    page = weight_change_page(table, WeightDelta(change.matrices, about))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "What the adapter &lt;b&gt; adds to a&amp;b" in page


@pytest.mark.usefixtures("as_for_a_user")
def test_what_is_refused(facts_model: Any, change: WeightDelta) -> None:
    table = delta_tokens(facts_model, change, k=2)
    with pytest.raises(InputError, match="no column 'norm'"):
        weight_change_page(table.drop(columns="norm"), change)
    with pytest.raises(InputError, match=r"delta is .*; pass WeightDelta, as returned by"):
        weight_change_table(table, blt)  # type: ignore[arg-type]
