"""To be removed: the ring form of sparse attention beside the other."""
import sys
from functools import partial

from benchmarks.kernels.mla_sparse import decode, error, guarded, prefill
from rorqual.kernels import mla_sparse as plain

HOWS = [None, (1, 9, 160, 56), (2, 10, 160, 40)]
for how in HOWS:
    extra = {"how": how} if how else {}
    form = partial(plain.fast, hopper=True, **extra)
    for heads, queries in ((128, 70), (16, 3), (64, 300)):
        if how:
            guarded(f"{how} h{heads} N{queries}", lambda: error(form, heads, queries, False))
    if len(sys.argv) == 1:
        guarded(f"{how} prefill", lambda: prefill(form))
        guarded(f"{how} decode", lambda: decode(form))
