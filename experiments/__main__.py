"""`python -m experiments NAME ...`: run what is missing, and write cards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console

from experiments import attention, balance, card, corpus, fp8, mtp, muon, pool
from experiments.frame import Setup
from rorqual.cli.pretrain import usable
from rorqual.data import DataError, Manifest

EXPERIMENTS = {
    found.name: found
    for found in (
        attention.EXPERIMENT, balance.BALANCE, balance.COLLAPSE, mtp.EXPERIMENT, fp8.EXPERIMENT, muon.EXPERIMENT,
    )
}  # fmt: skip

app = App(name="python -m experiments", help=__doc__)


@app.default
def main(
    *names: str,
    out: Path = Path("build/experiments"),
    cards: Path | None = None,
    data: Path | None = None,
    device: str | None = None,
    jobs: Annotated[int, Parameter(name=["--jobs", "-j"])] = 1,
    seeds: int = 3,
    steps: int | None = None,
    quick: bool = False,
    prepare: bool = False,
    commit: str = "",
) -> None:
    """Run experiments. What has been run is not run again; arms that several have in common are run once.

    Parameters
    ----------
    names
        Which; all by default.
    out
        Where the corpus and finished runs are kept.
    cards
        Where cards go; experiments/cards by default, OUT/cards for --quick.
    data
        A corpus of `rorqual data build` with something held out; by default one is made of Python's own library.
    device
        "cpu" or "cuda"; by default the GPU if there is one.
    jobs
        Runs at a time, in processes of their own.
    seeds
        Runs of an arm.
    steps
        Other than the experiment's own.
    quick
        A size for seconds on a CPU: shows that all works, and nothing else.
    prepare
        Build the corpus, and stop.
    commit
        What the code is, where there is no repository to ask.
    """
    import torch

    console = Console(highlight=False, soft_wrap=True)
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        raise ValueError(f"there is no experiment {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
    for option, value in (("jobs", jobs), ("seeds", seeds), ("steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"--{option} {value}: it must be above 0")
    place = data or corpus.prepare(out)
    manifest = Manifest.read(place)
    if not manifest.of("held"):
        raise DataError(f"{place} holds nothing out, and losses are compared there: build it with --hold-out")
    if prepare:
        console.print(
            f"{place}: {sum(entry.tokens for entry in manifest.shards):,} tokens of {manifest.vocab:,}"
        )
        return
    device = usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    setup = Setup(str(place), manifest.vocab, quick, device, steps, seeds)
    chosen = [EXPERIMENTS[name] for name in names or EXPERIMENTS]
    found = pool.go(chosen, setup, out / "runs", jobs=jobs, commit=commit, told=console.print)
    cards = cards or (out / "cards" if quick else Path(__file__).parent / "cards")
    short = []
    for name, progress in found.items():
        results = progress.results()
        if results is None:
            short.append(name)
            continue
        verdict = card.write(progress.experiment, setup, results, cards)
        console.print(f"{name}: {verdict.word}. {'; '.join(verdict.because)}. {cards / name}.md")
    if short:
        raise SystemExit(f"without a result, because runs went wrong: {', '.join(short)}")


def run() -> None:
    """The command, its errors as one line."""
    try:
        app()
    except (ValueError, OSError) as error:
        raise SystemExit(f"experiments: {error}") from None


if __name__ == "__main__":
    run()
