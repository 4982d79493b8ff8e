"""Every kind of member equals transformers in fp32: logits, hidden states, routing, selections, generation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rorqual
from rorqual.nn import Trace
from tests.parity.zoo import MEMBERS, VOCAB, build, largest

CLOSE = 1e-4  # the noise of fp32 between two orders of summation is near 1e-5 here
LENGTH = 53


@dataclass
class Pair:
    name: str
    theirs: Any
    ours: rorqual.Model
    directory: Path

    @torch.no_grad()
    def reference(self, ids: Tensor) -> Tensor:
        return self.theirs(input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="module", params=list(MEMBERS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp(request.param)
    theirs = build(request.param, directory)
    return Pair(request.param, theirs, rorqual.load(directory, dtype=torch.float32), directory)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def layer_of(name: str) -> int:
    return int(re.search(r"layers\.(\d+)\.", name)[1])


@torch.no_grad()
def test_logits_and_hidden_states(pair: Pair) -> None:
    ids = tokens(2, LENGTH)
    theirs = pair.theirs(input_ids=ids, use_cache=False, output_hidden_states=True)
    trace = Trace()
    assert largest(pair.ours(ids, trace=trace), theirs.logits) < CLOSE
    assert len(trace.hidden) == len(theirs.hidden_states)
    for depth, (ours, reference) in enumerate(zip(trace.hidden, theirs.hidden_states, strict=True)):
        assert largest(ours, reference) < CLOSE, f"after {depth} layers"


@torch.no_grad()
def test_router_choices_and_index_sets(pair: Pair) -> None:
    seen: dict[str, Any] = {}
    hooks = []
    for name, module in pair.theirs.named_modules():
        kind = type(module).__name__
        if kind.lower().endswith("router") or kind.endswith("Indexer"):
            hooks.append(
                module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
            )
    ids = tokens(2, LENGTH)
    pair.reference(ids)
    for hook in hooks:
        hook.remove()
    trace = Trace()
    pair.ours(ids, trace=trace)
    routers = {layer_of(n): out for n, out in seen.items() if isinstance(out, tuple)}
    selections = {layer_of(n): out for n, out in seen.items() if not isinstance(out, tuple)}
    assert set(trace.experts) == set(routers) and set(trace.selected) == set(selections)
    for layer, (_, weights, chosen) in routers.items():
        ours, theirs = trace.experts[layer][0].sort(-1), chosen.sort(-1)
        assert torch.equal(ours.values, theirs.values), f"layer {layer}"
        sorted_ours = trace.experts[layer][1].gather(1, ours.indices)
        assert largest(sorted_ours, weights.float().gather(1, theirs.indices)) < 1e-5
    for layer, chosen in selections.items():
        assert sets(trace.selected[layer]) == sets(visible(chosen, pair.name)), f"layer {layer}"


def visible(chosen: Tensor, name: str) -> Tensor:
    """transformers' V3.2 pads short selections with positions still to come: those mean none."""
    chosen = chosen.long()
    if name != "v32":
        return chosen
    return chosen.masked_fill(chosen > torch.arange(chosen.shape[1])[None, :, None], -1)


def sets(chosen: Tensor) -> list[set[int]]:
    return [set(row.tolist()) - {-1} for row in chosen.flatten(0, 1)]


def test_greedy_continuation_with_cache(pair: Pair) -> None:
    prompt = tokens(1, 21, seed=5)
    config = pair.theirs.generation_config
    config.eos_token_id, config.pad_token_id = None, 0
    mask = torch.ones_like(prompt)
    theirs = pair.theirs.generate(prompt, attention_mask=mask, max_new_tokens=16, do_sample=False)[0, 21:]
    sampling = rorqual.Sampling(temperature=0.0, max_new_tokens=16, ignore_eos=True)
    assert pair.ours.generate(prompt[0].tolist(), sampling).ids == theirs.tolist()


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(31, 22), (1,) * LENGTH, (7, 1, 16, 4, 1, 24), (50, 3)], ids=str)
def test_chunks_equal_the_whole(pair: Pair, cuts: tuple[int, ...]) -> None:
    """Borders of window (8), ratios (4, 16) and top-k (7, 3) are crossed at every offset by single steps."""
    ids = tokens(2, LENGTH, seed=2)
    cache = pair.ours.new_cache(2)
    logits = torch.cat([pair.ours(chunk, cache=cache) for chunk in ids.split(cuts, 1)], 1)
    assert largest(logits, pair.reference(ids)) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_single_rows(pair: Pair, side: str) -> None:
    lengths, width = [LENGTH, 34, 5], LENGTH
    rows = [tokens(1, n, seed=n) for n in lengths]
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    where = [slice(width - n, None) if side == "left" else slice(0, n) for n in lengths]
    for b, (row, place) in enumerate(zip(rows, where, strict=True)):
        ids[b, place], mask[b, place] = row[0], 1
    cache = pair.ours.new_cache(3)
    for logits in (pair.ours(ids, mask), pair.ours(ids, mask, cache=cache)):
        for b, (row, place) in enumerate(zip(rows, where, strict=True)):
            assert largest(logits[b : b + 1, place], pair.reference(row)) < CLOSE
        assert not logits[mask == 0].any()
    # The rows go on from their own ends, with chunks of one, two and three tokens in one pass.
    more, counts = tokens(3, 3, seed=9), [1, 2, 3]
    chunk_mask = torch.tensor([[1] * c + [0] * (3 - c) for c in counts])
    logits = pair.ours(more, chunk_mask, cache=cache)
    for b, (row, c) in enumerate(zip(rows, counts, strict=True)):
        whole = pair.reference(torch.cat((row, more[b : b + 1, :c]), 1))
        assert largest(logits[b : b + 1, :c], whole[:, -c:]) < CLOSE


def test_gradients(pair: Pair) -> None:
    """Training gradients agree parameter by parameter (by norm), so the modules can be trained as they are."""
    ids = tokens(2, 24, seed=3)
    pair.theirs.zero_grad()
    pair.theirs(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    ours = rorqual.load(pair.directory, dtype=torch.float32)
    logits = ours(ids)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = sum(
        float(p.grad.double().square().sum()) for p in pair.theirs.parameters() if p.grad is not None
    )
    total = sum(float(p.grad.double().square().sum()) for p in ours.parameters() if p.grad is not None)
    assert total == pytest.approx(theirs, rel=1e-4)
    assert largest(ours.embed.weight.grad, pair.theirs.get_input_embeddings().weight.grad) < 1e-5
