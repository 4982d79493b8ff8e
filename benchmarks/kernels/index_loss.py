"""What an indexer's training takes beside sparse attention, at V3.2's sizes: the choice, the shares of attention that
it learns from, its loss with all gradients.

`python -m benchmarks.kernels.index_loss [PART ...]`. Parts are processes of their own with a time limit, since a kernel
that hangs hangs its process; they compile side by side and measure one after the other.
"""

import contextlib
import functools
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.mla_prefill import guarded
from benchmarks.kernels.mla_sparse_backward import inputs as main_inputs
from benchmarks.kernels.mla_sparse_backward import parts, rate
from rorqual.kernels import index_loss as loss
from rorqual.kernels import mla_sparse_shares as shares
from rorqual.kernels.index_rows import index_choose_rows
from rorqual.nn.indexer import choose_in_blocks

HEADS, WIDTH, K = 64, 128, 2048
CHOICES = {"8192": (8192, 0), "8192, 4 documents": (8192, 2048), "8000": (8000, 0), "32768": (32768, 0)}
"""Tokens of a row, and of each of its documents."""
SHARES: dict[str, dict[str, Any]] = {
    "gluon": {},
    "triton": {"hopper": False},
    "triton, 128 heads": {"hopper": False, "tiles": (128, 64, 8, 1)},
}
LOSSES: dict[str, dict[str, Any]] = {
    "64/8/2": {},
    "64/4/2": {"tiles": (64, 4, 2)},
    "128/8/2": {"tiles": (128, 8, 2)},
}


