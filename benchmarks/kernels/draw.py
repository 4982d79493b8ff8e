"""The one-launch draw against the sampler's plain operations: the same tokens, and how long each takes."""

from __future__ import annotations

import itertools
import os
import traceback

import torch
import triton

from rorqual.engine import Sampler, Sampling, draws, fused

KINDS = {
    "plain": (Sampling(), 3.0),
    "top_p .95": (Sampling(temperature=0.6, top_p=0.95), 3.0),
    "top_p, flat": (Sampling(top_p=0.95), 0.3),
    "top_k 50": (Sampling(top_k=50, top_p=0.9), 3.0),
    "min_p": (Sampling(min_p=0.05), 3.0),
}


def seated(s: Sampling, rows: int, vocab: int) -> Sampler:
    ours = Sampler(vocab, torch.device("cuda"), rows)
    for slot in range(rows):
        ours.admit(slot, Sampling(**{**vars(s), "seed": slot}))
    return ours


def tables(ours: Sampler) -> tuple[torch.Tensor, ...]:
    return ours._knobs_SK, ours._key_S, ours._drawn_S, ours._unsound_S


def graphed(call) -> float:
    """Microseconds of a call replayed from a graph."""
    return 1e3 * triton.testing.do_bench_cudagraph(call, rep=20, return_mode="median")


def check(name: str, rows: int, vocab: int) -> None:
    s, spread = KINDS[name]
    ours = seated(s, rows, vocab)
    at = torch.arange(rows, device="cuda")
    same = alone = drawn = 0
    for _ in range(4):
        logits = (torch.randn(rows, vocab, device="cuda") * spread).bfloat16()
        got = fused.draw(logits, at, *tables(ours), filters=s.filtered)
        p = ours.distribution(logits, at)
        same += int((got == draws.pick(p, ours.uniforms(at, 0))).sum())
        assert bool((p.gather(1, got[:, None]) > 0).all()), "a token that the filters leave out"
        r = rows // 2
        alone += int(
            got[r] == fused.draw(logits[r : r + 1], at[r : r + 1], *tables(ours), filters=s.filtered)[0]
        )
        ours.saw(at, got)
        drawn += rows
    print(
        f"check {name:12} R={rows:<4} V={vocab}: {same} of {drawn} tokens as by plain operations; alone {alone} of 4"
    )


def speed(name: str, rows: int, vocab: int, configs: list[tuple[int, int]]) -> None:
    s, spread = KINDS[name]
    ours = seated(s, rows, vocab)
    logits = (torch.randn(rows, vocab, device="cuda") * spread).bfloat16()
    at, slots = torch.arange(rows, device="cuda"), list(range(rows))
    eager = 1e3 * triton.testing.do_bench(
        lambda: ours.draw(logits, slots), warmup=5, rep=30, return_mode="median"
    )
    try:
        graph = graphed(lambda: ours.draw(logits, at))
    except Exception as error:
        graph = float("nan")
        print("plain operations in a graph:", repr(error)[:150])
    found = []
    for block, warps in configs:
        try:
            us = graphed(
                lambda b=block, w=warps: fused.draw(
                    logits, at, *tables(ours), filters=s.filtered, block=b, warps=w
                )
            )
            found.append((us, block, warps))
        except Exception as error:
            print(f"block {block} warps {warps}: {repr(error)[:150]}")
    told = " ".join(f"{block}/{warps}:{us:.0f}" for us, block, warps in found)
    best = min(found, default=(float("nan"), 0, 0))
    print(f"{name:12} R={rows:<4} plain ops {eager:6.0f} us, in a graph {graph:6.0f};", end=" ")
    print(f"fused best {best[0]:6.1f} us {best[1:]} | {told}")


def main() -> None:
    fused.ON = False  # the sampler's own draws are the plain operations here
    sweep = os.environ.get("SWEEP") == "1"
    configs = [(4096, 16), (4096, 8), (8192, 16), (8192, 32), (2048, 8)] if sweep else [(4096, 16)]
    for name, rows in itertools.product(KINDS, (1, 64)):
        try:
            check(name, rows, 129280)
        except Exception:
            print(f"check {name}", traceback.format_exc()[-900:])
    for name, rows in itertools.product(KINDS, (1, 16, 128)):
        try:
            speed(name, rows, 129280, configs)
        except Exception:
            print(f"speed {name}", traceback.format_exc()[-900:])


if __name__ == "__main__":
    main()
