"""Models into checkpoints under the released names and in the released format."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from rorqual.family import ModelConfig
from rorqual.family.hub import to_hub
from rorqual.kernels import quant
from rorqual.nn import Transformer
from rorqual.nn.linear import Matrix
from rorqual.nn.spread import layout_of
from rorqual.weights import names
from rorqual.weights.errors import CheckpointError
from rorqual.weights.plan import SCALES
from rorqual.weights.released import Released, released
from rorqual.weights.shards import INDEX
from rorqual.weights.sound import encode
from rorqual.weights.write import Entry, Shard, commit, shard_names, staging, write_text

SHARD_BYTES = 5 * 10**9


@torch.no_grad()
def save(
    model: Transformer,
    directory: str | PathLike[str],
    *,
    quantize: Literal["released"] | None = "released",
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and safetensors under the released names (one file, or shards and an index).

    A loaded model is written as its checkpoint was: each tensor in its stored type, and quantised matrices
    as codes. A block of a matrix that still holds what its released codes meant gets exactly those codes
    and that scale; a changed block gets a fresh scale. (So a model loaded as float16 is written with what
    float16 left of it: `load` warns where values became zero.) A model that was not loaded is written in the types
    it holds, its matrices quantised if its config says so.

    Args:
        model: any `Transformer`.
        directory: made if needed; other files in it stay. An error or interruption leaves the checkpoint
            that stood there as it was.
        quantize: "released" as above; None writes plain matrices in the types the model holds.
        max_shard_bytes: how large a file may grow (a larger tensor gets a file of its own).

    Raises:
        CheckpointError: weights that can't be quantised (NaN or infinite, or codes that were cast), or no
            place to write to.
        ConfigError: config.json can't say what the model's config says.
    """
    if quantize not in ("released", None):
        raise ValueError(f'quantize must be "released" or None, got {quantize!r}')
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    layout = layout_of(model)
    if layout is not None and layout.world > 1:
        raise CheckpointError(
            "the model is spread over ranks, and this one holds only a share: save it before"
        )
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file: expected a directory to save to")
    writer = _Writer(model, quantize == "released")
    config_text = json.dumps(to_hub(writer.written_config()), indent=2) + "\n"
    shards = _split(list(writer.pieces()), max_shard_bytes)
    where: dict[str, str] = {}
    with staging(directory) as place:
        file_names = shard_names(len(shards), directory)
        write_text(place / "config.json", config_text)
        for name, pieces in zip(file_names, shards, strict=True):
            _write_shard(place / name, pieces, writer)
            where |= {entry.name: name for piece in pieces for entry in piece.entries}
        if len(shards) > 1:
            total = sum(piece.nbytes for pieces in shards for piece in pieces)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            write_text(place / INDEX, json.dumps(index, indent=2) + "\n")
        commit(place, directory, file_names)


@dataclass(frozen=True)
class Piece:
    """A hub tensor and, if it is quantised, its scales: written together."""

    ours: str
    expert: int | None
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return sum(entry.nbytes for entry in self.entries)


