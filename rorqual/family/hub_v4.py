"""config.json of deepseek_v4 in both directions."""

from __future__ import annotations

from typing import Any

from rorqual.family.fields import Fields
from rorqual.family.hub_dense import layer_count
from rorqual.family.hub_mla import mtp_count, read_index, read_moe, read_router, write_index, write_moe
from rorqual.family.hub_rope import THETA, Scaling, plain, read_scaling, write_scaling
from rorqual.family.parts import (
    Compress,
    CompressedAttention,
    ConfigError,
    HyperConnection,
    Layer,
    ModelConfig,
    MoE,
    Rope,
)

NAMES = {
    "SWA": "sliding_attention",
    "CSA": "compressed_sparse_attention",
    "HCA": "heavily_compressed_attention",
}
"""transformers' names of the attention kinds."""
RATES = {"CSA": 4, "HCA": 128}
"""Tokens to an entry in released models; only these can be told apart by `compress_ratios` alone."""


def read_layers(
    fields: Fields, model_type: str
) -> tuple[tuple[Layer, ...], tuple[Layer, ...], HyperConnection]:
    """The main layers, the MTP layers and the residual streams."""
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields.only("num_key_value_heads", 1)
    count = layer_count(fields)
    mtp = mtp_count(fields, allowed=True)
    kinds, rates = _kinds(fields, count, mtp)
    plain_rope, stretched = _ropes(fields)
    fields.asked |= {"index_n_heads", "index_head_dim", "index_topk"}
    index = read_index(fields) if "CSA" in kinds else None

    def attention(kind: str) -> CompressedAttention:
        compress = None
        if kind != "SWA":
            compress = Compress(rates[kind], overlap=kind == "CSA", index=index if kind == "CSA" else None)
        return CompressedAttention(
            heads=fields.size("num_attention_heads"),
            head_dim=fields.size("head_dim"),
            q_rank=fields.size("q_lora_rank"),
            o_groups=fields.size("o_groups"),
            o_rank=fields.size("o_lora_rank"),
            window=fields.size("sliding_window"),
            rope=plain_rope if kind == "SWA" else stretched,
            compress=compress,
        )

    limit = fields.number("swiglu_limit", 10.0)
    if limit < 0:
        raise fields.error("swiglu_limit", f"must be positive, or 0 for none, got {limit}")
    width = fields.maybe_whole("intermediate_size")
    if width is not None and width != fields.size("moe_intermediate_size"):
        raise fields.error("intermediate_size", f"({width}) contradicts moe_intermediate_size")
    experts = {
        hashed: read_moe(fields, read_router(fields, model_type, hashed=hashed), limit or None)
        for hashed in (False, True)
    }
    hashed = _hashed(fields, count)
    parts = {kind: attention(kind) for kind in {*kinds, "SWA"}}
    layers = tuple(Layer(parts[kind], experts[table]) for kind, table in zip(kinds, hashed, strict=True))
    residual = HyperConnection(
        streams=fields.size("hc_mult"),
        iterations=fields.size("hc_sinkhorn_iters", 20),
        eps=fields.number("hc_eps", 1e-6, above=0),
    )
    return layers, (Layer(parts["SWA"], experts[False]),) * mtp, residual


