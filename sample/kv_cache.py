"""Keys and values of the sequences in flight, and the attention that reads them, in torch.

Shapes: S slots, T positions of a slot, M items of B rows each, N = M*B rows; H query heads, G key/value heads, K head_dim.

An *item* is B consecutive positions of one slot. A layer writes the rows' keys and values to the cache; then each item attends,
unmasked, to the first start+B entries of its slot. Entries behind them are stale and never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from models.decoder import Attend
from models.family import DecoderConfig
from models.memory import free_memory

GIB = 2**30
MEMORY_SHARE = 0.9
"""Of the free GPU memory, what the cache may take: activations and logits of a forward need the rest."""


@dataclass
class Items:
    """The work of one forward."""

    count: int
    """M."""
    slots: Tensor | None
    """int64 [M]; None: slot m is item m, so that nothing has to be gathered."""
    rows: Tensor
    """int64 [N]: slot*T + position."""
    positions: Tensor
    """int64 [N]."""
    num_keys: int
    """Entries that the longest item sees."""
    mask: Tensor | None
    """bool [M, 1, 1, num_keys], True = visible; None: every item sees them all."""


class KVCache:
    def __init__(self, config: DecoderConfig, num_slots: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.num_slots, self.length = config, num_slots, length
        # Zeros, not garbage: a masked NaN is still a NaN behind the softmax.
        shape = (config.num_layers, num_slots, length, config.num_kv_heads, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    def fits(self, config: DecoderConfig, num_slots: int, length: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether this cache serves such a decoder with so many slots and positions."""
        same_kind = (self.config, self.k.dtype, self.k.device) == (config, dtype, device)
        return same_kind and self.num_slots >= num_slots and self.length >= length

    def items(self, slots: Tensor, starts: Tensor, size: int) -> Items:
        """Items of `size` rows from host tensors `slots` and `starts` [M]; copied to the device without waiting for it."""
        device = self.k.device
        positions = starts[:, None] + torch.arange(size)  # [M, B]
        rows = slots[:, None] * self.length + positions
        num_keys = starts + size
        longest = int(num_keys.max())
        in_order = int(slots[-1]) == len(slots) - 1 and bool((slots == torch.arange(len(slots))).all())
        mask = None
        if int(num_keys.min()) < longest:
            mask = (torch.arange(longest) < num_keys[:, None])[:, None, None].to(device, non_blocking=True)
        return Items(
            count=len(slots),
            slots=None if in_order else slots.to(device, non_blocking=True),
            rows=rows.flatten().to(device, non_blocking=True),
            positions=positions.flatten().to(device, non_blocking=True),
            num_keys=longest,
            mask=mask,
        )

    def attend(self, items: Items) -> Attend:
        """Attention of a forward over `items`; the query heads of one key/value head are folded into its rows."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.write(layer, items.rows, k, v)
            keys, values = self.read(layer, items)
            out = F.scaled_dot_product_attention(fold(q, items.count, k.shape[1]), keys, values, attn_mask=items.mask)
            return unfold(out, q.shape[1])

        return attend

    def attend_prompts(self, rows: Tensor, num_prompts: int, block_size: int) -> Attend:
        """Attention of a prefill: `num_prompts` prompts padded to one length F, block-causal. Padding is behind every token
        that counts, so nobody sees it. `rows` int64 [num_prompts*F]: where keys and values go."""
        length = len(rows) // num_prompts
        block = torch.arange(length, device=rows.device) // block_size
        mask = block[:, None] >= block  # [F, F]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.write(layer, rows, k, v)
            per_group = q.shape[1] // k.shape[1]
            keys, values = (x.unflatten(0, (num_prompts, length)).transpose(1, 2) for x in (k, v))  # [R, G, F, K]
            q_mask = mask.repeat_interleave(per_group, 0)  # [F*H/G, F]
            out = F.scaled_dot_product_attention(fold(q, num_prompts, k.shape[1]), keys, values, attn_mask=q_mask)
            return unfold(out, q.shape[1])

        return attend

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [N, G, K] -> entries `rows`."""
        self.k[layer].flatten(0, 1).index_copy_(0, rows, k)
        self.v[layer].flatten(0, 1).index_copy_(0, rows, v)

    def read(self, layer: int, items: Items) -> tuple[Tensor, Tensor]:
        """Keys and values [M, G, num_keys, K]."""
        keys, values = self.k[layer, :, : items.num_keys], self.v[layer, :, : items.num_keys]
        if items.slots is None:
            keys, values = keys[: items.count], values[: items.count]
        else:
            keys, values = keys.index_select(0, items.slots), values.index_select(0, items.slots)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def copy(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` entries of slots `sources` to slots `targets`, all layers."""
        for x in (self.k, self.v):
            for layer in x:  # one at a time: the copy in between is as large as what is copied
                layer[targets, :length] = layer[sources, :length]


def fold(q: Tensor, num_items: int, num_kv_heads: int) -> Tensor:
    """q [M*B, H, K] -> [M, G, B*H/G, K]: the query heads that share a key/value head become rows of it."""
    q = q.view(num_items, -1, num_kv_heads, q.shape[1] // num_kv_heads, q.shape[2])  # [M, B, G, H/G, K]
    return q.transpose(1, 2).flatten(2, 3)


def unfold(out: Tensor, num_heads: int) -> Tensor:
    """[M, G, B*H/G, K] -> [M*B, H, K]: undoes `fold`."""
    num_items, num_kv_heads, _, size = out.shape
    return out.unflatten(2, (-1, num_heads // num_kv_heads)).transpose(1, 2).reshape(-1, num_heads, size)


def slots_that_fit(config: DecoderConfig, wanted: int, length: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many slots of `length` positions to have: `wanted`, or fewer where the GPU's free memory says so.

    Raises UserError where not even one fits.
    """
    if device.type != "cuda":
        return wanted
    slot_bytes = 2 * config.num_layers * length * config.num_kv_heads * config.head_dim * dtype.itemsize
    free = free_memory(device)
    fitting = int(MEMORY_SHARE * free / slot_bytes)
    if fitting < 1:
        raise UserError(
            f"rollout.max_token: the keys and values of one sequence of {length} tokens take {slot_bytes / GIB:.1f} GiB, "
            f"{free / GIB:.1f} GiB are free: lower it, or use a GPU with more memory"
        )
    return min(wanted, fitting)
