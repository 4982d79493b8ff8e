"""Released checkpoints into models: streamed tensor by tensor into their parameters."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rorqual.family import ModelConfig
from rorqual.family.hub import from_hub
from rorqual.kernels.ahead import prepare
from rorqual.kernels.quant import FP4_BLOCK, dequantize_fp4, dequantize_fp8
from rorqual.nn import Transformer
from rorqual.nn.linear import Matrix
from rorqual.weights import names
from rorqual.weights.assign import assign, put, usable, warn_of_zeros
from rorqual.weights.errors import CheckpointError, some
from rorqual.weights.plan import FLOATS, FP8, Target, match, model_dtype, published_names, without_absent_mtp
from rorqual.weights.released import Released
from rorqual.weights.shards import CHUNK, PICKLES, Reader, Stored, read_directory, read_json, refuse_pickles
from rorqual.weights.sound import check_codes, check_recoverable, check_scales, check_stored_codes, extreme

THREADS = 2
"""Readers at a time: while one waits for the disk or the page cache, the other converts."""

CPU = torch.device("cpu")

Build = Callable[..., Transformer]
Job = tuple[Stored, Callable[[], None]]
"""Something to read, and the work that reads it."""


def load(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    build: Build = Transformer,
    quantized: bool | None = None,
    mapped: bool = True,
) -> Transformer:
    """A model from a checkpoint directory (config.json and safetensors) or a .gguf file.

    Args:
        path: the directory or file. Hub ids: see `rorqual.weights.resolve`.
        dtype: the type of the parameters; quantised matrices are multiplied out. float16 has less range
            than checkpoints: values too large are an error, values that become zero a warning. None keeps what
            is stored: BF16 stays BF16, FP8 and FP4 stay codes and scales. Parameters that the family pins to
            fp32 stay fp32, unless float64 is asked. A GGUF file defaults to bfloat16.
        device: where the parameters are made.
        build: makes the model: called as build(config, dtype=..., device="meta").
        quantized: keep quantised matrices as codes (True) or multiply them out (False) whatever `dtype`
            says; None follows `dtype`.
        mapped: let CPU parameters whose stored bytes need no change share the file's pages (copied when
            written to). The file must then not be overwritten in place while the model lives; `save`
            never does. False gives every parameter memory of its own.

    Raises:
        CheckpointError: with everything that is wrong; nothing half-loaded is returned.
        ValueError: a device or dtype that can't be used.
        ConfigError: config.json is unsupported or contradicts itself.
    """
    path, device = Path(path), usable(device)
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be a float type such as torch.bfloat16, got {dtype}")
    if device.type == "cuda":
        prepare()
    # Parameters made in inference mode could never be trained.
    with _refusing(path), torch.inference_mode(False):
        if path.suffix.lower() == ".gguf":
            from rorqual.weights.gguf import load_gguf

            return load_gguf(path, dtype=dtype or torch.bfloat16, device=device, build=build)
        if not path.is_dir():
            raise CheckpointError(_not_a_directory(path))
        config = read_config(path)
        stored = published_names(path, read_directory(path), config)
        config = without_absent_mtp(path, stored, config)
        model = build(config, dtype=torch.bfloat16, device="meta")
        targets, copies = match(path, stored, config, model)
        choice = _Choice(
            dtype=dtype or model_dtype(targets, config),
            as_stored=dtype is None,
            keep_codes=dtype is None if quantized is None else quantized,
        )
        with Reader() as reader:
            reader.open({s.file for s in stored.values()})
            for copy, original in copies:
                if not reader.same_bytes(copy, original):
                    raise CheckpointError(f"{path}: {copy} must repeat {original} byte for byte, but differs")
            filler = _Filler(model, config, reader, device, choice, mapped)
            released = filler.fill(targets)
        warn_of_zeros(filler.zeros, choice.dtype, path)
        repeated = {names.published(copy.name, config) for copy, _ in copies}
        released.copies = sorted(repeated - {names.hub_name("head.weight", config)})
        released.attach(model)
        unfilled = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if unfilled:
            raise CheckpointError(f"{path}: {len(unfilled)} parameters were not filled: {some(unfilled)}")
        return model


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """What the system says of a path that can't be read, as a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        named = getattr(error, "filename", None) or path
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{_short(named)}: can't be read: {why}") from error


def _short(name: object) -> str:
    text = str(name)
    return text if len(text) <= 300 else f"{text[:100]}... ({len(text)} characters)"


