"""Attention bricks: the two forms of MLA, live cache sizes, rollback, rows, tie rule, rotary constants."""

from __future__ import annotations

import math

import pytest
import torch

from rorqual.family import GQA, MLA, Rope, Yarn
from rorqual.nn import Cache, ContextError, InputError, Rows, Step, Transformer
from rorqual.nn.cache import ROLLBACK
from rorqual.nn.indexer import choose, index_scores
from rorqual.nn.mla import MLA as Brick
from rorqual.nn.rope import inverse_frequencies, rotate, rotation
from tests.engine.conftest import build, config
from tests.parity.zoo import largest, stir_ours

KINDS = ["gqa", "v3", "v32", "v4"]


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 60, (batch, length), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
@pytest.mark.parametrize("q_rank", [None, 20])
def test_absorbed_equals_expanded(q_rank: int | None) -> None:
    """Claim 8: one function in two forms, to 1e-12 in fp64, with and without a past."""
    yarn = Yarn(40, 4096, mscale=1.0, mscale_all_dim=1.0)
    part = MLA(4, 24, 16, 8, 12, Rope(8, scaling=yarn, interleaved=True), q_rank=q_rank)
    brick = Brick(32, part, 1e-6).double()
    stir_ours(brick)
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    outs = []
    for absorb in (False, True):
        whole = brick(x, Step(Rows([0, 0], [30, 30], 30, x.device)), None, absorb=absorb)
        cache = brick.new_cache(2, 30, torch.float64, x.device)
        parts = [
            brick(x[:, a:b], Step(Rows([a, a], [b - a] * 2, b - a, x.device)), cache, absorb=absorb)
            for a, b in ((0, 13), (13, 14), (14, 30))
        ]
        outs += [whole, torch.cat(parts, 1)]
    for other in outs[1:]:
        assert largest(outs[0], other) < 1e-12


def test_sparse_attention_trains_alike_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and all gradients of a batch of two, as on a CPU and in the form that a GPU takes."""
    (part,) = {layer.attention for layer in config("v32").layers if isinstance(layer.attention, MLA)}
    brick = Brick(32, part, 1e-6).double()
    stir_ours(brick)
    x = torch.randn(2, 21, 32, dtype=torch.float64, requires_grad=True)
    step, runs = Step(Rows([0, 0], [21, 21], 21, x.device)), []
    for kernels in (False, True):
        monkeypatch.setattr("rorqual.nn.mla.trained_by_kernels", lambda q, kernels=kernels: kernels)
        y = brick(x, step, None)
        into = [x, *(w for name, w in brick.named_parameters() if not name.startswith("index"))]
        runs.append([y, *torch.autograd.grad((y * torch.linspace(-1, 1, 32)).sum(), into)])
    assert "_TrainedBackward" in graph(y) and len(runs[0]) > 5
    for plain, trained in zip(*runs, strict=True):
        assert largest(plain.detach(), trained.detach()) < 1e-9


def graph(y: torch.Tensor) -> str:
    """The names of the operations that gradients of y go back through."""
    seen, left = [], [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.append(node)
            left += [into for into, _ in node.next_functions]
    return " ".join(type(node).__name__ for node in seen)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 7, 16, 53])
def test_live_cache_holds_only_what_the_papers_say(kind: str, length: int) -> None:
    """Claims 5 and 28: numbers in a cache that really ran, against the parts' own sizes."""
    model = Transformer(config(kind))
    cache = model.new_cache(1)
    model(tokens(1, length), cache=cache)
    expected = 0
    for layer in model.config.layers:
        a = layer.attention
        if isinstance(a, GQA):
            expected += length * 2 * a.kv_heads * a.head_dim
        elif isinstance(a, MLA):
            expected += length * (a.kv_rank + a.rope_dim + (a.index.dim if a.index else 0))
        else:
            expected += a.window * a.head_dim
            for width, on in ((a.head_dim, a.compress), (16, a.compress and a.compress.index)):
                if on:
                    slots = a.compress.ratio * (2 if a.compress.overlap else 1)
                    expected += length // a.compress.ratio * width
                    expected += 2 * slots * width * (2 if a.compress.overlap else 1)  # values and gates
    assert cache.used_bytes() == 4 * expected
    assert allocated(cache, length) == expected


