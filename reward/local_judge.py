"""A judge that runs here: a causal Hugging Face model, in turn with the engine.

It is read on first use, kept in CPU memory, and on the GPU only while it grades: the caller frees the engine's cache before. Every
process holds a copy of its own.

Sampling noise belongs to the request, not to the batch: what is graded together, as after a kill, does not change a judgement
(but for the rounding of differently padded batches).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.integrations import deepspeed

from common.errors import UserError
from reward.judge_client import JudgeRequest, Sampling
from sample.noise import gumbel, row_keys, sequence_key


class LocalJudge:
    num_retries = 0

    def __init__(
        self, path: str, sampling: Sampling, max_model_len: int, batch_size: int = 32, device: torch.device | str | None = None
    ) -> None:
        """`max_model_len`: tokens of prompt and reply together. `device` None: this process's GPU, if there is one."""
        self.path, self.sampling, self.batch_size = path, sampling, batch_size
        self.max_prompt = max_model_len - sampling.max_tokens
        self.device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        self._model = self._tokenizer = None

    def name(self) -> str:
        return self.path

    def _load(self) -> None:
        if self._model is not None:
            return
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.path)
            with _outside_zero3():
                self._model = AutoModelForCausalLM.from_pretrained(self.path, dtype="auto").eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"model.process_reward_model: {self.path} cannot be read as a language model: {reason}") from None

    def complete(self, requests: Sequence[JudgeRequest], on_reply: Callable[[int, str], None]) -> None:
        """Replies batch by batch, prompts of like length together; the model is on `device` meanwhile."""
        if not requests:
            return
        self._load()
        prompts = [self._prompt_ids(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda n: -len(prompts[n]))  # the longest first: out of memory shows at once
        self._model.to(self.device)
        try:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                replies = self._generate([prompts[n] for n in batch], [requests[n].seed for n in batch])
                for n, reply in zip(batch, replies):
                    on_reply(n, reply)
        finally:
            self._model.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _prompt_ids(self, request: JudgeRequest) -> list[int]:
        prompt = request.prompt
        while True:
            if self._tokenizer.chat_template:
                turn = [{"role": "user", "content": prompt.text()}]
                text = self._tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
                ids = self._tokenizer(text, add_special_tokens=False).input_ids
            else:
                ids = self._tokenizer(prompt.text() + "\n").input_ids
            if len(ids) <= self.max_prompt:
                return ids
            prompt = prompt.shorter()
            if prompt is None:
                raise UserError(
                    f"rollout.reward_model.max_model_len: a prompt to the judge has {len(ids)} tokens, {self.max_prompt} are left "
                    "beside max_generation_token: raise the one, lower the other, or grade smaller chunks (reward_chunk_length)"
                )

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], seeds: list[int]) -> list[str]:
        longest = max(map(len, prompts))
        ends = self._model.generation_config.eos_token_id
        if ends is None:
            ends = self._tokenizer.eos_token_id
        pad = next((one for one in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id) if one is not None), 0)
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.device)  # [N, longest]
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        processors: list[Any] = []
        if self.sampling.temperature > 0:
            processors = [_KeyedSampling(seeds, self.sampling.temperature, longest)]
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=self.sampling.max_tokens, pad_token_id=pad, eos_token_id=ends, use_cache=True
        )
        with _outside_zero3():
            output = self._model.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=LogitsProcessorList(processors)
            )
        return [self._tokenizer.decode(row, skip_special_tokens=True) for row in output[:, longest:]]


@contextmanager
def _outside_zero3() -> Iterator[None]:
    """Where the trainer runs ZeRO-3, transformers would shard this model over the ranks too, and let them generate in step."""
    reference = getattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    config = reference() if reference is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


class _KeyedSampling(LogitsProcessor):
    """Greedy choice over logits / temperature + Gumbel noise is sampling; the noise is a function of (seed, position, id)."""

    def __init__(self, seeds: Sequence[int], temperature: float, prompt_length: int) -> None:
        self.temperature, self.prompt_length = temperature, prompt_length
        self.keys = torch.tensor([sequence_key(seed, "judge", 0) for seed in seeds], dtype=torch.int32)  # [N, 2]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [N, V]."""
        position = torch.full((len(scores),), input_ids.shape[1] - self.prompt_length, device=scores.device)
        keys = row_keys(self.keys.to(scores.device), position, position)
        return scores.float() / self.temperature + gumbel(keys, scores.shape[1])