def tokens(time: int, document: int) -> dict[str, Any]:
    g = torch.Generator("cuda").manual_seed(time)
    place = torch.arange(time, device="cuda")
    return {
        "q_BTHd": torch.randn(1, time, HEADS, WIDTH, device="cuda", generator=g).bfloat16(),
        "k_BKd": torch.randn(1, time, WIDTH, device="cuda", generator=g).bfloat16(),
        "w_BTH": torch.randn(1, time, HEADS, device="cuda", generator=g) / 64,
        "limits_BT": (place + 1)[None],
        "firsts_BT": (place // document * document)[None] if document else None,
    }


def choice(case: str) -> str:
    time, document = CHOICES[case]
    x = tokens(time, document)
    found = index_choose_rows(**x, k=K)[0, :, None].long()
    told = ""
    if time <= 8192:
        plain = x["q_BTHd"], x["k_BKd"], x["w_BTH"], x["limits_BT"]
        if not document:
            wanted = choose_in_blocks(*plain, K)[0]
            told = f"the same {same(found[:, 0], wanted, time):.5f} of the plain choice"
            ms, _ = rate(lambda: choose_in_blocks(*plain, K), 0)
            told += f" in {ms:.1f} ms"
        else:  # a document alone
            last = slice(time - document, time)
            alone = {n: x[n][:, last] for n in ("q_BTHd", "k_BKd", "w_BTH")}
            wanted = index_choose_rows(**alone, limits_BT=x["limits_BT"][:, :document], k=K)[0].long()
            wanted = torch.where(wanted < 0, -1, wanted + last.start)
            told = f"the same {same(found[last, 0], wanted, time):.5f} of a document alone"
    pairs = sum(min(t % document if document else t, time) + 1 for t in range(time))
    ms, tera = rate(lambda: index_choose_rows(**x, k=K), 2 * pairs * HEADS * WIDTH / 1e12)
    return f"{ms:7.2f} ms {tera:5.0f} TFLOP/s  {told}"


def same(a_Nk: Tensor, b_Nk: Tensor, keys: int) -> float:
    """The part of b's choices that a makes too."""
    held = [torch.zeros(len(x), keys + 1, dtype=torch.bool, device="cuda") for x in (a_Nk, b_Nk)]
    for to, x in zip(held, (a_Nk, b_Nk), strict=True):
        to.scatter_(1, x + 1, True)
    both = (held[0] & held[1])[:, 1:].sum()
    return float(both / held[1][:, 1:].sum())


def attention(queries: int, gaps: bool = False) -> dict[str, Any]:
    x = main_inputs(queries, 8192, False, gaps)
    return {n: x[n] for n in ("q_NHC", "latent_MC", "slots_NK", "lse_NH", "scale")}


def share(**options: Any) -> str:
    x = attention(150, gaps=True)
    wide = {n: x[n].double() for n in ("q_NHC", "latent_MC")}
    wanted = shares.reference(**{**x, **wide})
    off = float((shares.fast(**x, **options) - wanted).norm() / wanted.norm())
    x = attention(1056)
    us, tera = rate(lambda: shares.fast(**x, **options), 2 * x["slots_NK"].numel() * 128 * 576 / 1e12)
    us *= 1e3 / 1056
    return f"{'ok ' if off < 3e-3 else 'WRONG'} {off:.1e} {us:6.2f} us a query {tera:5.0f} TFLOP/s"


def learning(queries: int, gaps: bool = False) -> dict[str, Any]:
    g = torch.Generator("cuda").manual_seed(queries)
    slots = main_inputs(queries, 8192, False, gaps)["slots_NK"]
    target = torch.rand(slots.shape, device="cuda", generator=g) ** 4 * (slots >= 0)
    x = tokens(max(queries, 8192), 0)
    return {
        "q_NHd": x["q_BTHd"][0, :queries],
        "k_Md": x["k_BKd"][0],
        "w_NH": x["w_BTH"][0, :queries],
        "slots_NK": slots,
        "target_NK": target / target.sum(1, keepdim=True).clamp(min=1e-30),
    }


def learn(**options: Any) -> str:
    x = learning(150, gaps=True)
    wide = {n: t if n == "slots_NK" else t.double() for n, t in x.items()}
    off = [
        float((a.double() - b).norm() / b.norm())
        for a, b in zip(loss.fast(**x, **options), loss.reference(**wide), strict=True)
    ]
    x = learning(1056)
    us, tera = rate(lambda: loss.fast(**x, **options), 8 * x["slots_NK"].numel() * HEADS * WIDTH / 1e12)
    us *= 1e3 / 1056
    told = " ".join(f"{name} {part:.0e}" for name, part in zip(("loss", "dq", "dk", "dw"), off, strict=True))
    good = off[0] < 1e-4 and max(off) < 1e-2
    return f"{'ok ' if good else 'WRONG'} {told} {us:6.2f} us a query {tera:5.0f} TFLOP/s"


def prepare(name: str) -> None:
    """Every launch of a part, once."""
    if name == "choice":
        for case in CHOICES.values():
            index_choose_rows(**tokens(*case), k=K)
    for options in {"shares": SHARES, "loss": LOSSES}.get(name, {}).values():
        with contextlib.suppress(Exception):  # the launch will say
            if name == "shares":
                shares.fast(**attention(150), **options)
            else:
                loss.fast(**learning(150), **options)


def measure(name: str) -> None:
    for case in CHOICES if name == "choice" else ():
        guarded(f"choice   {case:20s}", functools.partial(choice, case))
    for variant, options in SHARES.items() if name == "shares" else ():
        guarded(f"shares   {variant:20s}", functools.partial(share, **options))
    for variant, options in LOSSES.items() if name == "loss" else ():
        guarded(f"loss     {variant:20s}", functools.partial(learn, **options))
    if name == "loss":
        x = learning(264)
        ms, _ = rate(lambda: loss.reference(**x), 0)
        print(f"loss     in plain PyTorch     {ms * 1e3 / 264:6.2f} us a query", flush=True)


if __name__ == "__main__":
    parts("benchmarks.kernels.index_loss", sys.argv[1:], ["choice", "shares", "loss"], prepare, measure, 30)