def read_config(directory: Path) -> ModelConfig:
    """The config of a checkpoint directory. Raises CheckpointError if config.json is absent or not JSON."""
    if not any(directory.iterdir()):
        raise CheckpointError(f"{directory} is empty: expected config.json and model.safetensors")
    if not (directory / "config.json").exists():
        refuse_pickles(directory, [p.name for p in directory.iterdir()])
    return from_hub(read_json(directory / "config.json"), source=str(directory / "config.json"))


def _not_a_directory(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist: expected a checkpoint directory or a .gguf file"
    if path.suffix in PICKLES:
        return (
            f"{path} is a pickle, which runs code when read and is refused. Convert it once in a sandbox: "
            "load with transformers' from_pretrained, then save_pretrained(..., safe_serialization=True)"
        )
    return f"{path} is a file: expected a checkpoint directory (with config.json) or a .gguf file"


@dataclass(frozen=True)
class _Choice:
    """Which type each parameter gets."""

    dtype: torch.dtype
    as_stored: bool
    keep_codes: bool

    def held(self, target: Target) -> torch.dtype:
        """The type `target` is held in, when not as codes."""
        if target.stored not in FLOATS and not target.codes:
            return torch.int64
        if target.pinned:
            return torch.float64 if self.dtype == torch.float64 else torch.float32
        if self.as_stored and target.keeps_stored_type:
            return target.stored
        return self.dtype


class _Filler:
    """Gives each parameter of a meta model its memory and its values."""

    def __init__(
        self,
        model: nn.Module,
        config: ModelConfig,
        reader: Reader,
        device: torch.device,
        choice: _Choice,
        mapped: bool,
    ) -> None:
        self.model, self.config, self.reader = model, config, reader
        self.device, self.choice, self.mapped = device, choice, mapped
        self.released = Released()
        self.room: dict[str, Tensor] = {}
        self.lock = threading.Lock()
        self.zeros = 0
        """How many values became zero in the model's type."""

    def fill(self, targets: list[Target]) -> Released:
        """Fill everything. Tensors go in the order of the files, read by a few threads."""
        jobs: list[Job] = []
        with _Maps() as maps:
            for target in targets:
                jobs += self._jobs(target, maps)
        with ThreadPoolExecutor(THREADS) as pool:
            futures = [pool.submit(_run, batch) for batch in _batches(jobs)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return self.released

    def _jobs(self, target: Target, maps: _Maps) -> list[Job]:
        if target.codes and self.choice.keep_codes:
            self._hold_codes(target)
            scale_name = _scale(target.ours)
            return [
                *self._copy_jobs(target, target.ours, target.parts, target.stored, maps),
                *self._copy_jobs(target, scale_name, target.scales, target.scales[0].dtype, maps),
            ]
        held = self.choice.held(target)
        if target.codes:
            self.released.dtypes[target.ours] = target.stored
            return [
                (part, partial(self._multiply_out, target, index, held))
                for index, part in enumerate(target.parts)
            ]
        if held != target.stored:
            self.released.dtypes[target.ours] = target.stored
            if self.choice.as_stored and held.itemsize < target.stored.itemsize and held.is_floating_point:
                self._keep_values(target)
        return self._copy_jobs(target, target.ours, target.parts, held, maps)

    def _copy_jobs(
        self, target: Target, ours: str, parts: list[Stored], held: torch.dtype, maps: _Maps
    ) -> list[Job]:
        """Jobs that read `parts` into our parameter `ours`; none if the file's own pages serve."""
        alone = not target.stacked and self.device.type == "cpu" and parts[0].dtype == held
        if alone and self.mapped and parts[0].nbytes:
            tensor = maps.tensor(parts[0])
            if ours.endswith(".scale"):
                check_scales(tensor, str(parts[0]))
            assign(self.model, ours, tensor)
            if tensor.dtype == FP8:
                return [(parts[0], partial(check_stored_codes, self.reader, parts[0]))]
            return []
        return [
            (part, partial(self._copy, target, ours, part, index, held)) for index, part in enumerate(parts)
        ]

    # ------------------------------------------------------------------------------------- the work

    def _copy(self, target: Target, ours: str, part: Stored, index: int, held: torch.dtype) -> None:
        shape = (len(target.parts), *part.shape) if target.stacked else part.shape
        slot = self._slot(target, ours, shape, index, held)
        if slot.device.type == "cpu" and held == part.dtype:
            self.reader.read(part, slot)
        else:
            flat, width = slot.view(-1), part.dtype.itemsize
            for begin in range(0, flat.numel(), CHUNK // width):
                count = min(CHUNK // width, flat.numel() - begin)
                piece = self.reader.piece(part, begin * width, (count,))
                self._put(flat[begin : begin + count], piece, part)
        if target.codes:
            (check_codes if ours == target.ours else check_scales)(slot, str(part))

    def _multiply_out(self, target: Target, index: int, held: torch.dtype) -> None:
        part, scale = target.parts[index], self.reader.tensor(target.scales[index])
        check_scales(scale, str(target.scales[index]))
        slot = self._slot(target, target.ours, target.shape, index, held)
        lead = (len(target.parts),) if target.stacked else ()
        self._slot(target, _scale(target.ours), (*lead, *scale.shape), index, scale.dtype, CPU).copy_(scale)
        block, risky = self._block(target), extreme(scale, _wide(held))
        scale, (rows, width) = scale.to(self.device), part.shape
        step = block[0] * max(1, CHUNK // 4 // max(1, width * block[0]))
        for begin in range(0, rows, step):
            codes = self.reader.piece(part, begin * width, (min(step, rows - begin), width)).to(self.device)
            check_codes(codes, str(part))
            some_scale = scale[begin // block[0] : -(-(begin + step) // block[0])]
            if target.fp4:
                values = dequantize_fp4(codes, some_scale, _wide(held))
            else:
                values = dequantize_fp8(codes, some_scale, block, _wide(held))
            if risky:
                check_recoverable(codes, some_scale, values, block, fp4=target.fp4, what=str(part))
            self._put(slot[begin : begin + step], values, part)

    def _put(self, slot: Tensor, values: Tensor, part: Stored) -> None:
        zeros = put(slot, values, str(part))
        if zeros:
            with self.lock:
                self.zeros += zeros

    def _keep_values(self, target: Target) -> None:
        """Remember values that the model's type can't hold, for `save` (a few tensors in mixed files)."""
        values = [self.reader.tensor(part) for part in target.parts]
        self.released.values[target.ours] = torch.stack(values) if target.stacked else values[0]

    # ------------------------------------------------------------------------------------ the room

    def _slot(
        self,
        target: Target,
        ours: str,
        shape: tuple[int, ...],
        index: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> Tensor:
        """The memory for one part of `ours`, made when its first part comes."""
        with self.lock:
            whole = self.room.get(ours)
            if whole is None:
                whole = self.room[ours] = torch.empty(shape, dtype=dtype, device=device or self.device)
                if device is not None:
                    self.released.scales[ours] = whole
                else:
                    assign(self.model, ours, whole)
        return whole[index] if target.stacked else whole

    def _hold_codes(self, target: Target) -> None:
        module = self.model.get_submodule(target.ours.rpartition(".")[0])
        assert isinstance(module, Matrix)
        module.hold_codes(target.stored, target.scales[0].dtype, self._block(target), target.fp4)

    def _block(self, target: Target) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        assert self.config.quantization is not None
        return (1, FP4_BLOCK) if target.fp4 else self.config.quantization.block


def _batches(jobs: list[Job]) -> Iterator[list[Job]]:
    """Jobs in the order of the files, in runs of some megabytes."""
    batch: list[Job] = []
    size = 0
    for job in sorted(jobs, key=lambda job: (job[0].file, job[0].start)):
        batch.append(job)
        size += job[0].nbytes
        if size >= CHUNK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _run(batch: list[Job]) -> None:
    for _, work in batch:
        work()


class _Maps:
    """Tensors that share the pages of their files."""

    def __init__(self) -> None:
        self._open: dict[Path, safe_open] = {}

    def __enter__(self) -> _Maps:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def tensor(self, stored: Stored) -> Tensor:
        """The stored tensor over the file's pages (private: writing to it leaves the file alone)."""
        if stored.file not in self._open:
            self._open[stored.file] = safe_open(str(stored.file), framework="pt")
        tensor: Tensor = self._open[stored.file].get_tensor(stored.name)
        return tensor


def _scale(ours: str) -> str:
    return ours.removesuffix("weight") + "scale"


def _wide(held: torch.dtype) -> torch.dtype:
    """float16 is checked for overflow when it is put down, so its values come in fp32."""
    return torch.float32 if held == torch.float16 else held
