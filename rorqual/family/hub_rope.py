"""Rotary positions and FP8 storage in the hub's config.json."""

from __future__ import annotations

import math
from typing import Any

from rorqual.family.fields import Fields
from rorqual.family.parts import ConfigError, LinearScaling, Llama3Scaling, Quantization, Rope, Yarn

Scaling = LinearScaling | Llama3Scaling | Yarn
THETA = 10000.0
"""The base that transformers assumes when a file names none."""


def plain(value: float) -> int | float:
    """A whole float as an int, the way released files write rope bases and factors."""
    return int(value) if float(value).is_integer() else value


def read_scaling(table: Fields, amplitude: float | None = None) -> Scaling | None:
    """The scaling an object of either field style describes, None for plain positions.

    Args:
        table: `rope_scaling` of released files or `rope_parameters` of transformers 5.
        amplitude: YaRN's multiplier of cos and sin where the object is silent; None derives it.

    Raises:
        ConfigError: an unknown kind, a missing number, or two kinds at once.
    """
    kind = table.text("rope_type", table.text("type", "default"))
    if "type" in table and table.text("type") != kind:
        raise table.error("type", f'"{table.raw("type")}" contradicts rope_type "{kind}"')
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(table.number("factor", above=0))
    if kind == "llama3":
        return Llama3Scaling(
            factor=table.number("factor", above=0),
            original=table.size("original_max_position_embeddings"),
            low=table.number("low_freq_factor", above=0),
            high=table.number("high_freq_factor", above=0),
        )
    if kind == "yarn":
        return _read_yarn(table, amplitude)
    name = "rope_type" if "rope_type" in table else "type"
    raise table.error(name, f'"{kind}" is not supported: only "default", "linear", "llama3" or "yarn" is')


def _read_yarn(table: Fields, amplitude: float | None) -> Yarn:
    table.only("truncate", True)
    factor = table.number("factor", above=0)
    mscale = table.maybe_number("mscale")
    given = table.maybe_number("attention_factor", above=0)
    relative = table.maybe_number("attn_factor", above=0)
    if given is not None:
        amplitude = given
    elif relative is not None:
        # R1-0528-Qwen3-8B: a multiplier on top of YaRN's own, which serving engines honour.
        amplitude = relative * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return Yarn(
        factor=factor,
        original=table.size("original_max_position_embeddings"),
        beta_fast=table.number("beta_fast", 32.0, above=0),
        beta_slow=table.number("beta_slow", 1.0, above=0),
        mscale=mscale,
        mscale_all_dim=table.maybe_number("mscale_all_dim"),
        amplitude=amplitude,
    )


def read_rope(fields: Fields, dim: int, *, interleaved: bool, fraction: bool = True) -> Rope:
    """The one rope of every generation but V4, from `rope_theta` with `rope_scaling`, or `rope_parameters`.

    Args:
        fields: the file.
        dim: rotary channels.
        interleaved: the layout of the channel pairs.
        fraction: whether `partial_rotary_factor` would change `dim`. For MLA it says nothing: its rotary
            channels have a field of their own (and transformers 5.17 writes a fraction of another width).

    Raises:
        ConfigError: unsupported scaling, or two places that contradict each other.
    """
    _check_fraction(fields, fraction)
    theta = fields.maybe_number("rope_theta", above=0)
    found: list[tuple[str, Scaling | None]] = []
    for name in ("rope_scaling", "rope_parameters"):
        table = fields.inner(name)
        if table is None:
            continue
        _check_fraction(table, fraction)
        found.append((name, read_scaling(table)))
        inside = table.maybe_number("rope_theta", above=0)
        if theta is not None and inside is not None and inside != theta:
            raise fields.error("rope_theta", f"{plain(theta)} contradicts {name}.rope_theta {plain(inside)}")
        theta = theta if inside is None else inside
        fields.close(table)
    if len(found) == 2 and found[0][1] != found[1][1]:
        raise fields.error("rope_scaling", "contradicts rope_parameters: keep one of them")
    return Rope(dim, THETA if theta is None else theta, found[0][1] if found else None, interleaved)


def _check_fraction(table: Fields, matters: bool) -> None:
    if matters:
        table.only("partial_rotary_factor", 1.0, 1)
    else:
        table.maybe_number("partial_rotary_factor", above=0)


def write_rope(rope: Rope, *, kind: str = "type") -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` as released files have them; `kind` names the kind's field."""
    return {"rope_theta": plain(rope.theta), "rope_scaling": write_scaling(rope.scaling, kind=kind)}


def write_scaling(scaling: Scaling | None, *, kind: str = "type") -> dict[str, Any] | None:
    """A `rope_scaling` object, None for plain positions."""
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"factor": scaling.factor, kind: "linear"}
    if isinstance(scaling, Llama3Scaling):
        return {
            "factor": scaling.factor,
            "high_freq_factor": scaling.high,
            "low_freq_factor": scaling.low,
            "original_max_position_embeddings": scaling.original,
            kind: "llama3",
        }
    table = {
        "attention_factor": scaling.amplitude,
        "beta_fast": plain(scaling.beta_fast),
        "beta_slow": plain(scaling.beta_slow),
        "factor": plain(scaling.factor),
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
        "original_max_position_embeddings": scaling.original,
        kind: "yarn",
    }
    return {name: value for name, value in table.items() if value is not None}


# ----------------------------------------------------------------------------------------- storage

_EXPERTS = ("fp8", "fp4")


def read_quantization(fields: Fields) -> Quantization | None:
    """How the matrices are stored, None for plain ones.

    Raises:
        ConfigError: any method but FP8 E4M3 in blocks with dynamic activation scales, FP4 experts beside it.
    """
    table = fields.inner("quantization_config")
    fields.only("expert_dtype", *_EXPERTS)
    experts = fields.raw("expert_dtype")
    if table is None:
        if experts == "fp4":
            raise fields.error("expert_dtype", '"fp4" needs a quantization_config beside it')
        return None
    if "quant_method" not in table:
        raise table.error("quant_method", "is missing")
    table.only("quant_method", "fp8")
    table.only("fmt", "e4m3")
    table.only("activation_scheme", "dynamic")
    table.only("scale_fmt", "ue8m0")
    table.only("expert_dtype", *_EXPERTS)
    inner = table.raw("expert_dtype")
    if experts is not None and inner is not None and experts != inner:
        raise fields.error("expert_dtype", f'"{experts}" contradicts quantization_config\'s "{inner}"')
    block = table.whole_list("weight_block_size")
    if block is None:
        raise table.error("weight_block_size", "is missing: only weights scaled in blocks are supported")
    if len(block) != 2 or min(block) < 1:
        raise table.error("weight_block_size", f"must be two positive whole numbers, got {block!r}")
    table.asked |= {"modules_to_not_convert", "ignored_layers"}  # the files' own dtypes say it
    fields.close(table)
    return Quantization((block[0], block[1]), "scale_fmt" in table, experts or inner or "fp8")


def write_quantization(quantization: Quantization | None, model_type: str) -> dict[str, Any]:
    """The fields that say how the matrices are stored; none for plain ones."""
    if quantization is None:
        return {}
    table: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(quantization.block),
    }
    if quantization.ue8m0:
        table["scale_fmt"] = "ue8m0"
    out: dict[str, Any] = {"quantization_config": table}
    if model_type == "deepseek_v4":
        out["expert_dtype"] = quantization.experts
    elif quantization.experts != "fp8":
        raise ConfigError(f"{quantization.experts} experts can only be written for deepseek_v4")
    return out
