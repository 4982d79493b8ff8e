"""Layers as one token takes them, by the joined kernels (in Triton's interpreter), against the bricks' own way."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from rorqual.family import MLA, Layer, ModelConfig, MoE, Rope, Router, SwiGLU
from rorqual.kernels import cache_write
from rorqual.nn import Transformer, single
from rorqual.nn.paged import Group, PagedStep, new_store
from rorqual.nn.watch import Watch
from tests.interpreter import repair

PAGE = 64


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        return
    repair(monkeypatch)
    for name, module in list(sys.modules.items()):
        if name.startswith("rorqual.") and hasattr(module, "usable"):
            monkeypatch.setattr(module, "usable", lambda *_: True)
    monkeypatch.setattr(cache_write, "_plain", lambda *ts: all(t is None or t.stride(-1) == 1 for t in ts))


def model_of(q_rank: int | None, router: Router) -> Transformer:
    attention = MLA(4, 32, 16, 16, 16, Rope(16, interleaved=True), q_rank=q_rank)
    plan = (Layer(attention, SwiGLU(96)), Layer(attention, MoE(8, 3, 32, 1, router)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Transformer(
        ModelConfig("deepseek_v3", 50, 64, plan, 512, dtype="bfloat16", eos=()), device=device, seed=3
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    for buffer in model.buffers():
        if buffer.dtype == torch.float32:
            buffer.normal_(std=0.1)
    return model


def state(
    model: Transformer, on: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, list[Tensor], Tensor]:
    """After both layers of a pass of `width` tokens behind 70 others; the pages; and the experts chosen, in order."""
    monkeypatch.setattr(single, "ON", on)
    device, end = model.device, 70 + width
    torch.manual_seed(5)
    stores = [new_store(lanes, 4, PAGE, 1, device) for lanes in model.lanes()]
    for store in stores:
        store["latent"].normal_()
    table = torch.tensor([[2, 1, 3]], device=device, dtype=torch.int32)
    ends = torch.tensor([end], device=device, dtype=torch.int32)
    offsets = torch.tensor([0, width], device=device, dtype=torch.int32)
    group = Group(slice(0, width), [], [], width, 192, table, torch.zeros_like(ends), ends, offsets, True)
    step = PagedStep(torch.arange(70, end, device=device), [group], PAGE)
    ids = torch.tensor([[11, 31]], device=device)[:, :width]
    step.watch = Watch(True, True)
    with torch.no_grad():
        x = model.run_paged(ids, step, stores)
    chosen = step.watch.experts_at([1], torch.arange(width, device=device))
    return x, [store["latent"] for store in stores], chosen.sort(-1).values


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("q_rank", "width", "router"),
    [
        (None, 1, Router("sigmoid", bias=True, normalize=True, scale=2.4)),
        (48, 2, Router("softmax")),
        (48, 1, Router("sigmoid", groups=4, keep=2, group_score="top2", bias=True, normalize=True)),
    ],
)
def test_same_state(
    q_rank: int | None, width: int, router: Router, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled for the GPU here")
    model = model_of(q_rank, router)
    ways: list[str] = []
    attend, feed = single.attend, single.feed

    def noted_attend(*args: object) -> Tensor | None:
        y = attend(*args)  # type: ignore[arg-type]
        ways.append("attention" if y is not None else "-")
        return y

    def noted_feed(*args: object) -> Tensor | None:
        y = feed(*args)  # type: ignore[arg-type]
        ways.append("fed" if y is not None else "-")
        return y

    want, pages, experts = state(model, False, width, monkeypatch)
    monkeypatch.setattr(single, "attend", noted_attend)
    monkeypatch.setattr(single, "feed", noted_feed)
    got, others, chosen = state(model, True, width, monkeypatch)
    assert ways == ["attention", "fed", "attention", "fed" if width == 1 else "-"]
    assert torch.equal(chosen, experts)
    assert float((got.double() - want.double()).abs().max() / want.double().abs().max()) < 2e-2
    for page, other in zip(pages, others, strict=True):
        assert float((page.double() - other.double()).abs().max() / page.double().abs().max()) < 1e-2
