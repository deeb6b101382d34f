"""Which rows a forward over canvases computes, which keys they see, and how many canvases fit into the memory.

A *canvas* is a prompt and the whole response, masks included: T positions that all see one another. A forward holds one item per
canvas: all of it (a *refresh*), or a *window* of it, whose rows see the keys of their own item and, of what is outside, those that
the last refresh stored. Rows of all items are packed, without padding; sample/canvas_graphs.py has another way. Within a layer the
rows' keys and values are stored first; then an item sees the first `num_keys` entries of its slot: what is behind the window is
either as the refresh left it (dual cache) or beyond `num_keys` (prefix cache with a horizon).

Shapes: N rows of a forward, n items, S slots, T positions of a slot; H query heads, G key/value heads, K head_dim.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from models.decoder import Attend
from models.family import DecoderConfig
from models.memory import free_memory
from sample.kv_cache import GIB, MEMORY_SHARE, KVCache, fold, unfold
from sample.sampling import LOGITS_AT_A_TIME

ROWS_AT_A_TIME = 32_768
"""Of one forward. Canvases beyond it wait for the next; one alone may be longer."""
LOGITS_BYTES = 5 * 4 * LOGITS_AT_A_TIME
"""Logits, their log-softmax, the noise and what is in between, float32."""


@dataclass(frozen=True)
class Item:
    """The rows of one canvas in a forward."""

    slot: int
    start: int
    """First position."""
    rows: int
    num_keys: int
    """Entries of its slot that it sees."""
    is_whole: bool
    """It computes all that it sees, so it reads nothing that was stored."""

    @property
    def shape(self) -> tuple[bool, int]:
        """Items of one shape are attended to together."""
        return self.is_whole, self.rows


@dataclass
class Group:
    """Neighbouring items of one shape: one call of the attention."""

    first: int
    """First row of the forward."""
    count: int
    """M items."""
    rows: int
    """Of each."""
    is_whole: bool
    num_keys: int
    """Entries that the item which sees most sees."""
    slots: slice | Tensor
    """Of the items; a slice where they are neighbours, so that nothing has to be gathered."""
    mask: Tensor | None
    """bool [M, 1, 1, num_keys], True = visible; None: every item sees them all."""


@dataclass
class Rows:
    """Where the rows of a forward's items are: on the host, int64."""

    first: np.ndarray
    """[n]: first row of each item."""
    numbers: np.ndarray
    """[2, N]: position of each row, and slot*T + position, its entry in the cache. Rows that pad: 0 and -1."""
    tiles: np.ndarray
    """[2, tiles]: slot of each tile of rows, and how many of the slot's entries it sees. Tiles that pad: -1 and 0."""