def _split(pieces: list[Piece], limit: int) -> list[list[Piece]]:
    """Pieces in order, cut so that no shard exceeds `limit` (unless one piece alone does)."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return shards


def _write_shard(path: Path, pieces: list[Piece], writer: _Writer) -> None:
    shard = Shard(path, [entry for piece in pieces for entry in piece.entries])
    with contextlib.ExitStack() as stack:
        stack.callback(shard.abandon)
        for piece in pieces:
            for entry, tensor in zip(piece.entries, writer.tensors(piece), strict=True):
                shard.write(entry.name, tensor)
        shard.close()


class _Writer:
    """Knows for each parameter how it is written, and makes its bytes when they are due."""

    def __init__(self, model: Transformer, quantize: bool) -> None:
        self.model, self.quantize = model, quantize
        self.config: ModelConfig = model.config
        known = released(model)
        self.loaded, self.known = known is not None, known or Released()

    def written_config(self) -> ModelConfig:
        """The config that describes the files."""
        held = str(self.model.dtype).removeprefix("torch.")
        if not self.quantize:
            return self.config.replace(quantization=None, dtype=held)
        return self.config if self.loaded else self.config.replace(dtype=held)

    # ------------------------------------------------------------------------------------- what

    def pieces(self) -> Iterator[Piece]:
        """Everything that will be written, in our parameters' order."""
        originals: dict[str, Piece] = {}
        for ours, tensor in self.model.state_dict(keep_vars=True).items():
            if self._is_scale(ours):
                continue
            experts = tensor.shape[0] if names.routed_expert(ours) else None
            for hub, place in names.places([(ours, experts)], self.config):
                yield (piece := Piece(ours, place.expert, self._entries(hub, ours, place.expert)))
                originals[hub] = piece
        repeated = names.copies(self.config)
        for hub in self.known.copies:
            if hub in repeated and repeated[hub] in originals:
                like = originals[repeated[hub]]
                yield Piece(like.ours, None, (Entry(hub, like.entries[0].dtype, like.entries[0].shape),))

    def _entries(self, hub: str, ours: str, expert: int | None) -> tuple[Entry, ...]:
        tensor, module = self._tensor(ours, expert), self._matrix(ours)
        if module is not None and module.scale is not None:
            scale = module.scale if expert is None else module.scale[expert]
            if tensor.dtype not in (quant.FP8, torch.int8) or scale.dtype not in SCALES:
                raise CheckpointError(
                    f"{hub} can't be written: its codes are {tensor.dtype} and its scales {scale.dtype}, expected "
                    "float8_e4m3fn or int8 with float32 or float8_e8m0fnu scales. A model held as codes must "
                    "not be cast: load it with the dtype that is wanted"
                )
            if self.quantize:
                codes = Entry(hub, tensor.dtype, tuple(tensor.shape))
                return codes, Entry(names.scale_name(hub, self.config), scale.dtype, tuple(scale.shape))
            columns = tensor.shape[1] * (2 if module.fp4 else 1)
            return (Entry(hub, self.model.dtype, (tensor.shape[0], columns)),)
        form = self._form(ours)
        if form is None:
            return (Entry(hub, self._plain_dtype(ours, tensor), tuple(tensor.shape)),)
        rows, columns = tensor.shape
        codes = Entry(
            hub, *((torch.int8, (rows, columns // 2)) if form.fp4 else (quant.FP8, (rows, columns)))
        )
        counts = (quant.blocks(rows, form.block[0]), quant.blocks(columns, form.block[1]))
        return codes, Entry(names.scale_name(hub, self.config), form.scale_dtype, counts)

    def _plain_dtype(self, ours: str, tensor: Tensor) -> torch.dtype:
        return self.known.dtypes.get(ours, tensor.dtype) if self.quantize else tensor.dtype

    def _form(self, ours: str) -> _Form | None:
        """How a plainly held matrix is quantised on writing, or None."""
        q = self.config.quantization
        if not self.quantize or q is None or self._matrix(ours) is None:
            return None
        if self.loaded:
            scale = self.known.scales.get(_scale(ours))
            if scale is None:
                return None
            fp4 = self.known.dtypes[ours] == torch.int8
            return _Form(fp4, (1, quant.FP4_BLOCK) if fp4 else q.block, q.ue8m0, scale.dtype)
        if not names.quantizable(ours):
            return None
        v4 = names.is_v4(self.config)
        if names.routed_expert(ours) and q.experts == "fp4":
            return _Form(True, (1, quant.FP4_BLOCK), True, quant.E8M0)
        return _Form(False, q.block, q.ue8m0, quant.E8M0 if v4 and q.ue8m0 else torch.float32)

    # ------------------------------------------------------------------------------------ bytes

    def tensors(self, piece: Piece) -> tuple[Tensor, ...]:
        """The tensors of a piece, in the order of its entries."""
        tensor, module = self._tensor(piece.ours, piece.expert), self._matrix(piece.ours)
        if module is not None and module.scale is not None:
            if not self.quantize:
                return (module.matrix(self.model.dtype, piece.expert),)
            return tensor, (module.scale if piece.expert is None else module.scale[piece.expert])
        form = self._form(piece.ours)
        if form is None:
            return (self._plain(piece, tensor),)
        scale = self.known.scales.get(_scale(piece.ours)) if self.loaded else None
        if scale is not None and piece.expert is not None:
            scale = scale[piece.expert]
        try:
            return form.quantize(tensor, scale)
        except ValueError as error:
            raise CheckpointError(f"{piece.entries[0].name} can't be quantised: {error}") from error

    def _plain(self, piece: Piece, tensor: Tensor) -> Tensor:
        dtype = piece.entries[0].dtype
        original = self.known.values.get(piece.ours) if self.quantize else None
        if original is None:
            return tensor.to(dtype)
        original = (original if piece.expert is None else original[piece.expert]).to(tensor.device)
        return torch.where(original.to(tensor.dtype) == tensor, original, tensor.to(dtype))

    def _tensor(self, ours: str, expert: int | None) -> Tensor:
        owner, _, leaf = ours.rpartition(".")
        tensor = getattr(self.model.get_submodule(owner), leaf)
        assert isinstance(tensor, Tensor)
        return tensor.detach() if expert is None else tensor.detach()[expert]

    def _matrix(self, ours: str) -> Matrix | None:
        owner, _, leaf = ours.rpartition(".")
        module: nn.Module = self.model.get_submodule(owner)
        return module if leaf == "weight" and isinstance(module, Matrix) else None

    def _is_scale(self, ours: str) -> bool:
        owner, _, leaf = ours.rpartition(".")
        return leaf == "scale" and isinstance(self.model.get_submodule(owner), Matrix)


@dataclass(frozen=True)
class _Form:
    """A quantised format: FP4, or FP8 in blocks; the type of its scales."""

    fp4: bool
    block: tuple[int, int]
    ue8m0: bool
    scale_dtype: torch.dtype

    def quantize(self, w: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """`w` [R, C] -> codes and scales; blocks whose `kept` scale gives back exactly `w` keep it."""
        if kept is not None:
            kept = kept.to(w.device)
            codes = self._encode(w, kept)
            changed = self._changed(codes, kept, w)
            if not changed.any():
                return codes, kept
        fresh = quant.fp4_scale(w) if self.fp4 else quant.fp8_scale(w, self.block, self.ue8m0)
        if not fresh.isfinite().all():
            raise ValueError("it holds NaN or infinite values")
        scale = fresh if kept is None else torch.where(changed, fresh, kept.float())
        return self._encode(w, scale), scale.to(self.scale_dtype)

    def _encode(self, w: Tensor, scale: Tensor) -> Tensor:
        return encode(w, scale, self.block, fp4=self.fp4)

    def _changed(self, codes: Tensor, scale: Tensor, w: Tensor) -> Tensor:
        """Per block, whether the codes mean something else than `w`: bool of the scales' shape."""
        if self.fp4:
            back = quant.dequantize_fp4(codes, scale, w.dtype)
        else:
            back = quant.dequantize_fp8(codes, scale, self.block, w.dtype)
        return quant.block_amax((back != w).to(torch.uint8), self.block) > 0


def _scale(ours: str) -> str:
    return ours.removesuffix("weight") + "scale"
