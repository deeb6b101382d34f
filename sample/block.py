"""The engine of block-diffusion models, in torch.

A forward works on items (sample/kv_cache.py): for every sequence in flight the block that it is denoising, and where a block
has just been finished also that one, with its final tokens. This *fused commit* makes the finished block's keys permanent in
the very forward in which the next block begins. It is exactly block-causal: within a layer all keys are written before any
item attends, and the finished block's rows see nothing behind themselves.

Shapes: S slots, T positions of a slot, B block size; n active sequences, M masked rows among their n*B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import UserError
from common.records import Rollout
from models.decoder import Decoder
from models.family import Family
from sample import noise
from sample.engine import Engine, Request, SamplingSettings, Statistics, make_rollout
from sample.kv_cache import Items, KVCache, slots_that_fit
from sample.queue import WorkQueue
from sample.registry import UNMASKING
from sample.sampling import draw_rows
from sample.unmask import Candidates, schedule

PREFILL_TOKENS = 16_384
"""Of one prefill forward, padding included."""


class BlockEngine(Engine):
    """Samples from a block-diffusion decoder; keeps its cache between calls."""

    def __init__(self, decoder: Decoder, family: Family, max_active: int = 256) -> None:
        super().__init__(decoder, family, max_active)
        check_family(family)
        self.cache: KVCache | None = None

    def begin(
        self, requests: list[Request], settings: SamplingSettings, weights_version: int, queue: WorkQueue, num_slots: int
    ) -> Generation:
        """With a cache for the longest request, and for as many sequences as are wanted and fit."""
        config, device, dtype = self.decoder.config, self.decoder.device, self.decoder.dtype
        length = max(whole_length(request, n, settings) for request in requests for n in range(request.num_samples))
        if self.cache is None or not self.cache.fits(config, num_slots, length, dtype, device):
            self.release()
            self.cache = KVCache(config, slots_that_fit(config, num_slots, length, dtype, device), length, dtype, device)
        num_slots = min(num_slots, self.cache.num_slots)
        return Generation(self.decoder, self.cache, requests, settings, weights_version, num_slots, queue, self.statistics)

    def release(self) -> None:
        self.cache = None


def check_family(family: Family) -> None:
    """Raises UserError where an engine of blocks cannot sample from the family."""
    if family.logit_shift != 0:
        raise UserError(f"model.model_base: {family.name} shifts its logits, block sampling needs a family that does not")


def whole_length(request: Request, sample: int, settings: SamplingSettings) -> int:
    """Prompt and longest response, rounded up to the end of a block."""
    return -(-(len(request.prompt_ids) + request.limit(sample, settings)) // settings.block_size) * settings.block_size


class Generation:
    """One call of `generate`: admit -> step -> retire until nothing is in flight.

    The sequences' state lives on the device. Of it the host knows `status`, read once per step: what the next step's items
    are, and who is done.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        requests: list[Request],
        settings: SamplingSettings,
        weights_version: int,
        num_slots: int,
        queue: WorkQueue,
        statistics: Statistics,
    ) -> None:
        self.decoder, self.cache, self.requests, self.settings = decoder, cache, requests, settings
        self.weights_version, self.queue, self.statistics = weights_version, queue, statistics
        self.rollouts: dict[tuple[int, int], Rollout] = {}  # by (request, sample)
        self.occupant: list[tuple[int, int] | None] = [None] * num_slots  # (request, sample) in each slot
        self.leader: tuple[int, int] | None = None  # (request, slot): the newest request, and where its prompt was prefilled

        device = decoder.device
        zeros = lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
        self.tokens = zeros(num_slots, cache.length, dtype=torch.int64)
        self.step_map = zeros(num_slots, cache.length, dtype=torch.int64)
        self.logprobs = zeros(num_slots, cache.length, dtype=torch.float32)
        self.entropy = zeros(num_slots, cache.length, dtype=torch.float32)
        self.key = zeros(num_slots, 2, dtype=torch.int32)
        # Positions: where the prompt ends, where stop tokens cease to count, where the last block ends; then two counters.
        self.prompt_length, self.limit, self.end, self.step_in_block, self.forwards = (
            zeros(num_slots, dtype=torch.int64) for _ in range(5)
        )
        # On the host, per slot: which positions of its block are masked, where the block starts, and flags.
        self.masked = torch.zeros(num_slots, settings.block_size, dtype=torch.bool)
        self.block_start = torch.zeros(num_slots, dtype=torch.int64)
        self.active, self.commit, self.done = (torch.zeros(num_slots, dtype=torch.bool) for _ in range(3))

        self.schedule = schedule(settings.block_size, settings.num_steps, device)
        self.reveal = UNMASKING.get(settings.strategy, "rollout.remasking_strategy")
        self.stop_ids = torch.tensor(settings.stop_ids, dtype=torch.int64, device=device)
        self.forbidden = torch.tensor(settings.forbidden_ids, device=device) if settings.forbidden_ids else None

    def admit(self) -> bool:
        """Fill free slots with sequences from the queue. A prompt is prefilled for the first of its sequences and copied to the
        others. Returns whether any sequence is in flight.

        Requests come in order, so only the newest one can have sequences both in slots and to come, and every slot filled since
        its first sequence came belongs to it: that sequence's slot holds its prompt until all have been admitted.
        """
        free = (~self.active).nonzero().squeeze(1).tolist()
        coming: list[tuple[int, int]] = []  # (request, sample)
        while len(coming) < len(free) and (unit := self.queue.take(len(free) - len(coming))) is not None:
            coming += [(unit.request, sample) for sample in unit.samples]
        if coming:
            self._fill(free[: len(coming)], coming)
        return bool(self.active.any())

    def _fill(self, free: list[int], coming: list[tuple[int, int]]) -> None:
        """Put sequences, (request, sample), into slots `free`."""
        s, size = self.settings, self.settings.block_size
        lead: list[int] = []  # slots whose prompt has to be prefilled
        follow: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # by whether the leader is new: (leader, slot)
        rows = torch.full((len(free), self.cache.length), s.mask_id)
        keys, facts = [], []
        for row, (slot, (request_index, sample)) in enumerate(zip(free, coming, strict=True)):
            request = self.requests[request_index]
            self.occupant[slot] = request_index, sample
            if self.leader is None or self.leader[0] != request_index:
                self.leader = request_index, slot
                lead.append(slot)
            elif self.leader[1] != slot:
                follow[self.leader[1] in lead].append((self.leader[1], slot))
            length = len(request.prompt_ids)
            rows[row, :length] = torch.tensor(request.prompt_ids, dtype=torch.int64)
            start = length // size * size
            keys.append(noise.sequence_key(s.seed, request.task_id, sample))
            facts.append([length, length + request.limit(sample, s), whole_length(request, sample, s), 0, 0])
            self.block_start[slot] = start
            self.masked[slot] = torch.arange(start, start + size) >= length
            self.active[slot], self.commit[slot], self.done[slot] = True, False, False
        device = self.tokens.device
        self.tokens[free] = rows.to(device)
        self.key[free] = torch.tensor(keys, dtype=torch.int32, device=device)
        for state, values in zip(
            [self.prompt_length, self.limit, self.end, self.step_in_block, self.forwards],
            torch.tensor(facts, device=device).unbind(1),
        ):
            state[free] = values
        for state in [self.step_map, self.logprobs, self.entropy]:
            state[free] = 0
        self._copy_prompts(follow[False])  # before a new leader takes the slot of an old one
        self._prefill(lead)
        self._copy_prompts(follow[True])

    def _prefill(self, slots: list[int]) -> None:
        """Store the keys and values of the whole prompt blocks of `slots`, several prompts in one padded forward."""
        slots = sorted((slot for slot in slots if self.block_start[slot] > 0), key=lambda slot: self.block_start[slot])
        while slots:
            batch = [slots.pop()]  # the longest sets the length
            length = int(self.block_start[batch[0]])
            while slots and (len(batch) + 1) * length <= PREFILL_TOKENS:
                batch.append(slots.pop())
            positions = torch.arange(length).repeat(len(batch))
            rows = (torch.tensor(batch) * self.cache.length).repeat_interleave(length) + positions
            rows, positions = rows.to(self.tokens.device), positions.to(self.tokens.device)
            attend = self.cache.attend_prompts(rows, len(batch), self.settings.block_size)
            self.decoder(self.tokens.flatten()[rows], positions, attend)
            self.statistics.prefill_tokens += len(rows)

    def _copy_prompts(self, pairs: list[tuple[int, int]]) -> None:
        """Copy the prefilled prompt of the first slot of every pair to the second."""
        if pairs:
            sources, targets = map(list, zip(*pairs))
            self.cache.copy(sources, targets, int(self.block_start[targets].max()))

    def advance(self) -> None:
        self.step()
        self.retire()

    def finish(self) -> None:
        """Every sequence was recorded when it ended."""

    def step(self) -> None:
        """One forward of the model: items -> forward -> draw -> reveal -> advance."""
        size, device = self.settings.block_size, self.tokens.device
        active = self.active.nonzero().squeeze(1)  # [n], host
        committing = active[self.commit[active]]
        items = self.cache.items(
            slots=torch.cat([active, committing]),
            starts=torch.cat([self.block_start[active], self.block_start[committing] - size]),
            size=size,
        )
        masked = self.masked[active]  # [n, B], host
        masked_rows = masked.flatten().nonzero().squeeze(1).to(device, non_blocking=True)  # [M], rows of the first n items
        slots, masked = active.to(device, non_blocking=True), masked.to(device, non_blocking=True)

        hidden = self.decoder(self.tokens.flatten()[items.rows], items.positions, self.cache.attend(items))  # [N, D]
        self.forwards[slots] += 1
        forward, key = self.forwards[slots], self.key[slots]
        row_slot = masked_rows // size
        row_forward = forward[row_slot]
        row_keys = noise.row_keys(key[row_slot], items.positions[masked_rows], row_forward)
        draws = draw_rows(self.decoder, hidden[masked_rows], row_keys, self.settings, self.forbidden)

        grid = torch.zeros(2, masked.numel(), device=device)
        grid[:, masked_rows] = torch.stack([draws.score, draws.score_entropy])
        score, score_entropy = grid.unflatten(1, masked.shape)
        count = self.schedule[self.step_in_block[slots].clamp(max=len(self.schedule) - 1)]
        reveal = self.reveal(Candidates(masked, score, score_entropy, count), self.settings)  # [n, B]

        revealed = reveal.flatten()[masked_rows]  # [M]
        at = items.rows[masked_rows]
        self.tokens.view(-1)[at] = torch.where(revealed, draws.tokens, self.settings.mask_id)
        self.step_map.view(-1)[at] = torch.where(revealed, row_forward, 0)
        self.logprobs.view(-1)[at] = torch.where(revealed, draws.logprobs, 0.0)
        self.entropy.view(-1)[at] = torch.where(revealed, draws.entropy, 0.0)

        self.statistics.engine_forwards += 1
        self.statistics.sequence_forwards += len(active)
        self.statistics.commit_items += len(committing)
        self._advance(active, slots, masked & ~reveal, reveal, items)

    def _advance(self, active: Tensor, slots: Tensor, left: Tensor, reveal: Tensor, items: Items) -> None:
        """Go to the next step of the block, to the next block, or be done; then the step's one read by the host.

        left, reveal bool [n, B]: still masked, just revealed."""
        size = self.settings.block_size
        rows, positions = (x[: left.numel()].view(left.shape) for x in (items.rows, items.positions))  # [n, B]
        counts = (positions >= self.prompt_length[slots, None]) & (positions < self.limit[slots, None])
        stopped = (torch.isin(self.tokens.flatten()[rows], self.stop_ids) & counts).any(1)
        block_done = ~left.any(1)
        done = block_done & (stopped | (positions[:, -1] + 1 >= self.end[slots]))
        goes_on = block_done & ~done
        self.step_in_block[slots] = torch.where(goes_on, 0, self.step_in_block[slots] + 1)

        status = torch.cat([left | goes_on[:, None], torch.stack([goes_on, done, reveal.sum(1)], 1)], 1).cpu()  # [n, B + 3]
        masked, (goes_on, done, num_revealed) = status[:, :size].bool(), status[:, size:].unbind(1)
        self.masked[active], self.commit[active], self.done[active] = masked, goes_on.bool(), done.bool()
        self.block_start[active] += goes_on * size
        self.statistics.tokens += int(num_revealed.sum())

    def retire(self) -> None:
        """Make rollouts of the sequences that are done and free their slots."""
        slots = self.done.nonzero().squeeze(1).tolist()
        if not slots:
            return
        longest = int(self.block_start[slots].max()) + self.settings.block_size
        state = [x[slots, :longest].cpu() for x in (self.tokens, self.step_map, self.logprobs, self.entropy)]
        forwards = self.forwards[slots].tolist()
        for row, slot in enumerate(slots):
            request_index, sample = self.occupant[slot]
            end = int(self.block_start[slot]) + self.settings.block_size
            response = [x[row, len(self.requests[request_index].prompt_ids) : end] for x in state]
            self.rollouts[request_index, sample] = make_rollout(
                self.requests[request_index], sample, self.settings, *response, forwards[row], self.weights_version
            )
            self.occupant[slot] = None
        self.active[slots] = False
        self.done[slots] = False
        self.statistics.sequences += len(slots)
