"""The indexer's choice in training: whole rows of tokens, whose index keys lie beside each other and not in pages.

`index_choose` takes them as they lie. A row is a page; where documents are kept apart, or a row's length suits no tile,
every key is a page of its own and a document a sequence, whose table is a piece of one list of all numbers: nothing is
copied, and the host asks for no number of documents.
"""

import torch
from torch import Tensor

from rorqual.kernels.gpu import usable
from rorqual.kernels.index import MOST_KEYS, fast, plan, reference

WHOLE = 128
"""Keys of the largest tile: it must not reach behind a page."""


def supported(q_BTHd: Tensor, k_BKd: Tensor) -> bool:
    """Whether there is a kernel for them here."""
    return usable(q_BTHd, k_BKd) and q_BTHd.dtype != torch.float64 and k_BKd.shape[1] <= MOST_KEYS


def index_choose_rows(
    q_BTHd: Tensor,
    k_BKd: Tensor,
    w_BTH: Tensor,
    limits_BT: Tensor,
    *,
    k: int,
    firsts_BT: Tensor | None = None,
) -> Tensor:
    """The k best-scored positions of each query's own row, int32 `[B, T, min(k, K)]`, ascending; -1 behind them where
    fewer exist. `index_choose` says how scores come about.

    Index queries `[B, T, H, d]`, keys `[B, K, d]`, fp32 head weights `[B, T, H]`; a query sees the positions from its
    `first` (0 without) to before its `limit`. Takes no gradient.
    """
    (batch, time), K = w_BTH.shape[:2], k_BKd.shape[1]
    k, device = min(k, K), q_BTHd.device
    k_BKd = k_BKd.detach().contiguous()
    row_B1 = torch.arange(batch, device=device, dtype=torch.int32)[:, None]
    seq_BT, limits_BT = row_B1.expand(batch, time), limits_BT.int()
    if firsts_BT is not None:
        firsts_BT = torch.minimum(firsts_BT.int(), limits_BT)
        seq_BT, limits_BT = row_B1 * K + firsts_BT, limits_BT - firsts_BT
        numbers = torch.arange(batch * K + K, device=device, dtype=torch.int32)
        table = numbers.clamp(max=batch * K - 1).as_strided((batch * K + 1, K), (1, 1))
        pages = k_BKd.flatten(0, 1)[:, None]
    elif K % WHOLE:
        table = torch.arange(batch * K, device=device, dtype=torch.int32).view(batch, K)
        pages = k_BKd.flatten(0, 1)[:, None]
    else:
        table, pages = row_B1, k_BKd
    given = (
        q_BTHd.detach().flatten(0, 1), w_BTH.detach().flatten(0, 1), pages, table, seq_BT.flatten().contiguous(),
        limits_BT.flatten().contiguous(),
    )  # fmt: skip
    if supported(q_BTHd, k_BKd):
        tiles = plan(batch * time, batch, K, k, pages.shape[1], k_BKd.dtype)
        chosen_Nk = fast(*given, k=k, max_keys=K, tiles=tiles)
    else:
        chosen_Nk = reference(*given, k=k, max_keys=K)
    chosen_BTk = chosen_Nk.unflatten(0, (batch, time))
    if firsts_BT is not None:
        chosen_BTk = torch.where(chosen_BTk < 0, -1, chosen_BTk + firsts_BT[..., None])
    return chosen_BTk
