"""V3.2: V3 whose attention reads only the 2,048 tokens a lightning indexer picks (DeepSeek-V3.2 report)."""

from __future__ import annotations

from rorqual.family.cards import K, page
from rorqual.family.parts import Index
from rorqual.family.v3 import v3_shape

EXP_BASE = page(
    "DeepSeek-V3.2-Exp-Base",
    v3_shape(ue8m0=True, index=Index(heads=64, dim=128, top_k=2048)),
    released="2025-09-29",
    context=128 * K,
    licence="MIT",
    source="DeepSeek-V3.2-Exp report",
)

CARDS = (
    EXP_BASE,
    EXP_BASE.sibling("DeepSeek-V3.2-Exp", encoding="v31"),
    EXP_BASE.sibling(
        "DeepSeek-Math-V2",
        released="2025-11-27",
        licence="Apache-2.0",
        encoding="v32",
        source="DeepSeekMath-V2, arXiv 2511.22570",
        unverified=("encoding",),
    ),
    EXP_BASE.sibling(
        "DeepSeek-V3.2", released="2025-12-01", encoding="v32", source="DeepSeek-V3.2, arXiv 2512.02556"
    ),
    EXP_BASE.sibling(
        "DeepSeek-V3.2-Speciale",
        released="2025-12-01",
        encoding="v32",
        source="DeepSeek-V3.2, arXiv 2512.02556",
        note="thinks only, and takes no tools",
    ),
)
