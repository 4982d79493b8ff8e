"""One token through layers of the "lite" geometry: microseconds a layer, by the kernels of one token and without.

`python -m benchmarks.kernels.chain` makes one dense and four mixture layers (distinct weights, 4.6 GB in bf16, so
that L2 keeps nothing from pass to pass), compares the states that both ways give, and replays three rounds of the four
as one CUDA graph. `SWEEP=1` also tries other shapes of the launches; `WHOLE=1` decodes with the whole model.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.timing import replays_us
from benchmarks.lite import READ, decode, lite, quantise
from rorqual.engine.engine import Engine
from rorqual.kernels import single, single_experts, single_mla
from rorqual.kernels.route import Rule, chosen
from rorqual.kernels.single_ring import Rings
from rorqual.nn import Transformer
from rorqual.nn import single as way
from rorqual.nn.paged import Group, PagedStep, new_store

ROUNDS = 3
CONTEXT = 530
BLOCKS = 16
PAGE = 64


class Pass:
    """A decoding pass of one token after `CONTEXT`, on a model of one dense and four mixture layers."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        device = model.device
        self.ids = torch.full((1, 1), 7, device=device)
        self.stores = [new_store(lanes, BLOCKS + 1, PAGE, 1, device) for lanes in model.lanes()]
        for store in self.stores:
            store["latent"].normal_()
        self.positions = torch.tensor([CONTEXT - 1], device=device)
        self.table = torch.arange(1, BLOCKS + 1, device=device, dtype=torch.int32)[None]
        self.ends = torch.tensor([CONTEXT], device=device, dtype=torch.int32)
        self.slots = torch.zeros_like(self.ends)
        self.rings = Rings()
        self.offsets = torch.tensor([0, 1], dtype=torch.int32, device=device)

    def step(self) -> PagedStep:
        """The pass as the engine describes it under capture."""
        group = Group(
            slice(0, 1), [], [], 1, BLOCKS * PAGE, self.table, self.slots, self.ends, self.offsets, True
        )
        step = PagedStep(self.positions, [group], PAGE)
        step.shared["rings"] = self.rings
        return step

    def run(self, x: Tensor, step: PagedStep, rounds: int = 1) -> Tensor:
        """x `[1, 1, D]` through the mixture layers, `rounds` times."""
        pending = None
        for _ in range(rounds):
            for layer, store in list(zip(self.model.layers, self.stores, strict=True))[1:]:
                x, pending = layer.deferred(x, pending, self.ids, step, store)  # type: ignore[operator]
        return x if pending is None else x + pending


def replayed(run: Callable[[], Any], replays: int = 15) -> float:
    """Microseconds of a call in a CUDA graph: the median replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    took = replays_us(graph, replays)
    del kept
    return took


def floor(model: Transformer) -> float:
    """Microseconds of reading the weights that one token needs in a mixture layer, once."""
    layer: Any = model.layers[1]
    size = 0
    for name, p in layer.named_parameters():
        part = 6 / 64 if ".experts." in name else 1
        size += int(part * p.numel() * p.element_size())
    return size / READ * 1e6


def layer_time(p: Pass) -> float:
    """Microseconds a mixture layer."""
    x = torch.randn(1, 1, p.model.config.hidden, device=p.ids.device).to(p.model.dtype)

    def once() -> Tensor:
        return p.run(x, p.step(), ROUNDS)

    with torch.no_grad():
        return replayed(once) / (ROUNDS * (len(p.stores) - 1))


def compare(p: Pass) -> str:
    """How far both ways lie apart after each half of each layer, from the same states: the median and the
    largest difference, relative to the largest number. A router's choice may fall otherwise in FP8."""
    step = p.step()
    x = p.model.embed(p.ids)
    found = []
    with torch.no_grad():
        for layer, store in zip(p.model.layers, p.stores, strict=True):
            any_layer: Any = layer
            want = x + step.attend(any_layer.attention, any_layer.attention_norm(x), store)
            got = way.attend(any_layer.attention, any_layer.attention_norm, x, step, store)
            again = way.attend(any_layer.attention, any_layer.attention_norm, x, step, store)
            found.append("attention " + apart(got, want, again, x))
            x, want = want, want + any_layer._feed(any_layer.ff_norm(want), p.ids, step)
            got = way.feed(any_layer.ff, any_layer.ff_norm, x, p.ids, step)
            again = way.feed(any_layer.ff, any_layer.ff_norm, x, p.ids, step)
            if got is not None:
                found.append("feed " + apart(got, want, again, x))
            x = want
    return "; ".join(found)


def apart(got: Tensor | None, want: Tensor, again: Tensor | None, before: Tensor) -> str:
    """How far two new states lie apart, relative to the largest change from the state `before`."""
    if got is None or again is None:
        return "NOT TAKEN"
    error = (got.double() - want.double()).abs() / (want.double() - before.double()).abs().max()
    same = "" if torch.equal(got, again) else " RUNS DIFFER"
    return f"{error.median():.0e} {error.max():.0e}{same}"


