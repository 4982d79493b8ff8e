"""One token through its experts in one launch on Hopper, by programs that stay, in Gluon.

Every program brings its share of all matrices into a ring in shared memory by the bulk copy engine (TMA), in one
order from the first product's first row to the second's last: 190 KB are under way from each multiprocessor at any
time, whatever is being multiplied. A box is 8 rows of 16 runs of 128 bytes; an item is two of them: 8 channels of
gate and of up, or 16 channels of down.

Tensor cores multiply a box as it lies: its 128 runs are the rows of one factor, the 16 runs of x the columns of
the other, and of the product only those places count where a run met its like. That is one in 16, and still a small
part of what FP8 codes cost as plain products, whose conversion alone takes longer than reading them. For FP8, x is
written in two digits of E4M3 to a power of two for each run: together they have bf16's 8 bits, down to 2^-22 of
the run's largest number.

The first product's results reach the other programs inside the launch: each is a word of 32 bits, bf16 and 16 bits
that tell this launch from the one before, so a program that reads a word sees whether it is there already. No
barrier stands between the products. The shared experts come first: their matrices are asked for before the
kernels in front have ended. The routed ones follow in the same order in both products, so that what the second one
begins with was ready long ago.

Eight warps of a program multiply. Eight more turn words into columns, up to BUFFERS items ahead, from the shared
experts' on, while the first product still runs; one fetches. (By the same warps, one after the other, an item of the
second product took twice as long as its reading.)

All programs must be on the GPU at once, one a multiprocessor: `supported` and `Rings` see to that.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor

from rorqual.kernels.gluon_rings import AVAILABLE, TensorDescriptor, gl, processors
from rorqual.kernels.single_ring_kernel import ring_kernel

RUNS = 16
"""Runs of 128 bytes in a row of a box."""
ITEM = 2 * 8 * RUNS * 128
"""Bytes of an item: two boxes."""
ROOM = 190 * 1024
"""Bytes of shared memory that a program takes at most. The kernel in front has the rest: while it runs, the ring is
filled with the shared experts' boxes."""
REGISTERS, LAYING, FETCHING = 64, 56, 32
"""Registers of a thread when the kernel starts (40,000 in all leave room for the kernel in front), of those that lay
columns and of the one that fetches; those that multiply have the rest, 88. None spill."""
LAYERS = 8
"""Warps that lay columns (4 take 0.7 us longer in FP8)."""
BUFFERS = 4
"""Items of the second product whose columns are laid ahead at most."""
COPIES = 8
"""Copies of the words: all programs read the same ones at the same time, and a line of L2 serves few at once."""
PROGRAMS = 128
"""Programs: they divide the widths of DeepSeek's models, which 132 does not."""

State = tuple[Tensor, Tensor]
"""What launches keep between them: words of inner, and the number of the launch to come (1 at first)."""


def new_state(slots: int, width: int, device: torch.device) -> State:
    """For experts of `width` channels, `slots` of them a token. Launches that may run at the same time must not share
    one."""
    with torch.inference_mode(False):
        words = torch.zeros(COPIES * slots * width, dtype=torch.int32, device=device)
        return words, torch.ones(1, dtype=torch.int32, device=device)


