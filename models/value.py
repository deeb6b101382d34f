"""The value model: a decoder's trunk with a scalar head on its final-norm hidden states."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoint import Pretrained, load_pretrained, read_tensor, save_pretrained
from models.decoder import Attend, Decoder
from models.lora import read_extra
from models.registry import FAMILIES

VALUE_HEAD = "value_head.weight"
"""Its published name, [1, D]."""
VALUE_HEAD_FILE = "value_head.safetensors"
"""Where a head on a policy's own trunk is kept, beside the policy's checkpoint."""
SETTING = "model.value_base_model"
"""The config key that names the checkpoint."""


class ValueHead(nn.Linear):
    """A row of the decoder's width and precision; its product is float32, for values in bfloat16 would lie up to 2^-8 apart. The
    casts are in the module's own forward, so that sharded weights (ZeRO-3) are gathered around them."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder.config.hidden_size, 1, bias=False, device=decoder.device, dtype=decoder.dtype)
        nn.init.zeros_(self.weight)  # every value is 0 at first: the first advantages are the rewards

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [M], float32, of hidden states [M, D]."""
        return F.linear(hidden.float(), self.weight.float())[:, 0]


class ValueModel(nn.Module):
    """Values of tokens. The trunk has no vocabulary head."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        decoder.lm_head = None
        self.head = ValueHead(decoder)

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend, rows: Tensor) -> Tensor:
        """Values [M], float32, of the tokens at `rows` [M] of a packed row of N tokens."""
        hidden = self.decoder(input_ids, positions, attend)
        return self.head(hidden.index_select(0, rows))


def save_value_model(model: Pretrained, state: dict[str, Tensor], folder: str | os.PathLike) -> None:
    """Write a value model's whole state dict as a checkpoint: the trunk under its published names, and the head."""
    trunk = {name.removeprefix("decoder."): tensor for name, tensor in state.items() if name.startswith("decoder.")}
    save_pretrained(model, trunk, folder, extra={VALUE_HEAD: state["head.weight"]})


def load_value_model(
    name: str, model_base: str, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Pretrained, ValueModel]:
    """A value model from a checkpoint: its own head where it has one, else a head of zeros."""
    ignore = (VALUE_HEAD, FAMILIES.get(model_base, "model.model_base").head_name)
    pretrained = load_pretrained(name, model_base, dtype, device, seed, ignore, setting=SETTING)
    model = ValueModel(pretrained.decoder)
    head: Any = None if pretrained.path is None else read_tensor(pretrained.path, VALUE_HEAD)
    if pretrained.adapter is not None:
        head = read_extra(pretrained.source, VALUE_HEAD)
    if head is not None:
        with torch.no_grad():
            model.head.weight.copy_(head)
    return pretrained, model
