"""The policy as the trainer runs it: packed rows in, log-probabilities of what they predict out."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import attention_backend
from models.checkpoint import Pretrained
from models.decoder import Decoder
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
    ) -> None:
        """temperature: the one that the rollouts were sampled under, so that both log-probs are of one distribution."""
        super().__init__()
        self.decoder = decoder
        self.temperature = temperature
        self.backend = backend
        self.head_chunk = head_chunk
        forbidden = torch.tensor(forbidden_ids, dtype=torch.int64)
        self.register_buffer("forbidden", forbidden if len(forbidden) else None, persistent=False)

    def forward(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Log-probability [M] and entropy [M] of every prediction of the pack, float32."""
        attend = attention_backend(self.backend, pack.token_ids)
        hidden = self.decoder(pack.input_ids, pack.positions, attend)
        project = partial(
            chunked_logprobs,
            targets=pack.targets,
            temperature=self.temperature,
            forbidden=self.forbidden,
            chunk=self.head_chunk,
        )
        return self.decoder.lm_head(hidden.index_select(0, pack.rows), project)


def build_policy(model: Pretrained, config: Any, temperature: float) -> Policy:
    """A policy as the config says. temperature: of the rollouts; 1 for supervised finetuning."""
    t = config.training
    return Policy(model.decoder, model.forbidden_ids, temperature, t.attention_backend, t.head_chunk)


def policy_trainer(model: Pretrained, config: Any, accelerator: Any, temperature: float = 1.0) -> Trainer:
    """The trainer of the policy. In configs with a value model the rate is called policy_learning_rate, else learning_rate."""
    policy = build_policy(model, config, temperature)
    return Trainer(policy, model, config, accelerator, config.optimizer.params.policy_learning_rate)
