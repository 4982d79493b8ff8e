"""Decoding and prefill of the "lite" geometry on one GPU, against what its memory and tensor cores allow.

V3-type, 27 layers, width 2,048, 16 heads, latent 512, no query latent, first layer dense 11,264, then 64 routed
and 2 shared experts of 1,408, top 6, vocabulary 102,400: 15.7B parameters, 2.45B active. Random weights.
"""

from __future__ import annotations

import time
import traceback

import torch

from benchmarks import beside
from rorqual.engine.engine import Engine
from rorqual.engine.loop import Answer
from rorqual.engine.request import Handle
from rorqual.engine.sampling import Sampling
from rorqual.family import MLA, Layer, ModelConfig, MoE, Rope, Router, SwiGLU
from rorqual.nn import Transformer

READ = 4.35e12


def lite(layers: int = 27) -> ModelConfig:
    """The geometry; fewer layers for a trial."""
    attention = MLA(16, 512, 128, 64, 128, Rope(64, 50000.0, interleaved=True), q_rank=None)
    router = Router("sigmoid", bias=True, group_score="top2", normalize=True, scale=2.446)
    plan = (Layer(attention, SwiGLU(11264)),) + (Layer(attention, MoE(64, 6, 1408, 2, router)),) * (
        layers - 1
    )
    return ModelConfig("deepseek_v3", 102400, 2048, plan, 8192, dtype="bfloat16", eos=())


