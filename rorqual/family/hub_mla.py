"""config.json of deepseek (MoE-16B), deepseek_v2, deepseek_v3 and deepseek_v32 in both directions."""

from __future__ import annotations

from typing import Any

from rorqual.family.fields import Fields
from rorqual.family.hub_dense import layer_count, read_attention, write_attention
from rorqual.family.hub_rope import read_rope, write_rope
from rorqual.family.parts import GQA, MLA, ConfigError, Index, Layer, ModelConfig, MoE, Router, SwiGLU

METHODS = {
    "deepseek": ("greedy",),
    "deepseek_v2": ("greedy", "group_limited_greedy", "noaux_tc"),
    "deepseek_v3": ("noaux_tc",),
    "deepseek_v32": ("noaux_tc",),
    "deepseek_v4": ("noaux_tc",),
}
"""How each generation chooses experts; the first is what a file that names none means."""
SCORES = {
    "deepseek": "softmax",
    "deepseek_v2": "softmax",
    "deepseek_v3": "sigmoid",
    "deepseek_v32": "sigmoid",
    "deepseek_v4": "sqrtsoftplus",
}
"""The router score of a file that names none."""
LATE = ("deepseek_v3", "deepseek_v32", "deepseek_v4")
"""Generations whose files always name their scaling factor, and which normalise unless told otherwise."""

# fmt: off
EXPERT_FIELDS = frozenset({
    "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group",
    "topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace",
    "mlp_layer_types",
})
# fmt: on
"""Fields that have no effect in a model without experts, but are known."""


def read_layers(fields: Fields, model_type: str) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """The main layers and the MTP layers."""
    fields.only("hidden_act", "silu")
    fields.only("mlp_bias", False)
    fields.only("moe_layer_freq", 1)
    fields.only("use_mla", True)
    if model_type == "deepseek":
        attention: GQA | MLA = read_attention(fields, model_type)
    else:
        attention = read_mla(fields, model_type)
    count = layer_count(fields)
    sparse = _sparse_layers(fields, model_type, count)
    fields.asked |= {"intermediate_size", *EXPERT_FIELDS}
    dense: tuple[Layer, ...] = ()
    experts: tuple[Layer, ...] = ()
    if not all(sparse):
        dense = (Layer(attention, SwiGLU(fields.size("intermediate_size"))),)
    if any(sparse):
        experts = (Layer(attention, read_moe(fields, read_router(fields, model_type))),)
    layers = tuple((experts if moe else dense)[0] for moe in sparse)
    return layers, (layers[-1],) * mtp_count(fields, model_type in LATE)


def mtp_count(fields: Fields, allowed: bool) -> int:
    """How many multi-token prediction layers there are: `num_nextn_predict_layers` or `num_mtp_layers`."""
    counts = {name: fields.maybe_whole(name) for name in ("num_nextn_predict_layers", "num_mtp_layers")}
    given = {name: count for name, count in counts.items() if count is not None}
    if len(set(given.values())) > 1:
        raise fields.error("num_nextn_predict_layers", f"contradicts num_mtp_layers: {given}")
    for name, count in given.items():
        if count and not allowed:
            raise fields.error(name, f"{count} is not supported by this model_type: only 0 is")
        if count > 100:
            raise fields.error(name, f"must be 100 or fewer, got {count}")
        return count
    return 0


def _sparse_layers(fields: Fields, model_type: str, count: int) -> list[bool]:
    """For each layer, whether it has experts: `first_k_dense_replace` or `mlp_layer_types`, which must agree.

    In V3.2's files the list goes first, for its layers may alternate.
    """
    kinds = fields.text_list("mlp_layer_types")
    if not fields.given("n_routed_experts"):
        raise fields.error("n_routed_experts", "is missing (null means that every layer is dense)")
    if "n_routed_experts" not in fields:
        if kinds is not None and "sparse" in kinds:
            raise fields.error("mlp_layer_types", "has sparse layers, but n_routed_experts is null")
        return [False] * count
    if kinds is None:
        first = min(fields.whole("first_k_dense_replace"), count)
        return [False] * first + [True] * (count - first)
    if len(kinds) != count:
        raise fields.error("mlp_layer_types", f"has {len(kinds)} entries for {count} layers")
    for kind in kinds:
        if kind not in ("dense", "sparse"):
            raise fields.error("mlp_layer_types", f'"{kind}" is not supported: only "dense" or "sparse" is')
    named = [kind == "sparse" for kind in kinds]
    if model_type != "deepseek_v32":
        first = min(fields.whole("first_k_dense_replace"), count)
        if named != [False] * first + [True] * (count - first):
            raise fields.error("mlp_layer_types", f"contradicts first_k_dense_replace ({first})")
    return named


