"""The kernels' draw against the definition in whole numbers, and against the sampler's plain operations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rorqual.engine import Sampler, Sampling, draws, fused, fused_judge
from rorqual.kernels import gpu


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if not gpu.INSTALLED:
        pytest.skip("Triton is not installed")
    if (request.param == "cpu") == torch.cuda.is_available():
        pytest.skip("kernels run interpreted only where there is no GPU")
    return torch.device(request.param)


def defined(x: np.ndarray, s: Sampling, u: float) -> tuple[int, float]:
    """The token and how far from a border of the running sum it was drawn, as a share of the whole."""
    if s.greedy:
        return int(x.argmax()), 1.0
    e = np.exp((x - x.max()) / np.float32(s.temperature))
    weight = (e * np.float32(2**44)).astype(np.int64)
    order = sorted(range(len(x)), key=lambda t: (-e[t], t))[: s.top_k or None]
    whole, before, kept = int(weight[order].sum()), 0, []
    for t in order:
        if s.top_p < 1 and before >= math.ceil(s.top_p * whole):
            break
        before += int(weight[t])
        kept.append(t)
    kept = sorted(t for t in kept if e[t] >= np.float32(s.min_p))
    goal = min(int(u * float(weight[kept].sum())), int(weight[kept].sum()) - 1)
    ends = np.cumsum(weight[kept])
    at = int((ends <= goal).sum())
    border = np.abs(ends - goal).min() / ends[-1]
    return kept[at], float(border)


def tables(ours: Sampler) -> fused.Tables:
    kept = ours._knobs_SK, ours._key_S, ours._drawn_S, ours._unsound_S, ours.newest_S
    return fused.Tables(*kept, *ours._seen.tables)


CASES = [
    Sampling(),
    Sampling(temperature=0.6, top_p=0.95),
    Sampling(temperature=0.0),
    Sampling(top_k=1),
    Sampling(top_k=5, temperature=2.0),
    Sampling(top_k=40, top_p=0.7),
    Sampling(top_k=100, top_p=0.9, min_p=0.05),
    Sampling(min_p=0.3),
    Sampling(top_p=0.01),
    Sampling(top_p=0.9999999),
    Sampling(temperature=1e-20, top_p=0.5),
    Sampling(temperature=30.0, top_p=0.5),
]


@pytest.mark.parametrize("filters", [True, False])
@pytest.mark.parametrize(("vocab", "block"), [(1, 16), (37, 16), (150, 64)])
@pytest.mark.parametrize("levels", [0, 4])
def test_tokens_are_the_definitions(
    device: torch.device, vocab: int, block: int, levels: int, filters: bool
) -> None:
    """Many chunks, a ragged end, many equal logits or none, rows in another order than their slots."""
    cases = [s for s in CASES if filters or not s.filtered] * (1 if filters else 4)
    ours = Sampler(vocab, device, len(cases) + 2)
    for slot, s in enumerate(cases):
        ours.admit(slot, s if s.seed else Sampling(**{**vars(s), "seed": slot}), [], [0] * slot)
    slots = torch.randperm(len(cases))
    logits = torch.randn(len(cases), vocab + 3) * 3
    if levels:
        logits = (torch.rand(len(cases), vocab + 3) * levels).floor()
    logits = logits[:, :vocab]
    there = slots.to(device)
    got, _ = fused.draw(
        logits.to(device), there, tables(ours), filters=filters, part=block, block=block, warps=4
    )
    u = draws.uniforms(ours._key_S[there], ours._drawn_S[there], 0).tolist()
    for r, slot in enumerate(slots.tolist()):
        token, border = defined(logits[r].numpy(), cases[slot], u[r])
        assert int(got[r]) == token or border < 1e-5, (r, cases[slot])
    assert not ours.failed(there).any()


def test_unsound_rows_are_told(device: torch.device) -> None:
    logits = torch.zeros(5, 40, device=device)
    logits[1, 3], logits[2, 39], logits[3] = math.nan, math.inf, -math.inf
    logits[4, 1:] = -math.inf
    for s in (Sampling(top_k=3), Sampling(temperature=0.0), Sampling(top_p=0.5, min_p=0.1)):
        ours = Sampler(40, device, 5)
        for slot in range(5):
            ours.admit(slot, s)
        at = torch.arange(5, device=device)
        got, failed = fused.draw(logits, at, tables(ours), part=16, block=16, warps=4)
        assert (failed > 0).tolist() == [False, True, True, True, False]
        assert ((got >= 0) & (got < 40)).all() and got[4] == 0
        assert ours.failed(at).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("told", [False, True])
def test_penalties_masks_and_what_tables_are_told(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Several tokens of requests with all there is, through the sampler: by kernels and by plain operations the same,
    in the tokens and in what is left in the tables."""
    vocab, rows = 150, 6
    penal = {"repetition_penalty": 1.7, "presence_penalty": 0.9, "frequency_penalty": 0.8}
    cases = [
        Sampling(temperature=0.0, seed=1),
        Sampling(temperature=0.0, seed=2, **penal),
        Sampling(seed=3, **penal),
        Sampling(seed=4, top_p=0.7, temperature=0.8),
        Sampling(seed=5, top_k=9, logit_bias={5: 4.0, 90: -3.0}),
        Sampling(seed=6),
    ]
    ours, plain = (Sampler(vocab, device, rows + 1) for _ in range(2))
    genuine = fused.draw
    monkeypatch.setattr(fused, "draw", lambda *a, **k: genuine(*a, **k, part=64, block=64, warps=4))
    order = torch.randperm(rows).tolist()
    for biased in (False, True):
        use = order if biased else [slot for slot in order if slot != 4]
        for both in (ours, plain):
            for slot, s in enumerate(cases):
                both.admit(slot, s, [1, 2, 3, 90], [7, 7])
        for turn in range(3):
            logits = torch.randn(len(use), vocab, device=device) * 2
            bits = torch.randint(-(2**31), 2**31, (len(use), 4), device=device).int() if turn % 2 else None
            where = torch.rand(len(use), device=device) < 0.6 if told else None
            monkeypatch.setattr(fused, "supported", lambda logits: True)
            got, failed = ours.take(logits, use, bits, where)
            monkeypatch.setattr(fused, "supported", lambda logits: False)
            right, _ = plain.take(logits, use, bits, where)
            assert torch.equal(got, right)
            assert not failed.any()
            if bits is not None:
                assert (got < 128).all()
                assert ((bits.gather(1, (got // 32)[:, None])[:, 0] >> (got % 32)) & 1).all()
        for a, b in zip(tables(ours), tables(plain), strict=True):
            assert torch.equal(a, b)


def test_drafts_and_verdicts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By kernels and by plain operations the same drafts, what they were drawn from, verdicts and tables; rows of all
    kinds, with and without a draft."""
    vocab, turns = 150, 4
    cases = [
        Sampling(temperature=0.0, seed=1, repetition_penalty=1.3),
        Sampling(seed=2),
        Sampling(seed=3, top_k=6),
        Sampling(seed=4, top_p=0.6, temperature=0.7, frequency_penalty=0.3),
        Sampling(seed=5, min_p=0.2),
        Sampling(seed=6, top_k=20, top_p=0.9, logit_bias={4: 1.0}),
        Sampling(seed=7, temperature=1.5),
        Sampling(temperature=0.0, seed=8),
    ]
    ours, plain = (Sampler(vocab, device, len(cases)) for _ in range(2))
    part = {"part": 64}
    genuine, verdict = fused.draw, fused_judge.judge
    monkeypatch.setattr(fused, "draw", lambda *a, **k: genuine(*a, **k, **part, block=64, warps=4))
    monkeypatch.setattr(fused_judge, "judge", lambda *a, **k: verdict(*a, **k, **part))
    for both in (ours, plain):
        for slot, s in enumerate(cases):
            both.admit(slot, s, [1, 2, 3], [7])
    seen = []
    for turn in range(turns):
        use = torch.randperm(len(cases)).tolist()
        if turn % 2 == 0:  # equal logits tie, and ties are cut by their place
            logits = torch.randint(0, 4, (2, len(cases), vocab), device=device).float()
        else:
            logits = torch.randn(2, len(cases), vocab, device=device) * 2
            logits[1] = logits[0] + torch.randn(len(cases), vocab, device=device) * 0.4
        tries = (torch.rand(len(cases), device=device) < 0.8).long()
        got = []
        for sampler, kernels in ((ours, True), (plain, False)):
            monkeypatch.setattr(fused, "supported", lambda logits, kernels=kernels: kernels)
            drafts = sampler.draft(logits[0], use)
            got.append((drafts, *sampler.judge(logits[1], use, drafts, tries)))
        for a, b in zip(*got, strict=True):
            assert torch.equal(a, b)
        random = [slot for slot in range(len(cases)) if not cases[slot].greedy]
        torch.testing.assert_close(ours._q_SV[random], plain._q_SV[random], atol=1e-6, rtol=1e-4)
        seen += got[0][2][tries > 0].tolist()
    for a, b in zip(tables(ours), tables(plain), strict=True):
        assert torch.equal(a, b)
    assert 0.1 < sum(seen) / len(seen) < 0.9


@pytest.mark.gpu
def test_a_real_vocabulary_draws_what_plain_operations_draw(device: torch.device) -> None:
    """The same tokens but for a few that fall on borders, where exp rounds one way or the other."""
    rows, vocab, same = 48, 129280, 0
    ours = Sampler(vocab, device, rows)
    for slot in range(rows):
        ours.admit(slot, Sampling(**{**vars(CASES[slot % len(CASES)]), "seed": slot}))
    at = torch.arange(rows, device=device)
    for _ in range(5):
        logits = torch.randn(rows, vocab, device=device).bfloat16() * 3
        got, _ = fused.draw(logits, at, tables(ours))
        for r in (0, 1, 5, 47):
            assert got[r] == fused.draw(logits[r : r + 1], at[r : r + 1], tables(ours))[0, 0]
        p = ours.distribution(logits, at)
        same += int((got == draws.pick(p, ours.uniforms(at, 0))).sum())
        ours.saw(at, got)
    assert same >= 5 * rows - 6
