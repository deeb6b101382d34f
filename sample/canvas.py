"""The engine of full-attention models, in torch: a canvas of masks behind the prompt is denoised block by block.

Every canvas is on its own clock: a forward holds one item (sample/canvas_cache.py) of each, whatever it is at. The first forward
of a block is over the whole canvas; the others too (`cache` none), or over a window that begins with the block and sees of the
rest what that first forward stored. Stored keys are older than the tokens around them, so with a cache log-probs are recorded as
sampled, and the trainer's differ from them.

Where logits are shifted by one (`Family.logit_shift`) the token of a position is predicted by the row before it. A window has
that row for all of its positions but the first: where a block's first forward does not reveal that one
(`Family.first_token_from_refresh`), the window begins one row earlier.

Shapes: S slots, T positions of a slot, B block size; n items of a forward, N rows, M rows that predict.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.records import Rollout
from models.decoder import Decoder
from models.family import Family
from sample import noise
from sample.canvas_cache import Item, Rows, canvas_attention, canvases_that_fit, group_items, place_rows
from sample.canvas_schedule import blocks_of, count_at, counts_of
from sample.engine import Engine, Request, SamplingSettings, make_rollout
from sample.kv_cache import KVCache
from sample.queue import WorkQueue
from sample.registry import UNMASKING
from sample.sampling import Draws, draw_rows
from sample.unmask import Candidates


def send(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of whole numbers, as int64 on the device, in one copy."""
    packed = torch.from_numpy(np.concatenate([x.ravel() for x in arrays])).to(device, non_blocking=True)
    return [x.view(original.shape) for x, original in zip(packed.split([x.size for x in arrays]), arrays)]


def canvas_end(request: Request, sample: int, settings: SamplingSettings) -> int:
    """Tokens of the prompt and of the response."""
    return len(request.prompt_ids) + request.limit(sample, settings)


@dataclasses.dataclass
class Clock:
    """Where one canvas is: all on the host."""

    request: int
    sample: int
    prompt: int
    """Its length."""
    blocks: list[int]
    """Tokens of each."""
    counts: list[list[int]]
    """By block and forward: how many tokens a fixed schedule reveals."""
    block: int = 0
    start: int = 0
    """First position of the block."""
    step: int = 0
    """Forwards of the block so far."""
    forwards: int = 0
    has_stop: bool = False
    """A stop token was revealed (`stop_early`)."""
    waiting_since: int = 0
    """The forward of the engine after which it was last in one."""

    @property
    def size(self) -> int:
        return self.blocks[self.block]

    @property
    def end(self) -> int:
        """Of the canvas."""
        return self.prompt + sum(self.blocks)

    @property
    def count(self) -> int:
        return count_at(self.counts[self.block], self.step)