def allocated(cache: Cache, length: int) -> int:
    """Numbers really stored: growing slots up to the length, fixed tails without the last pass."""
    total = 0
    for layer in cache.layers:
        stack = list(vars(layer).values())
        while stack:
            item = stack.pop()
            if hasattr(item, "keep"):
                total += item.keep * item.items.shape[2]
            elif hasattr(item, "bytes_per_item"):
                ratio = getattr(owner, "ratio", 1) if (owner := owner_of(layer, item)) else 1
                assert item.items.shape[1] >= length // ratio
                total += length // ratio * math.prod(item.items.shape[2:])
            elif hasattr(item, "entries"):
                stack += list(vars(item).values())
    return total


def owner_of(layer: object, item: object) -> object | None:
    return next((v for v in vars(layer).values() if getattr(v, "entries", None) is item), None)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_rollback_forgets(kind: str) -> None:
    """Truncate within the last pass and go on otherwise: as if the forgotten tokens had never come."""
    model = build(kind)
    ids, other = tokens(2, 50), tokens(2, 60)[:, 50:]
    for back in range(6):
        cache = model.new_cache(2)
        model(ids[:, :40], cache=cache)
        model(ids[:, 40:46], cache=cache)
        cache.truncate([46 - back, 46 - max(0, back - 2)])
        logits = model(other, cache=cache)
        for b, length in enumerate((46 - back, 46 - max(0, back - 2))):
            whole = torch.cat((ids[b : b + 1, :length], other[b : b + 1]), 1)
            assert largest(logits[b], model(whole)[0, -10:]) < 1e-4


@torch.no_grad()
def test_v4_says_when_it_cannot_go_back() -> None:
    model = build("v4")
    cache = model.new_cache(1)
    model(tokens(1, ROLLBACK + 1), cache=cache)
    with pytest.raises(ContextError, match="can't go back"):
        cache.truncate([5])
    with pytest.raises(ContextError, match="only shorten"):
        cache.truncate([ROLLBACK + 2])
    assert cache.lengths == [ROLLBACK + 1]
    whole = torch.cat((tokens(1, ROLLBACK + 1), tokens(1, 3)), 1)
    assert largest(model(tokens(1, 3), cache=cache), model(whole)[:, -3:]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_caches_are_checked_and_cross_modes(kind: str) -> None:
    """A cache of another model is refused; one filled in inference mode works outside, and with gradients on."""
    model, ids = build(kind), tokens(2, 12)
    with torch.inference_mode():
        cache = model.new_cache(2)
        model(ids[:, :5], cache=cache)
    model(ids[:, 5:9], cache=cache)
    with torch.enable_grad():
        logits = model(ids[:, 9:], cache=cache)
    assert largest(logits, model(ids)[:, 9:]) < 1e-4 and not logits.requires_grad
    other = Transformer(config("gqa" if kind != "gqa" else "v4"), dtype=torch.float32)
    with pytest.raises(InputError, match="new_cache"):
        Transformer(config(kind), dtype=torch.bfloat16)(ids, cache=model.new_cache(2))
    with pytest.raises(InputError, match="the batch has 2"):
        model(ids, cache=model.new_cache(1))
    for rows in ([], [2], [-1]):
        with pytest.raises(InputError, match="rows 0 to 1"):
            cache.select(rows)
    with pytest.raises(ContextError, match="lengths were given"):
        cache.truncate([1])
    if len(other.layers) != len(model.layers):
        with pytest.raises(InputError, match="layers"):
            other(ids, cache=model.new_cache(2))


def test_the_cheaper_form_of_mla_is_the_one_with_less_arithmetic() -> None:
    """V3's widths: one token is absorbed at any length, a long pass is expanded, with the border near 170."""
    part = MLA(128, 512, 128, 64, 128, Rope(64, interleaved=True), q_rank=1536)
    with torch.device("meta"):
        brick = Brick(7168, part, 1e-6)
    assert brick.absorbing_is_cheaper(1, 2) and brick.absorbing_is_cheaper(160, 100_000)
    assert not brick.absorbing_is_cheaper(180, 100_000) and not brick.absorbing_is_cheaper(512, 1024)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_rows_can_be_dropped_repeated_and_reordered(kind: str) -> None:
    model = build(kind)
    ids, more = tokens(3, 21), tokens(4, 5)
    cache = model.new_cache(3)
    model(ids, cache=cache)
    order = [2, 0, 2, 1]
    cache.select(order)
    logits = model(more, cache=cache)
    whole = torch.cat((ids[order], more), 1)
    assert largest(logits, model(whole)[:, -5:]) < 1e-4


def test_equal_scores_go_to_the_lowest_position() -> None:
    scores = torch.tensor([[[1.0, 3.0, 3.0, 0.0, 0.0, 0.0, 9.0]]])
    limit = torch.tensor([[6]])  # the 9.0 lies past the limit
    assert choose(scores, limit, 4).tolist() == [[[1, 2, 0, 3]]]
    assert choose(scores, torch.tensor([[2]]), 4).tolist() == [[[1, 0, -1, -1]]]
    longer = torch.cat((scores, torch.zeros(1, 1, 9)), -1)
    assert choose(longer, limit, 4).tolist() == [[[1, 2, 0, 3]]]


def test_index_scores_are_the_formula() -> None:
    q, k, w = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 5), torch.randn(2, 3, 4)
    scores = index_scores(q, k, w)
    for b, t, s in ((0, 0, 0), (1, 2, 6), (0, 1, 3)):
        by_hand = sum(w[b, t, h] * max(float(q[b, t, h] @ k[b, s]), 0.0) for h in range(4))
        assert float(scores[b, t, s]) == pytest.approx(float(by_hand), abs=1e-5)


