"""The table of docs/deploy.md: python deploy/table.py. Arithmetic of `rorqual inspect --fit`, no measurement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rorqual.engine.fit import machine, room
from rorqual.family import card, words


@dataclass(frozen=True)
class Row:
    """A model, a machine, and what is asked of it at once; `more`: options of `rorqual serve` beyond --gpus."""

    model: str
    machine: str
    context: int
    requests: int
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> str:
        """The layout's options, as both commands take them."""
        flags = (
            f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            for name, value in self.more.items()
        )
        return " ".join(flags)

    def start(self, rows: int) -> str:
        """The command that serves it in so many rows; `--max-requests` is each row's own."""
        place = machine(self.machine)
        hosts = -(-place.count // 8)
        parts = ["rorqual serve", self.model, "--device cpu" if place.cpu else ""]
        if hosts > 1:
            parts[0] = f"torchrun --nnodes {hosts} --nproc-per-node 8 … -m rorqual serve"
        elif place.count > 1:
            parts.append(f"--gpus {place.count}")
        parts += [self.options, f"--max-requests {-(-self.requests // rows)}"]
        return " ".join(part for part in parts if part)


FP8 = {"fp8_cache": True}
ROWS = (
    Row("deepseek-v3", "8xH200", 32768, 64),
    Row("deepseek-r1", "8xH200", 32768, 64),
    Row("deepseek-v3.2", "8xH200", 131072, 16, FP8),
    Row("deepseek-v4-flash", "2xH200", 131072, 64),
    Row("deepseek-v4-flash", "4xH100", 131072, 64),
    Row("deepseek-v4-pro", "8xH200", 131072, 16, {"tensor": 2, **FP8}),
    Row("deepseek-v4-pro", "16xH200", 131072, 64, FP8),
    Row("deepseek-v2-lite", "24gb", 8192, 1),
    Row("deepseek-v2-lite", "2x24gb", 8192, 16),
    Row("deepseek-v2-lite", "48gb", 32768, 8),
    Row("deepseek-v2-lite", "80gb", 32768, 32),
    Row("r1-distill-llama-70b", "4x80gb", 32768, 8),
    Row("r1-distill-qwen-7b", "24gb", 32768, 2),
    Row("r1-distill-qwen-1.5b", "cpu16gb", 16384, 4),
    Row("r1-distill-qwen-7b", "cpu32gb", 16384, 4),
)


def table() -> list[str]:
    """The lines of the table, in Markdown."""
    heads = (
        "model",
        "machine",
        "weights on each",
        "cache a token",
        "left for caches on each",
        "sequences x context",
        "start",
    )
    out = ["| " + " | ".join(heads) + " |", "|---|---|--:|--:|--:|--:|---|"]
    for row in ROWS:
        layout = {name: value for name, value in row.more.items()}
        found = room(
            card(row.model).config, machine(row.machine), context=row.context, requests=row.requests, **layout
        )
        fits = f"{found.sequences:,} x {row.context:,}" if found.fits else "does not fit"
        cells = (
            row.model,
            row.machine,
            f"{words.size(found.weights)} {found.precision}",
            f"{found.token:,.0f} B",
            words.size(found.caches),
            fits,
            f"`{row.start(found.data)}`" if found.fits else "–",
        )
        out.append("| " + " | ".join(cells) + " |")
    return out


if __name__ == "__main__":
    print("\n".join(table()))
