"""Optimizers: AdamW with fp32 master weights, and Muon as V4 has it (V4 report; facts 3.10).

Both keep what they need under the parameters' own names, so that a checkpoint can be read by any layout, and both are
plain functions of (parameters, gradients, state, step): nothing is hidden in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rorqual.kernels import adamw, muon

HYBRID = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
"""Coefficients of V4's Newton-Schulz steps: eight that grow all singular values fast, two that settle them at 1."""

RMS = 0.18
"""Root mean square of Muon's update, which makes AdamW's learning rates fit it."""


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay (on matrices alone), moments in `moments`' type, 1/beta-corrected (V3 report 4.2)."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.1
    moments: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not (all(0 <= beta < 1 for beta in self.betas) and self.eps > 0 and 0 <= self.decay < math.inf):
            raise ValueError(
                f"AdamW with betas {self.betas}, eps {self.eps} and decay {self.decay}: betas lie from 0 to under 1, "
                "eps above 0, decay not below 0"
            )


@dataclass(frozen=True)
class Muon:
    """Orthogonalised momentum for matrices, those of all experts each by itself; `rest` for embedding, head, norms and
    all other vectors."""

    momentum: float = 0.95
    decay: float = 0.1
    nesterov: bool = True
    rest: AdamW = AdamW(eps=1e-20)
    product: torch.dtype = torch.bfloat16
    """Type of the Newton-Schulz products."""

    def __post_init__(self) -> None:
        if not (0 <= self.momentum < 1 and 0 <= self.decay < math.inf):
            raise ValueError(
                f"Muon with momentum {self.momentum} and decay {self.decay}: the first lies from 0 to under 1, the "
                "second not below 0"
            )


Settings = AdamW | Muon
State = dict[str, Tensor]


def by_muon(name: str, parameter: Tensor) -> bool:
    """Whether Muon moves a parameter: all matrices but embedding and head."""
    return parameter.dim() >= 2 and not name.startswith(("embed.", "head."))


def orthogonalised(m_RC: Tensor, product: torch.dtype = torch.bfloat16) -> Tensor:
    """The nearest semi-orthogonal matrix, about, of a matrix or of each of a stack `[..., R, C]`, in `product`."""
    x = m_RC.to(torch.promote_types(m_RC.dtype, torch.float32))
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)).to(product)
    return newton_schulz(x)


def newton_schulz(x_RC: Tensor) -> Tensor:
    """V4's steps on matrices `[..., R, C]` of Frobenius norm 1."""
    tall = x_RC.shape[-2] > x_RC.shape[-1]
    x = x_RC.mT if tall else x_RC
    x = x.flatten(0, -3) if x.dim() > 2 else x[None]
    for a, b, c in HYBRID:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.unflatten(0, x_RC.shape[:-2]) if x_RC.dim() > 2 else x[0]
    return x.mT if tall else x


