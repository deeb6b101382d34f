"""The canvas engine on Triton kernels: what lies between the products of a layer is fused, tokens are drawn from one pass over the
logits, and forwards of few rows are CUDA graphs (sample/canvas_graphs.py). The attention of larger ones stays SDPA: a canvas is a
rectangle of queries and keys without a mask, which it is best at.

Where the tensors are on the CPU the kernels' torch references run, without graphs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from models.decoder import Decoder
from models.family import Family
from sample.canvas import CanvasEngine, CanvasGeneration
from sample.canvas_cache import Item, Rows, canvas_attention, group_items, place_rows
from sample.canvas_graphs import CanvasForward, rows_that_pay, tile_rows
from sample.cuda_graphs import CudaGraphs
from sample.engine import Request, SamplingSettings
from sample.kernels.matmul import head_logits
from sample.kernels.sampler import draw_rows
from sample.pages import PAGE
from sample.sampling import Draws, in_parts


class KernelCanvasGeneration(CanvasGeneration):
    def __init__(self, engine: KernelCanvasEngine, *arguments: Any) -> None:
        super().__init__(engine, *arguments)
        self.forwards, self.tile = engine.forwards, tile_rows(self.settings, self.family)
        self.is_forbidden = torch.zeros(self.decoder.config.vocab_size, dtype=torch.bool, device=self.decoder.device)
        if self.forbidden is not None:
            self.is_forbidden[self.forbidden] = True

    def place(self, items: list[Item]) -> Rows:
        num_tiles = self.forwards.num_tiles(items, self.tile)
        return super().place(items) if num_tiles is None else place_rows(items, self.length, self.tile, num_tiles)

    def forward(self, items: list[Item], numbers: Tensor, tiles: Tensor) -> Tensor:
        tokens = self.tokens.view(-1)[numbers[1]]  # of a row that pads, entry -1, the last one there is: any will do
        if tiles.numel():
            return self.forwards.tiled(tokens, numbers, tiles, self.statistics)
        return self.forwards.packed(tokens, numbers, canvas_attention(group_items(items, tokens.device), self.cache))

    def draw(self, hidden: Tensor, keys: Tensor) -> Draws:
        def draw_some(rows: Tensor, keys: Tensor, first: int) -> Draws:
            return draw_rows(self.decoder.lm_head(rows, head_logits), keys, self.settings, self.is_forbidden)

        draws = in_parts(draw_some, hidden, keys, self.decoder.config.vocab_size)
        return dataclasses.replace(draws, tokens=draws.tokens.long())  # the kernel's are int32


class KernelCanvasEngine(CanvasEngine):
    """As CanvasEngine, faster on a GPU. Keeps its graphs between calls while the cache and the weights stay where they are."""

    generation = KernelCanvasGeneration
    length_unit = PAGE

    def __init__(self, decoder: Decoder, family: Family, max_active: int = 256) -> None:
        super().__init__(decoder, family, max_active)
        self.forwards: CanvasForward | None = None
        self.most_rows = rows_that_pay(decoder.config) if decoder.device.type == "cuda" else 0
        """Of a forward at a fixed size; 0: none is."""
        self.graphs: CudaGraphs | None = None
        """One for all calls: what the library of products allocates for its stream stays allocated."""

    def release(self) -> None:
        had_graphs = self.graphs is not None and len(self.graphs.graphs) > 0
        if had_graphs:
            self.graphs.clear()
        self.forwards = None
        super().release()
        if had_graphs:
            torch.cuda.empty_cache()  # the pool of graphs that are gone is of no use to anybody else

    def stored_layers(self, settings: SamplingSettings) -> int:
        """Without a cache one: a place where the rows of a forward find each other's keys."""
        return super().stored_layers(settings) or 1

    def _reserve(self, requests: list[Request], settings: SamplingSettings, wanted: int) -> tuple[int, int, int]:
        reserved = super()._reserve(requests, settings, wanted)
        if self.forwards is None:
            if self.graphs is None and self.decoder.device.type == "cuda":
                self.graphs = CudaGraphs(self.decoder.device)
            self.forwards = CanvasForward(self.decoder, self.cache, self.most_rows, self.graphs)
        self.forwards.follow_weights()
        return reserved
