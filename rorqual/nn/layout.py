"""Which rank of a group holds what, and how ranks add up and exchange tensors.

Ranks stand in a grid: `data` rows with tokens of their own, `tensor` ranks a row that share the heads and widths
of every layer for the same tokens. Experts are spread over all ranks, or over each row's alone. A `Layout`
knows no model; `nn.spread` cuts a model by it. Collectives run in the current stream, so CUDA graphs record them.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from rorqual.kernels.exchange import Near, room
from rorqual.nn.errors import InputError

FOREVER = datetime.timedelta(days=365)
"""How long a rank waits for the others on the host: an engine may have nothing to do for days."""

# Newer names first; the older ones are deprecated where these are.
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter_sum_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


_apart: ContextVar[bool] = ContextVar("apart", default=False)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, this rank exchanges nothing with others, which need not be here: sums and gathers give numbers of the
    right shape and nothing more. For passes that only compile kernels."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


class connected:
    """What a collective raises inside, as a ConnectionError: another rank has gone."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise ConnectionError(f"another rank has gone: {str(error).splitlines()[0]:.200}") from error


class Axis:
    """The ranks along one axis of the grid, this one among them. Results are the same bits on all of them."""

    def __init__(self, group: dist.ProcessGroup, size: int, rank: int) -> None:
        self.group, self.size, self.rank = group, size, rank
        self.near: Near | None = None
        """The way to exchange small tensors through each other's memory, where there is one."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, which may be overwritten."""
        _refuse_gradients(x)
        if _apart.get():
            return x
        x = x.contiguous()
        if self.near is not None and self.near.takes(x):
            return self.near.sum(x)
        with connected():
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x_ND: Tensor) -> Tensor:
        """All ranks' rows in the order of the ranks, `[size * N, ...]`; each brings as many."""
        _refuse_gradients(x_ND)
        if _apart.get():
            return torch.cat([x_ND] * self.size)
        if self.near is not None and self.near.takes(x_ND):
            return self.near.gather(x_ND.contiguous())
        out = x_ND.new_empty(self.size * x_ND.shape[0], *x_ND.shape[1:])
        with connected():
            gather_into(out, x_ND.contiguous(), group=self.group)
        return out

    def scatter_sum(self, x_MD: Tensor) -> Tensor:
        """This rank's rows `[M / size, ...]` of the sum of all ranks' `x_MD`."""
        _refuse_gradients(x_MD)
        if _apart.get():
            return x_MD[: x_MD.shape[0] // self.size]
        if self.near is not None and self.near.takes(x_MD):
            return self.near.scatter_sum(x_MD.contiguous())
        out = x_MD.new_empty(x_MD.shape[0] // self.size, *x_MD.shape[1:])
        with connected():
            scatter_sum_into(out, x_MD.contiguous(), group=self.group)
        return out

    def first(self, x: Tensor) -> Tensor:
        """The first rank's `x` on all ranks, in place."""
        if x.numel() and not _apart.get():
            with connected():
                dist.broadcast(x, group=self.group, group_src=0)
        return x


class Layout:
    """`data` x `tensor` ranks; rank r has row r // tensor. Made on every rank, with the same numbers.

    layout = rorqual.Layout(data=2)                      # torchrun --nproc-per-node 2
    engine = rorqual.Engine(model, layout=layout)

    `data` rows serve requests of their own (default: as many as the ranks allow); `tensor` ranks split each
    layer's heads and widths. `expert`: ranks that the routed experts are spread over, all of them by default, or
    `tensor` for rows with all experts each. `device` defaults to this process's GPU, or the CPU where there is none.

    `direct`: GPUs of one machine exchange small tensors by reading each other's memory (`kernels.exchange`), where
    they can; else NCCL takes all.

    Reads torchrun's variables and starts `torch.distributed` if the caller has not. Raises `InputError` for
    numbers that don't make up the ranks there are.
    """

    broken = False
    """A rank has failed: what ranks count in step may differ from now on."""

    def __init__(
        self,
        data: int | None = None,
        tensor: int = 1,
        expert: int | None = None,
        device: torch.device | str | None = None,
        direct: bool = True,
    ) -> None:
        world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
        for name, value in (("data", data), ("tensor", tensor), ("expert", expert)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not whole and not (value is None and name != "tensor"):
                raise InputError(f"{name} must be a positive whole number, got {value!r}")
        rows = world // tensor if data is None else data
        if rows * tensor != world:
            raise InputError(
                f"a layout of {rows} data x {tensor} tensor ranks needs {rows * tensor} processes, and there "
                f"{'is' if world == 1 else 'are'} {world}: start them with torchrun --nproc-per-node"
            )
        if expert not in (None, world, tensor):
            raise InputError(
                f"experts can be spread over all {world} ranks or over the {tensor} of a row, not over {expert}"
            )
        self.data, self.tensor, self.expert, self.world = rows, tensor, expert or world, world
        self.device = _device(device)
        self.tokens: int | None = None
        """Tokens that every data rank brings to the pass at hand, padding included; None: as many as it has."""
        self.tensor_axis: Axis | None = None
        self.data_axis: Axis | None = None
        self.host: dist.ProcessGroup | None = None
        if world == 1:
            self.rank = self.row = self.column = 0
            return
        _start(self.device)
        self.rank = dist.get_rank()
        self.row, self.column = divmod(self.rank, tensor)
        mesh = init_device_mesh(self.device.type, (self.data, tensor), mesh_dim_names=("data", "tensor"))
        if tensor > 1:
            self.tensor_axis = Axis(mesh.get_group("tensor"), tensor, self.column)
        if self.data > 1:
            self.data_axis = Axis(mesh.get_group("data"), self.data, self.row)
        self.host = dist.new_group(backend="gloo", timeout=FOREVER)
        if direct and self.device.type == "cuda":
            self._connect()
        self.warm_up()

    def __deepcopy__(self, memo: object) -> Layout:
        return self

    @property
    def gathers(self) -> bool:
        """Whether experts serve tokens of other rows than this one's."""
        return self.data > 1 and self.expert > self.tensor

    @property
    def expert_rank(self) -> int:
        """Which share of the experts is this rank's."""
        return self.rank if self.expert == self.world else self.column

    def warm_up(self) -> None:
        """Every collective once, so that connections stand before a CUDA graph records one."""
        x = torch.ones(self.data, 1, device=self.device)
        for axis in (self.tensor_axis, self.data_axis):
            if axis is not None:
                axis.first(axis.sum(x.clone()))
                axis.scatter_sum(axis.gather(x))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _connect(self) -> None:
        """Let axes exchange small tensors through each other's memory, if that works on all ranks."""
        one_machine = os.environ.get("LOCAL_WORLD_SIZE", str(self.world)) == str(self.world)
        axes = [axis for axis in (self.tensor_axis, self.data_axis) if axis is not None]
        for axis in axes if one_machine else ():
            try:
                near = _near(axis, self.device)
            except (RuntimeError, ImportError, AttributeError):
                near = None
            axis.near = near if self.least(int(near is not None)) else None

    def least(self, value: int) -> int:
        """The least of all ranks' values (on the host)."""
        if self.host is None:
            return value
        x = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(x, dist.ReduceOp.MIN, group=self.host)
        return int(x)


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        found = torch.device(device)
    elif torch.cuda.is_available():
        found = torch.device("cuda")
    else:
        found = torch.device("cpu")
    if found.type == "cuda" and found.index is None:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}"
            )
        found = torch.device("cuda", local)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


def _start(device: torch.device) -> None:
    if dist.is_initialized():
        return
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")


def _near(axis: Axis, device: torch.device) -> Near:
    """Memory that all ranks of an axis can read."""
    # Nothing here uses multicast objects, so none are to be made.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    from torch.distributed import _symmetric_memory as symmetric

    size = room(axis.size)
    memory = symmetric.empty(size, dtype=torch.uint8, device=device)
    memory.zero_()
    torch.cuda.synchronize(device)  # before others can know of it
    handle = symmetric.rendezvous(memory, axis.group.group_name)
    bases = [handle.get_buffer(rank, (size,), torch.uint8).data_ptr() for rank in range(axis.size)]
    near = Near(bases, axis.rank, device)
    near.holds = memory, handle
    return near


def _refuse_gradients(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError("a model spread over ranks is for inference: run it inside torch.no_grad()")
