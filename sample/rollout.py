"""The rollout stage: tasks -> prompts -> responses, over all ranks. What RL and evaluation share."""

from __future__ import annotations

from typing import Any

from common import dist
from common.errors import UserError
from common.records import Rollout, ScoredRollout, Task
from data.prompts import build_prompt
from models.checkpoint import Pretrained, check_block_size, check_tokenizer
from reward.registry import REWARDS
from sample.engine import Request, SamplingSettings, progress_bar
from sample.queue import ListQueue, SharedQueue


def stop_ids(model: Pretrained, stop_tokens: list[str]) -> list[int]:
    """Ids that end a response: the checkpoint's own and `rollout.stop_token_list`. Raises UserError for an unknown token."""
    ids = set(model.eos_ids)
    vocabulary = model.tokenizer.get_vocab() if stop_tokens else {}  # 150,000 entries, made anew at every call
    for token in stop_tokens:
        if token not in vocabulary:
            raise UserError(f"rollout.stop_token_list: {token!r} is no single token of this model: name one of its special tokens")
        ids.add(vocabulary[token])
    return sorted(ids - {model.mask_id})


def check_decoding(model: Pretrained, decoding: Any, section: str, becomes: int | None = None) -> None:
    """Whether the checkpoint can be sampled from as `section` of the config says: known before its weights are read.

    A block model whose config.json says its block size must be run at it, or at the one that it `becomes` (`model.block_size`).
    Raises UserError.
    """
    check_block_size(model, decoding.block_size, f"{section}.block_size", becomes)
    check_tokenizer(model)
    if not stop_ids(model, decoding.stop_token_list):
        raise UserError(
            f"{section}.stop_token_list: no token ends a response: config.json has no eos_token_id and the tokenizer no eos_token: "
            "name the checkpoint's stop token here"
        )


def sampling_settings(decoding: Any, model: Pretrained, seed: int, step: int = 0) -> SamplingSettings:
    """A `rollout` or evaluation section of the config, with what the model adds to it.

    A task comes again in later epochs and its noise must be new then: `step`, the RL step, is mixed into the seed.
    """
    return SamplingSettings.from_decoding(
        decoding,
        mask_id=model.mask_id,
        stop_ids=stop_ids(model, decoding.stop_token_list),
        forbidden_ids=model.forbidden_ids,
        pad_id=model.fill_id if model.family.attention == "full" else None,
        seed=seed + 1_000_003 * step,
    )


class PromptBuilder:
    """Tasks -> requests, in the model's chat format and with the instruction of the data type's reward."""

    def __init__(self, config: Any, decoding: Any, model: Pretrained) -> None:
        self.reward = REWARDS.get(config.dataset.data_type, "dataset.data_type")
        self.tokenizer, self.chat_style = model.tokenizer, model.family.chat_style
        self.start_with_think, self.max_length = decoding.start_with_think, config.training.max_prompt_len
        self.use_template = config.dataset.use_chat_template

    def __call__(self, tasks: list[Task], num_samples: int) -> tuple[list[Request], list[Task]]:
        """The requests, and the tasks whose prompt is longer than `training.max_prompt_len`: those are not sampled."""
        requests, too_long = [], []
        for task in tasks:
            prompt_ids = build_prompt(
                task, self.reward, self.chat_style, self.tokenizer, self.use_template, self.start_with_think
            )
            if len(prompt_ids) > self.max_length:
                too_long.append(task)
            else:
                requests.append(Request(task.id, prompt_ids, num_samples))
        return requests, too_long


def prompt_too_long(task: Task, block_size: int) -> ScoredRollout:
    """The record of a task that was not sampled: it counts among the dropped."""
    return ScoredRollout(
        task_id=task.id,
        sample=0,
        prompt_ids=[],
        response_ids=[],
        step_map=[],
        logprobs=[],
        entropy=[],
        num_response=0,
        finish="length",
        num_forwards=0,
        weights_version=0,
        block_size=block_size,
        dropped="prompt too long",
    )


def sample_on_all_ranks(
    engine: Any,
    requests: list[Request],
    settings: SamplingSettings,
    accelerator: Any,
    weights_version: int,
    title: str,
    deterministic: bool = False,
) -> list[Rollout]:
    """Every rank samples a part, all get all rollouts, in request and sample order. `title` heads the main process's progress bar.

    The ranks take their work from one shared queue (sample/queue.py), or, `deterministic`, every n-th request of the list. What a
    sequence draws depends on its task, its sample and the seed alone: not on the rank, nor on what is in flight beside it, up to
    the rounding of sums whose order depends on the size of a batch. With `deterministic` the batches too are the same in every
    run of the same job on as many ranks: bit for bit on CPU.
    """
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    counter = dist.SharedCounter(accelerator)
    if deterministic:
        requests_here = requests[rank::num_ranks]
        queue = ListQueue(requests_here)
    else:
        requests_here = requests
        queue = SharedQueue(requests, num_ranks, counter.next)
    with progress_bar(queue.share, title, accelerator.is_main_process) as progress:
        rollouts = engine.generate(requests_here, settings, weights_version, progress, queue)
    shares = dist.gather_objects(accelerator, rollouts)
    counter.close()
    by_task = {(r.task_id, r.sample): r for share in shares for r in share}
    assert len(by_task) == sum(len(share) for share in shares), "a sequence was sampled twice"
    return [by_task[request.task_id, sample] for request in requests for sample in range(request.num_samples)]
