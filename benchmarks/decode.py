"""Decoding and prefill on the CPU beside transformers, the same weights in both.

smollm2: the real SmolLM2-135M, batch 1, fp32 and bf16. latent: four V3-type layers with V2-Lite's attention
widths, at a context of 4,096 tokens, where transformers expands every cached latent in every step.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import rorqual
from benchmarks.record import alternate, report, seconds
from rorqual.family import MLA, Layer, MoE, Rope, Router, SwiGLU

NEW = 48


def _peer(directory: str, dtype: torch.dtype) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def _our_decode(model: rorqual.Model, prompt: list[int], new: int) -> float:
    """Tokens a second after the first, through the public generator."""
    sampling = rorqual.Sampling(temperature=0.0, max_new_tokens=new + 1, ignore_eos=True)
    stream = model.stream(prompt, sampling)
    next(stream)
    begun = time.perf_counter()
    count = sum(1 for _ in stream)
    return count / (time.perf_counter() - begun)


@torch.inference_mode()
def _peer_decode(model: Any, prompt: list[int], new: int) -> float:
    """The same by transformers' forward and cache in the tightest loop (its own `generate` is slower)."""
    import transformers

    cache = transformers.DynamicCache(config=model.config)
    out = model(torch.tensor([prompt]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    begun = time.perf_counter()
    for _ in range(new):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        token.item()
    return new / (time.perf_counter() - begun)


def _our_prefill(model: rorqual.Model, ids: torch.Tensor) -> None:
    """Up to the first token, through the public generator."""
    model.generate(ids, rorqual.Sampling(temperature=0.0, max_new_tokens=1))


@torch.inference_mode()
def _peer_prefill(model: Any, ids: torch.Tensor) -> None:
    model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).item()


def smollm2(rounds: int = 7) -> None:
    """Real weights, batch 1."""
    rows = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ours = rorqual.load("smollm2", dtype=dtype)
        with tempfile.TemporaryDirectory() as directory:
            rorqual.save(ours, directory)
            theirs = _peer(directory, dtype)
        text = "The history of the sea is the history of the ships that crossed it, and of the people who "
        prompt = ours.encode(text * 4)
        long = torch.tensor([(ours.encode(text) * 60)[:1000]])
        speed = alternate(
            {
                "ours": lambda m=ours, p=prompt: _our_decode(m, p, NEW),
                "theirs": lambda m=theirs, p=prompt: _peer_decode(m, p, NEW),
            },
            rounds,
        )
        rows.append((f"decode, {name}, batch 1", speed["ours"], speed["theirs"], "tok/s", 1.3))
        took = alternate(
            {
                "ours": lambda m=ours, i=long: seconds(lambda: _our_prefill(m, i)),
                "theirs": lambda m=theirs, i=long: seconds(lambda: _peer_prefill(m, i)),
            },
            rounds,
        )
        rows.append((f"prefill of 1,000 tokens, {name}", took["ours"], took["theirs"], "s", 1.0))
    report("SmolLM2: beside transformers", rows)


def latent(rounds: int = 3, context: int = 4096) -> None:
    """V2-Lite's attention (16 heads of 128 + 64, latent 512) in four layers, long context."""
    attention = MLA(16, 512, 128, 64, 128, Rope(64, interleaved=True))
    router = Router("sigmoid", bias=True, groups=1, keep=1, group_score="top2", normalize=True)
    moe = Layer(attention, MoE(16, 4, 704, 2, router))
    config = rorqual.ModelConfig(
        "deepseek_v3",
        8192,
        2048,
        (Layer(attention, SwiGLU(5632)), *[moe] * 3),
        8192,
        dtype="float32",
        bos=0,
        eos=(1,),
    )
    ours = rorqual.Model(config, seed=0)
    with tempfile.TemporaryDirectory() as directory:
        rorqual.save(ours, Path(directory))
        theirs = _peer(directory, torch.float32)
    prompt = torch.randint(2, 8192, (context,), generator=torch.Generator().manual_seed(0)).tolist()
    speed = alternate(
        {"ours": lambda: _our_decode(ours, prompt, 16), "theirs": lambda: _peer_decode(theirs, prompt, 4)},
        rounds,
    )
    row = (f"decode at {context:,} tokens, fp32", speed["ours"], speed["theirs"], "tok/s", 10.0)
    report("Latent attention: beside transformers", [row])
