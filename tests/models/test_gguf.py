"""Models in llama.cpp's format, against a dequantization written from its specification."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import D_MODEL, N_LAYERS, hf_name, interleaved, plain_llama, write_gguf
from models import relative_error, require_kind
from tokenizer_kinds import tokenizer_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import backward_lens_tl as blt
from backward_lens_tl.errors import BackwardLensError, ModelNotFoundError, UnsupportedModelError
from backward_lens_tl.models import gguf as gguf_loading
from backward_lens_tl.models.gguf import read_gguf
from backward_lens_tl.models.gguf_file import GGUFFile
from backward_lens_tl.models.gguf_tokenizer import (
    adds_bos,
    byte_level_tokenizer,
    with_llamas_spaces,
)

TEXTS = (
    "Once upon a time",
    "Zoë and José  met",
    "<eos> Rome<bos>\n\t is",
    "12 or 2024\n\n3",
    "🙂日本",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module", params=("bridge", "hooked"))
def model(request: pytest.FixtureRequest, path: Path) -> Any:
    require_kind(request.param)
    return blt.load_model(str(path), request.param)


# ------------------------------------------------------------------------------------- weights


@pytest.mark.versions
def test_logits_are_those_of_the_dequantized_model(model: Any, path: Path) -> None:
    tokens = torch.arange(4, 28).reshape(2, 12)
    expected = plain_llama(path)(tokens).logits
    assert relative_error(model(tokens), expected) < 1e-5  # float32; measured 1e-6
    # llama.cpp reorders the rows of W_Q and W_K, which matters.
    assert relative_error(plain_llama(path, permute=False)(tokens).logits, expected) > 0.1


def test_weights_are_exactly_the_dequantized_ones(path: Path, tmp_path: Path) -> None:
    _, model, _ = read_gguf(path, tmp_path, with_weights=True)
    expected = plain_llama(path).state_dict()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in expected.items():
        assert torch.equal(model.state_dict()[name], weight)
        assert torch.equal(again.state_dict()[name], weight)  # as a split over devices reads them
    assert not hasattr(model.config, "quantization_config")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_large_files_are_read_without_a_copy(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_loading, "_WORTH_COPYING", 0)
    monkeypatch.setattr(GGUFFile, "write_without_vocabulary", None)
    _, model, _ = read_gguf(path, tmp_path, with_weights=False)
    for name, weight in plain_llama(path).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    assert (tmp_path / "config.json").exists()
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("limit", [0, None])
def test_the_embedding_says_how_many_tokens_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """Not the metadata, which do not count rows that fill the embedding up."""
    if limit is not None:
        monkeypatch.setattr(gguf_loading, "_WORTH_COPYING", limit)
    path = write_gguf(tmp_path / "padded.gguf", llama__vocab_size=50)
    expected = plain_llama(path).state_dict()
    _, model, _ = read_gguf(path, tmp_path, with_weights=False)
    assert model.config.vocab_size == len(expected["model.embed_tokens.weight"]) > 50
    for name, weight in expected.items():
        assert torch.equal(model.state_dict()[name], weight)


def test_gguf_is_as_it_was(path: Path, tmp_path: Path) -> None:
    import gguf

    before = gguf.get_tensor_name_map
    read_gguf(path, tmp_path, with_weights=False)
    assert gguf.get_tensor_name_map is before


@pytest.mark.versions
def test_the_lens_on_it_is_exact(model: Any) -> None:
    assert blt.validate(model, "Once upon a time").passed


def test_the_name_says_which_tensors_are_quantized(model: Any, tmp_path: Path) -> None:
    assert model.cfg.model_name == "tiny.gguf (9 Q4_1, 5 F32, 4 Q8_0, 2 F16)"
    result = blt.backward_lens(model, "Once upon a time", 5)
    assert "tiny.gguf (9 Q4_1, " in result.to_html()
    config = blt.SweepConfig(prompts=1)
    rows = [{"prompt": "Once upon a", "target": 5}]
    swept = blt.sweep(model, rows, tmp_path / "sweep", config, progress=False)
    about = json.loads((tmp_path / "sweep" / "run.json").read_text())["model"]
    assert about["name"] == model.cfg.model_name
    assert about["stored_as"] == {
        "token_embd.weight": {"Q8_0": 1},
        "output_norm.weight": {"F32": 1},
        "blk.*.attn_norm.weight": {"F32": 2},
        "blk.*.attn_q.weight": {"Q4_1": 2},
        "blk.*.attn_k.weight": {"Q4_1": 2},
        "blk.*.attn_v.weight": {"F16": 2},
        "blk.*.attn_output.weight": {"Q8_0": 2},
        "blk.*.ffn_norm.weight": {"F32": 2},
        "blk.*.ffn_gate.weight": {"Q4_1": 2},
        "blk.*.ffn_up.weight": {"Q4_1": 2},
        "blk.*.ffn_down.weight": {"Q8_0": 1, "Q4_1": 1},
    }
    assert len(swept.prompts()) == 1


# ------------------------------------------------------------------------------------- tokenizer


@pytest.mark.versions
@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_is_rebuilt(path: Path, tmp_path: Path, text: str) -> None:
    write_gguf(tmp_path / "as_gpt2.gguf", tokenizer__ggml__pre="gpt-2")
    _, _, rebuilt = read_gguf(tmp_path / "as_gpt2.gguf", tmp_path, with_weights=False)
    original = tokenizer_of("byte-level")
    ids = original(text)["input_ids"]
    assert rebuilt(text)["input_ids"] == [original.bos_token_id, *ids]
    assert rebuilt(text, add_special_tokens=False)["input_ids"] == ids
    assert rebuilt.decode(ids) == original.decode(ids)
    special = ("bos_token", "eos_token", "unk_token", "pad_token")
    assert [getattr(rebuilt, each) for each in special] == [
        getattr(original, each) for each in special
    ]
    chat = rebuilt.apply_chat_template([{"role": "user", "content": "Rome"}], tokenize=False)
    assert chat == "<bos>Rome"


@pytest.mark.parametrize(
    ("way", "text", "pieces"),
    [
        ("gpt-2", "in 1969\n\n12's", ["in", " 1969", "\n", "\n", "12", "'s"]),
        ("smollm", "in 1969\n\n12's", ["in", " ", *"1969", "\n\n", *"12", "'s"]),
        ("llama-bpe", "in 1969\n\n12's", ["in", " ", "196", "9", "\n\n", "12", "'s"]),
        ("qwen2", "in 1969\n\n12's", ["in", " ", *"1969", "\n\n", *"12", "'s"]),
        ("gpt-2", "I'LL  go!", ["I", "'", "LL", " ", " go", "!"]),
        ("llama-bpe", "I'LL  go!", ["I", "'LL", " ", " go", "!"]),
    ],
)
def test_texts_are_split_as_in_training(
    tmp_path: Path, way: str, text: str, pieces: list[str]
) -> None:
    """As llama.cpp's patterns split them, by hand."""
    file = write_gguf(tmp_path / "tiny.gguf", tokenizer__ggml__pre=way)
    _, _, tokenizer = read_gguf(file, tmp_path, with_weights=False)
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in split] == pieces


