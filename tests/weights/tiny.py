"""Tiny checkpoints of every model type, made by transformers where it knows the type, and the logits that
are right for them. FP8 and FP4 forms are made here, block by block."""

import json
import zlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 96
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
DENSE: dict[str, Any] = COMMON | dict(intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
YARN: dict[str, Any] = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    beta_fast=32,
    beta_slow=1,
    original_max_position_embeddings=32,
)
MLA: dict[str, Any] = COMMON | dict(
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    first_k_dense_replace=1,
    kv_lora_rank=32,
    q_lora_rank=48,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
)
V3: dict[str, Any] = MLA | dict(
    norm_topk_prob=True, rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0)
)
SPARSE = ("compressed_sparse", "heavily_compressed")
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**DENSE, num_key_value_heads=4, attention_bias=True),
    "llama-tied": lambda: transformers.LlamaConfig(**DENSE, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**DENSE, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(**DENSE, num_key_value_heads=2, head_dim=24),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(
        **MLA | dict(n_shared_experts=2, norm_topk_prob=False, topk_method="group_limited_greedy"),
        rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707),
    ),
    "deepseek_v2-lite": lambda: transformers.DeepseekV2Config(
        **MLA | dict(q_lora_rank=None, n_group=1, norm_topk_prob=False, topk_method="greedy")
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**deepcopy(V3), num_nextn_predict_layers=0),
    "deepseek_v32": lambda: transformers.DeepseekV32Config(
        **deepcopy(V3), index_topk=8, index_head_dim=16, index_n_heads=16
    ),
    "deepseek_v4": lambda: transformers.DeepseekV4Config(
        **COMMON,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        q_lora_rank=32,
        partial_rotary_factor=0.25,
        num_experts_per_tok=2,
        n_routed_experts=6,
        n_shared_experts=1,
        routed_scaling_factor=1.5,
        compress_rope_theta=160000.0,
        layer_types=[f"{kind}_attention" for kind in ("sliding", *SPARSE, "compressed_sparse")],
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        swiglu_limit=1.5,
        sliding_window=8,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=16,
        index_head_dim=16,
        index_topk=3,
        num_nextn_predict_layers=0,
        rope_parameters=dict(YARN),  # transformers writes into it
    ),
}
"""What each checkpoint's config is; the key up to the dash is the model type."""


def randomize(model: Any) -> None:
    """Every number drawn by its own name; norms near one, biases and router biases not zero."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            if name.endswith("tid2eid"):
                rows = [
                    torch.randperm(6, generator=generator)[: tensor.shape[1]] for _ in range(tensor.shape[0])
                ]
                tensor.copy_(torch.stack(rows))
                continue
            if not tensor.is_floating_point():
                continue
            r = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() == 1:
                r = 1 + 0.2 * r if name.endswith("weight") else 0.2 * r
            elif "embed" not in name:
                r = r * tensor.shape[-1] ** -0.5
            tensor.copy_(r.to(torch.bfloat16))  # so that a BF16 copy of the checkpoint holds the same values
        model.tie_weights()


@dataclass
class Checkpoint:
    """A directory, and the logits its model must give for `ids`."""

    path: Path
    ids: torch.Tensor
    logits: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "model.safetensors")

    def config(self) -> dict[str, Any]:
        return json.loads((self.path / "config.json").read_text())

    def changed(
        self,
        to: Path,
        tensors: dict[str, torch.Tensor | None] | None = None,
        config: dict[str, Any] | None = None,
    ) -> "Checkpoint":
        """A copy in `to` with some tensors replaced (None: removed) and some config fields."""
        to.mkdir(parents=True, exist_ok=True)
        state = self.tensors()
        for name, tensor in (tensors or {}).items():
            if tensor is None:
                del state[name]
            else:
                state[name] = tensor.contiguous().clone()
        save_file(state, to / "model.safetensors", metadata={"format": "pt"})
        (to / "config.json").write_text(json.dumps(self.config() | (config or {})))
        return Checkpoint(to, self.ids, self.logits)


def make_checkpoint(key: str, root: Path) -> Checkpoint:
    """The checkpoint of a key in `CONFIGS`, below `root`."""
    config = CONFIGS[key]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    randomize(model)
    model.save_pretrained(root / key, safe_serialization=True)
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Checkpoint(root / key, ids, model(input_ids=ids, use_cache=False).logits)


# ------------------------------------------------------------------------------------- quantised forms


def fp8(w: torch.Tensor, block: int, power: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes, fp32 scales and the exact product of a matrix, block by block."""
    rows, columns = w.shape
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn)
    scale, product = torch.empty(-(-rows // block), -(-columns // block)), torch.empty(w.shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            s = w[at].float().abs().max() / 448
            s = torch.exp2(torch.ceil(torch.log2(s))) if power else s
            codes[at] = (w[at].float() / s).to(torch.float8_e4m3fn)
            scale[i, j], product[at] = s, codes[at].float() * s
    return codes, scale, product


def fp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed codes, e8m0 scales and the exact product."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    groups = w.float().unflatten(1, (-1, 32))
    exponent = torch.ceil(torch.log2(groups.abs().amax(-1) / 6))
    ratio = groups / torch.exp2(exponent)[..., None]
    index = (ratio.abs()[..., None] - table).abs().argmin(-1)
    product = (table[index].copysign(ratio) * torch.exp2(exponent)[..., None]).flatten(1)
    code = (index + 8 * ratio.signbit()).flatten(1)
    packed = (code[:, 0::2] | code[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    return packed, (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu), product


@dataclass
class Quantised:
    """A quantised checkpoint, and the same with every matrix multiplied out to fp32."""

    path: Path
    plain: Path
    ids: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "model.safetensors")


def quantise(original: Checkpoint, root: Path, *, block: int, power: bool, v4: bool) -> Quantised:
    """FP8 in small blocks as released (V4: FP4 routed experts, e8m0 scales under `.scale`)."""
    codes, plain = {}, {}
    for name, tensor in original.tensors().items():
        inside = tensor.dim() == 2 and ".layers." in f".{name}" and name.endswith(".weight")
        kept = ("norm", "mlp.gate.weight", "ffn.gate.weight", "compressor.", "weights_proj", "eh_proj")
        if (
            name.endswith(".weight")
            and ".layers." in f".{name}"
            and ("embed_tokens" in name or ".head." in name)
        ):
            inside = False
        if not inside or any(k in name for k in kept):
            codes[name] = plain[name] = tensor
        elif v4 and ".experts." in name:
            codes[name], codes[name[:-6] + "scale"], plain[name] = fp4(tensor)
        elif v4:
            codes[name], scale, plain[name] = fp8(tensor, block, True)
            codes[name[:-6] + "scale"] = scale.to(torch.float8_e8m0fnu)
        else:
            codes[name], codes[name + "_scale_inv"], plain[name] = fp8(tensor, block, power)
    quantization: dict[str, Any] = dict(
        quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[block, block]
    )
    if power:
        quantization["scale_fmt"] = "ue8m0"
    for directory, state, extra in (
        (
            root / "codes",
            codes,
            {"quantization_config": quantization} | ({"expert_dtype": "fp4"} if v4 else {}),
        ),
        (root / "plain", plain, {}),
    ):
        directory.mkdir(parents=True)
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(original.config() | extra))
    return Quantised(root / "codes", root / "plain", original.ids)


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Both hold the same tensors, bit for bit."""
    assert sorted(a) == sorted(b)
    for name, tensor in a.items():
        assert (tensor.dtype, tensor.shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name
