"""The loop: batches to losses to moved weights, one step after the other, the same from any checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.data import HELD, Ahead, Batch, Corpus, Mixture
from rorqual.data.numbers import uniform, word
from rorqual.data.shards import write_atomically
from rorqual.nn import Transformer
from rorqual.nn.balance import update_bias
from rorqual.nn.dropping import Capacity
from rorqual.train.anticipate import Routes
from rorqual.train.begin import begin_with
from rorqual.train.check import TrainError, check
from rorqual.train.checkpoint import Kept, Writer, amend, drop, newest, set_aside, steps_in
from rorqual.train.hold import hold
from rorqual.train.interrupts import interrupts
from rorqual.train.objective import Factors, Pretraining, Routing
from rorqual.train.optim import Optimizer, clipping, gradient_norms
from rorqual.train.parts import evenness, norms_by_part
from rorqual.train.recipe import Recipe
from rorqual.train.rollback import Skip, as_facts, back_to, begun, from_facts, left_out, sound_before
from rorqual.train.schedule import Steps

__all__ = ["LOG", "Report", "TrainError", "Trainer"]

LOG = "log.jsonl"
_MIXTURE, _HELD, _EXEMPT = 10, 11, 12
"""What numbers are drawn for (see `data.numbers.word`)."""


@dataclass
class Report:
    """What a step tells: `values` by name, among them "loss" and "tokens" (seen after it); `load`: tokens that chose
    each expert, by layer; `taken`: this step's own tokens."""

    step: int
    values: dict[str, float] = field(default_factory=dict)
    load: dict[int, list[int]] = field(default_factory=dict)
    taken: int = 0
    skipped: str = ""
    """Why nothing was moved, if nothing was."""
    back: str = ""
    """Why the run went back to this step, if it did."""