def _kinds(fields: Fields, count: int, mtp: int) -> tuple[list[str], dict[str, int]]:
    """Each main layer's attention kind, and the ratio of CSA and HCA."""
    rates = dict(RATES)
    table = fields.inner("compress_rates")
    if table is not None:
        for kind in RATES:
            rates[kind] = table.size(NAMES[kind], rates[kind])
        fields.close(table)
    for kind, name in (("CSA", "compress_rate_csa"), ("HCA", "compress_rate_hca")):
        rates[kind] = fields.size(name, rates[kind])
    ratios = fields.whole_list("compress_ratios")
    named = fields.text_list("layer_types")
    kinds = _by_name(fields, named, count) if named is not None else None
    if ratios is None:
        if kinds is None:
            raise fields.error("compress_ratios", "is missing, and so is layer_types")
        return kinds, rates
    if len(ratios) not in (count, count + mtp):
        raise fields.error(
            "compress_ratios", f"has {len(ratios)} entries for {count} layers and {mtp} MTP layers"
        )
    if any(ratios[count:]):
        raise fields.error("compress_ratios", f"of MTP layers must be 0, got {ratios[count:]}")
    by_ratio = {0: "SWA", rates["HCA"]: "HCA", rates["CSA"]: "CSA"}
    for position, ratio in enumerate(ratios[:count]):
        if ratio not in by_ratio:
            listed = ", ".join(map(str, sorted(by_ratio)))
            raise fields.error("compress_ratios", f"{ratio} is not supported: only {listed} are")
        if kinds is not None and (rates[kinds[position]] if kinds[position] != "SWA" else 0) != ratio:
            raise fields.error("compress_ratios", f"{ratio} of layer {position} contradicts layer_types")
    return kinds or [by_ratio[ratio] for ratio in ratios[:count]], rates


def _by_name(fields: Fields, named: list[str], count: int) -> list[str]:
    """Attention kinds from transformers' names."""
    kinds = {name: kind for kind, name in NAMES.items()}
    if len(named) != count:
        raise fields.error("layer_types", f"has {len(named)} entries for {count} layers")
    for name in named:
        if name not in kinds:
            raise fields.error("layer_types", f'"{name}" is not supported: only {", ".join(kinds)} are')
    return [kinds[name] for name in named]


def _hashed(fields: Fields, count: int) -> list[bool]:
    """For each layer, whether its experts come from the table."""
    kinds = fields.text_list("mlp_layer_types")
    first = fields.maybe_whole("num_hash_layers")
    by_count = None if first is None else [i < first for i in range(count)]
    if kinds is None:
        if by_count is None:
            raise fields.error("num_hash_layers", "is missing, and so is mlp_layer_types")
        return by_count
    if len(kinds) != count:
        raise fields.error("mlp_layer_types", f"has {len(kinds)} entries for {count} layers")
    for kind in kinds:
        if kind not in ("moe", "hash_moe"):
            raise fields.error("mlp_layer_types", f'"{kind}" is not supported: only "moe" or "hash_moe" is')
    by_name = [kind == "hash_moe" for kind in kinds]
    if by_count is not None and by_count != by_name:
        raise fields.error("num_hash_layers", f"({first}) contradicts mlp_layer_types")
    return by_name


def _ropes(fields: Fields) -> tuple[Rope, Rope]:
    """The rope of window-only layers, and that of compressing layers."""
    dim = _rotary_dim(fields)
    theta = fields.maybe_number("rope_theta", above=0)
    far = fields.maybe_number("compress_rope_theta", above=0)
    found: list[Scaling | None] = []
    for name in ("rope_scaling", "rope_parameters"):
        table = fields.inner(name)
        if table is None:
            continue
        main, compress = table.inner("main"), table.inner("compress")
        if main is None and compress is None:  # flat: the base is the main one, the scaling is the other's
            main = compress = table
        if main is not None:
            theta = _agree(fields, "rope_theta", theta, main, "rope_theta")
            _fraction(fields, main, dim)
            if main is not compress:
                main.only("rope_type", "default")
                table.close(main)
        if compress is not None:
            if main is not compress:
                far = _agree(fields, "compress_rope_theta", far, compress, "rope_theta")
            _fraction(fields, compress, dim)
            found.append(read_scaling(compress, amplitude=1.0))
            if compress is not table:
                table.close(compress)
        fields.close(table)
    if len(found) == 2 and found[0] != found[1]:
        raise fields.error("rope_scaling", "contradicts rope_parameters: keep one of them")
    if far is None:
        raise fields.error("compress_rope_theta", "is missing")
    near = Rope(dim, THETA if theta is None else theta, None, interleaved=True)
    return near, Rope(dim, far, found[0] if found else None, interleaved=True)


