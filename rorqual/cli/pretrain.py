"""`rorqual pretrain`: a recipe run, watched, stopped and resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from cyclopts import App
from rich.console import Console
from rich.live import Live

from rorqual.cli.view import View, describe, foretell

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
    log: str = "",
    profile: str | None = None,
    export: Literal["last", "best"] = "last",
    eval_tasks: str = "",
    eval_tasks_every: int = 0,
    eval_tasks_limit: int | None = None,
    eval_tasks_from: Path | None = None,
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
        Say what would be trained, the memory that takes and how long, and stop.
    device
        "cpu", "cuda", "cuda:1"; by default the GPU if there is one.
    log
        Where to tell of the run beside run/log.jsonl: tensorboard, trackio or both, with a comma between.
    profile
        Record these steps, N or N:M, into run/trace-N-M.json, which chrome://tracing and Perfetto show.
    export
        What becomes `model` at the end: the last weights, or the checkpoint with the lowest held-out loss.
    eval_tasks
        Tasks of lm-eval to run the model on, with commas between; by default at the end alone.
    eval_tasks_every
        Run them each so many steps, too.
    eval_tasks_limit
        At most so many documents of each task.
    eval_tasks_from
        A folder that describes tasks beside lm-eval's own.
    """
    import torch

    from rorqual.model import Model
    from rorqual.recipes import entry
    from rorqual.train import budget, plot
    from rorqual.train.checkpoint import steps_in
    from rorqual.train.logs import kinds_of, open_logs
    from rorqual.train.profiling import Profile, steps_of
    from rorqual.train.recipe import override as overridden
    from rorqual.train.trainer import Trainer

    if not name.startswith(PREFIX):
        raise ValueError(f"{name!r} is no recipe: write {PREFIX}NAME, such as {PREFIX}mini-cpu")
    folder = out or Path("runs") / name.removeprefix(PREFIX)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder by --out")
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
    if export == "best":
        if not plan.evaluate_every:
            raise ValueError("--export best needs held-out losses: set --override evaluate_every=STEPS, too")
        plan = replace(plan, keep_best=max(1, plan.keep_best))
    console = Console(stderr=True)
    device = usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kinds, window = kinds_of(log), steps_of(profile) if profile is not None else None

    def warn(text: str) -> None:
        console.print(text, style="yellow", markup=False)

    if dry_run:
        describe(plan, console)
        foretell(plan, device, console)
        return
    tasks = Tasks(eval_tasks, eval_tasks_every, eval_tasks_limit, eval_tasks_from, warn)
    if found.prepare is not None and not data:
        found.prepare(folder)
    tokenizer = Path(plan.sources[0].folder) / "tokenizer"
    run = folder / "run"
    trainer = Trainer(plan, run, device=device, resume=resume, warn=warn, build=Model, further=tasks)
    if export == "best" and trainer.held is None:
        raise ValueError("--export best needs held-out data: build the corpus with --hold-out")
    tasks.take(trainer.model, tokenizer)
    describe(plan, console)
    seen = trainer.steps[trainer.step][3]
    flops = budget.flops_per_token(plan.config, plan.stages[-1].length)
    view = View(plan, seen, device, flops, budget.peak(device))
    with contextlib.ExitStack() as ends:
        ends.callback(draw, plot.draw, run, console)
        watching: list[Callable[[Any], Any]] = []
        if window is not None:
            traced = Profile(run, *window, begin=trainer.step)
            ends.callback(traced.close)
            watching.append(traced)
        if kinds:
            logs = open_logs(kinds, run, plan.name, trainer.step, warn)
            ends.callback(logs.close)
            watching.append(logs)
        live = ends.enter_context(Live(view, console=console, refresh_per_second=4))
        watching.append(lambda report: live.update(view.take(report)))

        def told(report: Any) -> None:
            for watch in watching:
                watch(report)

        try:
            trainer.run(told)
        except KeyboardInterrupt:
            kept = steps_in(run)
            console.print(
                f"saved at step {kept[-1]}; the same command with --resume goes on"
                if kept
                else "nothing was saved yet"
            )
            raise
    if window is not None:
        told_of = f"the trace: {traced.path}" if traced.path.is_file() else f"no trace: no step {window[0]}"
        console.print(told_of)
    made = exported(trainer, export, tokenizer, folder / "model", console)
    console.print(f'the model: {made}. Try: rorqual generate {made} "The" --temperature 0.5')


class Tasks:
    """lm-eval's tasks by name, run on the model in training every so many steps and at the end. What goes wrong is told
    of once, and they are left out from then on. ValueError for tasks that can't be run."""

    def __init__(
        self, names: str, every: int, limit: int | None, include: Path | None, warn: Callable[[str], None]
    ) -> None:
        self.names = [name.strip() for name in names.split(",") if name.strip()]
        self.every, self.limit, self.warn = every, limit, warn
        self.model: Any = None
        if every < 0 or (limit is not None and limit < 1):
            raise ValueError("--eval-tasks-every must not be below 0, nor --eval-tasks-limit below 1")
        if not self.names:
            if every or limit is not None or include is not None:
                raise ValueError("name the tasks: --eval-tasks arc_easy,hellaswag")
            return
        try:
            from rorqual.harness import known_tasks
        except ImportError as error:
            raise ValueError(str(error)) from None
        self.manager = known_tasks(self.names, include)

    def take(self, model: Any, tokenizer: Path) -> None:
        """The model to run them on, and the folder of its tokenizer."""
        if self.names:
            from rorqual.text import Tokenizer

            self.model, model.tokenizer = model, Tokenizer.from_dir(tokenizer)

    def __call__(self, step: int, ended: bool) -> dict[str, float]:
        if not self.names or not (ended or (self.every and step % self.every == 0)):
            return {}
        from rorqual.harness import evaluate

        try:
            return evaluate(self.model, self.names, limit=self.limit, manager=self.manager)
        except Exception as error:
            self.warn(
                f"{', '.join(self.names)} failed ({type(error).__name__}: {error}); the run goes on without"
            )
            self.names = []
            return {}


def draw(drawn: Callable[[Path], Path | None], run: Path, console: Console) -> None:
    """The run's curves, however it ended; a drawing that fails takes nothing with it."""
    try:
        place = drawn(run)
    except Exception as error:
        console.print(f"the curves could not be drawn ({type(error).__name__}: {error})", markup=False)
        return
    if place is not None:
        console.print(f"the curves: {place}")


def exported(trainer: Any, which: str, tokenizer: Path, place: Path, console: Console) -> Path:
    """The model in the released format: the last one, or the best that was kept."""
    from rorqual.model import export
    from rorqual.train.checkpoint import best, read

    if which == "best":
        steps = best(trainer.folder)
        if not steps:
            raise ValueError(
                f"{trainer.folder} keeps no checkpoint that was evaluated; --resume --export last takes the last one"
            )
        kept = read(trainer.folder, steps[0])
        trainer.model.load_state_dict(kept.tensors["model"])
        console.print(f"step {steps[0]} is the best: held-out loss {kept.facts['held']:.3f}")
    return export(trainer.model, tokenizer, place)


def usable(device: str) -> str:
    """The device, if it is one that this machine has."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} can't be used here: {str(error).splitlines()[0]}") from None
    return device


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
