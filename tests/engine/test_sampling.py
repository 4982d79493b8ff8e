"""Sampling against a naive implementation, and draws against the probabilities they claim."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rorqual.engine import Sampler, Sampling, SamplingError, draws
from rorqual.engine.grammar import Grammar

VOCAB = 12


CPU = torch.device("cpu")


def sampler(*rows: Sampling, prompts: list[list[int]] | None = None, vocab: int = VOCAB) -> Sampler:
    """Request i in slot i."""
    made = Sampler(vocab, CPU, len(rows))
    for slot, row in enumerate(rows):
        made.admit(slot, row, prompts[slot] if prompts else [])
    return made


def naive(logits: list[float], s: Sampling, prompt: list[int], answer: list[int]) -> list[float]:
    """The documented order, with plain lists."""
    z = list(logits)
    for t in set(prompt) | set(answer):
        z[t] = z[t] / s.repetition_penalty if z[t] > 0 else z[t] * s.repetition_penalty
    for t in set(answer):
        z[t] -= s.presence_penalty + s.frequency_penalty * answer.count(t)
    for t, value in s.bias:
        z[t] += value
    if s.temperature == 0:
        return [1.0 if i == z.index(max(z)) else 0.0 for i in range(len(z))]
    e = [math.exp((v - max(z)) / s.temperature) for v in z]
    p = {i: v / sum(e) for i, v in enumerate(e)}
    order = sorted(p, key=lambda i: (-p[i], i))
    if s.top_k:
        order = order[: s.top_k]
    kept, mass, whole = [], 0.0, sum(p[i] for i in order)
    for i in order:
        if kept and mass >= s.top_p * whole:
            break
        kept.append(i)
        mass += p[i]
    kept = [i for i in kept if p[i] >= s.min_p * p[order[0]]]
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(z))]


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=VOCAB, max_size=VOCAB, unique=True),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        top_p=st.sampled_from([0.15, 0.55, 0.93, 1.0]),
        top_k=st.integers(0, VOCAB + 3),
        min_p=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
        repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
        presence_penalty=st.sampled_from([-0.5, 0.0, 0.8]),
        frequency_penalty=st.sampled_from([0.0, 0.6]),
        logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-3.0, 0.5, 2]), max_size=2),
    ),
    st.lists(st.integers(0, VOCAB - 1), max_size=4),
    st.lists(st.integers(0, VOCAB - 1), max_size=4),
)
def test_distribution_equals_the_definition(
    logits: list[float], s: Sampling, prompt: list[int], answer: list[int]
) -> None:
    ours = sampler(s, prompts=[prompt])
    for token in answer:
        ours.saw([0], [token])
    p = ours.distribution(torch.tensor([logits]), [0])[0]
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    # A token on a top-p or min-p border may fall to either side in fp32: then a hair's change of the border
    # must explain it.
    near = [
        replace(
            s,
            top_p=s.top_p * (1 + e) if s.top_p < 1 else 1.0,
            min_p=s.min_p * (1 + e) if s.min_p < 1 else 1.0,
        )
        for e in (0, 1e-5, -1e-5)
    ]
    assert any(torch.allclose(p, torch.tensor(naive(logits, one, prompt, answer)), atol=2e-5) for one in near)


def by_sorting(
    p: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """What stays, one row at a time and in whole numbers, as `draws.filtered` documents it."""
    keep = torch.zeros_like(p, dtype=torch.bool)
    for r, row in enumerate((p.double() * 2**60).long().tolist()):
        order = sorted(range(len(row)), key=lambda t: (-float(p[r, t]), t))[: int(top_k[r]) or None]
        whole, before = sum(row[t] for t in order), 0
        for t in order:
            if before == 0 or float(top_p[r]) == 1 or before < math.ceil(float(top_p[r]) * whole):
                keep[r, t] = row[t] > 0 and p[r, t] >= min_p[r].float() * p[r].max()
            before += row[t]
    kept = torch.where(keep, p, 0)
    return kept / kept.double().sum(-1, keepdim=True)


@pytest.mark.parametrize("levels", [0, 2, 5, 40])
@pytest.mark.parametrize("vocab", [1, 7, 300, 1500])
def test_filters_without_sorting_are_filters_with_it(vocab: int, levels: int) -> None:
    """Many ties (`levels` different logits) or none, steep and flat rows, more rows than are worked on at once."""
    rows = 70
    logits = torch.randn(rows, vocab) * torch.logspace(-2, 1.3, rows)[:, None]
    if levels:
        logits = (torch.rand(rows, vocab) * levels).floor() * torch.logspace(-2, 1, rows)[:, None]
    p = logits.softmax(-1)
    top_k = torch.randint(0, vocab + 3, (rows,)) * torch.randint(0, 2, (rows,))
    top_p = torch.where(torch.rand(rows) < 0.3, 1.0, torch.rand(rows).clamp(min=1e-6)).double()
    min_p = (torch.rand(rows) ** 4 * (torch.rand(rows) < 0.5)).double()
    expected = by_sorting(p, top_k, top_p, min_p)
    got = draws.filtered(p, top_k, top_p, min_p)
    assert torch.equal(got > 0, expected > 0)
    assert torch.allclose(got, expected.float(), atol=0, rtol=1e-6)
    assert torch.equal(
        got,
        torch.cat([draws.filtered(*(x[r : r + 1] for x in (p, top_k, top_p, min_p))) for r in range(rows)]),
    )
    off = draws.filtered(p, None, None, min_p * 0)
    assert torch.equal(off > 0, p >= 2**-60)
    assert torch.equal(
        draws.filtered(p, top_k * 0, None, min_p), draws.filtered(p, None, torch.ones(rows), min_p)
    )


def chi2(count: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((count - expected).square() / expected)[expected > 0].sum())


def test_draws_follow_the_probabilities() -> None:
    p = torch.tensor([[0.5, 0.0, 0.2, 0.05, 0.25]])
    ours = sampler(Sampling(seed=3), vocab=5)
    count = torch.zeros(5)
    for _ in range(4000):
        token = ours.draw_from(p, [0])
        ours.saw([0], token)
        count[token] += 1
    assert count[1] == 0
    assert chi2(count, p[0] * 4000) < 16.3  # 3 degrees of freedom: exceeded once in a thousand


@pytest.mark.parametrize("vocab", [3, 256, 257, 5000])
def test_pick_is_the_inverse_of_the_running_sum(vocab: int) -> None:
    """Against a plain search in fp64, with zeros, unequal totals and both ends of [0, 1)."""
    p = torch.rand(40, vocab) * (torch.rand(40, vocab) < 0.7)
    p[:, 1] += 0.01
    p *= torch.logspace(-6, -0.1, 40)[:, None] / p.sum(-1, keepdim=True)
    for u in (torch.zeros(40), torch.full((40,), 1 - 2**-53, dtype=torch.float64), torch.rand(40)):
        got = draws.pick(p, u.double())
        ends = p.double().cumsum(-1)
        plain = torch.searchsorted(ends, u.double()[:, None] * ends[:, -1:], right=True).squeeze(-1)
        assert (p.gather(1, got[:, None]) > 0).all()
        # Rounding may move a draw that falls on a border to its neighbour.
        same = got == plain.clamp(max=vocab - 1)
        border = (ends.gather(1, got[:, None]).squeeze(1) / ends[:, -1] - u).abs() < 1e-9
        assert (same | border | (u > 0.999)).all() and same.float().mean() > 0.9


def test_pick_survives_rows_nothing_can_be_drawn_from() -> None:
    p = torch.stack((torch.zeros(300), torch.full((300,), math.nan), torch.ones(300) / 300))
    got = draws.pick(p, torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64))
    assert ((got >= 0) & (got < 300)).all() and got[2] == 150


def splitmix(key: int, place: int) -> float:
    """SplitMix64 with Python's whole numbers."""
    x = (key + (place) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return ((x ^ (x >> 31)) >> 11) / 2**53


def test_uniforms_are_splitmix64() -> None:
    # The first outputs of the published generator from state 0 (state moves on before each output).
    assert [int(splitmix(0, n) * 2**53) for n in (1, 2)] == [
        0xE220A8397B1DCDAF >> 11,
        0x6E789E6AA1B965F4 >> 11,
    ]
    keys = [draws.key_of(seed) for seed in (0, 1, 2**61, 12345)]
    assert all(-(2**63) <= key < 2**63 for key in keys) and len(set(keys)) == 4
    index = torch.tensor([0, 1, 1000, 2**40])
    for stream in range(4):
        got = draws.uniforms(torch.tensor(keys), index, stream)
        assert got.tolist() == [splitmix(k, int(n) * 4 + stream) for k, n in zip(keys, index, strict=True)]


def test_uniforms_are_uniform_and_unrelated() -> None:
    """Along an answer, across neighbouring seeds, and between streams: 64 bins each way and no correlation."""
    count = 20000
    one = torch.full((count,), draws.key_of(7))
    many = torch.tensor([draws.key_of(seed) for seed in range(count)])
    lines = [draws.uniforms(one, torch.arange(count), stream) for stream in range(4)]
    lines += [draws.uniforms(many, torch.full((count,), 5), stream) for stream in range(4)]
    for u in lines:
        assert chi2(torch.histc(u, 64, 0, 1), torch.full((64,), count / 64)) < 110  # 63: once in 4,000
        pairs = torch.histc(u[1:].mul(8).floor() * 8 + u[:-1].mul(8).floor(), 64, 0, 64)
        assert chi2(pairs, torch.full((64,), (count - 1) / 64)) < 110
    apart = torch.corrcoef(torch.stack(lines)) - torch.eye(8)
    assert apart.abs().max() < 4.5 / math.sqrt(count)


MIXED = [
    Sampling(seed=1),
    Sampling(seed=2, temperature=0.7, top_k=5),
    Sampling(temperature=0.0),
    Sampling(seed=4, top_p=0.8, frequency_penalty=0.5),
    Sampling(seed=5, min_p=0.1, logit_bias={3: 2.0, 4: -100}),
    Sampling(temperature=0.0, repetition_penalty=1.3, logit_bias={5: 1.0}),
]


@pytest.mark.parametrize("vocab", [VOCAB, 1000])
@pytest.mark.parametrize("by_tensor", [False, True])
def test_a_row_draws_the_same_whatever_stands_beside_it(vocab: int, by_tensor: bool) -> None:
    """Rows in any order and any company, named by list or tensor, and requests in any slot: the same bits."""
    together = sampler(*MIXED, prompts=[[1, 2]] * len(MIXED), vocab=vocab)
    past: list[list[int]] = [[] for _ in MIXED]
    for _ in range(12):
        logits = torch.randn(len(MIXED), vocab)
        slots = torch.randperm(len(MIXED)).tolist()
        name = torch.tensor(slots) if by_tensor else slots
        alone = []
        for slot in slots:
            one = Sampler(vocab, CPU, 3)
            one.admit(2, MIXED[slot], [1, 2], past[slot])  # as if it came back after being put off
            alone.append(one)
        rows = logits[slots]
        p = together.distribution(rows, name)
        for r, one in enumerate(alone):
            assert torch.equal(p[r], one.distribution(rows[r : r + 1], [2])[0])
        drawn = together.draw(rows, name)
        assert drawn.tolist() == [int(one.draw(rows[r : r + 1], [2])) for r, one in enumerate(alone)]
        together.saw(name, drawn)
        for slot, token in zip(slots, drawn.tolist(), strict=True):
            past[slot].append(token)


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(len(MIXED), VOCAB)
    before = logits.clone()
    sampler(*MIXED).draw(logits, range(len(MIXED)), torch.rand(len(MIXED), VOCAB) < 0.5)
    assert torch.equal(logits, before)


def test_slots_are_reused_without_memories() -> None:
    logits = torch.randn(1, VOCAB)
    ours = Sampler(VOCAB, CPU, 4)
    busy = Sampling(seed=9, frequency_penalty=3.0, presence_penalty=2.0, logit_bias={1: 50.0, 2: 1.0, 3: 1.0})
    fresh = Sampling(seed=9, frequency_penalty=3.0, logit_bias={0: 1.0})
    expected = sampler(fresh, prompts=[[4]]).distribution(logits, [0])
    for _ in range(3):
        for slot in range(4):
            ours.admit(slot, busy, [1, 2, 3], [5, 5, 6])
        for slot in (2, 0, 3, 1):
            ours.release(slot)
        ours.admit(2, fresh, [4])
        assert torch.equal(ours.distribution(logits, [2]), expected)
        ours.saw([2], [7])
        assert not torch.equal(ours.distribution(logits, [2]), expected)
        ours.release(2)
    assert ours.draw(logits, [0]) == logits.argmax()  # nobody's slot: greedy


def test_tables_cost_nothing_until_asked_for() -> None:
    ours = sampler(Sampling(), Sampling(top_p=0.5))
    assert ours._seen._count.numel() == ours._bias._ids.numel() == 0
    ours.admit(0, Sampling(presence_penalty=1.0), [1])
    assert len(ours._seen._count) == 2 and ours._bias._ids.numel() == 0


def test_rows_without_filters_pay_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    genuine = draws.filtered
    monkeypatch.setattr(draws, "filtered", lambda p, *a: rows.append(len(p)) or genuine(p, *a))
    ours = sampler(Sampling(), Sampling(top_p=0.5), Sampling(temperature=0.0, top_k=3), Sampling(top_k=2))
    logits = torch.randn(4, VOCAB)
    ours.draw(logits, [0, 1, 2, 3])
    ours.draw(logits[:2], [0, 2])
    ours.draw(logits[:1], [1])
    assert rows == [2, 1]


def test_where_only_some_rows_moved_on() -> None:
    """`saw` with `where`: the others neither count the token nor use up a number."""
    s = Sampling(seed=3, frequency_penalty=1.0)
    ours, plain = sampler(s, s), sampler(s, s)
    ours.saw([0, 1], torch.tensor([4, 4]), torch.tensor([True, False]))
    plain.saw([0], [4])
    logits = torch.randn(2, VOCAB)
    assert torch.equal(ours.distribution(logits, [0, 1]), plain.distribution(logits, [0, 1]))
    assert torch.equal(ours.uniforms([0, 1], 0), plain.uniforms([0, 1], 0))
    assert ours.uniforms([1], 2, ahead=1) == ours.uniforms([0], 2)


def test_masks_apply_before_filters() -> None:
    logits = torch.randn(3, 100)
    allowed = torch.rand(3, 100) < 0.3
    bits = torch.zeros(3, 4, dtype=torch.int64)
    for r, t in allowed.nonzero().tolist():
        bits[r, t // 32] |= 1 << (t % 32)
    ours = sampler(Sampling(top_k=3), Sampling(temperature=0.0), Sampling(top_p=0.7), vocab=100)
    p = ours.distribution(logits, [0, 1, 2], allowed)
    assert torch.equal(p, ours.distribution(logits, [0, 1, 2], bits.to(torch.int32)))
    assert torch.equal(p, ours.distribution(logits.masked_fill(~allowed, -math.inf), [0, 1, 2]))
    assert not p[~allowed].any() and (p[0] > 0).sum() == 3
    for width in (3, 5):  # a mask of another width: tokens past it are banned, bits past the tokens ignored
        cut = draws.apply_bitmask(logits, torch.full((3, width), -1, dtype=torch.int32))
        assert (
            cut[:, : 32 * width].equal(logits[:, : 32 * width]) and cut[:, 32 * width :].eq(-math.inf).all()
        )


def test_logprobs_of_rows() -> None:
    logits = torch.randn(4, 1000) * 5
    ids = torch.tensor([0, 999, 5, 7])
    expected = logits.double().log_softmax(-1)
    chosen, top, values = draws.logprobs_of(logits, ids, 4)
    assert torch.allclose(chosen.double(), expected[torch.arange(4), ids], atol=1e-5)
    assert torch.equal(top, expected.topk(4).indices)
    assert torch.allclose(values.double(), expected.topk(4).values, atol=1e-5)
    assert draws.logprobs_of(logits, ids)[1].shape == (4, 0)
    assert torch.equal(draws.logprobs_of(logits[2:3], ids[2:3])[0], chosen[2:3])


def test_seed_repeats_and_no_seed_does_not() -> None:
    logits = torch.zeros(1, 1000)

    def run(seed: int | None) -> list[int]:
        one = sampler(Sampling(seed=seed), vocab=1000)
        tokens = []
        for _ in range(8):
            tokens.append(one.draw(logits, [0]))
            one.saw([0], tokens[-1])
        return [int(t) for t in tokens]

    assert run(7) == run(7) != run(8)
    assert run(None) != run(None)
    assert len(set(run(7))) > 4
    kept = sampler(Sampling()).admit(0, Sampling())
    assert 0 <= kept < 2**62 and sampler(Sampling()).admit(0, Sampling(seed=kept)) == kept


def test_samplings_can_be_hashed_and_changed() -> None:
    s = Sampling(logit_bias={5: 1, 2: -3.5}, grammar=Grammar.choice(["a"]))
    assert s.bias == s.logit_bias == ((2, -3.5), (5, 1.0))
    assert hash(s) == hash(replace(s)) and replace(s, seed=1).bias == s.bias
    with pytest.raises(SamplingError, match="id 5, outside the vocabulary of 5"):
        sampler(s, vocab=5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -1),
        ("top_k", -1),
        ("top_k", 2.5),
        ("repetition_penalty", 0),
        ("presence_penalty", math.inf),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("seed", -4),
        ("seed", 2**62),
        ("stop", ("",)),
        ("stop", 5),
        ("logprobs", -1),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: 101}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", 5),
        ("grammar", "a+"),
    ],
)
def test_bad_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=field):
        Sampling(**{field: value})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_refused(temperature: float) -> None:
    """A row's own fault, known on the device: its neighbours draw on."""
    bad = torch.zeros(4, VOCAB)
    bad[1, 3], bad[2, 3], bad[3] = math.nan, math.inf, -math.inf
    ours = sampler(*[Sampling(temperature=temperature, top_p=0.9)] * 4)
    drawn = ours.draw(bad, [0, 1, 2, 3])
    assert ((drawn >= 0) & (drawn < VOCAB)).all()
    ours.draw(torch.zeros(4, VOCAB), [0, 1, 2, 3])
    assert ours.failed([3, 0, 1, 2]).tolist() == [True, False, True, True]
    for slot in (1, 2, 3):
        with pytest.raises(SamplingError, match="NaN or infinite"):
            ours.check([0, slot])
        ours.admit(slot, Sampling())
    ours.check([0, 1, 2, 3])


