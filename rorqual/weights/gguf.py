"""GGUF files of the dense members (llama and qwen2) into models: multiplied out, under our names.

The file's own layout differs from the hub's in one thing: llama's query and key rows are stored in the
interleaved order (channel i and i + half side by side), and are put back in half-split order here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.family import GQA, ModelConfig
from rorqual.family.hub import from_hub
from rorqual.nn import Transformer
from rorqual.weights.assign import assign, put, warn_of_zeros
from rorqual.weights.errors import CheckpointError, Problems

ARCHITECTURES = ("llama", "qwen2")
NAMES = {
    "embed": "token_embd",
    "head": "output",
    "norm": "output_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "attention_norm": "attn_norm",
    "ff_norm": "ffn_norm",
    "ff.gate": "ffn_gate",
    "ff.up": "ffn_up",
    "ff.down": "ffn_down",
}
ROPE_FREQS = "rope_freqs.weight"
"""Llama 3.1's frequency bands, as one divisor a frequency."""
LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def gguf_fields(path: str | PathLike[str]) -> dict[str, Any]:
    """The file's metadata as plain numbers, strings, booleans and lists.

    Raises CheckpointError for a file that can't be read, or if the `gguf` package is not installed.
    """
    path = Path(path)
    if path.is_file() and _recent.key == _key(path):
        return dict(_recent.fields)
    return dict(_open(path).fields)


def load_gguf(
    path: Path, *, dtype: torch.dtype, device: torch.device, build: Callable[..., Transformer] = Transformer
) -> Transformer:
    """The model of a GGUF file, all its parameters in `dtype`. See `rorqual.weights.load`."""
    file = _open(path)
    config = read_config(file, path).replace(dtype=str(dtype).removeprefix("torch."))
    model = build(config, dtype=dtype, device="meta")
    wanted = {_gguf_name(ours): (ours, tensor) for ours, tensor in model.state_dict(keep_vars=True).items()}
    problems = Problems()
    for name, (_, tensor) in wanted.items():
        if name not in file.tensors:
            problems.add("missing tensors", name)
        elif file.shape(name) != tuple(tensor.shape):
            shapes = f"expected {list(tensor.shape)}, found {list(file.shape(name))}"
            problems.add("misshapen tensors", f"{name}: {shapes}")
    for name in file.tensors.keys() - wanted.keys() - {ROPE_FREQS}:
        problems.add("unexpected tensors", name)
    problems.raise_if_any(path)
    zeros = 0
    for name, (ours, tensor) in wanted.items():
        slot = torch.empty(tensor.shape, dtype=dtype, device=device)
        zeros += put(slot, _half_split(file.values(name), ours, config), f"{name} in {path.name}")
        assign(model, ours, slot)
    warn_of_zeros(zeros, dtype, path)
    return model


@dataclass
class _File:
    """An opened GGUF file."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Any]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in our order (the file's is reversed)."""
        return tuple(int(n) for n in reversed(self.tensors[name].shape))

    def values(self, name: str) -> Tensor:
        """The tensor in fp32, multiplied out."""
        from gguf import quants

        stored = self.tensors[name]
        try:
            values = quants.dequantize(stored.data, stored.tensor_type)
        except (NotImplementedError, ValueError) as error:
            kind = stored.tensor_type.name
            raise CheckpointError(
                f"{self.path}: {name} has the type {kind}, which can't be read: {error}"
            ) from error
        owned = values if values.flags.writeable else values.copy()
        return torch.from_numpy(owned).reshape(self.shape(name))


@dataclass
class _Recent:
    """The metadata of the file read last: parsing takes seconds, and its weights and its tokenizer both ask."""

    key: tuple[str, int, int] | None = None
    fields: dict[str, Any] = field(default_factory=dict)


_recent = _Recent()


def _key(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns


def _open(path: Path) -> _File:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: expected a .gguf file")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading GGUF needs the `gguf` package: pip install 'rorqual[gguf]' (or 'rorqual[demo]')"
        ) from error
    try:
        reader = GGUFReader(path)
        fields = {name: _plain(entry.contents()) for name, entry in reader.fields.items()}
    except Exception as error:  # the reader raises whatever its parsing of a bad file runs into
        raise CheckpointError(
            f"{path}: truncated, corrupt or of an unknown type: {type(error).__name__}: {error}"
        ) from error
    size = path.stat().st_size
    for tensor in reader.tensors:
        end = int(tensor.data_offset) + int(tensor.n_bytes)
        if end > size:
            raise CheckpointError(f"{path}: truncated: {tensor.name} ends at byte {end}, the file has {size}")
    _recent.key, _recent.fields = _key(path), fields
    return _File(path, fields, {tensor.name: tensor for tensor in reader.tensors})


