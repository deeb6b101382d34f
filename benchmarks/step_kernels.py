"""Times of the kernels around the forward of a step: plan, sampler, reveal. One GPU.

    python -m benchmarks.step_kernels --items 128 --vocab 151936
"""

from __future__ import annotations

import argparse
from typing import Callable

import torch

from benchmarks.kernels import microseconds
from sample.engine import SamplingSettings
from sample.kernels.plan import make_plan
from sample.kernels.reveal import reveal_and_advance
from sample.kernels.sampler import draw_rows
from sample.slots import Constants, Plan, Results, Slots, empty_status


def step_kernel_cases(items: int = 128, vocab_size: int = 151_936, block_size: int = 4) -> dict[str, Callable[[], object]]:
    """Name -> what to time. All items run, with 2 and 3 masked positions in turn, and a third of them commits: 2.5 * items rows."""
    device = torch.device("cuda")
    settings = SamplingSettings(max_tokens=1000, mask_id=vocab_size - 1, forbidden_ids=(vocab_size - 1,), block_size=block_size)
    slots, results = Slots.empty(items, block_size, device), Results.empty(items, 1024, device)
    place, item = torch.arange(block_size, device=device), torch.arange(items, device=device)
    slots.masked.copy_(place < 2 + item[:, None] % 2)
    slots.active.fill_(True)
    slots.start.copy_(item % 200 * block_size + 200)
    slots.commit.copy_(item % 3 == 0)
    slots.result_row.copy_(item)
    rows = int(slots.masked.sum())
    plan, status = Plan.empty(items, -(-items // 2), rows, block_size, device), empty_status(items, device)
    plan.order.copy_(item)
    table = torch.arange(items * 32, dtype=torch.int32, device=device).view(items, 32) + 1
    constants = Constants.of(settings, vocab_size, device)
    logits = 3.0 * torch.randn(rows, vocab_size, device=device)
    make_plan(slots, table, plan)
    assert int(plan.num_head) == rows

    def sampler(**changes: object) -> Callable[[], object]:
        s = SamplingSettings(max_tokens=1000, mask_id=0, **changes)
        return lambda: draw_rows(logits, plan.row_keys, s, constants.forbidden, plan.num_head)

    draws = sampler()()
    return {
        f"plan, {items} items": lambda: make_plan(slots, table, plan),
        f"sampler, {rows} x {vocab_size}": sampler(),
        f"sampler, {rows} x {vocab_size}, temperature 0.7": sampler(temperature=0.7),
        f"sampler, {rows} x {vocab_size}, greedy": sampler(greedy=True),
        f"sampler, {rows} x {vocab_size}, margin": sampler(target="margin_confidence"),
        f"reveal, {items} items": lambda: reveal_and_advance(slots, plan, draws, constants, settings, results, status),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--block-size", type=int, default=4)
    arguments = parser.parse_args()
    for name, case in step_kernel_cases(arguments.items, arguments.vocab, arguments.block_size).items():
        print(f"{name:<55}{microseconds([case]):9.1f} us")


if __name__ == "__main__":
    main()