def quantise(model: Transformer) -> None:
    """Hold every matrix of the layers but the routers as FP8 codes in blocks of 128x128."""
    from rorqual.nn.linear import Matrix

    for layer in model.layers:
        for module in layer.modules():
            if not isinstance(module, Matrix):
                continue
            weight = module.weight.detach()
            module.hold_codes(torch.float8_e4m3fn, torch.float32, (128, 128))
            flat = weight.reshape(-1, *weight.shape[-2:])
            codes = module.weight.data.view(torch.uint8).reshape(flat.shape)
            scales = module.scale.data.reshape(-1, *module.scale.shape[-2:])
            for i, w in enumerate(flat):
                rows, columns = w.shape
                pad = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128, device=w.device)
                pad[:rows, :columns] = w
                blocks = pad.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
                s = blocks.abs().amax((1, 3)).clamp(min=1e-8) / 448
                c = (blocks / s[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
                codes[i] = c.to(torch.float8_e4m3fn).view(torch.uint8)
                scales[i] = s


def _sound(handles: list[Handle]) -> None:
    for handle in handles:
        if handle.error is not None:
            raise handle.error


SETTLED = 16
"""Tokens that each answer has before decoding is timed."""


def decode(engine: Engine, batch: int, context: int, steps: int = 64) -> tuple[float, float]:
    """Tokens a second of `batch` answers in step, and of reading their prompts. Raises RuntimeError if not all of
    them were answered in all of the steps."""
    vocab = engine.model.config.vocab
    # The first prompts read are answered while the last are read, so their answers are longer when timing begins.
    passes = -(-batch * context // engine.scheduler.budget) + 1
    room = passes + SETTLED + steps + 8
    sampling = Sampling(temperature=0.0, max_new_tokens=room, ignore_eos=True)
    prompts = torch.randint(0, vocab, (batch, context)).tolist()
    wait(engine)
    begun = time.perf_counter()
    handles = [engine.submit_answer(Answer(p, sampling, frozenset(), None)) for p in prompts]
    while min(len(h.completion.ids) for h in handles) < 1:
        _sound(handles)
        engine.step()
    reading = batch * context / (time.perf_counter() - begun)
    while min(len(h.completion.ids) for h in handles) < SETTLED:
        _sound(handles)
        engine.step()
    before = [len(h.completion.ids) for h in handles]
    wait(engine)
    begun = time.perf_counter()
    for _ in range(steps):
        engine.step()
    wait(engine)
    took = time.perf_counter() - begun
    _sound(handles)
    grown = {len(h.completion.ids) - b for h, b in zip(handles, before, strict=True)}
    for handle in handles:
        handle.cancel()
    while engine.busy:
        engine.step()
    if grown != {steps}:
        raise RuntimeError(
            f"the answers are not in step: in {steps} passes they grew by {min(grown)} to {max(grown)} tokens"
        )
    return batch * steps / took, reading


def wait(engine: Engine) -> None:
    """Until the device has done what it was given."""
    if engine.model.device.type == "cuda":
        torch.cuda.synchronize()


def main(with_profile: bool = False) -> None:
    """Decoding and prefill in bf16 and with FP8 weights; `with_profile` also says which kernels take the time."""
    begun = time.perf_counter()
    model = Transformer(lite(), device="cuda", seed=0)
    print(
        f"built {sum(p.numel() for p in model.parameters()) / 1e9:.2f}B in {time.perf_counter() - begun:.1f} s"
    )
    found: dict[tuple[str, str, int, int], float] = {}
    for kind in ("bf16", "fp8"):
        if kind == "fp8":
            quantise(model)
        engine = Engine(model, prefix_cache=False, step_tokens=16384, memory=24 * 2**30)
        for batch, context in ((1, 512), (32, 4096), (256, 1024), (8, 4096)):
            try:
                decode(engine, batch, context, 8)
                rate, read = decode(engine, batch, context)
                found["decode", kind, batch, context], found["prefill", kind, batch, context] = rate, read
                print(
                    f"{kind} batch {batch} context {context}: decode {rate:,.0f}, prefill {read:,.0f} tok/s",
                    flush=True,
                )
                if with_profile and batch < 256:
                    profile(engine, batch, context)
            except Exception as error:
                print(kind, batch, context, "failed:", repr(error)[:300], flush=True)
                traceback.print_exc(limit=-4)
        del engine
        torch.cuda.empty_cache()
    if not with_profile:
        del model
        torch.cuda.empty_cache()
        print(beside.table(found, beside.rates()))


def profile(engine: Engine, batch: int, context: int) -> None:
    """Where a decoding pass spends its time, by kernel, and what the host takes for one."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    vocab = engine.model.config.vocab
    sampling = Sampling(temperature=0.0, max_new_tokens=100, ignore_eos=True)
    prompts = torch.randint(0, vocab, (batch, context)).tolist()
    handles = [engine.submit_answer(Answer(p, sampling, frozenset(), None)) for p in prompts]
    while min(len(h.completion.ids) for h in handles) < 4:
        engine.step()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    engine.step()
    host = time.perf_counter() - begun
    engine.step()
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(10):
            engine.step()
        torch.cuda.synchronize()
    events = sorted(prof.key_averages(), key=lambda e: -e.device_time_total)
    total = sum(e.device_time_total for e in events)
    count = sum(e.count for e in events) / 10
    print(
        f"-- batch {batch}: kernels {total / 1e4:.2f} ms a pass, {count:.0f} of them; host {host * 1e3:.2f} ms"
    )
    for e in events[:24]:
        each = e.device_time_total / max(1, e.count)
        print(f"{e.device_time_total / 1e4:8.3f} ms {e.count / 10:6.1f} x {each:7.1f} us  {e.key[:90]}")
    for handle in handles:
        handle.cancel()
    while engine.busy:
        engine.step()


def prefill(layers: int = 27, kinds: tuple[str, ...] = ("bf16", "fp8")) -> None:
    """Reading 8 prompts of 4,096 tokens, and which kernels take the time, in bf16 and with FP8 weights."""
    model = Transformer(lite(layers), device="cuda", seed=0)
    for kind in kinds:
        if kind == "fp8":
            quantise(model)
        for budget in (16384, 8192):
            engine = Engine(model, prefix_cache=False, step_tokens=budget, memory=24 * 2**30)
            read(engine, 8, 4096)
            rates = [8 * 4096 / read(engine, 8, 4096) for _ in range(3)]
            print(
                f"{kind} prefill 8 x 4096 in steps of {budget}:",
                *(f"{r:,.0f}" for r in rates),
                "tok/s",
                flush=True,
            )
            if budget == 8192:
                _profile_reading(engine, 8, 4096)
                _profile_host(engine)
            del engine
            torch.cuda.empty_cache()


def read(engine: Engine, batch: int, context: int) -> float:
    """Seconds from sending prompts to the last one's first token."""
    vocab = engine.model.config.vocab
    sampling = Sampling(temperature=0.0, max_new_tokens=40, ignore_eos=True)
    prompts = torch.randint(0, vocab, (batch, context)).tolist()
    wait(engine)
    begun = time.perf_counter()
    handles = [engine.submit_answer(Answer(p, sampling, frozenset(), None)) for p in prompts]
    while min(len(h.completion.ids) for h in handles) < 1:
        _sound(handles)
        engine.step()
    took = time.perf_counter() - begun
    for handle in handles:  # meanwhile the next pass is under way
        handle.cancel()
    while engine.busy:
        engine.step()
    wait(engine)
    return took


def _profile_host(engine: Engine) -> None:
    """What the host does in a pass so small that the device waits for it."""
    import cProfile
    import pstats

    read(engine, 8, 64)
    quick = min(read(engine, 8, 64) for _ in range(3))
    with cProfile.Profile() as recorded:
        read(engine, 8, 64)
    print(f"-- 8 x 64 tokens: {quick * 1e3:.1f} ms; own time of functions on the host:")
    stats: dict = pstats.Stats(recorded).stats  # type: ignore[attr-defined]
    for (file, number, name), (_, calls, own, _, _) in sorted(stats.items(), key=lambda e: -e[1][2])[:26]:
        print(f"{own * 1e3:8.2f} ms {calls:6} x {name[:40]} {file[-40:]}:{number}", flush=True)


def _profile_reading(engine: Engine, batch: int, context: int) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as prof:
        took = read(engine, batch, context)
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in prof.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, idle, end, gaps = 0.0, 0.0, spans[0][0], []
    for start, stop, name in spans:
        if start > end:
            idle += start - end
            gaps.append((start - end, name))
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    passes = batch * context / 8192
    print(
        f"-- {took * 1e3:.1f} ms under the profiler; device busy {busy / 1e3:.1f} ms, idle {idle / 1e3:.1f} ms in "
        f"{len(gaps)} gaps of {len(spans)} launches; longest before:",
        *(f"{name[:30]} {gap:.0f} us;" for gap, name in sorted(gaps, reverse=True)[:4]),
    )
    events = sorted(prof.key_averages(), key=lambda e: -e.device_time_total)
    for e in events[:32]:
        each, total = e.device_time_total / max(1, e.count), e.device_time_total / 1e3 / passes
        share = e.device_time_total / busy
        print(
            f"{total:7.3f} ms {share:5.1%} {e.count / passes:6.1f} x {each:7.1f} us  {e.key[:110]}",
            flush=True,
        )
