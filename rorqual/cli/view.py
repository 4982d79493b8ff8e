"""What a running run shows in the terminal, and what is said of one before it begins."""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class View:
    """How far a run is, its losses, and how fast it goes. `flops`: of training on a token; `peak`: the device's, a
    second, if it is known."""

    def __init__(
        self, plan: Any, tokens: float, device: Any = "cpu", flops: float = 0.0, peak: float | None = None
    ) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
        )  # fmt: skip
        self.task = self.progress.add_task(plan.name, total=plan.tokens, completed=int(tokens), left="")
        self.whole, self.device, self.flops, self.peak = plan.tokens, device, flops, peak
        self.recent: deque[tuple[int, float]] = deque(maxlen=20)
        self.last: dict[str, float] = {}
        self.step, self.skipped, self.back = 0, 0, 0

    def take(self, report: Any) -> View:
        """A step more."""
        self.recent.append((report.taken, report.values["seconds"]))
        self.step = report.step
        self.skipped += bool(report.skipped)
        self.back += bool(report.back)
        self.last |= report.values
        left = max(0.0, self.whole - report.values["tokens"]) / self.pace
        self.progress.update(self.task, completed=report.values["tokens"], left=f"{duration(left)} left")
        return self

    @property
    def pace(self) -> float:
        """Tokens a second of late."""
        return sum(tokens for tokens, _ in self.recent) / sum(seconds for _, seconds in self.recent)

    def __rich__(self) -> Group:
        table = Table(box=None, show_header=False, padding=(0, 2))
        marks = [f"{n}{what}" for n, what in ((self.skipped, " skipped"), (self.back, "× back")) if n]
        used = memory_in_use(self.device)
        shown = {
            "step": f"{self.step:,}" + (f" ({', '.join(marks)})" if marks else ""),
            "loss": self._of("next"),
            "MTP": self._of("mtp 1"),
            "held out": self._of("held"),
            "right": f"{100 * self.last['accuracy']:.1f} %" if "accuracy" in self.last else "",
            "gradient": self._of("norm"),
            "rate": f"{self.last['rate']:.2e}" if "rate" in self.last else "",
            "tokens/s": f"{self.pace:,.0f}" if self.recent else "",
            "of peak": f"{self.pace * self.flops / self.peak:.0%}" if self.recent and self.peak else "",
            "memory": f"{used / 2**30:,.1f} GiB" if used is not None else "",
            "busiest expert": self._busiest(),
        }
        filled = [(name, text) for name, text in shown.items() if text]
        for at in range(0, len(filled), 3):
            table.add_row(*(f"[dim]{name}[/] {text}" for name, text in filled[at : at + 3]))
        return Group(self.progress, table)

    def _of(self, name: str) -> str:
        return f"{self.last[name]:.3f}" if name in self.last else ""

    def _busiest(self) -> str:
        found = [value for name, value in self.last.items() if name.startswith("violation")]
        return f"{1 + max(found):.2f} of its share" if found else ""


def duration(seconds: float) -> str:
    """7000 -> "1 h 57 min"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02} min" if hours < 48 else f"{minutes / 1440:,.1f} days"


def memory_in_use(device: Any) -> int | None:
    """Bytes: the most that a GPU's tensors took so far, or that this process did on a CPU; None where nobody says."""
    import torch

    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def describe(plan: Any, console: Console) -> None:
    """What is to be trained, in a line."""
    from rorqual.nn import Transformer

    parameters = sum(p.numel() for p in Transformer(plan.config, device="meta").parameters())
    console.print(f"{plan.name}: {parameters / 1e6:,.1f}M parameters, {plan.tokens:,} tokens, {plan.dtype}")


def foretell(plan: Any, device: str, console: Console) -> None:
    """The memory and the time that it will take."""
    from rorqual.train.budget import flops_per_token, memory
    from rorqual.train.pace import pace

    need = memory(plan, device)
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column(style="dim")
    rows = {
        "weights": (need.weights, ""),
        "gradients": (need.gradients, ""),
        "master weights": (need.master, "fp32, beside the weights"),
        "moments": (need.moments, ""),
        "activations": (need.activations, f"about, for {plan.micro} sequences at once, nothing recomputed"),
        "loss": (need.loss, "a chunk of logits, and the head's gradient"),
        f"together, on {device}": (need.total, ""),
        "moving average": (need.ema, "fp32, on the CPU"),
    }
    for name, (size, note) in rows.items():
        if size:
            table.add_row(name, f"{size / 2**20:,.0f} MiB", note)
    console.print(table)
    rate, how = pace(plan, device)
    each = flops_per_token(plan.config, plan.stages[-1].length)
    console.print(
        f"{plan.tokens / rate:,.0f} s ({duration(plan.tokens / rate)}) at {rate:,.0f} tokens/s ({how}); "
        f"{each / 1e9:,.3g} GFLOP a token, {each * plan.tokens:.3g} in all"
    )
