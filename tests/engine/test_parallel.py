"""Several ranks are one engine: `model.generate`'s answers, books that balance, and no rank left hanging."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rorqual.family import MLA, Layer, ModelConfig, MoE, Rope, SwiGLU
from rorqual.nn import InputError, Transformer, single
from rorqual.nn.layout import Axis, Layout, apart
from rorqual.nn.paged import Group, PagedStep, new_store
from rorqual.nn.spread import spread
from tests.engine import ranks
from tests.engine.ranks import stirred, together

TENSOR, DATA, REPLICAS = (1, 2), (2, 1), (2, 1, 1)
TWO: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    *((kind, layout, {}) for kind in ("gqa", "v3", "v32", "v4") for layout in (TENSOR, DATA)),
    ("v3", REPLICAS, {}),
    ("v3", TENSOR, {"speculate": True}),
    ("v3", TENSOR, {"speculate": True, "ahead": True}),
    ("v3", TENSOR, {"ahead": True}),
    *((kind, DATA, {"ahead": True}) for kind in ("v3", "v4")),
]
FOUR = [
    ("v3", (2, 2), {}),
    ("v4", (2, 2, 2), {}),
    ("v32", (4, 1), {}),
    ("v3", (1, 4), {}),
    ("gqa", (2, 2), {}),
]


def check(found: list[Any], cases: list[Any]) -> None:
    assert all(isinstance(rank, list) for rank in found), found
    for i, (kind, layout, options) in enumerate(cases):
        name = kind, layout, options
        wrong, _ = found[0][i]
        assert not wrong, (name, wrong)
        books = [rank[i][1] for rank in found]
        assert all(lost == 0 and left == 0 for lost, _, left, _ in books), (name, books)
        rows, tensor = layout[:2]
        for row in range(rows):  # the ranks of a row have taken the same decisions
            assert len({tuple(b) for b in books[row * tensor : (row + 1) * tensor]}) == 1, (name, books)
        assert all(steps > 0 for _, steps, _, _ in books), (name, books)
        if kind in ("v3", "v32") and layout == TENSOR and not options:
            assert books[0][3] > 0, (name, "the test has to make memory short")


def test_two_ranks() -> None:
    check(together(ranks.serve, 2, TWO), TWO)


def test_four_ranks() -> None:
    check(together(ranks.serve, 4, FOUR), FOUR)


TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_all_and_is_named(rank: int, device: str) -> None:
    found = together(ranks.break_down, 2, rank, 3, device)
    what = f"rank {rank} failed: ArithmeticError: a kernel failed"
    assert isinstance(found[0], list), found
    raised, *handles, later = found[0]
    assert all(text.startswith(f"TeamError: {what}") for text in (raised, *handles, later)), found[0]
    assert len(handles) == 4
    # The other rank may be stuck in a call that nothing answers; then its process ends.
    assert found[1] == 1 or what in found[1][0], found[1]


def test_what_goes_wrong_on_its_own() -> None:
    leader, follower = together(ranks.doubtful, 2)
    assert leader == [
        True,
        "SamplingError: the model gave NaN or infinite logits: the we",
        [0, 8, 0],
        [1, "cancelled", 0],
        True,
        "rank 0 leads: it submits requests, and the other ranks follow",
        "the engine is closed",
    ] or pytest.fail(str(leader))
    assert follower == ["rank 0 takes requests; this is rank 1, which calls engine.follow()"]


def test_ranks_of_a_row_that_draw_different_tokens() -> None:
    for heard in together(ranks.differ, 2):
        assert "ranks 0 and 1 drew different tokens" in heard


def test_a_leader_that_goes_without_a_word() -> None:
    leader, follower = together(ranks.leave_early, 2)
    assert leader == 3 and "another rank has gone" in follower


# ------------------------------------------------------------------------------------ shares, in one process


def layout_of(data: int, tensor: int, rank: int, sums: Any = None, expert: int | None = None) -> Layout:
    """A layout as rank `rank` of `data` x `tensor` has it, without the other processes."""
    layout = object.__new__(Layout)
    layout.data, layout.tensor, layout.world = data, tensor, data * tensor
    layout.expert, layout.rank, layout.device = expert or data * tensor, rank, torch.device("cpu")
    layout.row, layout.column = divmod(rank, tensor)
    layout.tokens = layout.host = layout.data_axis = None
    layout.tensor_axis = None
    if tensor > 1:
        layout.tensor_axis = Axis(None, tensor, layout.column)  # type: ignore[arg-type]
        layout.tensor_axis.sum = sums or (lambda x: x)  # type: ignore[method-assign]
    if data > 1:
        layout.data_axis = Axis(None, data, layout.row)  # type: ignore[arg-type]
    return layout


def test_shares_are_freed_of_the_rest_and_add_up() -> None:
    whole = stirred("v3")
    shares = [spread(copy.deepcopy(whole), layout_of(1, 2, rank)) for rank in range(2)]
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    for share in shares:
        for name, parameter in share.named_parameters():
            held = parameter.untyped_storage().nbytes()
            assert held == parameter.numel() * parameter.element_size(), f"{name} holds on to the whole"
        counts = [m.layers[1].ff.experts.gate.weight.numel() for m in (whole, share)]
        assert counts[0] == 2 * counts[1]
    with torch.no_grad():
        feed = [m.layers[0].ff(x) for m in (whole, *shares)]
        torch.testing.assert_close(feed[1] + feed[2], feed[0])
        outs = [m.layers[1].ff.experts(x[0], *choice(whole, x)) for m in (whole, *shares)]
        torch.testing.assert_close(outs[1] + outs[2], outs[0])
        few = [m.layers[1].ff.experts(x[0, :1], *choice(whole, x[:, :1])) for m in (whole, *shares)]
        torch.testing.assert_close(few[1] + few[2], few[0])


def choice(model: Transformer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = model.layers[1].ff.router(x[0])
    return found.ids, found.weights


def test_quantised_blocks_are_cut_whole() -> None:
    attention = MLA(4, 128, 64, 64, 64, Rope(64))
    plan = (Layer(attention, SwiGLU(512)), Layer(attention, MoE(4, 2, 128, 2)))
    model = Transformer(ModelConfig("deepseek_v3", 60, 128, plan, 64, dtype="float32"), seed=0)
    for module in model.modules():
        if hasattr(module, "hold_codes"):
            module.hold_codes(torch.float8_e4m3fn, torch.float32, (128, 128))
            codes = torch.randint(0, 120, module.weight.shape, dtype=torch.uint8)
            module.weight.data = codes.view(torch.float8_e4m3fn)
            module.scale.data.uniform_(0.5, 2)
    for rank in range(2):
        share = spread(copy.deepcopy(model), layout_of(1, 2, rank))
        for name, rows in (
            ("layers.0.attention.q", 256),
            ("layers.0.ff.gate", 256),
            ("layers.1.ff.shared.up", 128),
        ):
            full, part = (m.get_submodule(name).matrix(torch.float32) for m in (model, share))
            assert torch.equal(part, full[rank * rows : (rank + 1) * rows])
        for name, columns in (
            ("layers.0.attention.o", 128),
            ("layers.0.ff.down", 256),
            ("layers.1.ff.shared.down", 128),
        ):
            full, part = (m.get_submodule(name).matrix(torch.float32) for m in (model, share))
            assert torch.equal(part, full[:, rank * columns : (rank + 1) * columns])
        experts = [m.layers[1].ff.experts.down.matrix(torch.float32) for m in (model, share)]
        assert torch.equal(experts[1], experts[0][2 * rank : 2 * rank + 2])
    with pytest.raises(InputError, match="shares of 64 attention outputs cut through the 128"):
        spread(model, layout_of(1, 4, 0))


def test_a_layer_that_is_cut_is_not_run_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that join a layer's parts would skip what adds the ranks up."""

    def fits(*_: object) -> bool:
        raise AssertionError("a layer of which other ranks hold parts was to be run by itself")

    monkeypatch.setattr(single, "fits", fits)
    block = spread(stirred("v3"), layout_of(1, 2, 0)).layers[1]
    zero, ends = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    group = Group(slice(0, 1), [0], [1], 1, 1, zero[None].int(), zero, ends, offsets, decoding=True)
    store = new_store(block.attention.lanes(torch.float64), 2, 4, 0, torch.device("cpu"))
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    with torch.no_grad():
        block.deferred(x, None, zero[None], PagedStep(zero, [group], 4), store)


