"""Training a miniature of ten million parameters on a CPU, beside transformers: the same model, batch and optimizer.

V3-type: 5 layers, width 256, first layer dense, then 16 experts of 128, 4 a token, a shared one; 4 heads; vocabulary
4,096; fp32. A step is loss, gradients and AdamW on 8 sequences of 256 tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.record import alternate, console, seconds
from rorqual.data import Batch
from rorqual.family import MLA, Layer, ModelConfig, MoE, Rope, Router, SwiGLU
from rorqual.nn import Transformer
from rorqual.train.objective import Factors, Pretraining
from rorqual.train.optim import AdamW, Optimizer, clipping, gradient_norms

BATCH, LENGTH, VOCAB = 8, 256, 4096


def config() -> ModelConfig:
    """The miniature."""
    attention = MLA(4, 128, 64, 32, 64, Rope(32, interleaved=True))
    router = Router("sigmoid", bias=True, group_score="top2", normalize=True)
    plan = (Layer(attention, SwiGLU(1024)),) + (Layer(attention, MoE(16, 4, 128, 1, router)),) * 4
    return ModelConfig("deepseek_v3", VOCAB, 256, plan, 1024, dtype="float32", eos=())


def ours(ids_BT: torch.Tensor) -> Callable[[], float]:
    """A step of ours: next-token loss and V3's balance loss."""
    model = Transformer(config(), dtype=torch.float32, seed=0)
    console.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")
    optimizer, objective = Optimizer(model.named_parameters(), AdamW()), Pretraining()
    batch = Batch(ids_BT, torch.zeros_like(ids_BT), torch.zeros(len(ids_BT), dtype=torch.int64))
    counts, number = objective.counts([batch], 0), 0

    def step() -> None:
        nonlocal number
        number += 1
        for p in model.parameters():
            p.grad = None
        objective(model, batch, counts, Factors(balance=1e-4)).loss.backward()
        norm = gradient_norms([p.grad for p in model.parameters() if p.grad is not None]).norm()
        optimizer.step(number, 1e-4, clipping(norm, 1.0))

    return lambda: BATCH * LENGTH / seconds(step)


def theirs(ids_BT: torch.Tensor, experts: str) -> Callable[[], float]:
    """A step of transformers', with one of its ways through experts."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=1024, moe_intermediate_size=128, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=16, kv_lora_rank=128,
        q_lora_rank=None, qk_rope_head_dim=32, v_head_dim=64, qk_nope_head_dim=64, n_group=1, topk_group=1,
        num_experts_per_tok=4, first_k_dense_replace=1, max_position_embeddings=1024,
    )  # fmt: skip
    sizes._attn_implementation, sizes._experts_implementation = "sdpa", experts
    model = DeepseekV3ForCausalLM(sizes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)

    def step() -> None:
        model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return lambda: BATCH * LENGTH / seconds(step)


def main() -> None:
    """Tokens a second, in turns."""
    torch.manual_seed(0)
    ids_BT = torch.randint(0, VOCAB, (BATCH, LENGTH + 1))
    runs = {"rorqual": ours(ids_BT)}
    for experts in ("eager", "grouped_mm"):
        runs[f"transformers, {experts}"] = theirs(ids_BT[:, :LENGTH].contiguous(), experts)
    figures = alternate(runs, 5)
    best = max(speed for name, speed in figures.items() if name != "rorqual")
    for name, speed in figures.items():
        console.print(f"{name}: {speed:,.0f} tokens/s")
    console.print(f"rorqual over the better of transformers': {figures['rorqual'] / best:.2f}")
