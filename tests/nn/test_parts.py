"""Routers and their balance, hyper-connections, quantised matrices in modules, fresh weights, rounding."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch

from rorqual import Sampling
from rorqual.family import HyperConnection, Index, MoE, Router
from rorqual.kernels import linear as kernel
from rorqual.kernels.affinity import affinities
from rorqual.kernels.quant import quantize_fp8
from rorqual.kernels.sequence_loss import sequence_loss
from rorqual.kernels.simulate import fake_fp4, fake_fp8, hadamard
from rorqual.nn import InputError, Trace, Transformer
from rorqual.nn.balance import expert_load, max_violation, update_bias
from rorqual.nn.hyper import Mix, sinkhorn
from rorqual.nn.linear import Linear, together
from rorqual.nn.moe import MoE as Brick
from rorqual.nn.router import Router as RouterBrick
from rorqual.nn.step import Rows, Step
from tests.engine.conftest import build, config
from tests.parity.zoo import largest, stir_ours

GROUPED = Router("sigmoid", bias=True, groups=8, keep=3, group_score="top2", normalize=True, scale=2.5)


def router(part: Router, experts: int = 32, top_k: int = 6) -> RouterBrick:
    brick = RouterBrick(16, 50, MoE(experts, top_k, 8, 0, part))
    stir_ours(brick)
    return brick


def test_no_token_crosses_more_groups_than_allowed() -> None:
    """Claim 16: device- and node-limited routing bound what a token sends."""
    for part in (GROUPED, Router("softmax", groups=8, keep=3)):
        ids = router(part)(torch.randn(500, 16)).ids
        groups = [set((row // 4).tolist()) for row in ids]
        assert max(map(len, groups)) == 3 and all(len(set(row.tolist())) == 6 for row in ids)


def test_masked_groups_lose_even_to_negative_scores() -> None:
    """The reference masks with -inf: a bias that drives s' below zero must not let masked experts in."""
    brick = router(GROUPED)
    brick.bias.fill_(-5.0)
    ids = brick(torch.randn(200, 16)).ids
    assert max(len(set((row // 4).tolist())) for row in ids) == 3


def test_bias_chooses_but_does_not_weigh() -> None:
    part = Router("sigmoid", bias=True, normalize=True)
    brick = router(part, experts=8, top_k=2)
    x = torch.randn(50, 16)
    brick.bias.zero_()
    brick.bias[3] = 10.0
    choice = brick(x)
    assert bool((choice.ids == 3).any(-1).all())
    s = choice.logits.sigmoid().gather(-1, choice.ids)
    assert largest(choice.weights.detach(), (s / s.sum(-1, keepdim=True)).detach()) < 1e-6


def test_hash_router_reads_the_table_and_weighs_by_the_gate() -> None:
    brick = router(Router("sqrtsoftplus", hashed=True, normalize=True, scale=1.5), experts=8, top_k=2)
    brick.table.copy_(torch.stack([torch.randperm(8)[:2] for _ in range(50)]))
    token = torch.tensor([7, 49, 7])
    choice = brick(torch.randn(3, 16), token)
    assert torch.equal(choice.ids, brick.table[token])
    assert largest(choice.weights.sum(-1), torch.full((3,), 1.5)) < 1e-5
    with pytest.raises(InputError, match="token ids"):
        brick(torch.randn(3, 16))


def test_balancing_evens_the_load() -> None:
    """V3's rule on a router with a strong favourite: the violation falls, and only the bias has moved."""
    brick = router(Router("sigmoid", bias=True), experts=16, top_k=2)
    brick.bias.zero_()
    with torch.no_grad():
        brick.weight[5] = 0.4  # inputs are shifted to be positive: everybody likes expert 5
    x, weight = torch.randn(2000, 16) + 0.5, brick.weight.clone()
    before = max_violation(expert_load(brick(x).ids, 16))
    for _ in range(400):
        update_bias(brick, expert_load(brick(x).ids, 16), 0.005)
    after = max_violation(expert_load(brick(x).ids, 16))
    assert before > 3 and after < 0.2 and torch.equal(weight, brick.weight)


def test_update_follows_the_sign_of_the_mean() -> None:
    brick = router(Router("sigmoid", bias=True), experts=4, top_k=1)
    brick.bias.zero_()
    update_bias(brick, torch.tensor([10, 2, 6, 6]), 0.001)
    assert brick.bias.tolist() == pytest.approx([-0.001, 0.001, 0.0, 0.0])
    with pytest.raises(InputError, match="no balance bias"):
        update_bias(router(Router("softmax"), 4, 1), torch.ones(4), 0.1)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_sequence_loss_is_the_formula(score: str) -> None:
    logits, experts, chosen = torch.randn(2, 5, 4), 4, 2
    scores = affinities(logits, score)
    ids = scores.topk(chosen).indices
    expected = 0.0
    for b in range(2):
        for i in range(experts):
            f = experts / (chosen * 5) * int((ids[b] == i).sum())
            expected += f * float((scores[b] / scores[b].sum(-1, keepdim=True))[:, i].mean()) / 2
    assert float(sequence_loss(logits, chosen, score)) == pytest.approx(expected, rel=1e-5)
    even = torch.eye(4).repeat_interleave(2, 0)[None]  # each is once first of two tokens, and equally likely
    assert float(sequence_loss(even, 1, score)) == pytest.approx(1.0)


def test_experts_do_not_see_their_neighbours() -> None:
    """A token's output is the same alone and in a batch that loads other experts (to fp32 rounding: the
    matrix products have other shapes)."""
    brick = Brick(16, 50, MoE(8, 3, 12, 1, Router("sigmoid", normalize=True)))
    stir_ours(brick)
    x, ids = torch.randn(1, 40, 16), torch.zeros(1, 40, dtype=torch.long)
    step = Step(Rows([0], [40], 40, x.device))
    whole = brick(x, ids, step)
    for t in (0, 17, 39):
        assert largest(brick(x[:, t : t + 1], ids[:, :1], step), whole[:, t : t + 1]) < 1e-6


def test_sinkhorn_is_doubly_stochastic() -> None:
    """Claim 30's premise: rows and columns of the mixing matrix sum to one."""
    one = torch.ones(100, 4, dtype=torch.float64)
    raw = torch.randn(100, 4, 4, dtype=torch.float64)
    m = sinkhorn(raw, 20, 1e-6)
    assert largest(m.sum(-2), one) < 1e-5 and largest(m.sum(-1), one) < 1e-3 and bool((m > 0).all())
    assert largest(sinkhorn(raw, 2, 1e-6).sum(-1), one) > 1e-2


def test_fresh_streams_act_as_one_residual() -> None:
    """At initialisation four equal streams stay nearly x + F(x) on average, so depth starts out harmless."""
    mix = Mix(32, HyperConnection(4, 20, 1e-6), 1e-6)
    with torch.no_grad():
        mix.fn.normal_(0, 0.02)
        mix.base.zero_()
        mix.base[8:] = 4.0 * torch.eye(4).flatten()
        mix.scale.fill_(0.01)
        x = torch.randn(1, 3, 1, 32).expand(-1, -1, 4, -1)
        inner, post, comb = mix.read(x)
        y = mix.write(x, torch.zeros(1, 3, 32), post, comb)
    assert largest(y, x) < 1e-2 and largest(post, torch.ones_like(post)) < 1e-2
    assert largest(inner, 2 * x[:, :, 0]) < 0.05


# ------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("kind", ["gqa", "v3", "v32", "v4"])
def test_fresh_models_train(kind: str) -> None:
    """A few steps on one batch bring the loss well under a uniform guess; the same seed, the same weights."""
    one, two = Transformer(config(kind), seed=3), Transformer(config(kind), seed=3)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    ids = torch.randint(0, 60, (4, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(one(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 2.5  # ln 60 = 4.1


def test_pinned_parameters_stay_fp32() -> None:
    model = Transformer(config("v4"), dtype=torch.bfloat16, device="meta")
    kept = {n.rsplit(".", 1)[1] for n, p in model.state_dict().items() if p.dtype == torch.float32}
    assert kept == {"fn", "base", "scale", "ape", "sink", "bias"}
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("weight")} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_cpu_linear_equals_its_reference(dtype: torch.dtype, rows: int) -> None:
    layers = [Linear(48, out, bias=b) for out, b in ((33, True), (7, False), (64, True))]
    for layer in layers:
        stir_ours(layer)
        layer.to(dtype)
    x = torch.randn(2, rows, 48).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    expected = kernel.reference(x, weights, biases)
    pack = kernel.Pack()
    with torch.no_grad():
        for scope in (contextlib.nullcontext(), kernel.packing([pack])):
            with scope:
                for ours, plain, layer in zip(together(x, pack, *layers), expected, layers, strict=True):
                    assert largest(ours, plain) <= tolerance and largest(layer(x), plain) <= tolerance
    assert pack.tensor is not None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_copies_follow_their_weights(dtype: torch.dtype) -> None:
    """Training, loading or moving a weight must never meet a stale copy; limits and copies are honoured."""
    a, b = Linear(16, 8).to(dtype), Linear(16, 8).to(dtype)
    for layer in (a, b):
        layer.weight.normal_()
    x, pack = torch.randn(1, 16).to(dtype), kernel.Pack()
    with kernel.packing([pack, a.pack, b.pack]):
        together(x, pack, a, b)
        a(x)
        a.weight.mul_(2)
        b.weight = torch.nn.Parameter(torch.ones_like(b.weight))
        for layer, out in zip((a, b), together(x, pack, a, b), strict=True):
            assert largest(out, x @ layer.weight.T) < 0.2 and largest(layer(x), x @ layer.weight.T) < 0.2
    used = kernel._packed_bytes
    assert used >= 2 * 8 * 16 * x.element_size()
    assert copy.deepcopy(pack).tensor is None
    pack.drop()
    assert kernel._packed_bytes == used - 2 * 8 * 16 * x.element_size()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "rows"), [(1, 1), (5, 3), (8, 40)])
def test_products_that_are_summed(dtype: torch.dtype, experts: int, rows: int) -> None:
    x, pack = torch.randn(rows, experts, 24).to(dtype), kernel.Pack()
    tolerance = (
        1e-5 if dtype == torch.float32 else 0.03
    )  # sums of bf16 products, rounded once or for each expert
    weight = torch.nn.Parameter(torch.randn(experts, 18, 24).to(dtype) * 0.1)
    wanted = torch.einsum("nei,eoi->no", x.double(), weight.double())
    assert largest(kernel.summed_reference(x, weight).double(), wanted) <= tolerance
    assert (
        largest(kernel.linear_summed(x, weight, pack).double(), wanted) <= tolerance and pack.tensor is None
    )
    with kernel.packing([pack]):
        assert largest(kernel.linear_summed(x, weight, pack).double(), wanted) <= tolerance
        assert pack.tensor is not None
        weight.mul_(2)
        assert largest(kernel.linear_summed(x, weight, pack).double(), 2 * wanted) <= 2 * tolerance
        other = torch.nn.Parameter(weight / 2)
        assert largest(kernel.linear_summed(x, other, pack).double(), wanted) <= tolerance


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gqa", "v3"])
def test_writes_that_no_counter_sees_are_found_between_generations(kind: str) -> None:
    """`.data`, as some trainers and weight syncs use it, changes a weight behind its version counter."""
    model = build(kind).to(torch.bfloat16)
    sampling = Sampling(temperature=0.0, max_new_tokens=12, ignore_eos=True)
    before = model.generate([5, 6, 7], sampling).ids
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        parameter.data.copy_(noise)
    after = model.generate([5, 6, 7], sampling).ids
    assert after == copy.deepcopy(model).generate([5, 6, 7], sampling).ids != before


@torch.no_grad()
def test_a_new_weight_at_an_old_address_is_new() -> None:
    layer, x = Linear(16, 8).to(torch.bfloat16), torch.ones(1, 16).to(torch.bfloat16)
    with kernel.packing([layer.pack]):
        for value in (1.0, 2.0, 3.0, 4.0):
            layer.weight = None
            layer.weight = torch.nn.Parameter(torch.full((8, 16), value).to(torch.bfloat16))
            assert bool((layer(x) == 16 * value).all())


def test_casts_leave_codes_and_pinned_parameters_alone() -> None:
    """`.to(dtype)` gives what building in that type gives; codes of a quantised matrix only change device."""
    for kind in ("v3", "v4"):
        cast, built = build(kind).to(torch.bfloat16), Transformer(config(kind), dtype=torch.bfloat16)
        assert {n: t.dtype for n, t in cast.state_dict().items()} == {
            n: t.dtype for n, t in built.state_dict().items()
        }
        assert all(t.dtype in (torch.float64, torch.int64) for t in cast.double().state_dict().values())
    layer = Linear(64, 32, bias=True)
    torch.nn.init.zeros_(layer.bias)
    layer.hold_codes(torch.float8_e4m3fn, torch.float32, (32, 32))
    codes, scale = quantize_fp8(torch.randn(32, 64), (32, 32))
    layer.weight.data.copy_(codes)
    layer.scale.data.copy_(scale)
    x = torch.randn(3, 64)
    before = layer(x)
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(cast)
        assert layer.weight.dtype == torch.float8_e4m3fn and layer.scale.dtype == torch.float32
        assert layer.bias.dtype == cast
    layer.float()
    assert torch.equal(layer(x), before)


def test_expert_gradients_do_not_fill_the_stack_for_every_expert() -> None:
    """The backward pass of E experts allocates a few stacks of gradients, not E of them."""
    brick = Brick(16, 50, MoE(64, 2, 16, 0, Router("sigmoid")))
    stir_ours(brick)
    stack = brick.experts.gate.weight.nbytes
    with torch.profiler.profile(profile_memory=True) as profile:
        step = Step(Rows([0], [256], 256, torch.device("cpu")))
        brick(torch.randn(1, 256, 16), torch.zeros(1, 256, dtype=torch.long), step).sum().backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated < 40 * stack, allocated / stack


@torch.no_grad()
def test_traces_count_real_tokens_only() -> None:
    model, trace = build("v3"), Trace()
    ids, mask = torch.tensor([[0, 0, 0, 3], [5, 6, 7, 8]]), torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    model(ids, mask, trace=trace)
    (chosen, _, _), whole = trace.experts[1], Trace()
    assert chosen.shape[0] == 5
    model(ids[1:], trace=whole)
    assert torch.equal(chosen[1:], whole.experts[1][0])


@torch.no_grad()
def test_wide_products_equal_widening_the_weight() -> None:
    x, weight = torch.randn(2, 3, 16).to(torch.bfloat16), torch.randn(20_000, 16).to(torch.bfloat16)
    assert largest(kernel.linear_in_fp32(x, weight), x.float() @ weight.float().T) < 1e-5


@torch.no_grad()
def test_no_room_for_copies_means_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PACK_LIMIT", 0)
    a = Linear(16, 8).to(torch.bfloat16)
    a.weight.normal_()
    x = torch.randn(1, 16).to(torch.bfloat16)
    with kernel.packing([a.pack]):
        assert torch.equal(a(x), torch.nn.functional.linear(x, a.weight)) and a.pack.tensor is None


# --------------------------------------------------------------------------------- released rounding


def test_fake_fp8_rounds_to_the_nearest_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()]
    x = torch.randn(20, 128) * 5
    for row, rounded in zip(x, fake_fp8(x, 64), strict=True):
        for block in (slice(0, 64), slice(64, 128)):
            exponent = torch.ceil(torch.log2(row[block].abs().max() / 448))
            nearest = codes[(row[block] / 2**exponent - codes[:, None]).abs().argmin(0)] * 2**exponent
            error, best = (rounded[block] - row[block]).abs(), (nearest - row[block]).abs()
            assert largest(error, best) < 1e-6  # a tie may fall to either side, the distance is the same


def test_fake_fp4_rounds_to_the_nearest_code() -> None:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.cat((values, -values))
    x = torch.randn(50, 32) * 3
    exponent = torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True) / 6))
    best = (x[..., None] / 2 ** exponent[..., None] - codes).abs().amin(-1) * 2**exponent
    assert largest((fake_fp4(x, 32) - x).abs(), best) < 1e-6
    assert torch.equal(fake_fp4(fake_fp4(x, 32), 32), fake_fp4(x, 32))


def test_hadamard_keeps_dots() -> None:
    a, b = torch.randn(7, 64), torch.randn(7, 64)
    assert largest((hadamard(a) * hadamard(b)).sum(-1), (a * b).sum(-1)) < 1e-4
    assert largest(hadamard(hadamard(a)), a) < 1e-5
    with pytest.raises(ValueError, match="power-of-two"):
        hadamard(torch.randn(3, 12))


def wide_v4() -> Transformer:
    """A V4 whose entries have 64 plain channels and whose index keys have 32: one block of each rounding."""
    small = config("v4")
    index = Index(16, 32, 3)
    layers = []
    for layer in small.layers:
        a = layer.attention
        compress = replace(a.compress, index=index) if a.compress and a.compress.index else a.compress
        layers.append(replace(layer, attention=replace(a, head_dim=72, compress=compress)))
    model = Transformer(small.replace(layers=tuple(layers), mtp=()))
    stir_ours(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["v32", "v4"])
def test_simulated_rounding_is_small_cached_alike_and_can_be_taken_back(kind: str) -> None:
    model = build(kind) if kind == "v32" else wide_v4()
    ids = torch.randint(0, 60, (1, 6), generator=torch.Generator().manual_seed(0))
    if kind == "v4":
        with pytest.raises(InputError, match="blocks of 64"):
            build("v4").simulate_released_rounding()
    plain = model(ids)
    model.simulate_released_rounding()
    rounded = model(ids)
    if kind == "v32":  # only the choice is rounded, and six tokens are all chosen
        assert largest(rounded, plain) < 1e-4
    else:
        assert 1e-4 < largest(rounded, plain) < 0.5 * float(plain.std())
    cache = model.new_cache(1)
    assert largest(torch.cat([model(one, cache=cache) for one in ids.split(1, 1)], 1), rounded) < 1e-3
    model.simulate_released_rounding(False)
    assert torch.equal(model(ids), plain)