def place_rows(items: list[Item], length: int, tile: int = 1, num_tiles: int | None = None) -> Rows:
    """Rows of `items` in slots of `length` positions: one item behind the other; or, with `num_tiles`, each in whole tiles of
    `tile` rows, padded, and the forward padded to so many."""
    # numpy: its operations on a few numbers take a tenth of torch's time, while the GPU waits.
    slot, start, num_rows, num_keys = np.array([(item.slot, item.start, item.rows, item.num_keys) for item in items]).T
    tiles_of = -(-num_rows // tile)  # [n]
    first = (tiles_of.cumsum() - tiles_of) * tile
    item = np.arange(len(items)).repeat(tiles_of * tile)  # [N], without the tiles that pad
    offset = np.arange(len(item)) - first[item]
    positions = start[item] + offset
    numbers = np.stack([positions, slot[item] * length + positions])
    if num_tiles is None:
        return Rows(first, numbers, np.empty((2, 0), dtype=np.int64))
    padded = np.repeat([[0], [-1]], num_tiles * tile, axis=1)
    padded[:, : len(item)] = np.where(offset < num_rows[item], numbers, padded[:, : len(item)])
    item_of_tile = item[::tile]
    tiles = np.repeat([[-1], [0]], num_tiles, axis=1)
    tiles[:, : len(item_of_tile)] = slot[item_of_tile], num_keys[item_of_tile]
    return Rows(first, padded, tiles)


def group_items(items: list[Item], device: torch.device) -> list[Group]:
    """Groups of `items`, which are in the order of their shapes."""
    groups, first = [], 0
    for (is_whole, rows), members in itertools.groupby(items, key=lambda item: item.shape):
        members = list(members)
        slots, num_keys = [item.slot for item in members], [item.num_keys for item in members]
        most, mask = max(num_keys), None
        if not is_whole and min(num_keys) < most:
            mask = (torch.arange(most) < torch.tensor(num_keys)[:, None])[:, None, None].to(device, non_blocking=True)
        neighbours = slots == list(range(slots[0], slots[0] + len(slots)))
        of_slots = slice(slots[0], slots[0] + len(slots)) if neighbours else torch.tensor(slots).to(device, non_blocking=True)
        groups.append(Group(first, len(members), rows, is_whole, most, of_slots, mask))
        first += len(members) * rows
    return groups


def canvas_attention(groups: list[Group], cache: KVCache | None) -> Attend:
    """Attention of a forward over `groups`, whose rows' keys and values are in the cache already. Without a cache all items have to
    be whole."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for group in groups:
            rows = slice(group.first, group.first + group.count * group.rows)
            if group.is_whole:
                keys, values = (x[rows].unflatten(0, (group.count, group.rows)) for x in (k, v))
            else:
                keys, values = (x[layer, group.slots, : group.num_keys] for x in (cache.k, cache.v))
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # [M, G, num_keys, K]
            queries = fold(q[rows], group.count, k.shape[1])  # [M, G, rows*H/G, K]
            outs.append(unfold(F.scaled_dot_product_attention(queries, keys, values, attn_mask=group.mask), q.shape[1]))
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    return attend


def row_bytes(c: DecoderConfig, itemsize: int) -> int:
    """Memory of one row while a layer runs: residual stream and norms, q, k, v and what rotates them, the MLP's three widths."""
    heads = c.num_heads + 2 * c.num_kv_heads
    return itemsize * (6 * c.hidden_size + 4 * heads * c.head_dim + 4 * c.intermediate_size)


def canvases_that_fit(
    c: DecoderConfig, wanted: int, length: int, has_cache: bool, dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """(canvases of `length` positions in flight, rows of a forward): `wanted` and ROWS_AT_A_TIME, or fewer where the GPU's free
    memory says so. Without a cache more canvases than fit into a forward would only wait, and the keys and values of one layer
    are stored at most (sample/canvas_graphs.py).

    Raises UserError where not even one fits.
    """
    rows = max(length, ROWS_AT_A_TIME)
    if device.type == "cuda":
        layer = 2 * c.num_kv_heads * c.head_dim * dtype.itemsize
        stored = c.num_layers * layer * length if has_cache else 0
        computed = row_bytes(c, dtype.itemsize) + (0 if has_cache else layer)
        free = free_memory(device)
        usable = int(MEMORY_SHARE * free) - LOGITS_BYTES
        if usable < stored + length * computed:
            raise UserError(
                f"rollout.max_gen_length: one canvas of {length} tokens takes {(stored + length * computed) / GIB:.1f} GiB "
                f"({stored / GIB:.1f} of keys and values, {length * computed / GIB:.1f} of activations) and its logits "
                f"{LOGITS_BYTES / GIB:.1f} GiB; {free / GIB:.1f} GiB are free, {MEMORY_SHARE:.0%} of which may be used: lower it, "
                "or use a GPU with more memory"
            )
        # At most half of the memory for activations, if that is enough for one canvas; the rest for what is stored.
        rows = min(rows, max(length, usable // 2 // computed))
        if stored:
            wanted = min(wanted, (usable - rows * computed) // stored) or 1
    if not has_cache:
        wanted = min(wanted, max(1, rows // length))
    return wanted, rows