def test_tiny_temperatures_are_greedy_and_masks_hold() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, -math.inf]])
    for heat in (1e-300, 1e-39, 1e-30, 1e-6):
        assert int(sampler(Sampling(temperature=heat), vocab=4).draw(logits, [0])) == 1
    one = sampler(Sampling(temperature=50.0, seed=1), vocab=4)
    drawn = set()
    for _ in range(200):
        token = one.draw(logits, [0])
        one.saw([0], token)
        drawn.add(int(token))
    assert drawn == {0, 1, 2}


@pytest.mark.gpu
def test_the_same_bits_on_a_gpu() -> None:
    """Whole answers drawn beside others on the GPU, from logits that are the same everywhere: powers of two at
    temperature 1 lose nothing in softmax's rounding that could move a draw."""
    gpu = torch.device("cuda")
    keys = torch.tensor([draws.key_of(seed) for seed in range(1000)])
    for stream in range(4):
        here = draws.uniforms(keys, torch.arange(1000), stream)
        assert torch.equal(here, draws.uniforms(keys.to(gpu), torch.arange(1000, device=gpu), stream).cpu())
    p = torch.rand(64, 129280).softmax(-1)
    u = torch.rand(64, dtype=torch.float64)
    assert torch.equal(draws.pick(p, u), draws.pick(p.to(gpu), u.to(gpu)).cpu())
    whole = Sampler(129280, gpu, 64)
    for slot in range(64):
        whole.admit(slot, MIXED[slot % len(MIXED)], [1, 2])
    logits = torch.randn(64, 129280, device=gpu)
    together = whole.distribution(logits, range(64))
    for r in (0, 1, 3, 4, 63):
        assert torch.equal(together[r], whole.distribution(logits[r : r + 1], [r])[0])
    assert whole.draw(logits, range(64)).tolist() == [
        int(whole.draw(logits[r : r + 1], [r])) for r in range(64)
    ]


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    gpu = torch.device("cuda")
    ours = Sampler(1000, gpu, 8)
    logits = torch.randn(6, 1000, device=gpu)
    mask = torch.full((6, 32), -1, dtype=torch.int32, device=gpu)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for slot, s in enumerate(MIXED):
            ours.admit(slot, s, [1, 2, 3], [4, 5])
        for _ in range(2):
            drawn = ours.draw(logits, range(6), mask)
            ours.saw(range(6), drawn, ours.distribution(logits, range(6))[:, 0] > 0)
            ours.failed(range(6))
        ours.release(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
