"""State of the paged block engine on the device: what one step reads and writes without the host.

Shapes: S slots, B block size, R sequences of a call, L response positions; a step has n places for denoising items, c for commit
items and h for head rows. All tensors keep their addresses, so that CUDA graphs can hold them.

One step, with the capacities n, c and h of its `Plan`:

    make_plan -> forward over (n + c) * B rows -> head on h rows -> draw_rows -> reveal_and_advance

A slot whose finished block finds no commit place left, or whose masked rows find no head rows left, is *stalled*: nothing of it
changes and it tries again at the next step. So results never depend on capacities. The first items are served first; progress is
certain where h >= B, and c >= 1 if a commit waits. Who comes first: sample/capacity.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sample import noise
from sample.block import whole_length
from sample.engine import Request, SamplingSettings
from sample.unmask import schedule

EMPTY, RAN, DONE, STALLED = range(4)
"""What a step did with an item's place, `status[:, 0]`: nobody there (or done before), took part, took part and is done, waits."""
STATUS_COLUMNS = ("state", "num_revealed", "num_masked", "commit")
"""Of `status` int32 [n, 4]: see sample/kernels/reveal.py."""


@dataclass
class Slots:
    """Sequences in flight, one per slot. int32 unless said."""

    tokens: Tensor
    """[S, 2, B]: the finished block before, and the current block (mask ids where masked)."""
    masked: Tensor
    """bool [S, B], of the current block; never all False while the slot is active."""
    active: Tensor
    """bool [S]."""
    commit: Tensor
    """bool [S]: the finished block before is not in the cache for good yet; it goes along with the next forward."""
    start: Tensor
    """[S]: first position of the current block."""
    step_in_block: Tensor
    """[S]: denoising forwards of the current block."""
    forwards: Tensor
    """[S]: denoising forwards of the sequence."""
    prompt_length: Tensor
    """[S]."""
    limit: Tensor
    """[S]: position from which on stop tokens do not count."""
    end: Tensor
    """[S]: position where the last block ends."""
    result_row: Tensor
    """[S]: row of `Results`."""
    key: Tensor
    """[S, 2]: the sequences' noise keys (sample/noise.py)."""

    NUMBERS = ("start", "step_in_block", "forwards", "prompt_length", "limit", "end", "result_row")

    @classmethod
    def empty(cls, num_slots: int, block_size: int, device: torch.device | str) -> Slots:
        """No slot active."""
        numbers = torch.zeros(len(cls.NUMBERS), num_slots, dtype=torch.int32, device=device)
        flags = torch.zeros(2, num_slots, dtype=torch.bool, device=device)
        return cls(
            tokens=torch.zeros(num_slots, 2, block_size, dtype=torch.int32, device=device),
            masked=torch.zeros(num_slots, block_size, dtype=torch.bool, device=device),
            active=flags[0],
            commit=flags[1],
            key=torch.zeros(num_slots, 2, dtype=torch.int32, device=device),
            **dict(zip(cls.NUMBERS, numbers)),
        )

    @property
    def num_slots(self) -> int:
        return self.tokens.shape[0]

    @property
    def block_size(self) -> int:
        return self.tokens.shape[2]

    def clear(self) -> None:
        """Nobody is in flight."""
        self.active.zero_()

    def admit(
        self,
        slot_ids: Sequence[int],
        sequences: Sequence[tuple[Request, int]],
        result_rows: Sequence[int],
        settings: SamplingSettings,
    ) -> None:
        """Start sequences (request, sample) in the slots `slot_ids`: each in the block where its prompt ends, the whole blocks
        before being in the cache.

        One copy to the device, asynchronous; ordered with the steps by the current stream.
        """
        size = self.block_size
        assert settings.block_size == size and len(set(slot_ids)) == len(slot_ids)
        rows = []
        for slot, (request, sample), result_row in zip(slot_ids, sequences, result_rows, strict=True):
            length = len(request.prompt_ids)
            start = length // size * size
            block = [*request.prompt_ids[start:], *[settings.mask_id] * (start + size - length)]
            limit, end = length + request.limit(sample, settings), whole_length(request, sample, settings)
            key = noise.sequence_key(settings.seed, request.task_id, sample)
            rows.append([slot, *key, start, 0, 0, length, limit, end, result_row, *block])
        staged = torch.tensor(rows, dtype=torch.int32)  # [m, 10 + B]
        if self.tokens.is_cuda:
            staged = staged.pin_memory()  # torch keeps pinned memory from being used again before the copy is over
        staged = staged.to(self.tokens.device, non_blocking=True)
        slots = staged[:, 0].long()
        self.key[slots] = staged[:, 1:3]
        for name, column in zip(self.NUMBERS, staged[:, 3:10].unbind(1)):
            getattr(self, name)[slots] = column
        self.tokens[slots, 1] = staged[:, 10:]
        offset = torch.arange(size, dtype=torch.int32, device=self.tokens.device)
        self.masked[slots] = staged[:, 3:4] + offset >= staged[:, 6:7]  # behind the prompt
        self.commit.index_fill_(0, slots, False)
        self.active.index_fill_(0, slots, True)


