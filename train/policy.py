"""The policy as the trainer runs it: packed rows in, log-probabilities of what they predict out."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.attention import attention_backend
from models.checkpoint import Pretrained
from models.decoder import Decoder
from models.value import VALUE_HEAD, VALUE_HEAD_FILE, ValueHead
from train.logprobs import chunked_logprobs
from train.loop import Trainer
from train.packing import Pack


class Policy(nn.Module):
    """The decoder and its head over predictions only. A module, so that DDP and DeepSpeed wrap the whole forward."""

    def __init__(
        self,
        decoder: Decoder,
        forbidden_ids: list[int],
        temperature: float = 1.0,
        backend: str = "auto",
        head_chunk: int = 2048,
        has_value_head: bool = False,
    ) -> None:
        """temperature: the one that the rollouts were sampled under, so that both log-probs are of one distribution.

        has_value_head: a scalar head of zeros beside the vocabulary's (train/shared_value.py).
        """
        super().__init__()
        self.decoder = decoder
        self.temperature = temperature
        self.backend = backend
        self.head_chunk = head_chunk
        forbidden = torch.tensor(forbidden_ids, dtype=torch.int64)
        self.register_buffer("forbidden", forbidden if len(forbidden) else None, persistent=False)

        self.value_head = ValueHead(decoder) if has_value_head else None

    def forward(self, pack: Pack) -> tuple[Tensor, ...]:
        """Log-probability [M] and entropy [M] of every prediction of the pack, and its value [M] with a value head; float32."""
        attend = attention_backend(self.backend, pack.token_ids, self.decoder.dtype)
        hidden = self.decoder(pack.input_ids, pack.positions, attend)
        project = partial(
            chunked_logprobs,
            targets=pack.targets,
            temperature=self.temperature,
            forbidden=self.forbidden,
            chunk=self.head_chunk,
        )
        rows = hidden.index_select(0, pack.rows)
        logprobs, entropy = self.decoder.lm_head(rows, project)
        if self.value_head is None:
            return logprobs, entropy
        return logprobs, entropy, self.value_head(rows)


def build_policy(model: Pretrained, config: Any, temperature: float) -> Policy:
    """A policy as the config says. temperature: of the rollouts; 1 for supervised finetuning."""
    t = config.training
    policy = Policy(model.decoder, model.forbidden_ids, temperature, t.attention_backend, t.head_chunk, config.model.value_shared)
    head = None if model.source is None else model.source.parent / config.model.optimized_value_name / VALUE_HEAD_FILE
    if policy.value_head is not None and head is not None and head.is_file():  # of the run that the checkpoint is from
        with torch.no_grad():
            policy.value_head.weight.copy_(load_file(head)[VALUE_HEAD])
    return policy


def policy_trainer(model: Pretrained, config: Any, accelerator: Any, temperature: float = 1.0) -> Trainer:
    """The trainer of the policy. In configs with a value model the rate is called policy_learning_rate, else learning_rate."""
    policy = build_policy(model, config, temperature)
    return Trainer(policy, model, config, accelerator, config.optimizer.params.policy_learning_rate)
