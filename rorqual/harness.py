"""A model as lm-eval (EleutherAI's evaluation harness, 0.4) asks for one, and its tasks run on it.

lm-eval comes with the extra `rorqual[eval]`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch

from rorqual.engine import Sampling
from rorqual.model import Model
from rorqual.nn import InputError, Rows

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"lm-eval's tasks need its package (pip install 'rorqual[eval]'): {error}") from None

Scored = tuple[float, bool]
"""The log-probability of a continuation, and whether greedy decoding would give it."""


class Harness(TemplateLM):
    """`lm_eval.api.model.LM` over a `Model` with a tokenizer: `batch` sequences at a time, greedy unless a task says
    otherwise. What is longer than the model's positions is cut at its beginning."""

    def __init__(self, model: Model, *, batch: int = 8) -> None:
        super().__init__()
        if model.tokenizer is None:
            raise InputError("lm-eval's tasks are text, and this model has no tokenizer: set model.tokenizer")
        if batch < 1:
            raise InputError(f"batch is {batch}; it must be above 0")
        self.model, self.batch, self._words = model, batch, model.tokenizer
        self.max_length = model.config.max_positions

    @property
    def eot_token_id(self) -> int:
        return self._words.eos[0] if self._words.eos else min(self.model.end_ids)

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._words.bos is None else self._words.bos

    @property
    def tokenizer_name(self) -> str:
        return self.model.config.model_type

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids; BOS goes first where the tokenizer's own files say so, and isn't there yet."""
        ids = self._words.encode(string)
        bos = self._words.adds_bos if add_special_tokens is None else add_special_tokens
        if bos and self._words.bos is not None and ids[:1] != [self._words.bos]:
            ids = [self._words.bos, *ids]
        return ids

    # ------------------------------------------------------------------------------------- scores

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[Scored]:
        """Of (texts, context ids, continuation ids), in their order."""
        found = self.scores([(context, continuation) for _, context, continuation in requests])
        for (texts, _, _), score in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, score)
        return found

    def scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        """Log-probability of each continuation after its context, both as ids; the longest go first."""
        for context, continuation in pairs:
            if not context or len(continuation) > self.max_length:
                raise InputError(
                    f"a context of {len(context)} tokens and a continuation of {len(continuation)}: the first "
                    f"must have one, the second at most {self.max_length}"
                )
        order = sorted(range(len(pairs)), key=lambda n: -sum(map(len, pairs[n])))
        found: dict[int, Scored] = {}
        for at in range(0, len(order), self.batch):
            numbers = order[at : at + self.batch]
            found.update(zip(numbers, self._scores([pairs[n] for n in numbers]), strict=True))
        return [found[n] for n in range(len(pairs))]

    @torch.no_grad()
    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        rows = [(context + continuation)[-self.max_length - 1 :] for context, continuation in pairs]
        counts = [len(row) - 1 for row in rows]
        width, device = max(counts), self.model.device
        ids_BT = torch.tensor([row[:-1] + [0] * (width - len(row) + 1) for row in rows], device=device)
        hidden = self.model.finish(self.model.run(ids_BT, Rows([0] * len(rows), counts, width, device)))
        out = []
        for b, (row, count, (_, continuation)) in enumerate(zip(rows, counts, pairs, strict=True)):
            n = len(continuation)
            if n == 0:
                out.append((0.0, True))
                continue
            target_T = torch.tensor(row[-n:], device=device)
            logits_TV = self.model.logits(hidden[b : b + 1, count - n : count])[0].float()
            picked = logits_TV.log_softmax(-1).gather(1, target_T[:, None])
            out.append((float(picked.sum()), bool((logits_TV.argmax(-1) == target_T).all())))
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token seen once with as much before it as the model has room for in
        windows that don't overlap."""
        found = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            scored = self.scores([make_disjoint_window(window) for window in windows])
            found.append(sum(score for score, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    # ------------------------------------------------------------------------------------ answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first of the task's stop strings, without it."""
        found = []
        for at in range(0, len(requests), self.batch):
            part = [request.args for request in requests[at : at + self.batch]]
            samplings = [self._sampling(dict(options)) for _, options in part]
            prompts = [
                (self.tok_encode(context) or [self.prefix_token_id])[
                    -max(1, self.max_length - s.max_new_tokens) :
                ]
                for (context, _), s in zip(part, samplings, strict=True)
            ]
            for args, done in zip(part, self.model.generate(prompts, samplings), strict=True):
                found.append(done.text)
                self.cache_hook.add_partial("generate_until", args, done.text)
        return found

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        until = options.get("until") or ()
        drawn = bool(options.get("do_sample"))
        return Sampling(
            temperature=float(options.get("temperature", 1.0)) if drawn else 0.0,
            top_p=float(options.get("top_p", 1.0)),
            top_k=int(options.get("top_k", 0)),
            max_new_tokens=int(options.get("max_gen_toks", min(256, self.max_length // 2))),
            stop=tuple(s for s in ([until] if isinstance(until, str) else until) if s),
        )


def known_tasks(names: Sequence[str], include: str | PathLike[str] | None = None) -> TaskManager:
    """What knows lm-eval's tasks, and those described in a folder. ValueError for a name that is unknown there."""
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        raise ValueError(
            f"lm-eval has no task {', '.join(unknown) or 'without a name'}: `lm-eval ls tasks` lists those there are"
        )
    return manager


def evaluate(
    model: Model,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch: int = 8,
    manager: TaskManager | None = None,
) -> dict[str, float]:
    """The metrics of lm-eval's tasks by "task metric", over at most `limit` documents of each. Leaves the generators of
    random numbers as they were."""
    with _same_random_numbers():
        found = simple_evaluate(
            model=Harness(model, batch=batch),
            tasks=list(tasks),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=manager or known_tasks(tasks),
        )
    return {
        f"{task} {metric.partition(',')[0]}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "," in metric and "_stderr" not in metric
    }


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """lm-eval seeds all generators."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
