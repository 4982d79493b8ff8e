"""Numbers on their way between host and device, without either waiting for the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Staging:
    """Host numbers on their way to the device: many small arrays in one copy, from memory the device can read
    while the host goes on. Two buffers take turns, so that a pass can be prepared while another runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor | None] = [None, None]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def send(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """Each int64 array as a tensor of its shape on the device."""
        if self.device.type != "cuda":
            return [torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64)) for a in arrays]
        sizes = [a.size for a in arrays]
        moved = torch.empty(sum(sizes), dtype=torch.int64, device=self.device)
        self._move(arrays, moved)
        return [part.view(a.shape) for part, a in zip(moved.split(sizes), arrays, strict=True)]

    def fill(self, array: np.ndarray, into: Tensor) -> None:
        """An int64 array into a tensor of its size on the device."""
        if self.device.type != "cuda":
            into.copy_(torch.from_numpy(array))
        else:
            self._move([array], into)

    def _move(self, arrays: Sequence[np.ndarray], into: Tensor) -> None:
        self._turn ^= 1
        buffer, event = self._buffers[self._turn], self._events[self._turn]
        if event is None:
            event = self._events[self._turn] = torch.cuda.Event()
        event.synchronize()
        if buffer is None or buffer.numel() < into.numel():
            buffer = torch.empty(2 * into.numel(), dtype=torch.int64, pin_memory=True)
            self._buffers[self._turn] = buffer
        flat, at = buffer.numpy(), 0
        for a in arrays:
            flat[at : at + a.size] = a.ravel()
            at += a.size
        into.copy_(buffer[:at], non_blocking=True)
        event.record()


class Coming:
    """Tensors on their way to the host. They may be read after `land()`."""

    def __init__(self, *tensors: Tensor) -> None:
        self.parts: list[Tensor] = []
        self._event: torch.cuda.Event | None = None
        self.add(*tensors)

    def add(self, *tensors: Tensor) -> list[Tensor]:
        """Have these come along; gives what will hold them."""
        new = [_to_host(x) for x in tensors]
        self.parts += new
        return new

    def depart(self) -> Coming:
        """No more will be added."""
        if any(x.is_pinned() for x in self.parts):
            self._event = torch.cuda.Event()
            self._event.record()
        return self

    def land(self) -> list[Tensor]:
        """Wait, and give them."""
        if self._event is not None:
            self._event.synchronize()
        return self.parts


def _to_host(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return x.clone()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