def hand_made(way: str) -> Any:
    tokens = ["<s>", "<tool>", "a", "b", "c", "ab", "abc"]
    return byte_level_tokenizer(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": way,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.token_type": [3, 4, 1, 1, 1, 1, 1],
            "tokenizer.ggml.bos_token_id": 0,
        }
    )


def test_only_llama_3_takes_words_of_the_vocabulary_without_merges() -> None:
    assert hand_made("gpt-2").tokenize("abc") == ["ab", "c"]
    assert hand_made("llama-bpe").tokenize("abc") == ["abc"]


def test_tokens_of_the_user_are_kept_whole_and_are_not_special() -> None:
    tokenizer = hand_made("gpt-2")
    ids = tokenizer("a<tool>b<s>")["input_ids"]
    assert ids == [2, 1, 3, 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>b"


def test_only_qwen_composes_accents() -> None:
    assert hand_made("gpt-2").backend_tokenizer.normalizer is None
    assert hand_made("qwen2").backend_tokenizer.normalizer.normalize_str("e\u0301") == "\u00e9"


@pytest.mark.parametrize(
    ("kind", "way", "said", "expected"),
    [
        ("llama", None, None, True),
        ("gpt2", "llama-bpe", None, True),
        ("gpt2", "gpt-2", None, False),
        ("llama", None, False, False),
        ("gpt2", "gpt-2", True, True),
    ],
)
def test_a_bos_token_by_llama_cpps_defaults(
    kind: str, way: str | None, said: bool | None, expected: bool
) -> None:
    values = {"model": kind, "pre": way, "add_bos_token": said}
    metadata = {f"tokenizer.ggml.{name}": own for name, own in values.items() if own is not None}
    assert adds_bos(metadata) == expected


def test_a_bos_token_is_added_only_if_the_file_says_so(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tokenizer__ggml__add_bos_token=False)
    model: Any = blt.load_model(str(file))
    bos = model.tokenizer.bos_token_id
    capture = blt.capture_gradients(model, "Once upon", blt.target_nll(5))
    assert bos not in capture.tokens
    forced = blt.capture_gradients(model, "Once upon", blt.target_nll(5), prepend_bos=True)
    assert forced.tokens[0].tolist() == [bos, *capture.tokens[0].tolist()]


def test_a_file_that_asks_for_a_bos_token_gets_one(model: Any) -> None:
    capture = blt.capture_gradients(model, "Once upon", blt.target_nll(5))
    assert (capture.tokens == model.tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, "▁a▁b"), ({"add_space_prefix": True}, "▁a▁b"), ({"add_space_prefix": False}, "a▁b")],
)
def test_a_space_before_a_text_unless_the_file_says_no(
    said: dict[str, bool], expected: str
) -> None:
    metadata = {f"tokenizer.ggml.{name}": own for name, own in said.items()}
    tokenizer = with_llamas_spaces(tokenizer_of("sentencepiece"), metadata)
    assert tokenizer.backend_tokenizer.normalizer.normalize_str("a b") == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_a_trained_llama_with_a_sentencepiece_tokenizer(
    kind: str, stories_folder: Path, tmp_path: Path
) -> None:
    require_kind(kind)
    model = AutoModelForCausalLM.from_pretrained(stories_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(stories_folder)
    file = write_stories(tmp_path / "stories.gguf", model, tokenizer)
    loaded: Any = blt.load_model(str(file), kind)
    for text in ("Once upon a time, Zoë", " She saw two cats.\n", "<s> She said:<s>  hi"):
        ids = tokenizer(text)["input_ids"]
        assert loaded.tokenizer(text)["input_ids"] == ids
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits
        assert relative_error(loaded(torch.tensor([ids])), expected) < 1e-5


def write_stories(path: Path, model: Any, tokenizer: Any) -> Path:
    """A Hugging Face Llama in float32 with its SentencePiece vocabulary."""
    from gguf import GGUFWriter

    config, vocabulary = model.config, tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    kinds = [3 if each in tokenizer.all_special_tokens else 1 for each in tokens]
    kinds = [
        6 if each.startswith("<0x") else kind for each, kind in zip(tokens, kinds, strict=True)
    ]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    ranks = {"".join(merge): -float(rank) for rank, merge in enumerate(merges)}
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([ranks.get(each, -1e6) for each in tokens])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(vocabulary["<unk>"])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    weights, heads = model.state_dict(), {"attn_q": config.num_attention_heads}
    heads["attn_k"] = config.num_key_value_heads
    layers = range(config.num_hidden_layers)
    own = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate")
    names = [f"blk.{layer}.{name}" for layer in layers for name in (*own, "ffn_up", "ffn_down")]
    if not config.tie_word_embeddings:
        names.append("output")
    for name in ("token_embd", "output_norm", *names):
        values = weights[hf_name(f"{name}.weight")].numpy()
        kind = name.split(".")[-1]
        writer.add_tensor(
            f"{name}.weight", interleaved(values, heads[kind]) if kind in heads else values
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ------------------------------------------------------------------------------------- errors


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """A file whose bytes are changed."""

    def write(folder: Path) -> Path:
        path = write_gguf(folder / "tiny.gguf")
        path.write_bytes(change(path.read_bytes()))
        return path

    return write


def changed(**changes: Any) -> Callable[[Path], Path]:
    return lambda folder: write_gguf(folder / "tiny.gguf", **changes)


REFUSALS: dict[str, tuple[Callable[[Path], Path], type[BackwardLensError], str]] = {
    "missing": (lambda folder: folder / "none.gguf", ModelNotFoundError, "No such file"),
    "a folder": (lambda folder: folder.with_suffix(".gguf"), ModelNotFoundError, "damaged or cut"),
    "empty": (damaged(lambda old: b""), ModelNotFoundError, "cannot mmap an empty file"),
    "cut off": (damaged(lambda old: old[:-100]), ModelNotFoundError, r"it has .* of .* bytes"),
    "cut in the header": (damaged(lambda old: old[:3000]), ModelNotFoundError, "download it again"),
    "another format": (damaged(lambda old: b"PK" + old), ModelNotFoundError, "begin with 'GGUF'"),
    "huge": (
        damaged(lambda old: old[:16] + struct.pack("<Q", 2**60) + old[24:]),
        ModelNotFoundError,
        "damaged or cut off",
    ),
    "version": (
        damaged(lambda old: old[:4] + struct.pack("<I", 1) + old[8:]),
        UnsupportedModelError,
        "has GGUF version 1, is for a big-endian machine, or is damaged",
    ),
    "one of several": (
        changed(split__count=3),
        UnsupportedModelError,
        "one of 3 files of a model; join them with llama.cpp's llama-gguf-split",
    ),
    "architecture": (
        changed(architecture="clip"),
        UnsupportedModelError,
        r"transformers .* does not load .* \(architecture 'clip'\): .* Load the model's folder",
    ),
    "split of texts": (
        changed(tokenizer__ggml__pre="viking"),
        UnsupportedModelError,
        r"tokenizer of .* cannot be rebuilt: .*'viking' \(tokenizer.ggml.pre\); known: codeshell",
    ),
    "no split of texts": (
        changed(tokenizer__ggml__pre=None), UnsupportedModelError, "splits texts as None"
    ),
    "kind of tokenizer": (
        changed(tokenizer__ggml__model="rwkv"), UnsupportedModelError, "cannot be rebuilt"
    ),
    "no tokens": (
        changed(tokenizer__ggml__tokens=None), UnsupportedModelError, "cannot be rebuilt"
    ),
    "rope factors": (
        changed(tensors=["rope_freqs.weight"]),
        UnsupportedModelError,
        r"scales its rotary angles \(rope_freqs.weight\)",
    ),
    "rope scaling": (
        changed(llama__rope__scaling__type="yarn"), UnsupportedModelError, r"angles \(yarn\)"
    ),
    "old rope scaling": (
        changed(llama__rope__scale_linear=4.0), UnsupportedModelError, r"angles \(linear\)"
    ),
    "a rope factor without a type": (
        changed(llama__rope__scaling__factor=4.0), UnsupportedModelError, r"angles \(linear\)"
    ),
    "a tensor that transformers ignores": (
        changed(tensors=["blk.0.attn_q.bias"]),
        UnsupportedModelError,
        "ignores 8 of 88,648 values in .* Load the model's folder",
    ),
    "a missing tensor": (
        changed(without=["blk.1.ffn_up.weight"]),
        UnsupportedModelError,
        "finds no tensor in .* for model.layers.1.mlp.up_proj.weight and 0 other weights",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("as_for_a_user")
@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, tmp_path: Path) -> None:
    write, kind, message = REFUSALS[case]
    with pytest.raises(kind, match=message):
        blt.load_model(str(write(tmp_path)))


def test_a_rope_factor_of_one_scales_nothing(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama__rope__scaling__factor=1.0)
    read_gguf(file, tmp_path, with_weights=False)


def test_the_package_gguf_is_optional(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_loading, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r"pip install 'backward-lens-tl\[gguf\]'"):
        blt.load_model(str(path))


def test_the_header_agrees_with_the_package_gguf(path: Path) -> None:
    from gguf import GGUFReader

    reader, file = GGUFReader(path), GGUFFile.read(path)
    named = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert file.metadata == {name: field.contents() for name, field in named.items()}
    assert [(each.name, each.kind, each.n_bytes) for each in file.tensors] == [
        (each.name, each.tensor_type.name, each.n_bytes) for each in reader.tensors
    ]
    starts = [each.offset + file.data_start for each in file.tensors]
    assert starts == [each.data_offset for each in reader.tensors]
    assert D_MODEL in file.tensors[0].shape
    assert len(file.tensors) == 2 + 9 * N_LAYERS