class Trainer:
    """A run of a recipe in a folder. `run()` goes to its end; `resume` takes the newest whole checkpoint up. `build`:
    the class of its model. `further(steps taken, ended)` is asked after each step for more to be told of it."""

    def __init__(
        self,
        recipe: Recipe,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        resume: bool = False,
        warn: Callable[[str], None] = print,
        build: type[Transformer] = Transformer,
        further: Callable[[int, bool], dict[str, float]] | None = None,
    ) -> None:
        self.recipe, self.folder, self.warn, self.further = recipe, Path(folder), warn, further
        self.steps = Steps(recipe.stages)
        self.objective = Pretraining(recipe.apart, recipe.dsa, recipe.recompute, recipe.fp8)
        self._corpora = [Corpus(source.folder) for source in recipe.sources]
        self._checking = check(recipe, self._corpora, torch.device(device), warn)
        self.mixtures = [
            Ahead(self._mixture(self._corpora, n, word(recipe.seed, _MIXTURE, n)))
            for n in range(len(recipe.stages))
        ]
        self.model = build(recipe.config, dtype=getattr(torch, recipe.dtype), device=device, seed=recipe.seed)
        if recipe.begin and not (resume and steps_in(self.folder)):
            fresh = begin_with(self.model, recipe.begin)
            if fresh:
                warn(f"{recipe.begin} has no {fresh[0]} and {len(fresh) - 1} more: these begin fresh")
        for name, p in self.model.named_parameters():
            p.requires_grad_(recipe.moves(name))
        self.routes = Routes(recipe.anticipate, self._routes) if recipe.anticipate is not None else None
        self.optimizer = Optimizer(self.model.named_parameters(), recipe.optimizer)
        self.ema: dict[str, Tensor] | None = None
        if recipe.ema is not None:
            self.ema = {
                name: p.detach().to("cpu", torch.float32, copy=True)
                for name, p in self.model.named_parameters()
            }
        self.held = self._held() if recipe.evaluate_every else None
        self.step, self.updates, self.norms, self._wrong = 0, 0, [], 0  # type: int, int, list[float], int
        self.skips: list[Skip] = []
        self._score: float | None = None
        """Held-out loss of what stands now, if it was evaluated."""
        self.writer = Writer(self.folder, recipe.keep, warn, recipe.keep_best)
        self._begin(resume)

    def _mixture(self, corpora: list[Corpus], stage: int, seed: int) -> Mixture:
        weights = [source.weight for source in self.recipe.sources]
        depths = len(self.recipe.config.mtp)
        return Mixture(corpora, weights, length=self.recipe.stages[stage].length, look=1 + depths, seed=seed)

    def _held(self) -> Mixture | None:
        """The held-out splits, mixed as what is trained on; None, with a word, where there is too little."""
        without = [c.folder for c in self._corpora if not c.manifest.of(HELD)]
        if without:
            self.warn(f"{without[0]} holds nothing out, so nothing is evaluated: build it with --hold-out")
            return None
        held = [Corpus(corpus.folder, HELD) for corpus in self._corpora]
        need = self.recipe.stages[0].length + 1 + len(self.recipe.config.mtp)
        short = [c.folder for c in held if c.tokens < need]
        if short:
            self.warn(f"{short[0]} holds less than one sample of {need} tokens out, so nothing is evaluated")
            return None
        return self._mixture(held, 0, word(self.recipe.seed, _HELD))

    # --------------------------------------------------------------------------------- begin, resume

    def _begin(self, resume: bool) -> None:
        if not resume:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._hold = hold(self.folder) if self.folder.is_dir() else None
        there = steps_in(self.folder)
        if not resume:
            if there or (self.folder / LOG).exists():
                raise TrainError(
                    f"{self.folder} holds a run: go on with it by --resume, or give this one another folder"
                )
            return
        going_back = begun(self.folder)
        if going_back is not None:
            drop(self.folder, going_back)
        kept, wrong = newest(self.folder)
        for problem in wrong:
            self.warn(problem)
        if kept is None:
            if there:
                raise TrainError(
                    f"{self.folder}: none of its {len(there)} checkpoints can be read; the newest: {wrong[0]}"
                )
            if not (self.folder / LOG).is_file():
                raise TrainError(f"{self.folder} holds no run to go on with")
            self.warn(f"{self.folder} has no checkpoint yet: it begins again")
            self._cut_log(0)
            return
        if kept.facts.get("recipe") != self.recipe.fingerprint():
            raise TrainError(
                f"{self.folder} is a run of another recipe (or of this one with other overrides): resume "
                "with what it was begun with, or begin anew in another folder"
            )
        if kept.facts.get("corpora") != self._contents():
            raise TrainError(
                f"{self.folder} was begun on other data: a corpus has been built anew or is another one. Give it "
                "what it had (where that lies may differ), or begin anew in another folder"
            )
        set_aside(self.folder, kept.step)
        self._take_up(kept)

    def _take_up(self, kept: Kept) -> None:
        """Be where a checkpoint is."""
        self.model.load_state_dict(kept.tensors["model"])
        self.optimizer.restore(kept.tensors["optimizer"])
        if self.ema is not None:
            self.ema = kept.tensors["ema"]
        self.step, self.updates = kept.step, int(kept.facts["updates"])
        self.norms, self._wrong = list(kept.facts["norms"]), int(kept.facts["wrong"])
        self.skips = from_facts(kept.facts["skips"])
        if self.routes is not None:  # those settled for samples that are left out now are no one's
            gone_back = any(skip.step == kept.step for skip in self.skips)
            found, until = {} if gone_back else kept.tensors["routes"], int(kept.facts["anticipated"])
            self.routes.restore(found, until, self.model.device)
        self._cut_log(self.step)

    def _cut_log(self, step: int) -> None:
        """Forget what the log says of steps that will be taken again; a line half written goes with them."""
        path = self.folder / LOG
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                if json.loads(line)["step"] >= step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            lines.append(line + "\n")
        write_atomically(path, "".join(lines).encode())

    def _contents(self) -> list[str]:
        """What the corpora hold, to the bit, wherever they lie."""
        found = []
        for corpus in self._corpora:
            shards = [(e.split, e.tokens, e.sha256) for e in corpus.manifest.shards]
            found.append(hashlib.sha256(repr((corpus.manifest.tokenizer, shards)).encode()).hexdigest())
        return found

    def save(self) -> None:
        """Begin to write a checkpoint of what stands now."""
        facts = {
            "recipe": self.recipe.fingerprint(),
            "name": self.recipe.name,
            "corpora": self._contents(),
            "tokens": self.steps[self.step][3],
            "updates": self.updates,
            "norms": self.norms,
            "wrong": self._wrong,
            "skips": as_facts(self.skips),
            "held": self._score,
        }
        tensors = {"model": dict(self.model.state_dict()), "optimizer": self.optimizer.tensors()}
        if self.ema is not None:
            tensors["ema"] = self.ema
        if self.routes is not None:
            tensors["routes"], facts["anticipated"] = self.routes.tensors(), self.routes.until
        self.writer.put(Kept(self.step, facts, tensors))

    # --------------------------------------------------------------------------------------- the loop

    def run(self, told: Callable[[Report], None] | None = None) -> None:
        """Go on to the recipe's end. Interrupted (Ctrl-C), it ends the step it is in, saves, and raises
        KeyboardInterrupt; interrupted once more it stops at once, and the last checkpoint counts."""
        with interrupts() as asked:
            self._run(told, asked)

    def _run(self, told: Callable[[Report], None] | None, asked: list[int]) -> None:
        try:
            for report in self:
                self._write_down(report)
                if told is not None:
                    told(report)
                if asked:
                    self.save()
                    raise KeyboardInterrupt
        finally:
            self.writer.wait()

    def _write_down(self, report: Report) -> None:
        """A line more in the log; the file is opened anew each time, as going back puts another in its place."""
        why = {"skipped": report.skipped, "back": report.back}
        line = {"step": report.step, **report.values, **{key: text for key, text in why.items() if text}}
        try:
            with (self.folder / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(
                f"{self.folder / LOG} can't be written ({error}). Make room, and go on by --resume"
            ) from error

    def __iter__(self) -> Iterator[Report]:
        recipe = self.recipe
        while self.steps[self.step][3] < recipe.tokens:
            self._sound()
            report, self._score = self._take(), None
            if report.skipped and self._back(report.skipped):
                continue
            self.step += 1
            ended = self.steps[self.step][3] >= recipe.tokens
            if recipe.evaluate_every and (self.step % recipe.evaluate_every == 0 or ended):
                found = self.evaluate()
                report.values |= found
                self._score = found.get("held")
            if self.further is not None:
                report.values |= self.further(self.step, ended)
            yield report  # and have it written down: what a checkpoint holds, the log has
            if ended:
                self._sound(wait=True)
            if ended and not self.updates:
                raise TrainError(f"no step moved anything; the last one: {report.skipped}")
            if ended or (recipe.save_every and self.step % recipe.save_every == 0):
                self.save()

    def _sound(self, wait: bool = False) -> None:
        wrong = self._checking.wrong(wait)
        if wrong:
            raise TrainError(
                f"{wrong} (found at step {self.step}). The command that built the corpus replaces such shards; what "
                "was learned from it since the last sound checkpoint had better be left out"
            )

    def factors(self, tokens: float) -> Factors:
        """What the parts of the objective count for then."""
        return Factors(self.recipe.mtp(tokens), self.recipe.balance, self.recipe.v2)

    def _take(self) -> Report:
        """One step."""
        began, recipe = time.perf_counter(), self.recipe
        for p in self.model.parameters():
            p.grad = None
        stage, first, samples, seen = self.steps[self.step]
        batch = self.mixtures[stage].batch(first + left_out(self.skips, self.step, stage), samples)
        tokens = samples * recipe.stages[stage].length
        told, load, gradients = self.gradients(batch, seen)
        norms_P = gradient_norms(list(gradients.values()))
        total = norms_P.norm()
        # All that is to be told is read off the device here, before the optimizer's work is handed to it.
        values = {name: float(value) for name, value in told.items()}
        report = Report(self.step, values, taken=tokens)
        report.load = {number: counts.tolist() for number, counts in load.items()}
        each = zip(gradients, norms_P.tolist(), strict=True)
        norm = float(total)
        balance = evenness(report.load, self._routers(load))
        report.back = "; ".join(skip.why for skip in self.skips if skip.step == self.step)
        report.skipped = self._doubt(values["loss"], norm)
        rate = recipe.rate(seen)
        if not report.skipped:
            self.updates += 1
            self.optimizer.step(self.updates, rate, clipping(total, recipe.clip), gradients)
            self._balance(load, recipe.speed(seen) if recipe.dsa != "warm-up" else 0.0)
            self._average()
        elif self.routes is not None:
            self.routes.spiked(self.step)
        took = time.perf_counter() - began
        values |= {"norm": norm, "rate": rate, "tokens": float(seen + tokens), "seconds": took}
        values |= {f"norm {part}": found for part, found in norms_by_part(each).items()}
        values |= balance
        return report

    def _back(self, why: str) -> bool:
        """Go back to the newest sound checkpoint, if that is what is to be done after a step that moved nothing."""
        guard = self.recipe.guard
        sound = all(bool(p.isfinite().all()) for p in self.model.parameters())
        if guard is None or (sound and not guard.back):
            return False
        self.writer.join()
        kept = sound_before(self.folder, self.recipe.save_every)
        if kept is None:
            if sound:
                return False
            raise TrainError(
                f"step {self.step}: the weights are no longer numbers, and there is no checkpoint to go back to: begin "
                "anew with a lower learning rate, and set save_every"
            )
        if sum(skip.step == kept.step for skip in self.skips) >= guard.most:
            raise TrainError(
                f"step {self.step}: {why}, and the run has gone back to step {kept.step} {guard.most} times: look at "
                "the data from there on, or begin anew with a lower learning rate"
            )
        skips = back_to(self.skips, self.steps, kept.step, self.step, f"step {self.step}: {why}")
        self.warn(
            f"step {self.step}: {why}; back to step {kept.step}, and on with what follows the data seen since"
        )
        kept.facts["skips"] = as_facts(skips)
        amend(self.folder, kept)  # first: from here on a run that is resumed knows
        drop(self.folder, kept.step)
        self._take_up(kept)
        return True

    def gradients(
        self, batch: Batch, seen: float
    ) -> tuple[dict[str, Tensor], dict[int, Tensor], dict[str, Tensor]]:
        """A step's losses, each layer's expert load, and the gradients by parameter. Those of several micro-batches are
        added up in at least fp32."""
        factors, batches = self.factors(seen), self._cut(batch)
        counts = self.objective.counts(batches, len(self.model.mtp))
        told: dict[str, Tensor] = {}
        load: dict[int, Tensor] = {}
        sums: dict[str, Tensor] = {}
        routes = self.routes.take(self.step) if self.routes is not None else None
        row = 0
        for part in batches:
            found = self.objective(self.model, part, counts, factors, self._routing(part, row, routes))
            row += len(part.ids_BT)
            found.loss.backward()
            for name, value in found.told.items():
                told[name] = told[name] + value if name in told else value
            for number, counted in found.load.items():
                load[number] = load[number] + counted if number in load else counted
            if len(batches) > 1:
                self._gather(sums)
        if len(batches) > 1:
            return told, load, sums
        return told, load, {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}

    def _gather(self, sums: dict[str, Tensor]) -> None:
        """Move gradients out of the parameters onto their sums."""
        for name, p in self.model.named_parameters():
            if p.grad is None:
                continue
            if name in sums:
                sums[name] += p.grad
            else:
                sums[name] = p.grad.to(torch.promote_types(p.grad.dtype, torch.float32))
            p.grad = None

    def _cut(self, batch: Batch) -> list[Batch]:
        """A batch's micro-batches."""
        micro = self.recipe.micro
        cuts = [slice(at, at + micro) for at in range(0, len(batch.ids_BT), micro)]
        return [
            Batch(batch.ids_BT[cut], batch.documents_BT[cut], batch.sources_B[cut], batch.look)
            for cut in cuts
        ]

    def _routes(self, step: int) -> dict[int, Tensor] | None:
        """The experts that a step's tokens would get now, by layer; None past the run's end."""
        stage, first, samples, seen = self.steps[step]
        if seen >= self.recipe.tokens:
            return None
        batches, mtp = (
            self._cut(self.mixtures[stage].mixture.batch(first + left_out(self.skips, step, stage), samples)),
            self.recipe.mtp(seen) > 0,
        )
        found = [self.objective.routes(self.model, part, mtp) for part in batches]
        return {number: torch.cat([routes[number] for routes in found]) for number in found[0]}

    def _routing(self, part: Batch, row: int, routes: dict[int, Tensor] | None) -> Routing:
        """What is settled for a micro-batch that begins at a row of the step: its part of the step's experts, and which
        of its rows are not to be dropped from."""
        rows, drop, capacity = len(part.ids_BT), self.recipe.drop, None
        width = part.ids_BT.shape[1] - part.look
        if routes is not None:
            routes = {n: ids_NK[row * width : (row + rows) * width] for n, ids_NK in routes.items()}
        if drop is not None:
            drawn = [uniform(self.recipe.seed, _EXEMPT, self.step, row + at) for at in range(rows)]
            exempt_B = torch.tensor([number < drop.exempt for number in drawn], device=self.model.device)
            capacity = Capacity(drop.capacity, exempt_B)
        return Routing(routes, capacity)

    def _doubt(self, loss: float, norm: float) -> str:
        """Why a step had better not be taken; "" if it may."""
        guard = self.recipe.guard
        why = ""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            why = f"the loss is {loss}, the gradient's norm {norm}"
        elif guard is not None and len(self.norms) == guard.window:
            middle = statistics.median(self.norms)
            if norm > guard.factor * middle:
                why = f"the gradient's norm is {norm:.3g}, {norm / middle:.0f} times its median"
        if not why:
            self._wrong = 0
            self.norms = [*self.norms, norm][-(guard.window if guard is not None else 1) :]
            return ""
        self._wrong += 1
        if self._wrong > (guard.most if guard is not None else 0):
            raise TrainError(
                f"step {self.step}: {why}, for the {self._wrong}th time in a row. The last checkpoint is from "
                "before it: look at the data of these steps, or begin anew with a lower learning rate"
            )
        return why

    @torch.no_grad()
    def _balance(self, load: dict[int, Tensor], speed: float) -> None:
        if speed == 0:
            return
        for number, router in self._routers(load).items():
            if router.bias is not None:
                update_bias(router, load[number], speed)

    def _routers(self, load: Iterable[int]) -> dict[int, Any]:
        layers: Any = [*self.model.layers, *(module.block for module in self.model.mtp)]
        return {number: layers[number].ff.router for number in load}

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is not None and self.recipe.ema is not None:
            for name, p in self.model.named_parameters():
                self.ema[name].lerp_(p.detach().to("cpu", torch.float32), 1 - self.recipe.ema)

    # -------------------------------------------------------------------------------------- evaluate

    @torch.no_grad()
    def evaluate(self, rows: int = 64) -> dict[str, float]:
        """Loss a token on the held-out splits, over the same rows every time; nothing where nothing was held out."""
        held = self.held
        if held is None:
            return {}
        rows = min(rows, sum(windows.count for windows in held.windows))
        total, targets = 0.0, 0
        for first in range(0, rows, self.recipe.micro):
            batch = held.batch(first, min(self.recipe.micro, rows - first))
            counts = self.objective.counts([batch], 0)
            loss = self.objective(self.model, batch, counts, Factors()).told["next"]
            total += float(loss) * counts.targets[0]
            targets += counts.targets[0]
        return {"held": total / targets}