class Rings:
    """The states of whoever runs one pass after another on a GPU. Nobody else there has any (`claim`): two launches
    at a time, each with a part of its programs on the GPU, would wait for ever."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _claimed: ClassVar[weakref.WeakValueDictionary[torch.device, Rings]] = weakref.WeakValueDictionary()

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], State] = {}

    @classmethod
    def claim(cls, device: torch.device) -> Rings | None:
        """New ones, or None as long as somebody else has some on this device, or it is none that could use them."""
        with cls._lock:
            if device.type != "cuda" or device in cls._claimed:
                return None
            made = cls._claimed[device] = cls()
            return made

    def of(self, x_1D: Tensor, slots: int, width: int, codes: bool) -> State | None:
        """The state of a shape; None if the kernel does not take it or is slower, or if a graph is being recorded and
        the shape has not been met before (its words must be there when the graph is replayed).

        Slower is bf16 whose second product has more than 16 channels a program: 143 us for 140 at V3's sizes, where
        FP8 takes 77 for 103."""
        hidden = x_1D.shape[1]
        if not supported(x_1D, slots, width, hidden) or not (codes or hidden <= 16 * PROGRAMS):
            return None
        if (slots, width) not in self._made:
            if torch.cuda.is_current_stream_capturing():
                return None
            self._made[slots, width] = new_state(slots, width, x_1D.device)
        return self._made[slots, width]


def supported(x: Tensor, slots: int, width: int, hidden: int) -> bool:
    """Whether the kernel takes `slots` experts of such sizes, on the device of x (whole: where several processes
    share its multiprocessors, by MPS, not all programs may be there at once)."""
    return (
        AVAILABLE
        and x.is_cuda
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and processors(x) >= PROGRAMS
        and width % 128 == 0
        and hidden % 128 == 0
        # Every program must have a word for the first: it ends the launch.
        and slots * width // 8 >= PROGRAMS
    )


def launch(
    x_1D: Tensor,
    choice: tuple[Tensor, Tensor],
    matrices: tuple[Tensor, ...],
    scales: tuple[Tensor, ...],
    residual_1D: Tensor | None,
    y_1D: Tensor,
    state: State,
    *,
    sizes: tuple[int, int, int],
    limit: float | None,
    powers: bool,
    how: dict[str, int] | None = None,
    part: int = 0,
) -> None:
    """y: the sum over experts, and the residual. `matrices`: gate, up `[E, W, D]`, down `[E, D, W]`, then the same of
    the shared experts `[F W, D]`, `[D, F W]`; `scales` likewise. `sizes`: experts in all, W, and F shared ones.
    """
    count, width, shared = sizes
    hidden, chosen = x_1D.shape[1], choice[0].shape[1]
    codes = matrices[0].element_size() == 1
    chunks = _chunks(hidden, width, shared, codes)
    plans = plan(chosen, *sizes[1:], hidden, codes)
    ups = -(-(chosen + shared) * width // 8 // PROGRAMS) * chunks[0]
    commons = max(1, -(-shared * width // 8 // PROGRAMS) * chunks[0])
    ring_kernel[(PROGRAMS,)](
        *(boxes(m) for m in matrices), x_1D, *choice, *scales, scales[5].stride(-2), residual_1D, y_1D, *state,
        limit or 0.0, count, W=width, D=hidden, K=chosen, SHARED=shared, UPS=_power_of_two(ups),
        COMMON_UPS=_power_of_two(commons), POWERS=powers, LIMIT=limit is not None, RESIDUAL=residual_1D is not None,
        COPIES=COPIES, PART=part, P=PROGRAMS, num_warps=8, launch_pdl=True, **(plans | (how or {})),
    )  # fmt: skip


def _chunks(hidden: int, width: int, shared: int, codes: bool) -> tuple[int, int, int]:
    """Items of a row of the first product, of the second's shared experts together and of a routed one."""
    depth = RUNS * (128 if codes else 64)
    return -(-hidden // depth), -(-shared * width // depth), -(-width // depth)


def plan(chosen: int, width: int, shared: int, hidden: int, codes: bool) -> dict[str, int]:
    """Items in the ring, and those of the shared experts' second product that are held beside it."""
    ups, common, _ = _chunks(hidden, width, shared, codes)
    held = common if codes and common <= 2 and hidden <= 16 * PROGRAMS else 0
    columns = (ups + BUFFERS) * RUNS * 128 * (2 if codes else 1)
    table = 0
    if codes:
        table = 128 * _power_of_two(-(-(chosen + shared) * width // 8 // PROGRAMS) * ups) + 4096
    return {
        "STAGES": min(6, (ROOM - columns - table) // ITEM) - held, "HELD": held, "BUFFERS": BUFFERS,
        "LAYERS": LAYERS, "LAYING": LAYING, "FETCHING": FETCHING, "maxnreg": REGISTERS,
    }  # fmt: skip


def boxes(matrix: Tensor) -> Any:
    """A matrix as rows of runs of 128 bytes, 8 rows and RUNS runs a box."""
    run = 128 // matrix.element_size()
    rows = matrix.numel() // matrix.shape[-1]
    shape = [rows, matrix.shape[-1] // run, run]
    return TensorDescriptor(
        matrix, shape, [matrix.stride(-2), run, 1], [8, RUNS, run], _layout(8 * matrix.element_size())
    )


@functools.cache
def _layout(bits: int) -> Any:
    return gl.NVMMASharedLayout(128, bits, rank=3)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