def test_nothing_is_exchanged_apart() -> None:
    axis, x = Axis(None, 2, 0), torch.ones(4, 3)  # type: ignore[arg-type]
    with apart():
        assert axis.gather(x).shape == (8, 3) and axis.scatter_sum(x).shape == (2, 3)
        assert axis.sum(x).shape == axis.first(x).shape == (4, 3)


def test_layouts_that_do_not_fit() -> None:
    model = stirred("v3")
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(InputError) as caught:
        spread(model, layout_of(1, 3, 0))
    assert "1 data x 3 tensor ranks" in str(caught.value)
    for text in ("4 attention heads don't divide by 3", "8 routed experts don't divide by 3"):
        assert text in str(caught.value)
    assert {name: p.shape for name, p in model.named_parameters()} == before
    with pytest.raises(InputError, match="2 groups of output heads don't divide by 4"):
        spread(stirred("v4"), layout_of(1, 4, 0))
    with pytest.raises(InputError, match="needs 4 processes, and there is 1"):
        Layout(data=2, tensor=2)
    with pytest.raises(InputError, match="tensor must be a positive whole number, got 0"):
        Layout(tensor=0)
    with pytest.raises(InputError, match="spread over all 1 ranks"):
        Layout(expert=3)
    spread(model, layout_of(1, 2, 0))
    with pytest.raises(InputError, match="spread already"):
        spread(model, layout_of(1, 2, 0))


def test_one_process_is_a_layout_too() -> None:
    from rorqual.engine.engine import Engine

    model, layout = stirred("v3"), Layout(device="cpu")
    engine = Engine(model, layout=layout)
    plain = stirred("v3").generate([3, 4, 5], ranks.GREEDY)
    with engine:
        assert engine.leads and engine.generate([3, 4, 5], ranks.GREEDY).ids == plain.ids


@pytest.mark.parametrize("direct", [pytest.param(d, marks=TWO_GPUS) for d in (False, True)])
@pytest.mark.parametrize("kind", ["gqa", "v3", "v32", "v4"])
def test_two_gpus(kind: str, direct: bool) -> None:
    """By kernels, graphs, and NCCL or each other's memory, in fp32: the CPU's answers."""
    cases = [case for case in TWO if case[0] == kind and "ahead" not in case[2]]
    check(together(ranks.serve, 2, cases, "cuda", direct), cases)