class CanvasGeneration:
    """One call of `generate`: admit -> step -> retire until nothing is in flight.

    Tokens and what is recorded with them live on the device. Of them the host reads one thing per forward: what is still masked in
    the blocks that took part.
    """

    def __init__(
        self,
        engine: CanvasEngine,
        slots: tuple[int, int],
        max_rows: int,
        requests: list[Request],
        settings: SamplingSettings,
        weights_version: int,
        queue: WorkQueue,
    ) -> None:
        """slots: (their number, positions of each)."""
        self.decoder, self.family, self.cache, self.max_rows = engine.decoder, engine.family, engine.cache, max_rows
        self.requests, self.settings, self.weights_version = requests, settings, weights_version
        self.queue, self.statistics = queue, engine.statistics
        self.rollouts: dict[tuple[int, int], Rollout] = {}  # by (request, sample)
        self.clocks: dict[int, Clock] = {}  # by slot
        self.num_slots, self.length = slots
        self.done: list[int] = []
        self.masked = np.zeros((self.num_slots, settings.block_size), dtype=bool)  # of the slots' blocks

        device = engine.decoder.device
        self.tokens = torch.full(slots, settings.mask_id, device=device)
        self.step_map = torch.zeros(slots, dtype=torch.int64, device=device)
        self.logprobs, self.entropy = torch.zeros(2, *slots, device=device)
        self.key = torch.zeros(self.num_slots, 2, dtype=torch.int32, device=device)
        self.reveal = UNMASKING.get(settings.strategy, "rollout.remasking_strategy")
        self.stop_ids = torch.tensor(settings.stop_ids, dtype=torch.int64, device=device)
        self.forbidden = torch.tensor(settings.forbidden_ids, device=device) if settings.forbidden_ids else None

    def admit(self) -> bool:
        """Fill free slots with sequences from the queue. Returns whether any sequence is in flight."""
        free = [slot for slot in range(self.num_slots) if slot not in self.clocks]
        coming: list[tuple[int, int]] = []  # (request, sample)
        while len(coming) < len(free) and (unit := self.queue.take(len(free) - len(coming))) is not None:
            coming += [(unit.request, sample) for sample in unit.samples]
        if coming:
            self._fill(free[: len(coming)], coming)
        return bool(self.clocks)

    def _fill(self, slots: list[int], coming: list[tuple[int, int]]) -> None:
        s = self.settings
        rows, keys = torch.full((len(slots), self.length), s.mask_id), []
        for row, (slot, (index, sample)) in enumerate(zip(slots, coming, strict=True)):
            request = self.requests[index]
            prompt, limit = len(request.prompt_ids), request.limit(sample, s)
            rows[row, :prompt] = torch.tensor(request.prompt_ids)
            keys.append(noise.sequence_key(s.seed, request.task_id, sample))
            steps = -(-(s.steps or s.max_tokens) * limit // s.max_tokens)  # a shorter canvas has its share of them
            blocks, counts = blocks_of(limit, s.block_size), counts_of(self.family.canvas_schedule, limit, s.block_size, steps)
            self.clocks[slot] = Clock(index, sample, prompt, blocks, counts, start=prompt)
            self._begin_block(slot)
        device = self.tokens.device
        self.tokens[slots] = rows.to(device)
        self.key[slots] = torch.tensor(keys, dtype=torch.int32, device=device)
        for state in (self.step_map, self.logprobs, self.entropy):
            state[slots] = 0

    def _begin_block(self, slot: int) -> None:
        self.clocks[slot].step = 0
        self.masked[slot] = np.arange(self.masked.shape[1]) < self.clocks[slot].size

    def _item(self, slot: int) -> Item:
        """What the next forward computes of a canvas."""
        s, clock = self.settings, self.clocks[slot]
        end = clock.end
        if s.cache == "none" or clock.step == 0:
            return Item(slot, 0, end, end, True)
        start = clock.start - (0 if self.family.first_token_from_refresh else self.family.logit_shift)
        stop = clock.start + clock.size
        if s.further_horizon is not None:
            stop = min(stop + s.further_horizon, end)
        elif s.cache == "prefix":
            stop = end
        return Item(slot, start, stop - start, end if s.cache == "dual" else stop, False)

    def _next_items(self) -> list[Item]:
        """An item of every canvas, as far as the rows of a forward go: those that have waited longest; in the order of shapes."""
        chosen, rows = [], 0
        for slot, clock in sorted(self.clocks.items(), key=lambda pair: (pair[1].waiting_since, pair[0])):
            item = self._item(slot)
            rows += item.rows
            if chosen and rows > self.max_rows:
                break
            clock.waiting_since = self.statistics.engine_forwards + 1
            clock.forwards += 1
            chosen.append(item)
        return sorted(chosen, key=lambda item: (item.shape, item.slot))

    def advance(self) -> None:
        self.step()
        self.retire()

    def finish(self) -> None:
        """Every sequence was recorded when it ended."""

    def step(self) -> None:
        """One forward of the model: items -> forward -> draw -> reveal -> advance."""
        items, device = self._next_items(), self.tokens.device
        clocks = [self.clocks[item.slot] for item in items]
        rows = self.place(items)
        head, count, candidates = self._predictions(items, clocks, rows.first)
        numbers, tiles, head, count, candidates = send([rows.numbers, rows.tiles, head, count, candidates], device)
        (head_rows, at, head_entries, head_positions, slots, forwards), masked = head, candidates.bool()

        hidden = self.forward(items, numbers, tiles)  # [N, D]
        keys = noise.row_keys(self.key[slots], head_positions, forwards)
        draws = self.draw(hidden[head_rows], keys)
        reveal = self.reveal(self._candidates(draws, keys, at, masked, count), self.settings)  # [n, B]

        revealed = reveal.flatten()[at]  # [M]
        self.tokens.view(-1)[head_entries] = torch.where(revealed, draws.tokens, self.settings.mask_id)
        self.step_map.view(-1)[head_entries] = torch.where(revealed, forwards, 0)
        self.logprobs.view(-1)[head_entries] = torch.where(revealed, draws.logprobs, 0.0)
        self.entropy.view(-1)[head_entries] = torch.where(revealed, draws.entropy, 0.0)

        stopped = torch.zeros_like(reveal)
        if self.settings.stop_early:
            stopped.view(-1)[at] = revealed & torch.isin(draws.tokens, self.stop_ids)
        self.statistics.engine_forwards += 1
        self.statistics.sequence_forwards += len(items)
        status = torch.stack([reveal, stopped]).cpu().numpy()  # the one read of the step
        self._advance([item.slot for item in items], *status)

    def place(self, items: list[Item]) -> Rows:
        """The rows of the forward over `items`."""
        return place_rows(items, self.length)

    def forward(self, items: list[Item], numbers: Tensor, tiles: Tensor) -> Tensor:
        """Hidden states [N, D] of the rows of `items`; numbers and tiles are those of `place`, on the device."""
        positions, entries = numbers
        attend = canvas_attention(group_items(items, entries.device), self.cache)

        def store_and_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.cache is not None:
                self.cache.write(layer, entries, k, v)
            return attend(layer, q, k, v)

        return self.decoder(self.tokens.view(-1)[entries], positions, store_and_attend)

    def draw(self, hidden: Tensor, keys: Tensor) -> Draws:
        """A token for each of the rows [M, D] that predict, with noise keys int32 [M, 2]."""
        return draw_rows(self.decoder, hidden, keys, self.settings, self.forbidden)

    def _predictions(
        self, items: list[Item], clocks: list[Clock], first_row: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a forward over `items` predicts (on the host); first_row [n]: of each item.

        int64 [6, M] (rows that predict; place in the grid of blocks, entry and position of the predicted token, its slot, number of
        the forward), the schedule's count int64 [n], candidates bool [n, B].
        """
        slot, start, block_start, forwards, count = np.array(
            [(item.slot, item.start, clock.start, clock.forwards, clock.count) for item, clock in zip(items, clocks)]
        ).T
        candidates = self.masked[slot]  # [n, B], a copy
        if self.family.first_token_from_refresh:
            candidates[[clock.step == 0 for clock in clocks], 1:] = False
        item, offset = candidates.nonzero()  # [M]
        predicted = block_start[item] + offset
        head_rows = (first_row - start)[item] + predicted - self.family.logit_shift
        at = item * candidates.shape[1] + offset
        head = [head_rows, at, slot[item] * self.length + predicted, predicted, slot[item], forwards[item]]
        return np.stack(head), count, candidates

    def _candidates(self, draws: Draws, keys: Tensor, at: Tensor, masked: Tensor, count: Tensor) -> Candidates:
        """What the strategy sees: numbers of the M rows at their places of the grid [n, B]."""
        s, score = self.settings, draws.score
        if s.pad_target_penalty != 1:
            score = torch.where(draws.tokens == s.pad_id, score / s.pad_target_penalty, score)
        columns = [score, draws.score_entropy]
        if s.alg_temp > 0:
            # The n largest of log p + Gumbel noise are n draws without replacement.
            choice = torch.full((1,), noise.CHOICE_ID, device=keys.device)
            columns.append(score / s.alg_temp + noise.gumbel_at(keys, choice)[:, 0])
        grid = torch.zeros(len(columns), masked.numel(), device=masked.device)
        grid[:, at] = torch.stack(columns)
        score, entropy, *ranking = grid.unflatten(1, masked.shape)
        return Candidates(masked, score, entropy, count, least=1, ranking=ranking[0] if ranking else None)

    def _advance(self, slots: list[int], reveal: np.ndarray, stopped: np.ndarray) -> None:
        """Go to the next step of the block, to the next block, or be done.

        reveal, stopped bool [n, B], on the host: what was revealed, and of that what is a stop token (`stop_early`).
        """
        self.statistics.tokens += int(reveal.sum())
        self.masked[slots] &= ~reveal
        for slot, is_open, has_stop in zip(slots, self.masked[slots].any(1).tolist(), stopped.any(1).tolist(), strict=True):
            clock = self.clocks[slot]
            clock.step += 1
            clock.has_stop |= has_stop
            if is_open:
                continue
            clock.start += clock.size
            clock.block += 1
            if clock.block == len(clock.blocks) or clock.has_stop:
                self.done.append(slot)
            else:
                self._begin_block(slot)

    def retire(self) -> None:
        """Make rollouts of the sequences that are done and free their slots."""
        if not self.done:
            return
        state = [x[self.done].cpu() for x in (self.tokens, self.step_map, self.logprobs, self.entropy)]
        for row, slot in enumerate(self.done):
            clock = self.clocks.pop(slot)
            response = [x[row, clock.prompt : clock.end] for x in state]
            self.rollouts[clock.request, clock.sample] = make_rollout(
                self.requests[clock.request], clock.sample, self.settings, *response, clock.forwards, self.weights_version
            )
        self.statistics.sequences += len(self.done)
        self.done = []


class CanvasEngine(Engine):
    """Samples from a full-attention decoder; keeps its cache between calls."""

    generation = CanvasGeneration
    """What one call runs."""
    length_unit = 1
    """The positions of a slot are a multiple of it."""

    def __init__(self, decoder: Decoder, family: Family, max_active: int = 256) -> None:
        super().__init__(decoder, family, max_active)
        self.cache: KVCache | None = None
        self.max_rows = 0  # of a forward, as the memory was when the cache was made

    def begin(
        self, requests: list[Request], settings: SamplingSettings, weights_version: int, queue: WorkQueue, num_slots: int
    ) -> CanvasGeneration:
        facts = {"top_p_first": self.family.top_p_first, "scores_unscaled": self.family.scores_unscaled}
        settings = dataclasses.replace(settings, **facts)
        num_slots, length, max_rows = self._reserve(requests, settings, num_slots)
        return self.generation(self, (num_slots, length), max_rows, requests, settings, weights_version, queue)

    def release(self) -> None:
        self.cache = None

    def _reserve(self, requests: list[Request], settings: SamplingSettings, wanted: int) -> tuple[int, int, int]:
        """(slots, positions of each, rows of a forward) for the longest request and as many canvases as are wanted and fit, with a
        cache for them where the settings ask for one."""
        config, device, dtype = self.decoder.config, self.decoder.device, self.decoder.dtype
        for request in requests:
            if self.family.logit_shift and not request.prompt_ids:
                raise UserError(
                    f"prompt of task {request.task_id}: it is empty, and {self.family.name} predicts a token from the one before it"
                )
        length = max(canvas_end(request, n, settings) for request in requests for n in range(request.num_samples))
        length = -(-length // self.length_unit) * self.length_unit
        num_layers = self.stored_layers(settings)
        stored = dataclasses.replace(config, num_layers=num_layers)
        if self.cache is not None and not (num_layers and self.cache.fits(stored, wanted, length, dtype, device)):
            self.release()
        if self.cache is not None:
            return min(wanted, self.cache.num_slots), self.cache.length, self.max_rows
        num_slots, self.max_rows = canvases_that_fit(config, wanted, length, settings.cache != "none", dtype, device)
        if num_layers:
            self.cache = KVCache(stored, num_slots, length, dtype, device)
        return num_slots, length, self.max_rows

    def stored_layers(self, settings: SamplingSettings) -> int:
        """Layers whose keys and values are kept."""
        return self.decoder.config.num_layers if settings.cache != "none" else 0
