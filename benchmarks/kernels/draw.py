"""The draw in few launches against the sampler's plain operations: the same tokens, and how long each takes."""

from __future__ import annotations

import itertools
import os
import traceback
from concurrent.futures import ThreadPoolExecutor

import torch
import triton

from rorqual.engine import Sampler, Sampling, draws, fused

KINDS = {
    "greedy": (Sampling(temperature=0.0), 3.0),
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


def tables(ours: Sampler) -> fused.Tables:
    kept = ours._knobs_SK, ours._key_S, ours._drawn_S, ours._unsound_S, ours.newest_S
    return fused.Tables(*kept, *ours._seen.tables)


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
        got, _ = fused.draw(logits, at, tables(ours), random=not s.greedy, filters=s.filtered)
        p = ours.distribution(logits, at)
        same += int((got == draws.pick(p, ours.uniforms(at, 0))).sum())
        assert bool((p.gather(1, got[:, None]) > 0).all()), "a token that the filters leave out"
        r = rows // 2
        one, _ = fused.draw(logits[r : r + 1], at[r : r + 1], tables(ours), filters=s.filtered, part=8192)
        alone += int(got[r] == one[0])
        ours.saw(at, got)
        drawn += rows
    print(
        f"check {name:12} R={rows:<4} V={vocab}: {same} of {drawn} tokens as by plain operations; alone {alone} of 4"
    )


def speed(name: str, rows: int, vocab: int, configs: list[tuple[int, int, int]], plainly: bool) -> None:
    s, spread = KINDS[name]
    ours = seated(s, rows, vocab)
    logits = (torch.randn(rows, vocab, device="cuda") * spread).bfloat16()
    at, slots = torch.arange(rows, device="cuda"), list(range(rows))
    eager = 1e3 * triton.testing.do_bench(
        lambda: ours.take(logits, slots), warmup=3, rep=15, return_mode="median"
    )
    plain = ""
    if plainly:
        fused.supported = lambda logits: False
        plain = f"plain ops in a graph {graphed(lambda: ours.draw(logits, at)):6.0f};"
        fused.supported = SUPPORTED
    found = []
    for part, block, warps in configs:
        try:
            us = graphed(
                lambda p=part, b=block, w=warps: fused.draw(
                    logits,
                    at,
                    tables(ours),
                    random=not s.greedy,
                    filters=s.filtered,
                    part=p,
                    block=b,
                    warps=w,
                    saw=True,
                )
            )
            found.append((us, part, block, warps))
        except Exception as error:
            print(f"part {part} block {block} warps {warps}: {repr(error)[:150]}")
    told = " ".join(f"{part}/{block}/{warps}:{us:.1f}" for us, part, block, warps in found)
    best = min(found, default=(float("nan"), 0, 0, 0))
    print(f"{name:12} R={rows:<4} take() {eager:5.0f} us {plain} best {best[0]:6.1f} us {best[1:]} | {told}")


SUPPORTED = fused.supported


def configs_of(name: str, sweep: bool) -> list[tuple[int, int, int]]:
    """Parts, blocks and warps to try, the built-in choice first."""
    configs = [(4096, 2048, 8)]
    if sweep and name in ("greedy", "plain"):
        configs += [(part, 2048, 8) for part in (1024, 2048, 8192)]
    elif sweep and name in ("top_p .95", "top_k 50"):
        blocks = ((1024, 4), (2048, 4), (4096, 8), (4096, 16))
        configs += [(part, block, warps) for part in (4096, 8192) for block, warps in blocks]
    return configs


def warm(job: tuple[str, int, tuple[int, int, int]]) -> None:
    name, rows, (part, block, warps) = job
    s, _ = KINDS[name]
    try:
        ours = Sampler(129280, torch.device("cuda"), rows)
        logits = torch.zeros(rows, 129280, device="cuda", dtype=torch.bfloat16)
        at = torch.arange(rows, device="cuda")
        options = {
            "random": not s.greedy,
            "filters": s.filtered,
            "part": part,
            "block": block,
            "warps": warps,
        }
        fused.draw(logits, at, tables(ours), **options, saw=True)
    except Exception as error:
        print("compile", job, repr(error)[:200])


def main() -> None:
    sweep = os.environ.get("SWEEP") == "1"
    if sweep:
        with ThreadPoolExecutor(8) as pool:  # compile
            jobs = itertools.product(KINDS, (1, 32, 128))
            list(pool.map(warm, [(n, r, c) for n, r in jobs for c in configs_of(n, sweep)]))
    for name, rows in itertools.product(KINDS, (1, 64)):
        try:
            check(name, rows, 129280)
        except Exception:
            print(f"check {name}", traceback.format_exc()[-900:])
    if os.environ.get("COMPILE") == "1":
        return
    for name, rows in itertools.product(KINDS, (1, 32, 128)):
        configs = configs_of(name, sweep)
        try:
            speed(name, rows, 129280, configs, plainly=not sweep)
        except Exception:
            print(f"speed {name}", traceback.format_exc()[-900:])


if __name__ == "__main__":
    main()
