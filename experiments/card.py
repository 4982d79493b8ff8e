"""What an experiment leaves: a card to read, a plot, and the figures as JSON."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

from experiments.frame import Experiment, Results, Setup, Verdict
from experiments.plot import draw
from rorqual.data import Corpus
from rorqual.data.shards import write_atomically


def write(experiment: Experiment, setup: Setup, results: Results, folder: Path) -> Verdict:
    """All three, into `folder`; the verdict."""
    verdict = experiment.judge(results)
    folder.mkdir(parents=True, exist_ok=True)
    facts = about(setup, results)
    record = {
        "experiment": experiment.name, "claims": experiment.claims, "verdict": verdict.word,
        "because": verdict.because, **facts, "arms": results.runs,
    }  # fmt: skip
    claims = ", ".join(map(str, experiment.claims))
    note = f"claim {claims} {verdict.word}; means over runs; {facts['hardware']}, {facts['date']}"
    text = card(experiment, setup, results, verdict, facts)
    for end, content in (
        (".json", json.dumps(record, indent=1)),
        (".svg", draw(experiment.claim, note, results, experiment.measures)),
        (".md", text),
    ):
        write_atomically(folder / f"{experiment.name}{end}", content.encode())
    return verdict


def about(setup: Setup, results: Results) -> dict[str, str]:
    """Command, commit, hardware, date and data. Where runs were made at several, all are named."""
    runs = [run for arm in results.runs.values() for run in arm.values()]
    corpus = Corpus(setup.corpus)
    source = Path(setup.corpus) / "about.txt"
    what = source.read_text(encoding="utf-8") if source.is_file() else "a corpus of its own (--data)"
    told = {
        name: ", ".join(sorted({run[name] for run in runs}))
        for name in ("commit", "hardware", "torch", "date")
    }
    data = f"{what}: {corpus.tokens:,} tokens of {setup.vocab:,}, tokenizer {corpus.manifest.tokenizer[:12]}"
    return told | {"data": data}


def command(experiment: Experiment, setup: Setup) -> str:
    """What runs it again, folders left out."""
    words = ["python -m experiments", experiment.name, "--device", setup.device]
    words += ["--quick"] if setup.quick else []
    words += ["--steps", str(setup.steps)] if setup.steps else []
    words += ["--seeds", str(setup.seeds)] if setup.seeds != 3 else []
    return " ".join(words)


def table(experiment: Experiment, results: Results) -> str:
    """Arms and measures: mean ± standard deviation over seeds."""
    rows = [["arm", "parameters", "steps", "runs", *experiment.measures]]
    for arm, runs in results.runs.items():
        one = next(iter(runs.values()))
        row = [arm, f"{one['parameters'] / 1e6:.2f}M", f"{one['steps']:,}", str(len(runs))]
        for measure in experiment.measures:
            row.append(spread(list(results.of(arm, measure).values())))
        rows.append(row)
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def spread(values: list[float]) -> str:
    """mean ± standard deviation, of one value itself."""
    whole = [value for value in values if math.isfinite(value)]
    if len(whole) < len(values):
        return f"{len(values) - len(whole)} of {len(values)} without"
    mean = statistics.fmean(whole)
    return f"{mean:.4f}" if len(whole) == 1 else f"{mean:.4f} ± {statistics.stdev(whole):.4f}"


def card(
    experiment: Experiment, setup: Setup, results: Results, verdict: Verdict, facts: dict[str, str]
) -> str:
    """As markdown."""
    claims = ", ".join(map(str, experiment.claims))
    broken = [
        f"- {arm}, seed {seed}: {run['failed']}"
        for arm, runs in results.runs.items()
        for seed, run in runs.items()
        if run["failed"]
    ]
    lines = [
        f"# {experiment.claim}",
        f"Claim {claims}. **Verdict: {verdict.word}.**",
        *(
            ["Quick size: this shows that the machinery works, and says nothing about the claim."]
            if setup.quick
            else []
        ),
        f"![curves]({experiment.name}.svg)",
        "## Result",
        table(experiment, results),
        "Mean ± standard deviation over seeds. Training loss and balance are taken over the last fifth of a run.",
        "\n".join(f"- {line}" for line in verdict.because),
        *(["Runs that broke down:", "\n".join(broken)] if broken else []),
        "## Rule, written before",
        experiment.rule,
        "## What it does not show",
        experiment.limits,
        "## How it was run",
        f"`{command(experiment, setup)}`",
        "\n".join(f"- {name}: {facts[name]}" for name in ("commit", "hardware", "torch", "date", "data")),
        f"All figures and curves: [{experiment.name}.json]({experiment.name}.json).",
    ]
    return "\n\n".join(lines) + "\n"
