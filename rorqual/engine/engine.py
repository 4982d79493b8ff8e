"""`Engine`: the core with text in and out, and memory sized to the machine."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Self

import torch

from rorqual.engine.core import Core
from rorqual.engine.inside import Inside
from rorqual.engine.loop import Completion, Delta
from rorqual.engine.prompts import answers_of, is_batch
from rorqual.engine.request import Handle
from rorqual.engine.sampling import Sampling, brief
from rorqual.engine.warm import warm
from rorqual.kernels.ahead import prepare
from rorqual.nn import InputError, Transformer
from rorqual.nn.layout import Layout
from rorqual.nn.paged import page_bytes, ring_bytes
from rorqual.nn.spread import layout_of, spread

MOST_REQUESTS = 65_536
"""At once: tables grow with this number. More may wait."""


class Engine(Core):
    """Many requests at once on one model: continuous batching over paged caches.

    engine = rorqual.Engine(model)
    done = engine.generate(["The sea is", "Whales are"], rorqual.Sampling(temperature=0.0))
    for delta in engine.submit("The sea is"): print(delta.text, end="")

    `max_requests` run at once, `max_waiting` more may wait. `memory` bytes go to caches (by default most of
    what the GPU has left, or a quarter of the machine's); `page_size` tokens a page. A pass takes at most
    `step_tokens` tokens: prompts beyond that are worked in chunks beside running answers. `prefix_cache`
    keeps finished prefixes for requests that begin alike. `speculate` drafts with the MTP module. `invariant`:
    log-probabilities that no batch, chunking, prefix hit or draft changes, those of `model(ids)` inside
    `rorqual.invariant()` to the bit. `fp8_cache` keeps caches in the released layouts, rounded to FP8: MLA latents
    in V3.2's 656 bytes a token and layer instead of 1,152, V4's entries in 584 instead of 1,024 and its index keys as
    FP4 in 68 instead of 256. Answers are then no longer exactly `model.generate`'s; V4 rounds as
    `simulate_released_rounding` does, and rotary channels to bf16.

    With a `layout` (`rorqual.Layout`) many processes, started by torchrun, are one engine: each makes it with the
    same options (`max_requests` and `memory` are each rank's own), rank 0 uses it as here, the others call `follow()`
    until rank 0 calls `close()`. The model is spread over the ranks in place, if it isn't yet.

    Safe to use from several threads and from asyncio. Raises `InputError` for options that can't work.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_requests: int | None = None,
        max_waiting: int = 4096,
        memory: int | None = None,
        page_size: int | None = None,
        step_tokens: int | None = None,
        prefix_cache: bool = True,
        speculate: bool = False,
        invariant: bool = False,
        fp8_cache: bool = False,
        layout: Layout | None = None,
    ) -> None:
        if not isinstance(model, Transformer):
            raise InputError(f"Engine takes a model, as rorqual.load(path) gives one, not {model!r:.80}")
        layout = _laid_out(model, layout, speculate, invariant)
        cpu = model.device.type == "cpu"
        if not cpu:
            prepare()
        slots = _whole("max_requests", max_requests, 32 if cpu else 256)
        if slots > MOST_REQUESTS:
            raise InputError(
                f"max_requests is {brief(slots)}; an engine runs at most {MOST_REQUESTS:,} at once"
            )
        step = _whole("step_tokens", step_tokens, 1024 if cpu else 8192)
        if speculate and not len(model.mtp):
            raise InputError("speculate=True needs an MTP module, and this model has none")
        lanes = model.lanes(fp8_cache)[: None if speculate else len(model.layers)]
        every = math.lcm(*(lane.every for layer in lanes for lane in layer.values() if lane.keep is None))
        size = _whole("page_size", page_size, math.lcm(64, every))
        if size % every:
            raise InputError(
                f"page_size {size} must be a multiple of {every}, the longest window of this model"
            )
        positions = model.config.max_positions
        rings = ring_bytes(lanes) * (2 * slots if prefix_cache else slots)
        page = page_bytes(lanes, size)
        most = slots * -(-positions // size)
        if memory is None:
            room = _free_bytes(model.device) - rings
        else:
            room = _whole("memory", memory, 0) - rings
        pages = min(room // page, most) if page else most
        if layout is not None:
            pages = layout.least(int(pages))
        if pages < 1:
            raise InputError(
                f"{f'{memory:,}' if memory is not None else 'the free'} bytes hold no page: one of {size} tokens takes "
                f"{page:,} bytes{f', and the windows of {slots} requests {rings:,}' if rings else ''}; lower "
                "max_requests or give more memory"
            )
        super().__init__(
            model,
            slots=slots,
            pages=int(pages),
            page_size=size,
            step_tokens=step,
            max_waiting=_whole("max_waiting", max_waiting, 0),
            prefix_cache=prefix_cache,
            speculate=speculate,
            invariant=invariant,
            fp8_cache=fp8_cache,
            layout=layout,
        )

    # ---------------------------------------------------------------------------------- many ranks

    @property
    def leads(self) -> bool:
        """Whether this process takes requests: rank 0 does, and so does an engine of one process."""
        return self.team is None or self.team.leads

    def follow(self) -> None:
        """On ranks other than 0: run passes in step with rank 0 until it closes the engine. Raises `TeamError`,
        naming the rank, if one fails."""
        if self.leads:
            raise InputError("rank 0 leads: it submits requests, and the other ranks follow")
        assert self.team is not None
        try:
            while not self.team.closed:
                self.step()
        finally:
            self._release()

    def close(self) -> None:
        """End the engine, on all its ranks; requests under way are cancelled, and no more are taken. The memory of
        its caches is free from then on."""
        if self.leads:
            with self._lock:
                self._closed = True  # from here on nobody starts it again
        self.stop()
        with self._lock:
            if self.team is not None:
                try:
                    self.team.close()
                finally:
                    if self.team.closed or self.team.error is not None:
                        self._release()
                return
            self._land()
            for request in self.scheduler.everyone():
                self._cancel(request.handle)
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------ requests

    def warm(self, most: int = 64) -> Iterator[float]:
        """Before users come: compile the kernels and record the graphs of passes of up to `most` answers, by
        answering prompts of its own. Yields the share that is done. Raises `InputError` if the engine runs in a
        thread already (`start`)."""
        if self._thread is not None:
            raise InputError("warm an engine before it is started")
        return warm(self, max(1, min(most, self.slots)))

    def submit(
        self,
        prompt: Any,
        sampling: Sampling | None = None,
        *,
        priority: int = 0,
        inside: Inside | None = None,
    ) -> Handle:
        """Queue one prompt (text, ids or a 1-D tensor). Higher `priority` is served first. `inside`: what to tell of
        the model's inside, in `Delta.inside` as it becomes known and whole in `Completion.inside`; the tokens are the
        same with it. Raises what `model.generate` would for a bad prompt or sampling, and `EngineFull` when too many
        wait. Dropping the handle does not stop the answer: `cancel` does."""
        _check_priority(priority)
        (answer,) = answers_of(self.model, [prompt], sampling, inside)
        return self.submit_answer(answer, priority)

    def generate(
        self,
        prompts: Any,
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        priority: int = 0,
        inside: Inside | None = None,
    ) -> Any:
        """`model.generate`, run by the engine: the same shapes, the same answers."""
        _check_priority(priority)
        many = is_batch(prompts)
        answers = answers_of(self.model, list(prompts) if many else [prompts], sampling, inside)
        handles = []
        try:
            for answer in answers:
                handles.append(self.submit_answer(answer, priority))
            done: list[Completion] = [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return done if many else done[0]

    async def stream(
        self,
        prompt: Any,
        sampling: Sampling | None = None,
        *,
        priority: int = 0,
        inside: Inside | None = None,
    ) -> AsyncIterator[Delta]:
        """The answer to one prompt as it comes, for asyncio. Leaving the loop cancels the request."""
        handle = self.submit(prompt, sampling, priority=priority, inside=inside)
        try:
            async for delta in handle:
                yield delta
        finally:
            handle.cancel()


def _laid_out(model: Transformer, layout: Layout | None, speculate: bool, invariant: bool) -> Layout | None:
    """The layout that `model` is spread by, now if it wasn't; None for one process."""
    found = layout_of(model)
    if found is not None and layout is not None and found is not layout:
        raise InputError("the model is spread by another layout: give the engine that one")
    layout = layout or found
    if layout is None:
        return None
    if layout.broken:
        raise InputError(
            "a rank of this layout has failed, and the others' counts with it: start all ranks again"
        )
    if speculate and layout.gathers:
        raise InputError("speculation isn't written for data ranks that share experts: leave it off")
    if invariant and layout.world > 1:
        raise InputError(
            "batch-invariant mode is for one process: sums over ranks have an order of their own"
        )
    if found is None:
        spread(model, layout)
    return layout


def _whole(name: str, value: int | None, default: int) -> int:
    """`value`, or `default` for None; `InputError` unless it is a positive whole number."""
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a positive whole number, got {brief(value)}")
    return value


def _check_priority(priority: int) -> None:
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) >= 2**62:
        raise InputError(f"priority must be a whole number between -2^62 and 2^62, got {brief(priority)}")


def _free_bytes(device: torch.device) -> int:
    """Bytes that caches may take: what a GPU has left but a tenth of it for activations, or a quarter of
    the machine's memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return int(free - 0.1 * total)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
