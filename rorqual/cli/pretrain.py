"""`rorqual pretrain`: a recipe run, watched, stopped and resumed."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from cyclopts import App
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

app = App(name="pretrain")

PREFIX = "recipe:"


@app.default
def pretrain(
    name: str,
    *,
    out: Path | None = None,
    override: tuple[str, ...] = (),
    data: tuple[str, ...] = (),
    resume: bool = False,
    dry_run: bool = False,
    device: str | None = None,
) -> None:
    """Pretrain a model as a recipe says. Ctrl-C saves and stops; --resume goes on, to the bit on a CPU.

    Example: rorqual pretrain recipe:mini-cpu --out runs/mini --override rate=2e-3

    Parameters
    ----------
    name
        recipe:NAME; a name that is unknown lists those there are.
    out
        The run's folder; runs/NAME by default. At the end it holds `model`, which `rorqual generate` takes.
    override
        A field of the recipe by its path, such as optimizer.decay=0.05 or stages.0.batch=8; may be repeated.
    data
        A corpus of `rorqual data build` instead of the recipe's, FOLDER or FOLDER:WEIGHT; may be repeated.
    resume
        Go on with the run in the folder, from its newest whole checkpoint.
    dry_run
        Say what would be trained, and stop.
    device
        "cpu", "cuda", "cuda:1"; by default the GPU if there is one.
    """
    import torch

    from rorqual.model import export
    from rorqual.recipes import entry
    from rorqual.train.checkpoint import steps_in
    from rorqual.train.recipe import override as overridden
    from rorqual.train.trainer import Trainer

    if not name.startswith(PREFIX):
        raise ValueError(f"{name!r} is no recipe: write {PREFIX}NAME, such as {PREFIX}mini-cpu")
    folder = out or Path("runs") / name.removeprefix(PREFIX)
    found = entry(name.removeprefix(PREFIX))
    plan: Any = found.make(folder)
    if data:
        plan = overridden_sources(plan, data)
    for change in sorted(override, key=lambda change: not change.startswith("tokens=")):
        path, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--override {change}: write path=value, such as optimizer.decay=0.05")
        plan = overridden(plan, path, value)
        if path == "tokens":  # schedules and stages are shares of it
            plan = replace(found.make(folder, plan.tokens), sources=plan.sources)
    console = Console(stderr=True)
    if dry_run:
        describe(plan, console)
        return
    if found.prepare is not None and not data:
        found.prepare(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(
        plan,
        folder / "run",
        device=device,
        resume=resume,
        warn=lambda text: console.print(text, style="yellow"),
    )
    describe(plan, console)
    view = View(plan, trainer.steps[trainer.step][3])
    try:
        with Live(view, console=console, refresh_per_second=4) as live:
            trainer.run(lambda report: live.update(view.take(report)))
    except KeyboardInterrupt:
        kept = steps_in(folder / "run")
        console.print(
            f"saved at step {kept[-1]}; the same command with --resume goes on"
            if kept
            else "nothing was saved yet"
        )
        raise
    made = export(trainer.model, Path(plan.sources[0].folder) / "tokenizer", folder / "model")
    console.print(f'the model: {made}. Try: rorqual generate {made} "The" --temperature 0.5')


def overridden_sources(plan: Any, data: tuple[str, ...]) -> Any:
    """The recipe with other corpora."""
    from rorqual.train.recipe import Source

    sources = []
    for one in data:
        folder, colon, weight = one.rpartition(":")
        try:
            sources.append(Source(folder, float(weight)) if colon and folder else Source(one))
        except ValueError:
            raise ValueError(f"--data {one}: {weight!r} is no weight") from None
    return replace(plan, sources=tuple(sources))


def describe(plan: Any, console: Console) -> None:
    """What is to be trained, in a few lines."""
    import torch

    from rorqual.nn import Transformer

    model = Transformer(plan.config, device="meta")
    parameters = sum(p.numel() for p in model.parameters())
    size = getattr(torch, plan.dtype).itemsize
    wide = 0 if size >= 4 else 4  # the master
    held = parameters * (2 * size + wide + 8)
    console.print(
        f"{plan.name}: {parameters / 1e6:,.1f}M parameters, {plan.tokens:,} tokens, {plan.dtype}; "
        f"weights, gradients and optimizer take {held / 2**20:,.0f} MiB"
    )


class View:
    """What a running run shows: how far it is, its losses, and how fast it goes."""

    def __init__(self, plan: Any, tokens: float) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.task = self.progress.add_task(plan.name, total=plan.tokens, completed=int(tokens))
        self.before = tokens
        self.rates: deque[float] = deque(maxlen=20)
        self.last: dict[str, float] = {}
        self.step, self.skipped, self.began = 0, 0, time.monotonic()

    def take(self, report: Any) -> View:
        """A step more."""
        now = report.values["tokens"]
        self.rates.append((now - self.before) / report.values["seconds"])
        self.before, self.step = now, report.step
        self.skipped += bool(report.skipped)
        self.last |= report.values
        self.progress.update(self.task, completed=now)
        return self

    def __rich__(self) -> Group:
        table = Table(box=None, show_header=False, padding=(0, 2))
        shown = {
            "step": f"{self.step:,}" + (f" ({self.skipped} skipped)" if self.skipped else ""),
            "loss": self._of("next"),
            "MTP": self._of("mtp 1"),
            "held out": self._of("held"),
            "right": f"{100 * self.last['accuracy']:.1f} %" if "accuracy" in self.last else "",
            "gradient": self._of("norm"),
            "rate": f"{self.last['rate']:.2e}" if "rate" in self.last else "",
            "tokens/s": f"{sum(self.rates) / len(self.rates):,.0f}" if self.rates else "",
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
