"""Where a run is told of beside its own log.jsonl: TensorBoard and trackio. What goes wrong there never ends a run."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rorqual.train.trainer import Report

HISTOGRAMS = 10
"""Every so many steps the experts' loads are told whole."""

NEEDS = {
    "tensorboard": ("tensorboard", "pip install 'rorqual[train]'"),
    "trackio": ("trackio", "pip install trackio"),
}
"""The kinds there are: the package that each needs, and how to get it."""


class Sink(Protocol):
    """Takes what steps tell, one after the other."""

    def put(self, step: int, curves: Mapping[str, float], load: Mapping[str, list[int]]) -> None:
        """A step's numbers by "group/name", and what each expert took, by layer (of some steps alone)."""

    def cut(self, step: int) -> None:
        """This step and those after it are taken again: forget them, if that is possible."""

    def close(self) -> None:
        """All has been told."""


def curves(report: Report) -> dict[str, float]:
    """A step's numbers under the names that dashboards group by."""
    found = {}
    for name, value in report.values.items():
        kind, _, rest = name.partition(" ")
        if name == "seconds":
            found["run/tokens_per_second"] = report.taken / value
            continue
        if name.endswith("accuracy"):
            group, own = "accuracy", name.removesuffix("accuracy").strip() or "next"
        elif kind == "norm":
            group, own = "gradient_norm", rest or "all"
        elif kind in ("violation", "spread"):
            group, own = {"violation": "max_violation", "spread": "bias_spread"}[kind], f"layer {rest}"
        elif kind in ("loss", "next", "mtp", "balance", "held"):
            group, own = "loss", name
        elif name in ("rate", "tokens"):
            group, own = "run", {"rate": "learning_rate"}.get(name, name)
        else:
            group, own = "more", name
        found[f"{group}/{own.replace(' ', '_')}"] = value
    return found | {"run/skipped": float(bool(report.skipped))}


class TensorBoard:
    """Event files in `folder`, from step `step` on. A layer's load is a histogram over the numbers of its experts."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.folder = folder
        self._writer: Any = None
        self.cut(step)

    def put(self, step: int, curves: Mapping[str, float], load: Mapping[str, list[int]]) -> None:
        for name, value in curves.items():
            self._writer.add_scalar(name, value, step)
        for layer, counts in load.items():
            total, squares = (float(sum(n * e**power for e, n in enumerate(counts))) for power in (1, 2))
            self._writer.add_histogram_raw(
                f"expert_load/{layer}", min=0, max=len(counts) - 1, num=sum(counts), sum=total,
                sum_squares=squares, bucket_limits=[e + 0.5 for e in range(len(counts))], bucket_counts=counts,
                global_step=step,
            )  # fmt: skip

    def cut(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._writer = SummaryWriter(str(self.folder), purge_step=step or None)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Trackio:
    """A local trackio run. Steps that are taken again stand there twice: trackio forgets nothing."""

    def __init__(self, project: str, name: str) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        self._trackio.init(project=project, name=name, resume="allow", embed=False, auto_log_gpu=False)

    def put(self, step: int, curves: Mapping[str, float], load: Mapping[str, list[int]]) -> None:
        shown = {
            f"expert_load/{layer}": self._trackio.Histogram(np_histogram=(counts, range(len(counts) + 1)))
            for layer, counts in load.items()
        }
        self._trackio.log({**curves, **shown}, step=step)

    def cut(self, step: int) -> None:
        pass

    def close(self) -> None:
        self._trackio.finish()


class Logs:
    """Sinks by name, to be told of each step. One that fails is told of by `warn`, and left alone from then on."""

    def __init__(self, sinks: Mapping[str, Sink], warn: Callable[[str], None] = print) -> None:
        self.sinks, self.warn = dict(sinks), warn
        self._last: int | None = None

    def __call__(self, report: Report) -> None:
        again = self._last is not None and report.step <= self._last
        self._last = report.step
        load = {f"layer_{number}": counts for number, counts in report.load.items()}
        shown = load if report.step % HISTOGRAMS == 0 else {}
        numbers = curves(report)

        def tell(sink: Sink) -> None:
            if again:
                sink.cut(report.step)
            sink.put(report.step, numbers, shown)

        self._each(tell)

    def close(self) -> None:
        """All has been told."""
        self._each(lambda sink: sink.close())

    def _each(self, do: Callable[[Sink], None]) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                do(sink)
            except Exception as error:
                del self.sinks[name]
                self.warn(
                    f"{name} takes no more of the log ({type(error).__name__}: {error}); the run goes on, and its own "
                    "log.jsonl has all"
                )


def kinds_of(text: str) -> list[str]:
    """ "tensorboard,trackio" as a list. ValueError for what is unknown or not installed."""
    kinds = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for kind in kinds:
        if kind not in NEEDS:
            raise ValueError(f"there is no log {kind!r}; there are {', '.join(NEEDS)}")
        package, how = NEEDS[kind]
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"logs for {kind} need its package: {how}")
    return kinds


def open_logs(
    kinds: list[str], folder: Path, project: str, step: int = 0, warn: Callable[[str], None] = print
) -> Logs:
    """The logs of a run in `folder` that is at step `step`. One that can't be opened is told of by `warn`."""
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoard(folder / "tensorboard", step),
        "trackio": lambda: Trackio(project, "-".join(folder.parts[-2:])),
    }
    sinks = {}
    for kind in kinds:
        try:
            sinks[kind] = makers[kind]()
        except Exception as error:
            warn(f"{kind} can't be opened ({type(error).__name__}: {error}); the run goes on without it")
    return Logs(sinks, warn)
