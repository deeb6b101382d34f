"""The decoder's forward over canvases, on kernels; where it pays at one of few sizes, which CUDA graphs hold.

What the host does for a forward, starting some 400 kernels one by one, takes as long as the GPU does for a thousand rows of an 8B
model. A graph is started at once, but its sizes are fixed, and items are whole canvases and windows of many lengths. So an item is
cut into *tiles* of equally many rows, the last one padded, and a forward is filled up to one of few numbers of tiles. All rows of a
layer store their keys and values before any attends; then each tile attends for itself, to what its item sees
(sample/kernels/item_attention.py, which reads slots and numbers of keys on the device). Of the items only the number of tiles is
in the graph, so canvases that drift apart need few graphs.

A row that pads stores nothing and nobody looks at it: how a forward is run changes no result, rounding aside.

Shapes: N rows of a forward, padding included, in t tiles; S slots, T positions of a slot; G key/value heads, K head_dim, D hidden.
"""

from __future__ import annotations

from typing import Hashable

import torch
from torch import Tensor

from models.decoder import Attend, Decoder
from models.family import DecoderConfig, Family
from sample.canvas_cache import Item
from sample.cuda_graphs import CudaGraphs
from sample.engine import SamplingSettings, Statistics
from sample.fused_forward import fused_forward
from sample.kernels.item_attention import item_attention
from sample.kernels.rotary_store import rotary_table
from sample.kv_cache import KVCache
from sample.pages import PAGE

TILE, LEAST_TILE = 32, 8
"""Rows of a tile at most, and at least: with fewer the keys of a whole canvas are read by too many."""
PRODUCTS, MOST_ROWS = 2**38, 4096
"""A forward is run at a fixed size up to so many weights of a layer times rows, which an H200 takes 0.8 ms for, and up to so many
rows. The host takes 0.6 ms for a layer: with more rows it is ahead of the GPU anyway, and padding would only cost."""
PROGRAMS = 256
"""Of the attention: about two for each multiprocessor are enough."""
SPLITS = (16, 4, 1)
"""Programs that share the keys of a tile. Each number is another compiled kernel."""


