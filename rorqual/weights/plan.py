"""What to read for each of our parameters: every stored tensor matched, and every mismatch found, before
any data is read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from rorqual.family import ModelConfig
from rorqual.kernels.quant import FP4_BLOCK, blocks
from rorqual.nn.linear import Matrix
from rorqual.weights import names
from rorqual.weights.errors import CheckpointError, Problems
from rorqual.weights.shards import DTYPE_NAMES, Stored

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
FP4 = torch.int8
SCALES = (torch.float32, torch.float8_e8m0fnu)


@dataclass
class Target:
    """One of our parameters or buffers, and the stored tensors that make it.

    `parts` has one tensor, or one an expert of a stack; `scales` goes with them if they are codes.
    """

    ours: str
    shape: tuple[int, ...]
    stacked: bool
    pinned: bool
    parts: list[Stored] = field(default_factory=list)
    scales: list[Stored] = field(default_factory=list)

    @property
    def stored(self) -> torch.dtype:
        """The type its tensors are stored in."""
        return self.parts[0].dtype

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of one hub tensor, as a plain matrix."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def codes(self) -> bool:
        """Whether it is stored quantised."""
        return bool(self.scales)

    @property
    def fp4(self) -> bool:
        """Whether its codes are packed FP4."""
        return self.codes and self.stored == FP4

    @property
    def keeps_stored_type(self) -> bool:
        """Norms and routers, which the modules read in any float type."""
        return names.small(self.ours)


def published_names(directory: Path, stored: Mapping[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """The stored tensors by their published names; ignorable buffers dropped."""
    out: dict[str, Stored] = {}
    for name, tensor in stored.items():
        if names.IGNORED.search(name):
            continue
        proper = names.published(name, config)
        if proper in out:
            raise CheckpointError(
                f"{directory}: {tensor} and {out[proper]} are the same tensor under two names"
            )
        out[proper] = tensor
    return out


def without_absent_mtp(directory: Path, stored: Mapping[str, Stored], config: ModelConfig) -> ModelConfig:
    """`config` without its multi-token-prediction layers if the checkpoint has not one tensor of them."""
    if not config.mtp or any(names.is_mtp(name, config) for name in stored):
        return config
    warnings.warn(
        f"{directory} declares {len(config.mtp)} multi-token-prediction layers but holds none of their tensors: "
        "loaded without them",
        stacklevel=4,
    )
    return config.replace(mtp=())


def match(
    directory: Path, stored: Mapping[str, Stored], config: ModelConfig, model: nn.Module
) -> tuple[list[Target], list[tuple[Stored, Stored]]]:
    """A target for everything in `model`, and the (copy, original) pairs to compare.

    `stored` is by published name; `model` was built on the meta device in bfloat16, so that fp32 tells the
    parameters that always are. Raises one CheckpointError for all missing, unexpected, misshapen and
    mistyped tensors.
    """
    problems = Problems()
    left = dict(stored)
    copies = _take_copies(left, stored, config)
    targets = []
    for ours, tensor in model.state_dict(keep_vars=True).items():
        stacked = names.routed_expert(ours)
        target = Target(ours, tuple(tensor.shape), stacked, tensor.dtype == torch.float32)
        experts, is_matrix = tensor.shape[0] if stacked else None, _is_matrix(model, ours)
        for hub, _ in names.places([(ours, experts)], config):
            _take(target, hub, left, config, problems, tensor, is_matrix)
        _check_stack(target, problems)
        targets.append(target)
    for name, unused in left.items():
        weight = names.weight_name(name, config)
        if weight is None:
            kind = "unexpected tensors"
        elif weight in stored:
            kind = "scales beside weights that are not quantised"
        else:
            kind = "scales without weights"
        problems.add(kind, str(unused))
    if left and not config.mtp and all(_of_next_layer(name, config) for name in left):
        problems.add(
            "layers that config.json does not declare",
            f"every unexpected tensor is one of layer {len(config.layers)} and on, where multi-token prediction "
            "stands: set num_nextn_predict_layers to how many there are (it is 0)",
        )
    problems.raise_if_any(directory)
    return targets, copies


def _of_next_layer(name: str, config: ModelConfig) -> bool:
    return config.model_type in ("deepseek_v3", "deepseek_v32", "deepseek_v4") and names.is_mtp(name, config)


def _is_matrix(model: nn.Module, ours: str) -> bool:
    owner, _, leaf = ours.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(owner), Matrix)


def _take_copies(
    left: dict[str, Stored], stored: Mapping[str, Stored], config: ModelConfig
) -> list[tuple[Stored, Stored]]:
    """Move tensors that repeat another one out of `left`: (copy, original) pairs."""
    present = {copy: original for copy, original in names.copies(config).items() if copy in left}
    return [(left.pop(copy), stored[original]) for copy, original in present.items() if original in stored]


def _take(
    target: Target,
    hub: str,
    left: dict[str, Stored],
    config: ModelConfig,
    problems: Problems,
    meta: Tensor,
    is_matrix: bool,
) -> None:
    """Move one hub tensor, and its scales, from `left` into `target`."""
    part = left.pop(hub, None)
    if part is None:
        problems.add("missing tensors", hub)
        return
    scale_hub = names.scale_name(hub, config)
    scale = left.pop(scale_hub, None) if part.dtype in (FP8, FP4) else None
    shape, found = target.part_shape, list(part.shape)
    if meta.dtype == torch.int64:
        wanted: tuple[torch.dtype, ...] = (torch.int64, torch.int32)
    elif is_matrix and config.quantization is not None and part.dtype not in FLOATS:
        fp4 = target.stacked and config.quantization.experts == "fp4"
        wanted = (FP4,) if fp4 else (FP8,)
        shape = (shape[0], shape[1] // 2) if fp4 else shape
        if part.dtype not in wanted:
            pass  # told below
        elif scale is None:
            problems.add("quantised weights without scales", f"{part} (expected {scale_hub})")
        else:
            _check_scale(target.part_shape, scale, config, fp4, problems)
            target.scales.append(scale)
    else:
        wanted = FLOATS
        if part.dtype == FP8 and is_matrix:
            problems.add("FP8 weights in a config.json without quantization_config", f"{part}")
            return
    if part.dtype not in wanted:
        kinds = " or ".join(DTYPE_NAMES[d] for d in wanted)
        problems.add("tensors of a wrong type", f"{part}: expected {kinds}, found {DTYPE_NAMES[part.dtype]}")
    elif part.shape != shape:
        problems.add("misshapen tensors", f"{part}: expected {list(shape)}, found {found}")
    target.parts.append(part)


def _check_scale(
    shape: tuple[int, ...], scale: Stored, config: ModelConfig, fp4: bool, problems: Problems
) -> None:
    assert config.quantization is not None
    rows, columns = shape
    block = (1, FP4_BLOCK) if fp4 else config.quantization.block
    wanted = (blocks(rows, block[0]), blocks(columns, block[1]))
    if scale.dtype not in SCALES:
        kinds = " or ".join(DTYPE_NAMES[d] for d in SCALES)
        problems.add("scales of a wrong type", f"{scale}: expected {kinds}, found {DTYPE_NAMES[scale.dtype]}")
    elif scale.shape != wanted:
        problems.add(
            "misshapen scales",
            f"{scale}: expected {list(wanted)} for {list(shape)} in blocks of {list(block)}, found {list(scale.shape)}",
        )


def _check_stack(target: Target, problems: Problems) -> None:
    """The experts of a stack share one type, and so do their scales."""
    for what, tensors in (("experts", target.parts), ("scales", target.scales)):
        kinds = sorted({DTYPE_NAMES[t.dtype] for t in tensors})
        if len(kinds) > 1:
            problems.add(
                "stacks of mixed types",
                f"{what} of {target.ours}: expected one type, found {', '.join(kinds)}",
            )


def model_dtype(targets: list[Target], config: ModelConfig) -> torch.dtype:
    """The type of the matrices that are stored plainly, or the config's where they differ."""
    kinds = {
        t.stored
        for t in targets
        if t.stored in FLOATS and not t.codes and not t.pinned and not t.keeps_stored_type
    }
    only: torch.dtype = kinds.pop() if len(kinds) == 1 else getattr(torch, config.dtype)
    return only
