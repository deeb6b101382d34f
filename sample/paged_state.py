"""What the paged engine keeps on the device from call to call, beside the weights and the cache: CUDA graphs hold its addresses."""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass

import torch

from models.family import DecoderConfig
from sample.capacity import Capacity
from sample.engine import SamplingSettings
from sample.kernels.rotary_store import rotary_table
from sample.pages import PAGE
from sample.slots import Constants, Plan, Results, Slots, empty_status

RESULT_POSITIONS = 2**24
"""Response positions whose results are kept on the device: 256 MiB. There are always rows for twice the sequences in flight."""


@dataclass(frozen=True)
class StateSizes:
    num_slots: int
    block_size: int
    table_width: int
    """Pages of the longest sequence."""
    result_columns: int


class DeviceState:
    """Slots, results, block table, the order of items, plans, and what the host reads of a step."""

    def __init__(self, sizes: StateSizes, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.sizes, self.kind = sizes, (config, dtype, device)
        self.slots = Slots.empty(sizes.num_slots, sizes.block_size, device)
        num_rows = max(2 * sizes.num_slots, RESULT_POSITIONS // sizes.result_columns)
        num_rows = min(num_rows, 16 * sizes.num_slots)
        self.results = Results.empty(num_rows, sizes.result_columns, device)
        self.block_table = torch.zeros(sizes.num_slots, sizes.table_width, dtype=torch.int32, device=device)
        self.order = torch.full((sizes.num_slots,), -1, dtype=torch.int32, device=device)
        self.status = empty_status(sizes.num_slots, device)
        self.rotary = rotary_table(sizes.table_width * PAGE, config.head_dim, config.rope_theta, dtype, device)
        pinned = device.type == "cuda"
        # On the host, for two steps in turn.
        self.host_status = [torch.zeros_like(self.status, device="cpu", pin_memory=pinned) for _ in range(2)]
        self.events = [torch.cuda.Event() if pinned else None for _ in range(2)]
        # A plan goes with the last graph that has it.
        self.plans: weakref.WeakValueDictionary[tuple[int, int, int], Plan] = weakref.WeakValueDictionary()
        self.constants: dict[SamplingSettings, Constants] = {}

    def serves(self, sizes: StateSizes, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> bool:
        ours, theirs = dataclasses.astuple(self.sizes), dataclasses.astuple(sizes)
        same = self.kind == (config, dtype, device) and self.sizes.block_size == sizes.block_size
        return same and all(a >= b for a, b in zip(ours, theirs))

    def plan(self, capacity: Capacity) -> Plan:
        """All plans read their order from one place."""
        key = capacity.items, capacity.commits, capacity.head_rows
        plan = self.plans.get(key)
        if plan is None:
            plan = Plan.empty(*key, self.sizes.block_size, self.order.device)
            plan = self.plans[key] = dataclasses.replace(plan, order=self.order[: capacity.items])
        return plan

    def constants_of(self, settings: SamplingSettings, vocab_size: int) -> Constants:
        if settings not in self.constants:
            self.constants[settings] = Constants.of(settings, vocab_size, self.order.device)
        return self.constants[settings]
