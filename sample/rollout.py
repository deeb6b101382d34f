"""The rollout stage: tasks -> prompts -> responses, over all ranks. What RL and evaluation share."""

from __future__ import annotations

from typing import Any, Callable

from common import dist
from common.errors import UserError
from common.records import Rollout, Task
from models.checkpoint import Pretrained
from sample.engine import Request, SamplingSettings


def stop_ids(model: Pretrained, stop_tokens: list[str]) -> list[int]:
    """Ids that end a response: the checkpoint's own and `rollout.stop_token_list`. Raises UserError for an unknown token."""
    ids = set(model.eos_ids)
    for token in stop_tokens:
        found = model.tokenizer.convert_tokens_to_ids(token)
        if found is None or found == model.tokenizer.unk_token_id:
            raise UserError(f"rollout.stop_token_list: {token!r} is not a token of this model: name one of its special tokens")
        ids.add(found)
    return sorted(ids - {model.mask_id})


def check_block_size(model: Pretrained, block_size: int, setting: str) -> None:
    """A checkpoint that says its block size must be run at it (block models). Raises UserError."""
    trained = model.family.config_block_size(model.config)
    if model.family.attention == "block" and trained is not None and trained != block_size:
        raise UserError(f"{setting}: {block_size}, but the checkpoint was trained at block size {trained}: set it to {trained}")


class PromptBuilder:
    """Tasks -> requests: renders prompts, drops those longer than `max_length` and remembers which."""

    def __init__(self, render: Callable[[Task], list[int]], max_length: int | None) -> None:
        self.render, self.max_length = render, max_length
        self.dropped: list[str] = []

    def __call__(self, tasks: list[Task], num_samples: int) -> list[Request]:
        requests = []
        for task in tasks:
            prompt_ids = self.render(task)
            if self.max_length is not None and len(prompt_ids) > self.max_length:
                self.dropped.append(task.id)
                continue
            requests.append(Request(task.id, prompt_ids, num_samples))
        return requests


def sample_on_all_ranks(
    engine: Any,
    requests: list[Request],
    settings: SamplingSettings,
    accelerator: Any,
    weights_version: int,
    progress: Callable[..., None] | None = None,
) -> list[Rollout]:
    """Every rank samples its share (requests dealt out by index); all get all rollouts, in request and sample order.

    What a sequence draws depends on its task, sample and the seed alone, so the number of ranks changes nothing.
    """
    own = requests[accelerator.process_index :: accelerator.num_processes]
    rollouts = engine.generate(own, settings, weights_version=weights_version, progress=progress)
    by_task = {(r.task_id, r.sample): r for r in dist.gather_objects(rollouts)}
    return [by_task[request.task_id, sample] for request in requests for sample in range(request.num_samples)]