def whole() -> None:
    """Tokens a second of the whole model at batch 1 and context 512, both ways."""
    model = Transformer(lite(), device="cuda", seed=0)
    for kind in ("bf16", "fp8"):
        if kind == "fp8":
            quantise(model)
        for way.ON in (False, True):
            try:
                engine = Engine(model, prefix_cache=False, step_tokens=4096, memory=8 * 2**30)
                decode(engine, 1, 512, 8)
                rates = [decode(engine, 1, 512)[0] for _ in range(2)]
                print(f"{kind} {'as one token' if way.ON else 'before'}: {max(rates):.0f} tok/s", flush=True)
                del engine
            except Exception:
                traceback.print_exc(limit=-6)


def main() -> None:
    """Compare and time, in bf16 and FP8."""
    if os.environ.get("WHOLE"):
        return whole()
    torch.manual_seed(0)
    begun = time.perf_counter()
    model = Transformer(lite(5), device="cuda", seed=0)
    for kind in ("bf16", "fp8"):
        if kind == "fp8":
            quantise(model)
        p = Pass(model)
        try:
            print(f"{kind}: {compare(p)} ({time.perf_counter() - begun:.0f} s)", flush=True)
            if os.environ.get("COMPILE"):
                layer_time(p)
                sweep(p, kind)
                continue
            for on in (False, True):
                way.ON = on
                print(
                    f"{kind}: {layer_time(p):6.1f} us a layer {'as one token' if on else 'before'}, "
                    f"floor {floor(model):.1f}",
                    flush=True,
                )
            asked = way.ASK
            for way.ASK in (False, True):
                print(
                    f"{kind}: {layer_time(p):6.1f} us {'' if way.ASK else 'not '}asking for `o` ahead",
                    flush=True,
                )
            way.ASK, single_mla.CLUSTERS = asked, False
            print(f"{kind}: {layer_time(p):6.1f} us with the attention in three launches", flush=True)
            single_mla.CLUSTERS = True
            pieces(p, kind)
            if os.environ.get("SWEEP"):
                sweep(p, kind)
        except Exception:
            traceback.print_exc(limit=-6)
    print(f"{time.perf_counter() - begun:.0f} s")


def pieces(p: Pass, kind: str) -> None:
    """Microseconds of the parts of a layer, each in a row of its own."""
    device, config = p.ids.device, p.model.config
    x = torch.randn(1, 1, config.hidden, device=device).to(p.model.dtype)
    layers: list[Any] = list(p.model.layers)[1:] * ROUNDS
    stores = p.stores[1:] * ROUNDS
    step = p.step()
    a = layers[0].attention.part
    cos, sin = (t[0] for t in step.rotation(a.rope))
    row = x[0]
    q, kv = row.new_zeros(1, a.heads, a.qk_dim).normal_(), row.new_zeros(1, a.kv_rank + a.rope_dim).normal_()
    wide = row.new_zeros(1, a.heads * a.v_dim).normal_()
    slots = step.slots()
    normed = torch.empty_like(row)
    ids = [torch.randperm(64, device=device)[None, :6].int().contiguous() for _ in layers]
    by = torch.rand(1, 6, device=device)

    def core(n: int) -> Any:
        m = layers[n].attention
        w = m.kv_b.weight.unflatten(0, (a.heads, a.nope_dim + a.v_dim))
        return single_mla.attention(
            q, kv, (m.kv_a_norm.weight, m.kv_a_norm.eps), cos, sin, w, m.kv_b.scale, stores[n]["latent"], slots,
            p.table, p.ends, width=1, nope=a.nope_dim, interleaved=True, softmax_scale=a.scale,
        )  # fmt: skip

    def router(n: int, choose: bool) -> Any:
        norm, r = layers[n].ff_norm, layers[n].ff.router
        (logits,) = single.rows(
            row, [r.weight], [None], (norm.weight, norm.eps), normed_ND=normed, out_dtype=torch.float32
        )
        return chosen(logits, r.bias, Rule(6, "sigmoid", normalize=True)) if choose else logits

    def experts(n: int) -> Any:
        e, s = layers[n].ff.experts, layers[n].ff.shared
        shared: Any = tuple(way._weights(m) for m in (s.gate, s.up, s.down))
        stacks = e.gate.stack(), e.up.stack(), e.down.stack()
        return single_experts.through_experts(row, (ids[n], by), *stacks, shared=shared, residual_1D=row)

    def before(n: int) -> Any:
        e, s = layers[n].ff.experts, layers[n].ff.shared
        shared: Any = tuple(way._weights(m) for m in (s.gate, s.up, s.down))
        return e(row, ids[n], by, shared)

    def project(n: int) -> Any:
        norm, m = layers[n].attention_norm, layers[n].attention
        return single.rows(row, *way._lists(m.q, m.kv_a), norm=(norm.weight, norm.eps))

    def out(n: int) -> Any:
        return single.rows(wide, *way._lists(layers[n].attention.o), residual_NO=row)

    parts: dict[str, Callable[[int], Any]] = {
        "attention": lambda n: way.attend(layers[n].attention, layers[n].attention_norm, x, step, stores[n]),
        "q, kv": project,
        "core": core,
        "o": out,
        "feed": lambda n: way.feed(layers[n].ff, layers[n].ff_norm, x, p.ids, step),
        "router": lambda n: router(n, False),
        "router, choice": lambda n: router(n, True),
        "experts": experts,
        "experts before": before,
    }
    found = []
    for name, part in parts.items():
        with torch.no_grad():
            took = replayed(lambda part=part: [part(n) for n in range(len(layers))]) / len(layers)  # type: ignore[misc]
        found.append(f"{name} {took:.1f}")
    print(f"{kind}: " + ", ".join(found), flush=True)


