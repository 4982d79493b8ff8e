"""How indexers learn: V3.2's two stages and V4's entries, against sums written out query by query in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rorqual
from rorqual.data import Batch
from rorqual.model import Model
from rorqual.nn import Rows, Step, Transformer, indexer
from rorqual.nn.rope import rotate, rotate_tail
from rorqual.train.objective import Factors, Pretraining
from rorqual.train.recipe import Recipe
from rorqual.train.schedule import Schedule, Stage
from rorqual.train.trainer import Trainer
from tests.engine.conftest import config
from tests.parity.zoo import stir_ours
from tests.train.test_step import LOOK, VOCAB, double, gradients
from tests.train.test_trainer import corpus, recipe

__all__ = ["corpus"]

TIME = 22
FACTORS = Factors(mtp=0.3, balance=0.01)


def batch(rows: int = 2) -> Batch:
    ids = torch.randint(3, VOCAB, (rows, TIME + LOOK))
    return Batch(ids, torch.zeros_like(ids), torch.zeros(rows, dtype=torch.long), LOOK)


def learnt(
    model: Transformer, given: Batch, dsa: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Any]]:
    """What a pass told, its gradients, and what each attention with an indexer was given."""
    inputs: list[Any] = []
    bricks = [*(x.attention for x in model.layers), *(m.block.attention for m in model.mtp)]
    hooks = [
        brick.register_forward_pre_hook(lambda brick, args: inputs.append((brick, args[0].detach())))
        for brick in bricks
        if getattr(brick, "index", None) is not None
    ]
    model.zero_grad(set_to_none=True)
    objective = Pretraining(dsa=dsa)
    parts = objective(model, given, objective.counts([given], len(model.mtp)), FACTORS)
    parts.loss.backward()
    for hook in hooks:
        hook.remove()
    return parts.told, gradients(model), inputs


def in_latents(brick: Any, x_BTD: Tensor, step: Step) -> Iterator[tuple[int, int, int, Tensor]]:
    """MLA's softmax of every query over all it can see, by row, query and head, from keys of its own: facts 3.1."""
    p = brick.part
    cos, sin = step.rotation(p.rope)
    q = brick.q_b(brick.q_a_norm(brick.q_a(x_BTD))).unflatten(-1, (p.heads, p.qk_dim))
    latent, key = brick.kv_a(x_BTD).split((p.kv_rank, p.rope_dim), -1)
    still = brick.kv_b(brick.kv_a_norm(latent)).unflatten(-1, (p.heads, -1))[..., : p.nope_dim]
    key = rotate(key, (cos, sin), p.rope.interleaved)
    turned = rotate(q[..., p.nope_dim :], (cos[:, :, None], sin[:, :, None]), p.rope.interleaved)
    for b in range(len(x_BTD)):
        for t in range(x_BTD.shape[1]):
            for h in range(p.heads):
                dots = still[b, : t + 1, h] @ q[b, t, h, : p.nope_dim] + key[b, : t + 1] @ turned[b, t, h]
                yield b, t, h, dots * (p.nope_dim + p.rope_dim) ** -0.5