def tile_rows(settings: SamplingSettings, family: Family) -> int:
    """Rows of a tile: the windows of a block in even parts, if they are all as long, else TILE."""
    window = settings.block_size + (0 if family.first_token_from_refresh else family.logit_shift)
    if settings.further_horizon is not None:
        window += settings.further_horizon
    elif settings.cache != "dual":
        return TILE
    parts = -(-window // TILE)
    return max(LEAST_TILE, -(-window // parts))


def tile_bucket(num_tiles: int) -> int:
    """At least so many, of few sizes: up to 16 each, then multiples of a sixteenth of the power of two that is not below it."""
    multiple = max(1, (1 << (num_tiles - 1).bit_length()) // 16)
    return -(-num_tiles // multiple) * multiple


def rows_that_pay(c: DecoderConfig) -> int:
    """Rows up to which a forward is worth a graph."""
    heads = 2 * (c.num_heads + c.num_kv_heads)
    layer = c.hidden_size * (heads * c.head_dim + 3 * c.intermediate_size)
    return max(TILE, min(MOST_ROWS, PRODUCTS // layer // TILE * TILE))


def splits_of(num_tiles: int, tile: int, c: DecoderConfig) -> int:
    """The most of SPLITS that do not make more than PROGRAMS, a program having up to 128 query rows of a key/value head."""
    programs = num_tiles * c.num_kv_heads * -(-tile * (c.num_heads // c.num_kv_heads) // 128)
    return next((splits for splits in SPLITS if splits * programs <= PROGRAMS), 1)


class CanvasForward:
    """Forwards over the canvases of one cache. On a CPU the kernels' references run."""

    def __init__(self, decoder: Decoder, cache: KVCache, most_rows: int, graphs: CudaGraphs | None) -> None:
        """cache: of slots in whole pages; it may be one of a single layer, where nothing is read that another forward stored: each
        layer of a forward then overwrites what the one before has left. most_rows: of a forward at a fixed size. graphs: empty;
        None: such forwards run as they are."""
        config, device, dtype = decoder.config, decoder.device, decoder.dtype
        assert cache.length % PAGE == 0 and cache.config.num_layers in (1, config.num_layers), (cache.length, cache.config)
        self.decoder, self.most_rows = decoder, most_rows
        self.rotary = rotary_table(cache.length, config.head_dim, config.rope_theta, dtype, device)
        stores = cache.k.flatten(1, 2), cache.v.flatten(1, 2)  # [layers, S*T, G, K]
        self.k_store, self.v_store = ([store[n % len(store)] for n in range(config.num_layers)] for store in stores)

        # What forwards at fixed sizes read and write.
        self.rows = torch.zeros(3, most_rows, dtype=torch.int32, device=device)  # tokens, positions, entries
        self.tiles = torch.zeros(2, most_rows, dtype=torch.int32, device=device)  # slots, entries that they see
        self.no_commit = torch.full((most_rows,), -1, dtype=torch.int32, device=device)
        self.hidden = torch.empty(most_rows, config.hidden_size, dtype=dtype, device=device)
        num_pages = cache.num_slots * cache.length // PAGE
        self.block_table = torch.arange(num_pages, dtype=torch.int32, device=device).view(cache.num_slots, -1)

        self.graphs = graphs
        self.seen: set[Hashable] = set()
        """Sizes that came before."""
        self.captured_over = self._addresses()

    def _addresses(self) -> list[int]:
        return [p.data_ptr() for p in self.decoder.parameters()]

    def follow_weights(self) -> None:
        """Before a call: drop the graphs if the weights have moved. New values in place need no new graphs."""
        addresses = self._addresses()
        if self.graphs is not None and addresses != self.captured_over:
            self.graphs.clear()
        self.captured_over = addresses

    def num_tiles(self, items: list[Item], tile: int) -> int | None:
        """Of a forward over `items` at a fixed size; None: it is too large for one."""
        needed = sum(-(-item.rows // tile) for item in items)
        padded = tile_bucket(needed)
        return padded if padded * tile <= self.most_rows else None

    def packed(self, tokens: Tensor, numbers: Tensor, attend: Attend) -> Tensor:
        """Hidden states [N, D] of rows of any number: tokens [N]; positions and entries `numbers` [2, N]."""
        positions, entries = numbers.int()
        return fused_forward(
            self.decoder, tokens, positions, entries, self.k_store, self.v_store, self.rotary, attend, keep_kv=True
        )

    def tiled(self, tokens: Tensor, numbers: Tensor, tiles: Tensor, statistics: Statistics) -> Tensor:
        """Hidden states [N, D] of rows in tiles, until the next forward: tokens [N]; numbers [2, N] and tiles [2, t] as of
        `canvas_cache.Rows`, t as of `num_tiles`."""
        num_rows, num_tiles = len(tokens), tiles.shape[1]
        self.rows[0, :num_rows].copy_(tokens)
        self.rows[1:, :num_rows].copy_(numbers)
        self.tiles[:, :num_tiles].copy_(tiles)
        size = num_rows // num_tiles, num_tiles
        if self.graphs is None or (size not in self.graphs and size not in self.seen):
            # A size that comes once would cost three forwards: a run, the capture, and a replay.
            self.seen.add(size)
            self._run(*size)
            return self.hidden[:num_rows]
        if size not in self.graphs:
            before = self.graphs.capture_seconds
            self.graphs.capture(size, lambda: self._run(*size))  # run twice, a forward stores the same keys twice
            statistics.graphs += 1
            statistics.capture_seconds += self.graphs.capture_seconds - before
        self.graphs.replay(size)
        return self.hidden[:num_rows]

    def _run(self, tile: int, num_tiles: int) -> None:
        """The forward over what is in the buffers. Captured: everything that changes from forward to forward is on the device."""
        num_rows, splits = tile * num_tiles, splits_of(num_tiles, tile, self.decoder.config)
        tokens, positions, entries = self.rows[:, :num_rows]
        slots, num_keys = self.tiles[:, :num_tiles]
        no_commit = self.no_commit[:num_tiles]

        def attend(layer: int, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
            return item_attention(
                q, self.k_store[layer], self.v_store[layer], self.block_table, slots, num_keys, no_commit, tile, splits=splits
            )

        hidden = fused_forward(self.decoder, tokens, positions, entries, self.k_store, self.v_store, self.rotary, attend)
        self.hidden[:num_rows].copy_(hidden)