def _rotary_dim(fields: Fields) -> int:
    """`qk_rope_head_dim`, or the fraction of the head that `partial_rotary_factor` says."""
    dim = _fraction(fields, fields, fields.maybe_whole("qk_rope_head_dim", least=1))
    if dim is None:
        raise fields.error("qk_rope_head_dim", "is missing, and so is partial_rotary_factor")
    head_dim = fields.size("head_dim")
    if dim % 2 or dim < 2 or dim > head_dim:
        raise fields.error("qk_rope_head_dim", f"must be even and at most head_dim ({head_dim}), got {dim}")
    return dim


def _fraction(fields: Fields, table: Fields, dim: int | None) -> int | None:
    """The rotary channels of a head, which `partial_rotary_factor` of `table` must agree with."""
    part = table.maybe_number("partial_rotary_factor", above=0)
    if part is None:
        return dim
    if part > 1:
        raise table.error("partial_rotary_factor", f"must be at most 1, got {part}")
    ours = int(fields.size("head_dim") * part)
    if dim is not None and dim != ours:
        raise table.error("partial_rotary_factor", f"means {ours} channels, which contradicts {dim}")
    return ours


def _agree(fields: Fields, name: str, value: float | None, table: Fields, inner: str) -> float | None:
    """Whichever of `value` (of field `name`) and the number in `table` is given; they must be equal."""
    other = table.maybe_number(inner, above=0)
    if value is not None and other is not None and value != other:
        raise table.error(inner, f"{plain(other)} contradicts {name} {plain(value)}")
    return value if other is None else other


# ----------------------------------------------------------------------------------------- writing


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields that describe a V4 model's layers.

    A model with other ratios than 4 and 128 also gets `layer_types` and `compress_rates`, which transformers
    needs to tell the kinds apart.
    """
    layers = [*config.layers, *config.mtp]
    parts = [layer.attention for layer in layers if isinstance(layer.attention, CompressedAttention)]
    moes = [layer.ff for layer in layers if isinstance(layer.ff, MoE)]
    if len(parts) != len(layers) or len(moes) != len(layers) or config.residual is None:
        raise ConfigError("model_type deepseek_v4 needs compressed attention, experts and hyper-connections")
    part, moe, count = parts[0], moes[0], len(config.layers)
    near = next((p.rope for p in parts if p.compress is None), None)
    far = next((p.rope for p in parts if p.compress is not None), None)
    compressors = [p.compress for p in parts if p.compress is not None]
    index = next((c.index for c in compressors if c.index is not None), None)
    hashed = [m.router.hashed for m in moes[:count]]
    scaling = write_scaling(far.scaling) if far is not None else None
    if scaling is not None and scaling.get("attention_factor") == 1.0:
        del scaling["attention_factor"]
    out: dict[str, Any] = {
        "num_attention_heads": part.heads,
        "num_key_value_heads": 1,
        "head_dim": part.head_dim,
        "qk_rope_head_dim": part.rope.dim,
        "q_lora_rank": part.q_rank,
        "o_groups": part.o_groups,
        "o_lora_rank": part.o_rank,
        "sliding_window": part.window,
        "rope_theta": plain(near.theta if near is not None else THETA),
        "compress_rope_theta": plain(far.theta if far is not None else THETA),
        "rope_scaling": scaling,
        "compress_ratios": [p.compress.ratio if p.compress is not None else 0 for p in parts],
        "num_hash_layers": sum(hashed),
        "num_nextn_predict_layers": len(config.mtp),
        "hc_mult": config.residual.streams,
        "hc_sinkhorn_iters": config.residual.iterations,
        "hc_eps": config.residual.eps,
        "attention_bias": False,
        **write_moe(moe, config.model_type),
        "swiglu_limit": moe.limit or 0.0,
    }
    if index is not None:
        out |= write_index(index)
    rates = {p.kind: p.compress.ratio for p in parts if p.compress is not None}
    if any(RATES[kind] != rate for kind, rate in rates.items()):
        out["compress_rates"] = {NAMES[kind]: rates.get(kind, RATES[kind]) for kind in RATES}
        out["layer_types"] = [NAMES[p.kind] for p in parts[:count]]
    if hashed != sorted(hashed, reverse=True):
        del out["num_hash_layers"]
        out["mlp_layer_types"] = ["hash_moe" if by_table else "moe" for by_table in hashed]
    return out
