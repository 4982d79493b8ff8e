"""The attention of one token in one launch, against the operations it joins. It needs a GPU: its programs send each other
numbers, and the interpreter runs one after the other."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels import single_core, single_mla
from tests.kernels.test_single import close, matrix

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("codes", ["plain", "codes", "powers"])
@pytest.mark.parametrize(
    ("heads", "nope", "v", "rope", "size", "blocks", "interleaved"),
    [
        (16, 128, 128, 64, 64, 16, True),
        (3, 128, 256, 32, 16, 32, False),
        (5, 256, 128, 16, 32, 32, True),
        (1, 64, 64, 64, 128, 1, False),
    ],
)
def test_core(
    codes: str, heads: int, nope: int, v: int, rope: int, size: int, blocks: int, interleaved: bool
) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    device, rank, longest = torch.device("cuda"), 512, size * blocks
    pages = torch.full((blocks + 3, size, rank + rope), float("nan"), device=device).bfloat16()
    table = (torch.randperm(blocks + 2, device=device)[:blocks] + 1).view(1, blocks).int()
    w, scale = matrix(
        heads * (nope + v), rank, codes=codes != "plain", device=device, powers=codes == "powers"
    )
    w = w.view(heads, nope + v, rank)
    norm = torch.rand(rank, device=device).bfloat16() + 0.5, 1e-6
    rest = {"width": 1, "nope": nope, "interleaved": interleaved, "softmax_scale": 0.1}
    for end in sorted({1, 2, min(63, longest), min(65, longest), longest // 2 + 1, longest}):
        q = torch.randn(1, heads, nope + rope + 8, device=device).bfloat16()[:, :, : nope + rope]
        kv = torch.randn(1, rank + rope, device=device).bfloat16()
        angle = torch.rand(1, rope // 2, device=device) * 6
        held = torch.randn(longest, rank + rope, device=device).bfloat16()
        held[end - 1 :] = float("nan")  # what is not there yet is not looked at
        pages[table[0].long()] = held.view(blocks, size, -1)
        place = int(table[0, (end - 1) // size]) * size + (end - 1) % size
        ends, slots = (
            torch.tensor([end], device=device, dtype=torch.int32),
            torch.tensor([place], device=device),
        )
        assert single_core.supported(q, w, pages, table, nope, 1)
        shared = (q, kv, norm, angle.cos(), angle.sin(), w, scale)
        other, again = pages.nan_to_num(), pages.clone()
        y = single_mla.attention(*shared, pages, slots, table, ends, **rest)
        same = single_mla.attention(*shared, again, slots, table, ends, **rest)
        want = single_mla.reference(*shared, other, slots, table, ends, **rest)
        close(y, want, 2e-2)
        assert torch.equal(y, same)
        new = place // size, place % size
        close(pages[new].float(), other[new].float(), 8e-3)
        pages[new] = other[new] = 0.0
        assert torch.equal(pages.nan_to_num(), other)
