"""The engine of block-diffusion models for GPUs: paged cache, Triton kernels, CUDA graphs.

It samples what sample/block.py samples, from the same items (a block that is being denoised, and a finished one that is
committed along with the next), with three differences. The cache is in pages (sample/pages.py). A step is one CUDA graph of
kernels whose sizes are capacities (sample/slots.py, sample/capacity.py): everything it reads and writes stays on the device,
also which items there are. And the host runs behind: while step t runs it reads what step t - 1 did, retires and admits
sequences, and launches step t + 1.

    admit -> launch step t -> read the status of step t - 1 -> retire -> admit -> ...

On a CPU the kernels' torch references run, without graphs: slow, and the same otherwise.

Shapes: S slots, B block size, n items of a forward.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.records import Rollout
from models.decoder import Decoder
from models.family import Family
from sample import pages
from sample.block import check_family, whole_length
from sample.capacity import Demand, Waits, item_bucket
from sample.cuda_graphs import CudaGraphs
from sample.engine import Engine, Request, SamplingSettings, make_rollout
from sample.fused_forward import fused_forward
from sample.kernels.item_attention import item_attention
from sample.kernels.matmul import head_logits
from sample.kernels.plan import MOST_ITEMS, MOST_ROWS, make_plan
from sample.kernels.prefill_attention import prefill_attention
from sample.kernels.reveal import reveal_and_advance
from sample.kernels.sampler import draw_rows, kernel_target
from sample.paged_cache import PagedCache, to_device
from sample.paged_state import DeviceState, StateSizes
from sample.pages import PAGE, Pages, PromptPages, pages_of
from sample.queue import Unit, WorkQueue
from sample.sampling import Draws, in_parts
from sample.slots import DONE, RAN, STALLED, Plan

PREFILL_TOKENS = 16_384
"""Of one prefill forward, unless a single prompt is longer."""
SMALL_STEP = 2048
"""Rows of a step whose activations find place in what is kept free for a prefill: that is about twice what it takes."""
LOGITS = 2**29
"""Entries of the logits that are there at a time: 2 GiB. More than in the other engines (sample/sampling.py), for the kernels make
no further tensors of this size."""
SORT_EVERY = 32
"""Steps after which the items are put in order of length again, should nothing else have changed."""


class PagedBlockEngine(Engine):
    """Samples from a block-diffusion decoder; keeps cache, state and graphs between calls."""

    def __init__(self, decoder: Decoder, family: Family, max_active: int = 256, cache_pages: int | None = None) -> None:
        """cache_pages: of the cache at most, also where memory has place for more."""
        super().__init__(decoder, family, max_active)
        check_family(family)
        self.cache_pages = cache_pages
        self.cache: PagedCache | None = None
        self.device_state: DeviceState | None = None
        self.graphs: CudaGraphs | None = None
        self.captured_over: Any = None
        """Addresses of the weights that the graphs hold."""
        self.num_pages = 0
        """Pages that the call may use, page 0 included."""

    def begin(
        self, requests: list[Request], settings: SamplingSettings, weights_version: int, queue: WorkQueue, num_slots: int
    ) -> Generation:
        num_slots = min(num_slots, most_in_flight(settings.block_size))
        self._reserve(requests, settings, num_slots)
        return Generation(self, requests, settings, weights_version, queue, num_slots)

    def release(self) -> None:
        if self.cache is not None:
            self.cache.release()

    def _reserve(self, requests: list[Request], settings: SamplingSettings, num_slots: int) -> None:
        """Have the cache, the state and the graphs that fit the call; graphs go where an address that they hold has changed."""
        config, device, dtype = self.decoder.config, self.decoder.device, self.decoder.dtype
        samples = [(request, n) for request in requests for n in range(request.num_samples)]
        lengths = [whole_length(request, n, settings) for request, n in samples]
        most_columns = max(request.limit(n, settings) for request, n in samples) + settings.block_size - 1
        needs = sorted((pages_of(length) for length in lengths), reverse=True)
        wanted = for_all = 1 + sum(needs[:num_slots])
        if self.cache_pages is not None:
            wanted = min(wanted, self.cache_pages)
            if wanted < 1 + needs[0]:
                raise UserError(
                    f"cache_pages: got {self.cache_pages}, but the longest sequence, {max(lengths)} tokens, needs {1 + needs[0]} "
                    f"pages of {PAGE} positions, one of them for what is written nowhere"
                )
        state = self.device_state
        sizes = StateSizes(
            num_slots=item_bucket(num_slots),
            block_size=settings.block_size,
            table_width=1 << (needs[0] - 1).bit_length(),
            result_columns=1 << (most_columns - 1).bit_length(),
        )
        if state is None or not state.serves(sizes, config, dtype, device):
            if state is not None and state.sizes.block_size == sizes.block_size:
                sizes = StateSizes(*map(max, zip(dataclasses.astuple(state.sizes), dataclasses.astuple(sizes))))
            self.graphs = CudaGraphs(device) if device.type == "cuda" else None
            self.device_state = DeviceState(sizes, config, dtype, device)
        if self.cache is None or not self.cache.matches(config, dtype, device):
            if self.cache is not None:
                self.cache.close()
            self.cache = PagedCache(config, dtype, device)
            if self.graphs is not None:
                self.graphs.clear()
        addresses = [p.data_ptr() for p in self.decoder.parameters()]
        if self.graphs is not None and addresses != self.captured_over:
            self.graphs.clear()
        self.captured_over = addresses
        # Beside the cache: a prefill's widest activations; and float32 logits, of which torch's own sampling makes several copies.
        wide = 6 * config.intermediate_size + 4 * config.num_heads * config.head_dim + 8 * config.hidden_size
        logits = min(LOGITS, sizes.num_slots * settings.block_size * config.vocab_size) * 4
        copies = 2 if kernel_target(settings) is not None else 6
        longest_prompt = max(len(request.prompt_ids) for request, _ in samples) // settings.block_size * settings.block_size
        prefill = max(PREFILL_TOKENS, longest_prompt) * wide * dtype.itemsize
        # A step's own stay in the graphs' pool, beside a prefill's. Every page has its part of them: where there are fewer, fewer
        # sequences are in flight.
        largest = Demand(settings.block_size, settings.num_steps).capacity(num_slots)
        step_rows = max(0, (largest.items + largest.commits) * settings.block_size - SMALL_STEP)
        self.cache.take(wanted, 1 + needs[0], prefill + copies * logits, step_rows * wide * dtype.itemsize // for_all)
        self.num_pages = min(wanted, self.cache.num_pages)


def most_in_flight(block_size: int) -> int:
    """Sequences of one step at most, as many as a plan holds; what more there are wait in the queue."""
    most = min(MOST_ITEMS - 1, (MOST_ROWS - 1) // block_size)
    return next(n for n in range(most, 0, -1) if item_bucket(n) <= most)


def graph_settings(settings: SamplingSettings) -> SamplingSettings:
    """What of the settings is in a graph: the rest comes with every sequence."""
    return dataclasses.replace(settings, seed=0, max_tokens=1)


class Generation:
    """One call of `generate`. The host knows of every slot what it has read so far: one step less than the device."""

    def __init__(
        self,
        engine: PagedBlockEngine,
        requests: list[Request],
        settings: SamplingSettings,
        weights_version: int,
        queue: WorkQueue,
        num_slots: int,
    ) -> None:
        self.decoder, self.cache, self.state, self.graphs = engine.decoder, engine.cache, engine.device_state, engine.graphs
        self.requests, self.settings, self.weights_version, self.queue = requests, settings, weights_version, queue
        self.statistics = engine.statistics
        self.graph_settings = graph_settings(settings)
        self.constants = self.state.constants_of(self.graph_settings, self.decoder.config.vocab_size)
        self.demand = Demand(settings.block_size, settings.num_steps)
        self.rollouts: dict[tuple[int, int], Rollout] = {}  # by (request, sample)

        self.pages = Pages(engine.num_pages)
        self.free_slots = list(range(num_slots))[::-1]
        self.free_rows = list(range(len(self.state.results.tokens)))[::-1]
        self.finished: list[tuple[tuple[int, int], int]] = []  # (request, sample), row of its results
        # By slot: who is in it, (request, sample, result row, pages).
        self.occupant: list[tuple[int, int, int, list[int]] | None] = [None] * num_slots
        self.waiting: Unit | None = None  # taken from the queue, not admitted yet
        self.prompt: tuple[int, PromptPages] | None = None  # (request, its pages): of the newest request
        self.start = np.zeros(num_slots, dtype=np.int64)  # of the current block, by slot
        self.commit = np.zeros(num_slots, dtype=bool)

        self.order = np.zeros(0, dtype=np.int64)  # slots, as on the device
        self.order_age: int | None = None  # steps since it was made; None: make a new one
        self.waits = Waits(num_slots)
        self.launched: deque[np.ndarray] = deque()  # the orders of the steps that have not been read
        self.num_launched = 0
        self.state.slots.clear()  # also of what an interrupted call has left

    # -- admission

    def admit(self) -> bool:
        """Fill free slots with sequences from the queue, as far as there are pages. Returns whether any is in flight.

        A prompt is computed for the first sample of its request.
        """
        admitted: list[tuple[int, int, int]] = []  # (slot, request, sample)
        prefill: list[tuple[Request, list[int]]] = []  # prompts to compute, and their pages
        copies: list[tuple[int, int]] = []
        while self.free_slots and self._next():
            index, sample = self.waiting.request, self.waiting.samples[0]
            request = self.requests[index]
            grant = pages.admit(self.pages, self.prompt[1], whole_length(request, sample, self.settings))
            if grant is None:
                break
            self.waiting = Unit(index, self.waiting.samples[1:])
            if not self.free_rows:
                self._collect()
            slot, row = self.free_slots.pop(), self.free_rows.pop()
            self.occupant[slot] = index, sample, row, grant.pages
            self.start[slot] = self.prompt[1].num_positions
            self.commit[slot] = False
            admitted.append((slot, index, sample))
            if grant.prefill:
                prefill.append((request, grant.pages))
            if grant.copy is not None:
                copies.append(grant.copy)
        if admitted:
            self._start(admitted)
            self.waits.begin([slot for slot, *_ in admitted])
            self._prefill(prefill)
            self.cache.copy(copies)
            self.order_age = None
        in_flight = len(self.occupant) - len(self.free_slots)
        assert in_flight or self.waiting is None, "nothing in flight, and yet no room"
        return in_flight > 0

    def _next(self) -> bool:
        """Have a sequence waiting, if the queue has one left."""
        if self.waiting is None or not self.waiting.samples:
            self.waiting = self.queue.take(len(self.free_slots))
            if self.prompt is not None and (self.waiting is None or self.waiting.request != self.prompt[0]):
                pages.close(self.pages, self.prompt[1])
                self.prompt = None
            if self.waiting is not None and self.prompt is None:
                length = len(self.requests[self.waiting.request].prompt_ids)
                whole_blocks = length // self.settings.block_size * self.settings.block_size
                self.prompt = self.waiting.request, PromptPages(whole_blocks)
        return self.waiting is not None

    def _start(self, admitted: list[tuple[int, int, int]]) -> None:
        """Tell the device about new sequences."""
        slots = [slot for slot, *_ in admitted]
        table = torch.zeros(len(slots), self.state.block_table.shape[1], dtype=torch.int32)
        for row, slot in zip(table, slots):
            taken = self.occupant[slot][3]
            row[: len(taken)] = torch.tensor(taken, dtype=torch.int32)
        self.state.block_table.index_copy_(0, self._to_device(torch.tensor(slots)), self._to_device(table))
        sequences = [(self.requests[index], sample) for _, index, sample in admitted]
        self.state.slots.admit(slots, sequences, [self.occupant[slot][2] for slot in slots], self.settings)

    def _prefill(self, prompts: list[tuple[Request, list[int]]]) -> None:
        """Compute the whole blocks of prompts, several in one forward."""
        size = self.settings.block_size
        while prompts:
            tokens, entries, lengths = [], [], []
            while prompts and (not tokens or len(tokens) + len(prompts[0][0].prompt_ids) <= PREFILL_TOKENS):
                request, taken = prompts.pop(0)
                length = len(request.prompt_ids) // size * size
                tokens += request.prompt_ids[:length]
                entries.append((np.asarray(taken)[:, None] * PAGE + np.arange(PAGE)).reshape(-1)[:length])
                lengths.append(length)
            packed = np.stack([tokens, np.concatenate(entries), np.concatenate([np.arange(n) for n in lengths])])
            tokens, entries, positions = self._to_device(torch.from_numpy(packed.astype(np.int32))).unbind(0)
            starts = np.cumsum([0, *lengths[:-1]])
            starts, sizes = self._to_device(torch.tensor([*starts, *lengths], dtype=torch.int32)).chunk(2)

            self._prefill_packed(tokens, positions, entries, starts, sizes, max(lengths))
            self.statistics.prefill_tokens += sum(lengths)

    def _prefill_packed(
        self, tokens: Tensor, positions: Tensor, entries: Tensor, starts: Tensor, lengths: Tensor, longest: int
    ) -> None:
        size, cache = self.settings.block_size, self.cache

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return prefill_attention(q, k, v, starts, lengths, size, longest)

        fused_forward(self.decoder, tokens, positions, entries, cache.k, cache.v, self.state.rotary, attend, keep_kv=True)

    def _to_device(self, x: Tensor) -> Tensor:
        return to_device(x, self.state.order.device)

    # -- steps

    def advance(self) -> None:
        self.launch()
        self.read()

    def launch(self) -> None:
        """Queue one step: graph, then the copy of its status."""
        active = len(self.occupant) - len(self.free_slots)
        capacity = self.demand.capacity(active)
        plan = self.state.plan(capacity)
        n, turn = capacity.items, self.num_launched % 2
        key = (self.graph_settings, n, capacity.commits, capacity.head_rows)
        if self.graphs is not None and key not in self.graphs:
            self._capture(key, plan)
        if self.order_age is None or self.order_age >= SORT_EVERY:
            self._sort()
        self.order_age += 1
        if self.graphs is not None:
            self.graphs.replay(key)
        else:
            self._step(plan)
        self.state.host_status[turn][:n].copy_(self.state.status[:n], non_blocking=True)
        if self.graphs is not None:
            self.state.events[turn].record()
        self.launched.append(self.order)
        self.num_launched += 1

    def _sort(self) -> None:
        """Items in order of length, the longest first: the programs that take longest start first. Before them those that often
        found no place: it is given away in this order, and nobody is to wait much more often than others."""
        slots = np.array([slot for slot, who in enumerate(self.occupant) if who is not None])
        self.order = slots[np.lexsort((-self.start[slots], ~self.waits.come_first(slots)))]
        padded = np.full(len(self.state.order), -1, dtype=np.int32)
        padded[: len(slots)] = self.order
        self.state.order.copy_(self._to_device(torch.from_numpy(padded)))
        self.order_age = 0

    def _capture(self, key: Any, plan: Plan) -> None:
        """Capture the step, over an order without items: the run before the capture changes nothing."""
        before = self.graphs.capture_seconds
        self.state.order.fill_(-1)
        self.graphs.capture(key, lambda: self._step(plan), keeps=plan)
        self.order_age = None
        self.statistics.graphs += 1
        self.statistics.capture_seconds += self.graphs.capture_seconds - before

    def _step(self, plan: Plan) -> None:
        """plan -> forward -> head -> draw -> reveal and advance, all on the device."""
        state, size = self.state, self.settings.block_size
        make_plan(state.slots, state.block_table, plan)

        def attend(layer: int, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
            return item_attention(
                q, self.cache.k[layer], self.cache.v[layer], state.block_table, plan.order, plan.num_keys, plan.commit_of, size
            )

        hidden = fused_forward(
            self.decoder, plan.row_tokens, plan.positions, plan.entries, self.cache.k, self.cache.v, state.rotary, attend,
            rows=plan.head_rows,
        )  # fmt: skip

        def draw_some(rows: Tensor, keys: Tensor, first: int) -> Draws:
            logits = self.decoder.lm_head(rows, head_logits)
            num_rows = plan.num_head - first if first else plan.num_head
            return draw_rows(logits, keys, self.graph_settings, self.constants.forbidden, num_rows)

        draws = in_parts(draw_some, hidden, plan.row_keys, self.decoder.config.vocab_size, LOGITS)
        status = state.status[: plan.num_items]
        reveal_and_advance(state.slots, plan, draws, self.constants, self.graph_settings, state.results, status)

    # -- what the host learns

    def read(self) -> None:
        """Wait for the step before the newest, and retire the sequences that it ended."""
        if len(self.launched) < 2:
            return
        order, turn = self.launched.popleft(), self.num_launched % 2
        if self.graphs is not None:
            self.state.events[turn].synchronize()
        status = self.state.host_status[turn].numpy()[: len(order)]
        what, revealed, masked, commit = status.T
        ran = (what == RAN) | (what == DONE)
        slots = order[ran]
        num_ran, num_commits = len(slots), int(self.commit[slots].sum())
        if num_ran:
            self.statistics.engine_forwards += 1
        self.statistics.sequence_forwards += num_ran
        self.statistics.commit_items += num_commits
        self.statistics.tokens += int(revealed[ran].sum())
        stalled = what == STALLED
        self.statistics.stalled += int(stalled.sum())
        self.waits.observe(order, stalled)
        if stalled.any():
            self.order_age = None
        self.demand.observe(num_ran, num_commits, int(masked[ran].sum()))
        self.commit[slots] = commit[ran]
        self.start[slots] += commit[ran] * self.settings.block_size
        for slot in order[what == DONE].tolist():
            index, sample, row, taken = self.occupant[slot]
            self.pages.give_back(taken)
            self.finished.append(((index, sample), row))
            self.occupant[slot] = None
            self.free_slots.append(slot)
            self.order_age = None
            self.statistics.sequences += 1

    def _collect(self) -> None:
        """Make rollouts of the sequences that are done: one copy to the host."""
        rows = torch.tensor([row for _, row in self.finished])
        on_device = self._to_device(rows)
        results = self.state.results
        numbers = torch.stack([results.num_forwards, results.length])[:, on_device].cpu()  # [2, m]
        num_forwards, lengths = numbers.tolist()
        longest = max(lengths)
        fields = [results.tokens, results.step_map, results.logprobs.view(torch.int32), results.entropy.view(torch.int32)]
        values = torch.stack([x[on_device, :longest] for x in fields]).cpu()  # [4, m, longest]
        for n, ((index, sample), row) in enumerate(self.finished):
            tokens, step_map, logprobs, entropy = values[:, n, : lengths[n]]
            logprobs, entropy = logprobs.view(torch.float32), entropy.view(torch.float32)
            self.rollouts[index, sample] = make_rollout(
                self.requests[index],
                sample,
                self.settings,
                tokens,
                step_map,
                logprobs,
                entropy,
                num_forwards[n],
                self.weights_version,
            )
            self.free_rows.append(row)
        self.finished = []

    def finish(self) -> None:
        if self.finished:
            self._collect()
        assert self.pages.num_free == self.pages.num_usable, "a page was lost"