class Optimizer:
    """Moves named parameters. What it keeps is in `state`: for each parameter `master` (unless it is fp32 or fp64
    itself) and `m` and `v`, or `m` alone."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], settings: Settings) -> None:
        self.settings = settings
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.state: dict[str, State] = {}
        for name, p in self.parameters.items():
            self.state[name] = self._new(name, p)

    def _adam(self) -> AdamW:
        return self.settings.rest if isinstance(self.settings, Muon) else self.settings

    def _muon(self, name: str) -> bool:
        return isinstance(self.settings, Muon) and by_muon(name, self.parameters[name])

    def _new(self, name: str, p: nn.Parameter) -> State:
        full = p.dtype in (torch.float32, torch.float64)
        made: State = {} if full else {"master": p.detach().float()}
        wide = p.dtype if full else torch.float32
        if self._muon(name):
            return made | {"m": torch.zeros_like(p, dtype=wide)}
        kind = wide if self._adam().moments == torch.float32 else self._adam().moments
        return made | {key: torch.zeros_like(p, dtype=kind) for key in ("m", "v")}

    @torch.no_grad()
    def step(
        self,
        number: int,
        rate: float,
        factor: Tensor | None = None,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Move parameters that have gradients, their own or those given by name, each times `factor` (of `clipping`):
        step `number`, from 1 on, at learning rate `rate`."""
        for name, p in self.parameters.items():
            found = p.grad if gradients is None else gradients.get(name)
            if found is None:
                continue
            state = self.state[name]
            weight = state.get("master", p)
            by_muon, master = self._muon(name), weight.detach() if weight is not p else None
            if by_muon and adamw.supported(p, weight, found):
                self._by_muon_fast(p.detach(), master, found, state["m"], factor, rate)
                torch.autograd.graph.increment_version(p)
                continue
            if adamw.supported(p, weight, found):
                s = self._adam()
                adamw.step(
                    p.detach(), master, found, state["m"], state["v"], factor,
                    rate=rate, decay=s.decay if p.dim() >= 2 else 0.0, betas=s.betas, eps=s.eps, number=number,
                )  # fmt: skip
                torch.autograd.graph.increment_version(p)  # kernels' writes don't count by themselves
                continue
            grad = found.to(weight.dtype)
            if factor is not None:
                grad = grad * factor.to(weight.dtype)
            if by_muon:
                self._by_muon(weight, grad, state, rate)
            else:
                self._by_adam(weight, grad, state, rate, number)
            if weight is not p:
                p.copy_(weight)

    def _by_adam(self, weight: Tensor, grad: Tensor, state: State, rate: float, number: int) -> None:
        s = self._adam()
        (one, two), m, v = s.betas, state["m"], state["v"]
        if m.dtype == weight.dtype:
            m.lerp_(grad, 1 - one)
            v.mul_(two).addcmul_(grad, grad, value=1 - two)
        else:  # sums in full precision, kept rounded
            m.copy_(m.to(weight.dtype).lerp_(grad, 1 - one))
            v.copy_(v.to(weight.dtype).mul_(two).addcmul_(grad, grad, value=1 - two))
        wide = v.to(weight.dtype)
        if weight.dim() >= 2:
            weight.mul_(1 - rate * s.decay)
        below = (wide / (1 - two**number)).sqrt_().add_(s.eps)
        weight.addcdiv_(m.to(weight.dtype), below, value=-rate / (1 - one**number))

    def _by_muon(self, weight: Tensor, grad: Tensor, state: State, rate: float) -> None:
        assert isinstance(self.settings, Muon)
        s, m = self.settings, state["m"]
        m.mul_(s.momentum).add_(grad)
        update = grad + s.momentum * m if s.nesterov else m
        product = weight.dtype if weight.dtype == torch.float64 else s.product
        o = orthogonalised(update, product).to(weight.dtype)
        rows, columns = weight.shape[-2:]
        weight.mul_(1 - rate * s.decay)
        weight.add_(o, alpha=-rate * RMS * max(rows, columns) ** 0.5)

    def _by_muon_fast(
        self, p: Tensor, master: Tensor | None, grad: Tensor, m: Tensor, factor: Tensor | None, rate: float
    ) -> None:
        assert isinstance(self.settings, Muon)
        s, (rows, columns) = self.settings, p.shape[-2:]
        update, norm = muon.momentum(grad, m, factor, s.momentum, s.nesterov, s.product)
        o = newton_schulz(update.div_(norm.clamp(min=1e-30)))
        stride = rate * RMS * max(rows, columns) ** 0.5
        muon.move(p, master, o.contiguous(), shrink=1 - rate * s.decay, stride=stride)

    # ------------------------------------------------------------------------------------- state

    def tensors(self) -> dict[str, Tensor]:
        """All that it keeps: "parameter.key" -> tensor."""
        return {f"{name}.{key}": t for name, kept in self.state.items() for key, t in kept.items()}

    @torch.no_grad()
    def restore(self, found: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave. ValueError for other names or shapes."""
        mine = self.tensors()
        if mine.keys() != found.keys():
            odd = sorted(mine.keys() ^ found.keys())
            raise ValueError(
                f"the optimizer's state is of another run: {len(odd)} tensors are in one alone, {odd[0]} first"
            )
        for name, t in mine.items():
            if t.shape != found[name].shape or t.dtype != found[name].dtype:
                raise ValueError(
                    f"the optimizer's {name} is {found[name].dtype} {tuple(found[name].shape)}, "
                    f"this run wants {t.dtype} {tuple(t.shape)}"
                )
            t.copy_(found[name])


@torch.no_grad()
def gradient_norms(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of each `[P]`, fp32 (fp64 of fp64)."""
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(list(gradients), 2, wide))


def clipping(norm: Tensor, most: float | None) -> Tensor | None:
    """What all gradients are to be multiplied by so that their joint norm is at most `most`."""
    return None if most is None else (most / norm.clamp(min=1e-30)).clamp(max=1.0)
