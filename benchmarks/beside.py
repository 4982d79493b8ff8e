"""transformers on the geometry "lite", for the table of `python -m benchmarks lite`: the same shapes in the same run.
Only here is transformers imported, and nothing of ours runs through it."""

from __future__ import annotations

import time
from typing import Any

import torch

CASES = ((1, 512), (32, 4096))
"""Batch and context of its decoding runs; prefill is 8 x 4,096."""


def build(device: str = "cuda", **smaller: Any) -> Any:
    """The model in bf16 with random weights, SDPA and grouped products: what it is fastest with."""
    import transformers

    transformers.logging.set_verbosity_error()
    sizes: dict[str, Any] = dict(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_shared_experts=2,
        n_routed_experts=64,
        routed_scaling_factor=2.446,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        v_head_dim=128,
        qk_nope_head_dim=128,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        max_position_embeddings=8192,
        rope_theta=50000.0,
        norm_topk_prob=True,
    )
    config = transformers.DeepseekV3Config(**(sizes | smaller))
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return transformers.DeepseekV3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


@torch.inference_mode()
def decode(model: Any, batch: int, context: int, tokens: int) -> float:
    """Tokens a second by its forward and cache, greedy, after the prompt and a few warm steps."""
    import transformers

    device = model.device.type
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device=device)
    cache = transformers.DynamicCache(config=model.config)
    token = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    begun = 0.0
    for step in range(tokens + 4):
        if step == 4:
            _wait(device)
            begun = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        token.tolist()
    return batch * tokens / (time.perf_counter() - begun)


@torch.inference_mode()
def prefill(model: Any, batch: int, context: int) -> float:
    """Tokens a second of reading prompts."""
    device = model.device.type
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device=device)
    model(ids, logits_to_keep=1)
    _wait(device)
    begun = time.perf_counter()
    for _ in range(3):
        model(ids, logits_to_keep=1)
    _wait(device)
    return 3 * batch * context / (time.perf_counter() - begun)


def rates(device: str = "cuda", **smaller: Any) -> dict[tuple[str, int, int], float]:
    """(what, batch, context) -> tokens a second; what failed, or transformers missing, is left out."""
    found: dict[tuple[str, int, int], float] = {}
    try:
        model = build(device, **smaller)
    except ImportError:
        return found
    for batch, context in CASES:
        found["decode", batch, context] = decode(model, batch, context, 24 if batch == 1 else 12)
    found["prefill", 8, 4096] = prefill(model, 8, 4096)
    return found


ROWS = (  # what, weights, batch, context, tokens a second asked and at most (read once at 4.35 TB/s; bf16 products)
    ("decode", "bf16", 1, 512, 600, 896),
    ("decode", "fp8", 1, 512, 900, 1790),
    ("decode", "bf16", 32, 4096, 2700, 3900),
    ("decode", "fp8", 32, 4096, None, None),
    ("decode", "bf16", 256, 1024, 16000, 28000),
    ("decode", "fp8", 256, 1024, None, None),
    ("prefill", "bf16", 8, 4096, 100000, 144000),
    ("prefill", "fp8", 8, 4096, None, None),
)


def table(ours: dict[tuple[str, str, int, int], float], theirs: dict[tuple[str, int, int], float]) -> str:
    """Markdown, one row for each of ROWS that was measured."""
    lines = ["| what | transformers | ceiling | asked | rorqual | of the ceiling | ratio |", "|" + "---|" * 7]
    for what, kind, batch, context, asked, most in ROWS:
        got = ours.get((what, kind, batch, context))
        if got is None:
            continue
        peer = theirs.get((what, batch, context)) if kind == "bf16" else None
        cells = (
            f"{peer:,.1f} tok/s" if peer else "–",
            f"{most:,}" if most else "–",
            f"{asked:,}" if asked else "–",
            f"{got:,.0f}" if not asked or got >= asked else f"**{got:,.0f}**",
            f"{got / most:.0%}" if most else "",
            f"{got / peer:.0f}×" if peer else "",
        )
        lines.append(f"| {what}, batch {batch}, {context:,} tokens, {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