def in_entries(brick: Any, x_BTD: Tensor, step: Step) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
    """V4's logits of every query: of finished entries, and of window and sink: facts 3.9."""
    p = brick.part
    cos, sin = step.rotation(p.rope)
    q = brick.q_b(brick.q_a_norm(brick.q_a(x_BTD))).unflatten(-1, (p.heads, p.head_dim))
    q = q * (q.square().mean(-1, keepdim=True) + brick.eps).rsqrt()
    q = rotate_tail(q, (cos[:, :, None], sin[:, :, None]))
    kv = rotate_tail(brick.kv_norm(brick.kv(x_BTD)), (cos, sin))
    entries = brick.compressor(x_BTD, step, None)
    for b in range(len(x_BTD)):
        for t in range(x_BTD.shape[1]):
            for h in range(p.heads):
                far = entries[b, : (t + 1) // p.compress.ratio] @ q[b, t, h]
                near = kv[b, max(0, t - p.window + 1) : t + 1] @ q[b, t, h]
                yield (
                    b,
                    t,
                    h,
                    far * p.head_dim**-0.5,
                    torch.cat((near * p.head_dim**-0.5, brick.sink[h : h + 1])),
                )


def plain_loss(brick: Any, x_BTD: Tensor, dsa: str) -> Tensor:
    """Σ_t KL(p_t || softmax(I_t)), over S_t if sparse."""
    batch, time = x_BTD.shape[:2]
    step = Step(Rows([0] * batch, [time] * batch, time, x_BTD.device))
    c_q, v4 = brick.q_a_norm(brick.q_a(x_BTD)).detach(), hasattr(brick, "sink")
    q, k, w = brick.index.project(x_BTD, c_q, step, *([None] if v4 else []))
    index = torch.stack([(w[:, :, h, None] * (q[:, :, h] @ k.mT).relu()) for h in range(w.shape[2])]).sum(0)
    target: dict[tuple[int, int], Tensor] = {}
    picked: dict[tuple[int, int], Tensor] = {}
    with torch.no_grad():
        for b, t, _, far, *others in (in_entries if v4 else in_latents)(brick, x_BTD, step):
            best = torch.arange(len(far))
            if dsa == "sparse":
                best = index[b, t, : len(far)].argsort(descending=True)[: brick.index.part.top_k]
            whole = torch.cat((far[best], *others)).softmax(0)[: len(best)]
            target[b, t], picked[b, t] = target.get((b, t), 0) + whole, best
    loss = torch.zeros((), dtype=torch.float64)
    for (b, t), p in target.items():
        if len(p):
            p = p / p.sum()
            loss = loss + (p * (p.log() - index[b, t, picked[b, t]].log_softmax(0))).sum()
    return loss


@pytest.mark.parametrize("dsa", ["warm-up", "sparse"])
@pytest.mark.parametrize("name", ["v32", "v4"])
def test_indexers_learn_where_attention_goes(name: str, dsa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = double(config(name)), batch()
    monkeypatch.setattr(indexer, "BLOCK_BYTES", 2**14)  # several blocks of queries
    told, mine, inputs = learnt(model, given, dsa)
    assert len(inputs) == sum(key.startswith("index ") for key in told) == (3 if name == "v32" else 1)
    model.zero_grad(set_to_none=True)
    wanted = torch.stack([plain_loss(brick, x, dsa) for brick, x in inputs]) / (2 * TIME)
    wanted.sum().backward()
    assert (
        torch.stack([v for key, v in told.items() if key.startswith("index ")]) - wanted
    ).abs().max() < 1e-12
    theirs = {key: grad for key, grad in gradients(model).items() if ".index." in key}
    assert (
        len(theirs) == (15 if name == "v32" else 6) and {k for k in mine if ".index." in k} == theirs.keys()
    )
    for key, grad in theirs.items():
        assert (mine[key] - grad).abs().max() < 1e-11 * max(1, float(grad.abs().max())) and grad.any(), key
    others = {key: grad for key, grad in mine.items() if key not in theirs}
    if dsa == "warm-up":
        assert not others and told["loss"] == told["index"] and "balance" not in told
        return
    # The model learns from its own losses alone, as if the indexers took no part.
    told, alone, _ = learnt(model, given, "")
    assert "index" not in told and alone.keys() == others.keys()
    assert all((alone[key] - grad).abs().max() < 1e-12 for key, grad in others.items())


def test_dense_is_the_model_without_indexers() -> None:
    made, given = config("v32"), batch()
    model = double(made)

    def plain(layer: Any) -> Any:
        return replace(layer, attention=replace(layer.attention, index=None))

    layers, mtp = (tuple(plain(layer) for layer in some) for some in (made.layers, made.mtp))
    without = Transformer(replace(made, layers=layers, mtp=mtp), dtype=torch.float64).double()
    without.load_state_dict({k: v for k, v in model.state_dict().items() if ".index." not in k})
    wanted, theirs, _ = learnt(without, given, "")
    told, mine, _ = learnt(model, given, "dense")
    assert abs(told["loss"] - wanted["loss"]) < 1e-12 and mine.keys() == theirs.keys()
    assert all((mine[key] - grad).abs().max() < 1e-11 for key, grad in theirs.items())
    sparse, _, _ = learnt(model, given, "")
    assert abs(sparse["loss"] - wanted["loss"]) > 1e-3
    warm, _, _ = learnt(model, given, "warm-up")
    assert abs(warm["next"] - wanted["next"]) < 1e-12


def test_v3_goes_on_as_v32(tmp_path: Path, corpus: str) -> None:
    """Fresh indexers beside a V3 checkpoint, warmed up with all else frozen, then everything moves."""
    plan = recipe(corpus, "v32", stages=(Stage(32, 4),), tokens=32 * 4 * 30, micro=4, rate=Schedule(0.01))
    v3 = Model(config("v3", plan.config.vocab))
    stir_ours(v3)
    rorqual.save(v3, tmp_path / "v3")
    said: list[str] = []
    plan = replace(plan, begin=str(tmp_path / "v3"), dsa="warm-up", save_every=0, evaluate_every=0, ema=None)
    trainer = Trainer(plan, tmp_path / "a", warn=said.append)
    assert "index" in said[-1] and "begin fresh" in said[-1]
    fresh = {name: p.clone() for name, p in trainer.model.state_dict().items() if ".index." in name}
    assert trainer.optimizer.parameters.keys() == fresh.keys()  # nothing is kept for what is frozen
    told = [report.values for report in trainer]
    for name, p in trainer.model.state_dict().items():
        if name in fresh:
            assert not torch.equal(p, fresh[name]), name
        else:
            assert torch.equal(p, v3.state_dict()[name]), name
    assert sum(v["index"] for v in told[-5:]) < 0.9 * sum(v["index"] for v in told[:5])
    with pytest.raises(ValueError, match="another model"):
        Trainer(replace(plan, config=config("v4", plan.config.vocab)), tmp_path / "b")
    trainer = Trainer(replace(plan, dsa="sparse", tokens=32 * 4 * 2), tmp_path / "c", warn=said.append)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    list(trainer)
    assert all(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_recipes_say_what_indexers_do(corpus: str) -> None:
    with pytest.raises(ValueError, match="it can be '', 'dense', 'warm-up', 'sparse'"):
        recipe(corpus, "v32", dsa="thin")
    with pytest.raises(ValueError, match="has no indexers"):
        recipe(corpus, "v3", dsa="sparse")
    assert isinstance(recipe(corpus, "v4", dsa="sparse"), Recipe)
