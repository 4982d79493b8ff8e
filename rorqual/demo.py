"""`make demo`: real weights through our code, two questions, and what the talk would cost elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.table import Table

import rorqual
from rorqual.chat import Chat
from rorqual.family import account

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Name three animals that live in the sea.",
)
SAMPLING = rorqual.Sampling(temperature=0.0, repetition_penalty=1.1, max_new_tokens=80)
BESIDE = {
    "V1-67B": "deepseek-llm-67b-chat",
    "V2": "deepseek-v2",
    "V3": "deepseek-v3",
    "V3.2": "deepseek-v3.2",
    "V4-Flash": "deepseek-v4-flash",
}


def cache_table(tokens: int, own: rorqual.Model) -> Table:
    """What `tokens` tokens of conversation take in the cache of this model and of its big relatives."""
    table = Table(title="The same conversation in the cache of its relatives (bf16)", title_justify="left")
    table.add_column("model")
    table.add_column("attention")
    table.add_column("bytes a token", justify="right")
    table.add_column("bytes fixed", justify="right")
    table.add_column(f"{tokens} tokens", justify="right")
    configs = {"this model": own.config} | {label: rorqual.config(name) for label, name in BESIDE.items()}
    for name, config in configs.items():
        cache = account.cache(config)
        kinds = sorted({_kind(layer.attention) for layer in config.layers})
        fixed = cache.fixed + cache.pooling
        cells = f"{float(cache.growing):,.0f}", f"{fixed:,}", f"{cache.at(tokens):,}"
        table.add_row(name, " + ".join(kinds), *cells)
    return table


def _kind(part: object) -> str:
    match part:
        case rorqual.family.GQA(heads=h, kv_heads=g):
            return "MHA" if h == g else f"GQA-{g}"
        case rorqual.family.MLA(index=index):
            return "MLA" if index is None else "MLA + DSA"
        case rorqual.family.CompressedAttention(kind=kind):
            return kind
    return type(part).__name__


def main() -> None:
    """Load, answer, count; on a terminal go on as a chat."""
    console = Console(highlight=False)
    begun = time.perf_counter()
    model = rorqual.load("smollm2")
    took = time.perf_counter() - begun
    count = sum(p.numel() for p in model.parameters())
    console.print(f"SmolLM2-135M-Instruct: {count:,} parameters loaded in {took:.1f} s\n", style="dim")
    chat = Chat(model, console, SAMPLING)
    tokens = 0
    for question in QUESTIONS:
        console.print(f"> {question}", style="bold", markup=False)
        done = chat.ask(question)
        tokens = done.prompt_tokens + len(done.ids)
        console.print()
    console.print(cache_table(tokens, model))
    if sys.stdin.isatty() and console.is_terminal:
        chat.sampling = rorqual.Sampling(temperature=0.6, top_p=0.95, max_new_tokens=512)
        console.print("\nYour turn.", style="bold")
        chat.loop()


if __name__ == "__main__":
    main()