def sweep(p: Pass, kind: str) -> None:
    """Other shapes of the launches, one at a time."""
    way.ON = True
    rows, both = single.rows_plan, single_experts.plan

    def plans(first: dict[str, int] | None, second: dict[str, int] | None) -> Any:
        def plan(*shape: Any) -> Any:
            up, down = both(*shape)
            return first or up, second or down

        return plan

    def row_plan(least: int, most: int, cut: tuple[int, int]) -> Any:
        def plan(width: int, outputs: int) -> dict[str, int]:
            if least <= outputs <= most:
                return {"BO": cut[0], "num_warps": cut[1]}
            return rows(width, outputs)

        return plan

    small, large = [(1, 2), (1, 4), (2, 2), (2, 4)], [(4, 4), (8, 4), (8, 8)]
    trials: list[tuple[str, Any, Any]] = []
    for cut in [(2, 4), (4, 4), (8, 8)]:
        how = {"BO": cut[0], "num_warps": cut[1]}
        trials.append((f"up {cut}", rows, plans(how, None)))
    for cut in [(1, 4), (1, 2), (2, 4), (2, 8)]:
        how = {"BO": cut[0], "num_warps": cut[1]}
        trials.append((f"down {cut}", rows, plans(None, how)))
    for cut in [*small[2:], *large] if kind == "bf16" else []:  # in FP8: benchmarks.kernels.rows
        trials.append((f"q, kv {cut}", row_plan(3000, 4000, cut), both))
        trials.append((f"o {cut}", row_plan(2048, 2048, cut), both))
    for cut in [*small, (1, 8)]:
        trials.append((f"router {cut}", row_plan(64, 64, cut), both))

    def warm(trial: tuple[str, Any, Any]) -> None:
        with contextlib.suppress(Exception):
            single_launches(p, trial)()

    with ThreadPoolExecutor(14) as pool:
        list(pool.map(warm, trials))
    if os.environ.get("COMPILE"):
        return
    found = []
    for name, row, expert in trials:
        single.rows_plan, single_experts.plan = row, expert
        try:
            found.append(f"{name}: {layer_time(p):.1f}")
        except Exception as error:
            found.append(f"{name}: {repr(error)[:100]}")
    single.rows_plan, single_experts.plan = rows, both
    print(f"{kind} sweep (us a layer): " + "; ".join(found), flush=True)


def single_launches(p: Pass, trial: tuple[str, Any, Any]) -> Callable[[], None]:
    """Compile what a trial needs, without touching the plans that others read."""
    name, row, expert = trial
    layer: Any = p.model.layers[1]
    a, moe = layer.attention, layer.ff
    device = p.ids.device
    x = torch.zeros(1, 2048, device=device, dtype=p.model.dtype)
    codes = a.o.scale is not None

    def launch() -> None:
        with torch.no_grad():
            norm = (layer.ff_norm.weight, 1e-6)
            if name.startswith("q"):
                single.rows(
                    x,
                    [a.q.weight, a.kv_a.weight],
                    [a.q.scale, a.kv_a.scale],
                    norm,
                    how=row(2048, 3648),
                )
            elif name.startswith("o"):
                single.rows(x, [a.o.weight], [a.o.scale], None, x, how=row(2048, 2048))
            elif name.startswith("router"):
                normed = torch.empty_like(x)
                single.rows(
                    x,
                    [moe.router.weight],
                    [None],
                    norm,
                    None,
                    normed,
                    torch.float32,
                    how=row(2048, 64),
                )
            else:
                e, s = moe.experts, moe.shared
                ids = torch.arange(6, device=device, dtype=torch.int32)[None]
                shared: Any = tuple(way._weights(m) for m in (s.gate, s.up, s.down))
                single_experts.through_experts(
                    x, (ids, ids.float()), e.gate.stack(), e.up.stack(), e.down.stack(), shared=shared, residual_1D=x,
                    how=expert(1408, 2048, codes),
                )  # fmt: skip

    return launch


if __name__ == "__main__":
    main()
