"""All runs of all experiments, several at a time; what has been run is not run again."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from experiments import run
from experiments.frame import Arm, Experiment, Outcome, Results, Setup
from rorqual.train.recipe import Recipe


@dataclass
class Progress:
    """How far an experiment is: its arms, and which file each run's outcome has."""

    experiment: Experiment
    arms: list[Arm] = field(default_factory=list)
    places: dict[tuple[str, int], Path] = field(default_factory=dict)
    again: bool = False
    """Whether the arms that follow from the first ones' results are among them."""

    def add(self, arms: Sequence[Arm], setup: Setup, folder: Path) -> dict[Path, Recipe]:
        """Runs of these arms that are not there yet, by the file they will be in."""
        new = {}
        for arm in arms:
            self.arms += [arm] if arm.name not in {a.name for a in self.arms} else []
            for seed in arm.seeds if arm.seeds is not None else range(setup.seeds):
                recipe = replace(arm.make(setup), seed=seed)
                place = folder / f"{run.key(recipe, setup.device)}.json"
                self.places[arm.name, seed] = place
                if run.kept(place) is None:
                    new[place] = recipe
        return new

    def results(self) -> Results | None:
        """None until all runs are there."""
        found: dict[str, dict[int, Outcome]] = {}
        for (arm, seed), place in self.places.items():
            outcome = run.kept(place)
            if outcome is None:
                return None
            found.setdefault(arm, {})[seed] = outcome
        return Results(found)


def go(
    experiments: Sequence[Experiment],
    setup: Setup,
    folder: Path,
    *,
    jobs: int = 1,
    commit: str = "",
    told: Callable[[str], None] = print,
) -> dict[str, Progress]:
    """Run what is missing of all experiments, `jobs` at a time. A run that fails is told of and leaves its experiment
    without a result; the others go on."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"commit": commit or commit_here(), "date": datetime.date.today().isoformat()}
    found = {experiment.name: Progress(experiment) for experiment in experiments}
    names: dict[Path, str] = {}
    with _pool(jobs, setup.device) as submit:
        waiting: dict[Future[Outcome], Path] = {}

        def begin(progress: Progress, arms: Sequence[Arm]) -> None:
            for place, recipe in progress.add(arms, setup, folder).items():
                if place not in names:
                    names[place] = f"{recipe.name} seed {recipe.seed}"
                    waiting[submit(run.work, recipe, setup.device, str(place), facts)] = place

        def follow() -> None:
            for progress in found.values():
                more, results = progress.experiment.more, progress.results()
                if more is not None and results is not None and not progress.again:
                    progress.again = True
                    begin(progress, more(setup, results))

        # Those that go on from their first results come first, so that the machine isn't idle in between.
        for progress in sorted(found.values(), key=lambda p: p.experiment.more is None):
            begin(progress, progress.experiment.arms(setup))
        follow()
        told(f"{len(waiting)} runs, {jobs} at a time")
        while waiting:
            ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                told(f"{names[waiting.pop(future)]}: {_said(future)}; {len(waiting)} left")
            follow()
    return found


def _said(future: Future[Outcome]) -> str:
    error = future.exception()
    if error is not None:
        return f"went wrong ({type(error).__name__}: {error}); the same command tries it again"
    outcome = future.result()
    if outcome["failed"]:
        return f"broke down at step {outcome['steps']}: {outcome['failed']}"
    loss, speed = outcome["measures"]["held-out loss"], 1000 * outcome["step seconds"]
    told = "none" if loss is None else f"{loss:.4f}"
    return f"held-out loss {told} after {outcome['seconds']:.0f} s ({speed:.0f} ms a step)"


@contextmanager
def _pool(jobs: int, device: str) -> Iterator[Callable[..., Future[Any]]]:
    """What takes work: processes of their own, or a thread of this one for one job at a time."""
    threads = 1 if device != "cpu" else max(1, (os.cpu_count() or 1) // jobs)
    pool: Executor = (
        ThreadPoolExecutor(1)
        if jobs == 1
        else ProcessPoolExecutor(jobs, _context(), initializer=run.begin, initargs=(threads,))
    )
    try:
        yield pool.submit
    finally:
        pool.shutdown(cancel_futures=True)


def _context() -> BaseContext:
    """How workers begin: from a process that has imported everything once, where the system has that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run.__name__])
    return context


def commit_here() -> str:
    """Of the working tree, if there is one."""
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"
