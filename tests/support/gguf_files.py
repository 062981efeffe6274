"""Small GGUF files, and their values by the format's specification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizer_kinds import tokenizer_of
from transformers import LlamaConfig, LlamaForCausalLM

SPLIT = "smollm"
N_HEADS, N_KV_HEADS, D_HEAD, D_MLP, N_LAYERS = 4, 2, 16, 96, 2
D_MODEL = N_HEADS * D_HEAD
"""Widths are multiples of 32, the size of a block of quantized values."""


def values_of(data: np.ndarray, kind: str) -> np.ndarray:
    """The values of a stored tensor, one block of 32 at a time.

    By ggml's specification: Q8_0 is a scale `d` (float16) and 32 signed bytes `q`, with values
    `d * q`. Q4_1 is `d`, a minimum `m` (both float16), and 16 bytes; the lower halves of the bytes
    are `q` of the first 16 values, the upper halves those of the last 16, with values `d * q + m`.
    """
    if kind == "Q8_0":
        blocks = data.reshape(*data.shape[:-1], -1, 34)
        scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
        values = scale * blocks[..., 2:].view(np.int8)
    elif kind == "Q4_1":
        blocks = data.reshape(*data.shape[:-1], -1, 20)
        scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
        least = blocks[..., 2:4].copy().view(np.float16).astype(np.float32)
        halves = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
        values = scale * halves + least
    else:
        return data.astype(np.float32)
    return values.reshape(*data.shape[:-1], -1).astype(np.float32)


_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def hf_name(name: str) -> str:
    """The name of a Llama's tensor in transformers."""
    *layer, own, suffix = name.split(".")
    front = f"model.layers.{layer[1]}." if layer else ""
    return f"{front}{_NAMES[own]}.{suffix}"


def interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows in llama.cpp's order: rotary embeddings turn neighbours, not halves, of a head."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def deinterleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows in transformers's order."""
    pairs = weight.reshape(n_heads, -1, 2, weight.shape[1])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(weight.shape)


def plain_llama(path: Path, *, permute: bool = True) -> Any:
    """A GGUF file's Llama in transformers, without its or this package's readers."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    field = {name: entry.contents() for name, entry in reader.fields.items() if len(entry.data) < 9}
    heads = {"attn_q": field["llama.attention.head_count"]}
    heads["attn_k"] = field["llama.attention.head_count_kv"]
    weights = {}
    for tensor in reader.tensors:
        values = values_of(np.array(tensor.data), tensor.tensor_type.name)
        kind = tensor.name.split(".")[-2]
        if permute and kind in heads:
            values = deinterleaved(values, heads[kind])
        weights[hf_name(tensor.name)] = torch.from_numpy(values)
    is_tied = "lm_head.weight" not in weights
    config = LlamaConfig(
        vocab_size=len(weights["model.embed_tokens.weight"]),
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=field["llama.block_count"],
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        max_position_embeddings=field["llama.context_length"],
        rms_norm_eps=field["llama.attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=is_tied,
        attn_implementation="eager",
    )
    theta = field["llama.rope.freq_base"]
    if hasattr(config, "rope_parameters"):  # transformers 5
        config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    else:
        config.rope_theta = theta
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if is_tied else [])
    return model.float().eval()


def write_gguf(path: Path, **changes: Any) -> Path:
    """A small random Llama with a byte-level tokenizer, stored in four types.

    Args:
        path: The file.
        **changes: Metadata by name, with `__` for a dot; `None` leaves an entry out. `tensors` adds
            names of tensors, `without` leaves tensors out, `architecture` replaces `llama`.

    Returns:
        The file.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    extra, without = changes.pop("tensors", ()), changes.pop("without", ())
    architecture = changes.pop("architecture", "llama")
    backend = json.loads(tokenizer_of("byte-level").backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {each["content"] for each in backend["added_tokens"]}
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": SPLIT,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in backend["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": vocabulary["<bos>"],
        "tokenizer.ggml.eos_token_id": vocabulary["<eos>"],
        "tokenizer.ggml.unknown_token_id": vocabulary["<unk>"],
        "tokenizer.ggml.padding_token_id": vocabulary["<pad>"],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}",
        f"{architecture}.block_count": N_LAYERS,
        f"{architecture}.context_length": 64,
        f"{architecture}.embedding_length": D_MODEL,
        f"{architecture}.feed_forward_length": D_MLP,
        f"{architecture}.attention.head_count": N_HEADS,
        f"{architecture}.attention.head_count_kv": N_KV_HEADS,
        f"{architecture}.rope.freq_base": 700.0,
        f"{architecture}.rope.dimension_count": D_HEAD,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
    }
    metadata |= {name.replace("__", "."): value for name, value in changes.items()}
    writer = GGUFWriter(path, architecture)
    for name, value in metadata.items():
        _add(writer, name, value)
    random = np.random.default_rng(0)
    for name, shape, kind in (*_tensors(len(tokens)), *((each, (8,), "F32") for each in extra)):
        if name in without:
            continue
        noise = random.standard_normal(shape).astype(np.float32)
        values = 1 + 0.3 * noise if len(shape) == 1 else 0.2 * noise
        if kind == "F32":
            writer.add_tensor(name, values)
        elif kind == "F16":
            writer.add_tensor(name, values.astype(np.float16))
        else:
            stored = GGMLQuantizationType[kind]
            writer.add_tensor(name, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _tensors(n_tokens: int) -> list[tuple[str, tuple[int, ...], str]]:
    """Names, shapes and types."""
    d_kv = N_KV_HEADS * D_HEAD
    found: list[tuple[str, tuple[int, ...], str]] = [
        ("token_embd.weight", (n_tokens, D_MODEL), "Q8_0"),
        ("output_norm.weight", (D_MODEL,), "F32"),
    ]
    for layer in range(N_LAYERS):
        found += [
            (f"blk.{layer}.{name}.weight", shape, kind)
            for name, shape, kind in (
                ("attn_norm", (D_MODEL,), "F32"),
                ("attn_q", (D_MODEL, D_MODEL), "Q4_1"),
                ("attn_k", (d_kv, D_MODEL), "Q4_1"),
                ("attn_v", (d_kv, D_MODEL), "F16"),
                ("attn_output", (D_MODEL, D_MODEL), "Q8_0"),
                ("ffn_norm", (D_MODEL,), "F32"),
                ("ffn_gate", (D_MLP, D_MODEL), "Q4_1"),
                ("ffn_up", (D_MLP, D_MODEL), "Q4_1"),
                ("ffn_down", (D_MODEL, D_MLP), "Q4_1" if layer else "Q8_0"),
            )
        ]
    return found