@dataclass
class Results:
    """What was sampled, one row per sequence of the call; column = position - prompt length. Whole blocks: the last one too."""

    tokens: Tensor
    """int32 [R, L]."""
    step_map: Tensor
    """int32 [R, L]: number of the denoising forward that revealed the token, from 1 on; 0: not revealed yet."""
    logprobs: Tensor
    """float32 [R, L]."""
    entropy: Tensor
    """float32 [R, L], nats."""
    num_forwards: Tensor
    """int32 [R]: denoising forwards of the sequence; 0 until it is done."""
    length: Tensor
    """int32 [R]: response positions of the sequence, to the end of its last block; 0 until it is done."""

    @classmethod
    def empty(cls, num_rows: int, num_columns: int, device: torch.device | str) -> Results:
        zeros = lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
        return cls(
            *(zeros(num_rows, num_columns, dtype=dtype) for dtype in (torch.int32, torch.int32, torch.float32, torch.float32)),
            *(zeros(num_rows, dtype=torch.int32) for _ in range(2)),
        )


@dataclass
class Plan:
    """One forward. N = (n + c) * B rows: row i*B + j is position start + j of slot order[i]; row (n + k)*B + j is position
    start - B + j of the k-th slot that commits. int32 unless said. Rows of nobody: token 0, position 0, entry -1."""

    order: Tensor
    """[n]: the slot of each item, -1 for an empty place; the only field that the host writes."""
    row_tokens: Tensor
    """[N]: what the forward embeds."""
    positions: Tensor
    """[N]."""
    entries: Tensor
    """[N]: where keys and values go, -1: nowhere."""
    runs: Tensor
    """bool [n]: whether the item takes part."""
    num_keys: Tensor
    """[n]: what the item's rows see: start + B; its commit rows see B less. 0 if it does not run."""
    commit_of: Tensor
    """[n]: k of the item's commit item, or -1."""
    head_rows: Tensor
    """[h]: the masked rows of the forward, item by item; padded with 0."""
    row_keys: Tensor
    """[h, 2]: their noise keys; padded with 0."""
    draw_of: Tensor
    """[n, B]: where in `head_rows` a position is, or -1: not masked, or the item does not run."""
    num_head: Tensor
    """[1]: head rows in use."""

    @classmethod
    def empty(cls, n: int, c: int, h: int, block_size: int, device: torch.device | str) -> Plan:
        """For n items, c <= n of which may commit, with h <= n * block_size masked rows."""
        assert 0 <= c <= n and 1 <= h <= n * block_size, f"n {n}, c {c}, h {h}, block size {block_size}"
        make = lambda *shape, fill=0: torch.full(shape, fill, dtype=torch.int32, device=device)  # noqa: E731
        num_rows = (n + c) * block_size
        return cls(
            order=make(n, fill=-1),
            row_tokens=make(num_rows),
            positions=make(num_rows),
            entries=make(num_rows, fill=-1),
            runs=torch.zeros(n, dtype=torch.bool, device=device),
            num_keys=make(n),
            commit_of=make(n, fill=-1),
            head_rows=make(h),
            row_keys=make(h, 2),
            draw_of=make(n, block_size, fill=-1),
            num_head=make(1),
        )

    @property
    def num_items(self) -> int:
        """n."""
        return self.order.shape[0]

    @property
    def block_size(self) -> int:
        return self.draw_of.shape[1]

    @property
    def commit_capacity(self) -> int:
        """c."""
        return self.row_tokens.shape[0] // self.block_size - self.num_items


@dataclass
class Constants:
    """Of one call's settings, what the kernels read from memory."""

    schedule: Tensor
    """int32 [steps]: how many positions to reveal in each step of a block (sample/unmask.py)."""
    stop_ids: Tensor
    """int32 [at least 1]; -1 stands for none."""
    forbidden: Tensor
    """bool [V]: ids that are never sampled and carry no probability."""

    @classmethod
    def of(cls, settings: SamplingSettings, vocab_size: int, device: torch.device | str) -> Constants:
        forbidden = torch.zeros(vocab_size, dtype=torch.bool)
        forbidden[list(settings.forbidden_ids)] = True
        return cls(
            schedule(settings.block_size, settings.num_steps).int().to(device),
            torch.tensor(settings.stop_ids or (-1,), dtype=torch.int32, device=device),
            forbidden.to(device),
        )


def empty_status(n: int, device: torch.device | str) -> Tensor:
    """int32 [n, 4], the columns of STATUS_COLUMNS."""
    return torch.zeros(n, len(STATUS_COLUMNS), dtype=torch.int32, device=device)
