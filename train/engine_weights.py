"""The weights that the engine samples with while the trainer trains them."""

from __future__ import annotations

from typing import Any

import torch

from common import dist
from models.checkpoint import Pretrained, empty_decoder
from models.decoder import Decoder
from models.lora import attach


class EngineWeights:
    """A decoder that every rank can run alone: ranks sample different prompts, so they meet in no forward.

    Up to ZeRO-2 it is the trainer's own, and nothing is copied. Under ZeRO-3 that one is cut up between the ranks: the engine has a
    second, whole one, which `refresh` fills in place, so that graphs captured over it stay valid.
    """

    def __init__(self, accelerator: Any, model: Pretrained) -> None:
        """model: the one that the trainer has prepared."""
        self.trained = model.decoder
        self.sharded = dist.shards_weights(accelerator)
        self.decoder = model.decoder
        self.version: int | None = None
        """Optimizer steps of the weights that were copied last."""
        if self.sharded:
            dtype = model.decoder.dtype
            self.decoder = empty_decoder(model.family, model.config, dtype, accelerator.device).requires_grad_(False)
            if model.adapter is not None:
                attach(self.decoder, model.family, model.adapter)
                self.decoder.requires_grad_(False)

    @torch.no_grad()
    def refresh(self, version: int) -> None:
        """Make `decoder` hold the trained weights after `version` optimizer steps. Before every use of it, all ranks together."""
        if not self.sharded or version == self.version:
            return
        from deepspeed.runtime.zero import GatheredParameters

        here = all(p.ds_tensor.untyped_storage().nbytes() for p in self.trained.parameters())
        assert here, "the trainer is offloaded: its weights are not on this device"
        pairs = list(zip(parts(self.trained), parts(self.decoder), strict=True))
        for source, target in pairs:  # one part at a time: no rank ever holds a third copy of the whole
            # Frozen weights (LoRA) are copied once.
            moved = {name: p for name, p in source.named_parameters() if p.requires_grad or self.version is None}
            with GatheredParameters(list(moved.values())):
                for name, parameter in moved.items():
                    target.get_parameter(name).copy_(parameter)
        self.version = version


def parts(decoder: Decoder) -> list[torch.nn.Module]:
    """Modules that together hold every weight, each about a layer's size."""
    return [decoder.embed, *decoder.layers, decoder.norm, decoder.lm_head]
