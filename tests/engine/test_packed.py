"""A decoding pass's numbers and their layout; on a GPU, that no step waits for the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rorqual import Sampling
from rorqual.engine.packed import HERE, NONE, Left, fields, lay_reference, lay_triton, numbers
from rorqual.engine.request import Request
from rorqual.family import MLA, Rope
from rorqual.kernels import gpu
from rorqual.model import Model
from tests.engine.conftest import config
from tests.engine.test_engine import engine_of, prompts_of
from tests.interpreter import repair
from tests.parity.zoo import stir_ours

SLOTS, PAGE = 9, 4


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if not gpu.INSTALLED:
        pytest.skip("Triton is not installed")
    if (request.param == "cpu") == torch.cuda.is_available():
        pytest.skip("kernels run interpreted only where there is no GPU")
    if request.param == "cpu":
        repair(monkeypatch)
    return torch.device(request.param)


class Known(Request):
    """A request of which the host knows so much: `tokens`, of which `held` are in the caches."""

    def __init__(self, tokens: int, held: int, slot: int, width: int = 1, loose: int = 0) -> None:
        self.ids, self.held, self.slot, self.loose = list(range(100, 100 + tokens)), held, slot, loose
        self.pages, self.ring, self._width = (
            [slot * 10 + b for b in range(-(-(held + width) // PAGE))],
            slot,
            width,
        )

    @property
    def width(self) -> int:
        return self._width


def left(device: torch.device) -> Left:
    lines = torch.arange(SLOTS)
    return Left(*(x.to(device) for x in (lines + 700, lines + 800, lines + 40)))


@pytest.mark.parametrize("width", [1, 2])
def test_what_is_known_and_what_is_not(device: torch.device, width: int) -> None:
    """Rows whose last token, draft or start only the device knows, rows without a draft, and idle ones."""
    rows = [Known(8, 7, 1, width), Known(7, 7, 2, width), Known(5, 4, 3)]
    if width == 2:
        rows.append(Known(13, 12, 4, 2, loose=1))
    blocks = 8
    packed = torch.from_numpy(numbers(rows, 5, width, blocks, SLOTS - 1)).to(device)
    last, draft, start, ring, slot, table = (x.tolist() for x in fields(packed.cpu(), 5))
    assert (last[:3], start[:3]) == ([107, HERE, 104], [7, 7, 4])
    assert draft == ([NONE] * 5 if width == 1 else [HERE, HERE, NONE, HERE, NONE])
    assert slot[len(rows) :] == [SLOTS - 1] * (5 - len(rows)) and table[4] == [0] * blocks
    assert ring[:3] == [1, 2, 3]
    plain = lay_reference(packed, 5, width, PAGE, left(device))
    ids, starts = plain.ids_N.view(5, width), plain.positions_N.view(5, width)[:, 0]
    assert ids[:3, 0].tolist() == [107, 702, 104] and starts[:3].tolist() == [7, 7, 4]
    assert plain.ends_S.tolist() == (starts + width).tolist()
    assert plain.slots_N.view(5, width)[0, 0] == 11 * PAGE + 3
    if width == 2:
        assert ids[:, 1].tolist() == [801, 802, 0, 804, 0] and plain.tries_S.tolist() == [1, 1, 0, 1, 0]
        assert (ids[3, 0], starts[3], plain.slots_N.view(5, 2)[3, 0]) == (
            704,
            44,
            0,
        )  # past the table: page 0
        assert plain.slots_N.view(5, 2)[0].tolist() == [11 * PAGE + 3, 12 * PAGE]
    for a, b in zip(plain, lay_triton(packed, 5, width, PAGE, left(device)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def wide() -> Model:
    """A small V3 whose heads' parts kernels take: references may ask the device for numbers."""
    plan = config("v3")
    attention = MLA(4, 16, 16, 16, 16, Rope(16, interleaved=True), q_rank=32)
    layers, mtp = (
        tuple(replace(layer, attention=attention) for layer in some) for some in (plan.layers, plan.mtp)
    )
    model = Model(replace(plan, layers=layers, mtp=mtp))
    stir_ours(model)
    return model


@pytest.mark.gpu
@pytest.mark.parametrize("speculate", [False, True])
def test_no_step_waits_for_the_gpu(speculate: bool) -> None:
    """Steps with everything a request can ask for, but for the one wait for the draws themselves."""
    model = wide().cuda()
    engine = engine_of(model, 400, slots=8, speculate=speculate)
    samplings = [
        Sampling(0.0, max_new_tokens=30, ignore_eos=True),
        Sampling(0.8, top_p=0.9, seed=1, max_new_tokens=30, ignore_eos=True, logprobs=3),
        Sampling(
            1.0, seed=2, max_new_tokens=30, ignore_eos=True, repetition_penalty=1.2, presence_penalty=0.5
        ),
        Sampling(1.0, top_k=5, seed=3, max_new_tokens=30, ignore_eos=True, logit_bias={5: 2.0}),
    ]
    prompts = prompts_of(model.config.vocab, 4)
    for _ in range(2):  # graphs of all sizes are recorded, also of what goes on from cached prefixes
        first = engine.generate(prompts, samplings)
    handles = [engine.submit(p, s) for p, s in zip(prompts, samplings, strict=True)]
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        while engine.busy:
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [h.result().ids for h in handles] == [c.ids for c in first]