def _plain(value: Any) -> Any:
    """Numbers, strings and lists of Python's own kinds; an fp32 number as its shortest decimal."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, bool | str | int):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    return float(f"{value:.7g}") if isinstance(value, float) else value


# --------------------------------------------------------------------------------------------- config


def read_config(file: _File, path: Path) -> ModelConfig:
    """The config that the file's metadata describes. Raises CheckpointError for an unsupported architecture."""
    fields = file.fields
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: architecture {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}"
        )
    if int(fields.get("split.count", 1)) > 1:
        raise CheckpointError(
            f"{path} is one part of {fields['split.count']}: merge them with llama-gguf-split first"
        )
    own = {key.removeprefix(f"{architecture}."): value for key, value in fields.items()}

    def need(key: str) -> Any:
        if key not in own:
            raise CheckpointError(f"{path}: its metadata has no {architecture}.{key}")
        return own[key]

    if own.get("expert_count"):
        raise CheckpointError(f"{path}: a GGUF file with {own['expert_count']} experts is not supported")
    hidden, heads = need("embedding_length"), need("attention.head_count")
    head_dim = own.get("attention.key_length", hidden // heads)
    if own.get("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(
            f"{path}: rotary dimension {own['rope.dimension_count']} is not the head's {head_dim}"
        )
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{path}: missing tensor token_embd.weight")
    mapping = {
        "model_type": architecture,
        "vocab_size": file.shape("token_embd.weight")[0],
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_theta": own.get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16",
        "bos_token_id": own.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": own.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": own.get("tokenizer.ggml.padding_token_id"),
    }
    if architecture == "llama":
        mapping["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if scaling := _rope_scaling(own, file, path, head_dim, mapping["rope_theta"]):
        mapping["rope_scaling"] = scaling
    return from_hub({k: v for k, v in mapping.items() if v is not None}, source=str(path))


def _rope_scaling(
    own: Mapping[str, Any], file: _File, path: Path, head_dim: int, theta: float
) -> dict[str, Any] | None:
    """The hub's `rope_scaling` of the file, or None."""
    if ROPE_FREQS in file.tensors:
        return _llama3_scaling(file.values(ROPE_FREQS).flatten(), path, head_dim, theta)
    kind = own.get("rope.scaling.type", "linear" if "rope.scale_linear" in own else "none")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise CheckpointError(f"{path}: rope scaling {kind!r} is not supported, only linear and yarn")
    original = own.get("rope.scaling.original_context_length")
    if original is None:
        raise CheckpointError(f"{path}: YaRN needs rope.scaling.original_context_length in the metadata")
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if (value := own.get(f"rope.scaling.{theirs}")) is not None:
            scaling[ours] = value
    attention = own.get("rope.scaling.attn_factor")
    if attention is not None and attention != 1.0:
        # The file's factor multiplies the one YaRN has by itself.
        scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return scaling


def _llama3_scaling(divisors: Tensor, path: Path, head_dim: int, theta: float) -> dict[str, Any] | None:
    """Which Llama 3 scaling gives these divisors of the frequencies; None if they are all one."""
    factor = float(divisors.max())
    if factor == 1.0:
        return None
    low, high, original = LLAMA3_BANDS.values()
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = original * frequency / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not torch.allclose(divisors.double(), expected, rtol=1e-4):
        raise CheckpointError(f"{path}: {ROPE_FREQS} holds frequencies that no known rope scaling gives")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_BANDS}


# -------------------------------------------------------------------------------------------- tensors


def _gguf_name(ours: str) -> str:
    match = re.match(r"layers\.(\d+)\.", ours)
    prefix, rest = (f"blk.{match[1]}.", ours[match.end() :]) if match else ("", ours)
    stem, _, leaf = rest.rpartition(".")
    return f"{prefix}{NAMES[stem]}.{leaf}"


def _half_split(values: Tensor, ours: str, config: ModelConfig) -> Tensor:
    """llama's query and key rows (weights or biases) back in the hub's order."""
    if config.model_type != "llama" or not re.search(r"\.attention\.[qk]\.", ours):
        return values
    attention = config.layers[0].attention
    assert isinstance(attention, GQA)
    heads = attention.heads if ".q." in ours else attention.kv_heads
    return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(values.shape)
