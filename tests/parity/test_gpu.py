"""The same modules on a GPU: fp32 as on the CPU, bf16 no further from fp32 than transformers' bf16 is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import rorqual
from tests.parity.zoo import MEMBERS, VOCAB, build, largest

pytestmark = pytest.mark.gpu
LENGTH = 53


def distance(a: Tensor, reference: Tensor) -> float:
    """Median over tokens of ||a - reference|| / ||reference||: one flipped expert moves one token, not this."""
    a, reference = a.double(), reference.double()
    return float(((a - reference).norm(dim=-1) / reference.norm(dim=-1)).median())


@pytest.fixture(scope="module", autouse=True)
def exact_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@torch.no_grad()
@pytest.mark.parametrize("name", MEMBERS)
def test_gpu_equals_cpu_and_bf16_rounds_like_transformers(name: str, tmp_path: Path) -> None:
    theirs = build(name, tmp_path)
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    reference = theirs(input_ids=ids, use_cache=False).logits
    on_gpu = rorqual.load(tmp_path, dtype=torch.float32, device="cuda")
    assert largest(on_gpu(ids.cuda()).cpu(), reference) < 2e-4
    cache = on_gpu.new_cache(2)
    chunks = [on_gpu(chunk, cache=cache) for chunk in ids.cuda().split((31, 1, 1, 20), 1)]
    assert largest(torch.cat(chunks, 1).cpu(), reference) < 2e-4

    rounded = theirs.to("cuda", torch.bfloat16)(input_ids=ids.cuda(), use_cache=False).logits.cpu()
    ours = rorqual.load(tmp_path, dtype=torch.bfloat16, device="cuda")
    whole = ours(ids.cuda()).cpu()
    cache = ours.new_cache(2)
    cached = torch.cat([ours(chunk, cache=cache) for chunk in ids.cuda().split((31, 1, 1, 20), 1)], 1).cpu()
    limit = max(1.25 * distance(rounded, reference), 0.01)
    print(
        f"{name}: transformers {distance(rounded, reference):.4f}, ours {distance(whole, reference):.4f}, "
        f"cached {distance(cached, reference):.4f}"
    )
    assert distance(whole, reference) < limit and distance(cached, reference) < limit


@torch.no_grad()
@pytest.mark.parametrize("name", MEMBERS)
def test_greedy_on_the_gpu(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    sampling = rorqual.Sampling(temperature=0.0, max_new_tokens=16, ignore_eos=True)
    prompts = [[5, 6, 7], list(range(9, 40)), [4]]
    on_cpu = rorqual.load(tmp_path, dtype=torch.float32).generate(prompts, sampling)
    on_gpu = rorqual.load(tmp_path, dtype=torch.float32, device="cuda").generate(prompts, sampling)
    assert [d.ids for d in on_gpu] == [d.ids for d in on_cpu]