@pytest.mark.parametrize(("mscale", "factor"), [(1.0, 1.87385), (0.707, 1.58963)])
def test_yarn_constants(mscale: float, factor: float) -> None:
    """Facts 3.2: what V3 and V2 multiply the softmax scale by; cos and sin stay as they are."""
    yarn = Yarn(40, 4096, mscale=mscale, mscale_all_dim=mscale)
    part = MLA(128, 512, 128, 64, 128, Rope(64, scaling=yarn), q_rank=1536)
    assert part.scale * math.sqrt(192) == pytest.approx(factor, rel=1e-5)
    assert yarn.rotation_amplitude() == 1.0


def test_yarn_keeps_high_and_divides_low_frequencies() -> None:
    rope = Rope(64, 10000.0, Yarn(40, 4096, mscale=1.0, mscale_all_dim=1.0))
    scaled, plain = inverse_frequencies(rope), inverse_frequencies(Rope(64, 10000.0))
    # Correction indices of 32 rotations and one rotation: 10.47 and 22.51, rounded outwards.
    assert torch.equal(scaled[:11], plain[:11])
    assert largest(scaled[23:], plain[23:] / 40) < 1e-9
    middle = (scaled / plain)[11:23]
    assert bool((middle.diff() < 0).all())


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_turns_back_and_is_relative(interleaved: bool) -> None:
    rope = Rope(16, interleaved=interleaved)
    q, k = torch.randn(16), torch.randn(16)

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, rotation(rope, torch.tensor(position)), interleaved)

    assert largest(rotate(at(q, 9), rotation(rope, torch.tensor(9)), interleaved, inverse=True), q) < 1e-5
    assert float(at(q, 29) @ at(k, 20)) == pytest.approx(float(at(q, 9) @ at(k, 0)), abs=1e-4)
    assert float(at(q, 29) @ at(k, 20)) != pytest.approx(float(at(q, 30) @ at(k, 20)), abs=1e-3)