def read_mla(fields: Fields, model_type: str) -> MLA:
    """Latent attention, with V3.2's indexer."""
    fields.only("attention_bias", False)
    heads = fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    if kv_heads != heads:
        raise fields.error("num_key_value_heads", f"({kv_heads}) must equal num_attention_heads ({heads})")
    if model_type == "deepseek_v3":
        interleaved = fields.flag("rope_interleave", True)
    else:
        fields.only("rope_interleave", True)
        interleaved = True
    rope_dim = fields.size("qk_rope_head_dim")
    if rope_dim % 2:
        raise fields.error("qk_rope_head_dim", f"must be even, got {rope_dim}")
    index = None
    if model_type == "deepseek_v32":
        fields.only("indexer_rope_interleave", False)
        fields.entries("layer_types", layer_count(fields))
        for kind in fields.text_list("layer_types") or []:
            if kind not in (
                "indexed_attention",
                "deepseek_sparse_attention",
            ):  # two spellings of transformers
                raise fields.error("layer_types", f'"{kind}" is not supported: only "indexed_attention" is')
        index = read_index(fields)
    nope_dim = fields.size("qk_nope_head_dim")
    fields.repeats("qk_head_dim", nope_dim + rope_dim, "qk_nope_head_dim + qk_rope_head_dim")
    fields.repeats("head_dim", rope_dim, "qk_rope_head_dim")  # so transformers writes it
    if not fields.given("q_lora_rank"):
        raise fields.error("q_lora_rank", "is missing (null means queries without a latent)")
    return MLA(
        heads=heads,
        kv_rank=fields.size("kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        v_dim=fields.size("v_head_dim"),
        rope=read_rope(fields, rope_dim, interleaved=interleaved, fraction=False),
        q_rank=fields.maybe_whole("q_lora_rank", least=1),
        index=index,
    )


def read_index(fields: Fields) -> Index:
    """The lightning indexer."""
    return Index(fields.size("index_n_heads"), fields.size("index_head_dim"), fields.size("index_topk"))


def read_moe(fields: Fields, router: Router, limit: float | None = None) -> MoE:
    """Routed and shared experts behind `router`."""
    routed, top_k = fields.size("n_routed_experts"), fields.size("num_experts_per_tok")
    if top_k > routed:
        raise fields.error("num_experts_per_tok", f"({top_k}) exceeds n_routed_experts ({routed})")
    width = fields.size("moe_intermediate_size")
    return MoE(routed, top_k, width, fields.whole("n_shared_experts", 0), router, limit)


def read_router(fields: Fields, model_type: str, *, hashed: bool = False) -> Router:
    """How tokens choose experts, with each generation's meaning of the fields."""
    fields.only("scoring_func", "softmax", "sigmoid", "sqrtsoftplus")
    fields.only("topk_method", *METHODS[model_type])
    if model_type == "deepseek":
        fields.only("n_group", 1)
        fields.only("topk_group", 1)
    method = fields.text("topk_method", METHODS[model_type][0])
    late = model_type in LATE
    scale = fields.number("routed_scaling_factor", None if late else 1.0)
    groups = keep = 1
    if method != "greedy" and model_type != "deepseek_v4":
        groups, keep = fields.size("n_group"), fields.size("topk_group")
        if keep > groups:
            raise fields.error("topk_group", f"({keep}) exceeds n_group ({groups})")
        routed = fields.size("n_routed_experts")
        if routed % groups:
            raise fields.error("n_group", f"({groups}) doesn't divide n_routed_experts ({routed})")
    balanced = method == "noaux_tc"
    return Router(
        score=fields.text("scoring_func", SCORES[model_type]),
        bias=balanced and not hashed,
        groups=groups,
        keep=keep,
        group_score="top2" if balanced and model_type != "deepseek_v4" else "max",
        hashed=hashed,
        normalize=fields.flag("norm_topk_prob", late),
        scale=scale,
    )


# ----------------------------------------------------------------------------------------- writing


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields that describe the layers of a model of these four types."""
    attention = config.layers[0].attention
    if config.model_type == "deepseek":
        if not isinstance(attention, GQA):
            raise ConfigError("model_type deepseek is written for multi-head attention only")
        out: dict[str, Any] = write_attention(attention, config)
    elif isinstance(attention, MLA):
        out = _write_mla(attention, config.model_type)
    else:
        raise ConfigError(f"model_type {config.model_type} is written for MLA only")
    dense = [layer.ff for layer in config.layers if isinstance(layer.ff, SwiGLU)]
    experts = [layer.ff for layer in config.layers if isinstance(layer.ff, MoE)]
    sparse = [isinstance(layer.ff, MoE) for layer in config.layers]
    out |= {"attention_bias": False, "first_k_dense_replace": len(dense), "moe_layer_freq": 1}
    if sparse != sorted(sparse):
        if config.model_type != "deepseek_v32":
            raise ConfigError(f"model_type {config.model_type} needs its dense layers first")
        out["mlp_layer_types"] = ["sparse" if moe else "dense" for moe in sparse]
    if dense:
        out["intermediate_size"] = dense[0].width
    out |= write_moe(experts[0], config.model_type) if experts else {"n_routed_experts": None}
    if config.model_type in LATE:
        out["num_nextn_predict_layers"] = len(config.mtp)
    return out


def _write_mla(attention: MLA, model_type: str) -> dict[str, Any]:
    out: dict[str, Any] = {
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.heads,
        "q_lora_rank": attention.q_rank,
        "kv_lora_rank": attention.kv_rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.v_dim,
        **write_rope(attention.rope),
    }
    if not attention.rope.interleaved:
        out["rope_interleave"] = False
    return out | (write_index(attention.index) if attention.index is not None else {})


def write_index(index: Index) -> dict[str, Any]:
    """The indexer's fields."""
    return {"index_n_heads": index.heads, "index_head_dim": index.dim, "index_topk": index.top_k}


def write_moe(moe: MoE, model_type: str) -> dict[str, Any]:
    """The fields that describe experts and router."""
    router = moe.router
    out: dict[str, Any] = {
        "n_routed_experts": moe.routed,
        "n_shared_experts": moe.shared,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.width,
        "norm_topk_prob": router.normalize,
        "scoring_func": router.score,
    }
    if model_type == "deepseek":
        return out
    out["routed_scaling_factor"] = router.scale
    if router.bias or router.hashed:
        out["topk_method"] = "noaux_tc"
    else:
        out["topk_method"] = "greedy" if router.groups == 1 else "group_limited_greedy"
    return out if model_type == "deepseek_v4" else out | {"n_group": router.groups, "topk_group": router.keep}
