"""One step of ours is one step written out plainly, in fp64, for every kind of member."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.data import Batch
from rorqual.family import ModelConfig, Router
from rorqual.nn import Rows, Trace, Transformer
from rorqual.train.balance import V2Balance
from rorqual.train.objective import Counts, Factors, Pretraining
from tests.engine.conftest import config
from tests.engine.members import members
from tests.parity.zoo import stir_ours

VOCAB, TIME, LOOK = 60, 14, 2
ALL = [*members(), "v3", "v32", "v4"]
"""Every released member at toy size, and those with an MTP module once more."""


def member(name: str) -> Transformer:
    made = config(name) if name in ("v3", "v32", "v4") else replace(members()[name], dtype="float32")
    return double(made)


def double(made: ModelConfig) -> Transformer:
    """In fp64 throughout, also what the family keeps in fp32."""
    model = Transformer(made, dtype=torch.float64, seed=1).double()
    stir_ours(model)
    return model


def batch(rows: int = 4, vocab: int = VOCAB) -> Batch:
    ids = torch.randint(3, vocab, (rows, TIME + LOOK))
    documents = torch.randint(0, 2, ids.shape).cumsum(1)
    return Batch(ids, documents, torch.zeros(rows, dtype=torch.long), LOOK)


def plainly(model: Transformer, given: Batch, factors: Factors) -> Tensor:
    """The loss from whole logits and from sums over tokens and experts."""
    ids, width = given.ids_BT, TIME
    trace = Trace()
    logits = model(ids[:, :width], trace=trace)
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1 : width + 1].flatten())
    rows = Rows([0] * len(ids), [width] * len(ids), width, ids.device)
    traces = [trace]
    if len(model.mtp) and factors.mtp:
        assert len(model.mtp) == 1
        state = model.run(ids[:, :width], rows)
        state = state if model.config.residual is not None else model.finish(state)
        further, _ = model.predict_further(state, ids[:, 1 : width + 1], rows)
        loss = loss + factors.mtp * F.cross_entropy(further.flatten(0, 1), ids[:, 2 : width + 2].flatten())
    for found in traces:
        for number, (chosen, _, router_logits) in found.experts.items():
            router = model.layers[number].ff.router
            if router.table is not None:
                continue
            score = {"softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid}.get(
                router.part.score, lambda z: F.softplus(z).sqrt()
            )(router_logits)
            for row in range(len(ids)):
                mine = slice(row * width, (row + 1) * width)
                s, picked = score[mine], chosen[mine]
                experts, k = s.shape[1], picked.shape[1]
                p = (s / s.sum(1, keepdim=True)).sum(0) / width
                likeliest = s.topk(k, 1).indices  # eq. 18: of the affinities alone
                for i in range(experts):
                    f = experts / (k * width) * int((likeliest == i).sum())
                    loss = loss + factors.balance * f * p[i] / len(ids)
    return loss


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ALL)
def test_losses_and_gradients(name: str) -> None:
    model, given = member(name), batch()
    # The balance of MTP's own experts is not in `plainly`: it is added below where there are some.
    factors = Factors(mtp=0.3 if len(model.mtp) else 0.0, balance=0.0 if len(model.mtp) else 0.01)
    other = copy.deepcopy(model)
    counts = Pretraining().counts([given], len(model.mtp))
    parts = Pretraining()(model, given, counts, factors)
    parts.loss.backward()
    wanted = plainly(other, given, factors)
    wanted.backward()
    assert abs(parts.loss - wanted) < 1e-12 * abs(wanted)
    mine, theirs = gradients(model), gradients(other)
    assert mine.keys() == theirs.keys() and len(mine) > 5
    for key, grad in theirs.items():
        assert (mine[key] - grad).abs().max() <= 1e-10 * max(1e-3, float(grad.abs().max())), key


@pytest.mark.parametrize("name", ["v3", "v32", "v4"])
def test_balance_counts_in_every_layer_with_a_router_that_learns(name: str) -> None:
    model, given = member(name), batch()
    counts = Pretraining().counts([given], 1)
    with_, without = (Pretraining()(model, given, counts, Factors(0.3, b)) for b in (0.5, 0.0))
    layers = {n for n, layer in enumerate(model.config.layers) if hasattr(layer.ff, "routed")}
    layers |= {len(model.layers)} if hasattr(model.config.mtp[0].ff, "routed") else set()
    assert set(with_.load) == layers
    k = model.config.mtp[0].ff.top_k
    assert all(int(load.sum()) == 4 * TIME * k for load in with_.load.values())
    added = (with_.loss - without.loss).item()
    assert float(with_.told["balance"]) == pytest.approx(added, rel=1e-9)
    with_.loss.backward()
    grads = gradients(model)
    assert all(grads[f"mtp.0.{n}"].any() for n in ("block.ff.router.weight", "norm.weight"))


@pytest.mark.parametrize(
    ("name", "apart", "dsa"),
    [
        ("gqa", False, ""),
        ("gqa", True, ""),
        ("v3", False, ""),
        ("v3", True, ""),
        ("v32", False, "warm-up"),
        ("v32", True, "sparse"),
        ("v4", True, "sparse"),
    ],
)
def test_any_cut_into_micro_batches_gives_the_same_step(name: str, apart: bool, dsa: str) -> None:
    model = double(config(name))
    given, objective, factors = batch(4), Pretraining(apart, dsa), Factors(0.3, 0.01)
    seen = []
    for pieces in (1, 2, 4):
        for p in model.parameters():
            p.grad = None
        each = 4 // pieces
        batches = [
            Batch(
                given.ids_BT[a : a + each],
                given.documents_BT[a : a + each],
                given.sources_B[a : a + each],
                LOOK,
            )
            for a in range(0, 4, each)
        ]
        counts = objective.counts(batches, len(model.mtp))
        total, load = 0.0, 0
        for part in batches:
            found = objective(model, part, counts, factors)
            found.loss.backward()
            total += found.loss.item()
            load += sum(int((n * torch.arange(len(n))).sum()) for n in found.load.values())
        seen.append((total, load, {key: grad.clone() for key, grad in gradients(model).items()}))
    for total, load, grads in seen[1:]:
        assert total == pytest.approx(seen[0][0], rel=1e-12) and load == seen[0][1]
        assert all((grads[key] - grad).abs().max() < 1e-12 for key, grad in seen[0][2].items())


@pytest.mark.parametrize("name", ["gqa", "v3", "v32", "v4"])
def test_documents_kept_apart_are_documents_alone(name: str) -> None:
    """The next tokens' loss, and what indexers learn: V4's windows are those of each document, too."""
    model = double(replace(config(name), mtp=()))
    lengths = (5, 1, 23, 41)
    ids = torch.randint(3, VOCAB, (2, sum(lengths) + 1))
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor([*lengths[:-1], lengths[-1] + 1]))
    # The second row has other borders.
    both = torch.stack((documents, documents.flip(0).neg()))
    given = Batch(ids, both, torch.zeros(2, dtype=torch.long), 1)
    dsa = "sparse" if name in ("v32", "v4") else ""
    objective = Pretraining(True, dsa)
    counts, targets = objective.counts([given], 0), 2 * (sum(lengths) - 3)
    assert counts == Counts((targets,), 2)
    told = objective(model, given, counts, Factors()).told
    alone, learnt = torch.zeros(2, dtype=torch.float64)
    for row, numbers in zip(ids, both, strict=True):
        for number in numbers.unique():
            own = row[numbers == number][None]
            logits = model(own)[0, :-1]
            alone = alone + F.cross_entropy(logits, own[0, 1:], reduction="sum")
            if dsa:
                # The row's last token is only foretold; a document before it needs one that is.
                read = own if numbers[-1] == number else F.pad(own, (0, 1), value=3)
                one = Batch(read, torch.zeros_like(read), torch.zeros(1), 1)
                found = Pretraining(dsa=dsa)(model, one, Counts((1,), 1), Factors()).told
                learnt = learnt + found.get("index", 0) * (read.shape[1] - 1)
    assert abs(told["next"] * targets - alone) < 1e-9
    if dsa:
        assert abs(told["index"] * 2 * sum(lengths) - learnt) < 1e-10 and learnt > 0.1
    together = Pretraining()(model, given, Counts((1,), 1), Factors()).told["next"]
    assert abs(together - alone) > 0.1


def test_too_few_tokens_ahead_are_refused() -> None:
    model = Transformer(config("v3"), dtype=torch.float64)
    given = Batch(torch.ones(1, 9, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long), torch.zeros(1), 1)
    with pytest.raises(ValueError, match="2 tokens ahead"):
        Pretraining()(model, given, Counts((8, 8), 1), Factors(mtp=0.3))


def test_v2s_three_losses() -> None:
    """Facts 3.3, written out token by token."""
    from rorqual.train.balance import v2_losses

    router = Router("softmax", groups=3, keep=2)
    logits = torch.randn(2, 5, 6, dtype=torch.float64)
    ids = torch.stack([torch.stack([torch.randperm(6)[:2] for _ in range(5)]) for _ in range(2)])
    found = v2_losses(logits, ids, router, V2Balance(0.3, 0.5, 0.7))
    wanted = 0.0
    for s, picked in zip(logits.softmax(-1), ids, strict=True):
        p = [float(s[:, i].mean()) for i in range(6)]
        f = [6 / (2 * 5) * int((picked == i).sum()) for i in range(6)]
        wanted += 0.3 * sum(a * b for a, b in zip(f, p, strict=True))
        for j in range(3):
            p_j = p[2 * j] + p[2 * j + 1]
            wanted += 0.5 * (f[2 * j] + f[2 * j + 1]) / 2 * p_j
            sent = sum(any(int(e) // 2 == j for e in row) for row in picked)
            wanted += 0.7 * 3 / (2 * 5) * sent * p_j
    assert abs(float(found) - wanted / 2) < 1e-12
    one = Router("softmax")
    assert v2_losses(logits, ids, one, V2Balance(0.3, 9.0, 9.0)) < found  # one device: experts alone
