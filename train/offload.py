"""Take a trained model off the GPU for a while, and bring it back.

What is moved is storages, not tensors: DeepSpeed's optimizers hold flat buffers and hand out views of them, and every view has to
stay one. So a storage's bytes are copied to the host and the storage is emptied; bringing it back fills it again in place.
(DeepSpeed's own `offload_states` knows neither its bfloat16 optimizer nor torch's Adam.)
"""

from __future__ import annotations

from typing import Any, Iterator

import torch
from torch import Tensor, nn


def tensors_in(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that a module, an optimizer or a container holds, however deep."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        yield from tensors_in(thing.grad if thing.is_leaf else None, seen)
        yield from tensors_in(vars(thing), seen)  # DeepSpeed hangs the partition of a weight on the weight
    elif isinstance(thing, dict):
        for value in list(thing.values()):
            yield from tensors_in(value, seen)
    elif isinstance(thing, (list, tuple, set)):
        for value in list(thing):
            yield from tensors_in(value, seen)
    elif isinstance(thing, nn.Module):
        for tensor in [*thing.parameters(), *thing.buffers()]:
            yield from tensors_in(tensor, seen)
    elif "Optimizer" in type(thing).__name__ or isinstance(thing, torch.optim.Optimizer):  # DeepSpeed's are no torch optimizers
        yield from tensors_in(vars(thing), seen)


class Offloaded:
    """The storages of some things, on the host until `restore`."""

    def __init__(self, things: list[Any], device_type: str) -> None:
        """Empties the storages on devices of that type. Nothing may compute with them until `restore`."""
        self.copies: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        known: set[int] = set()
        seen: set[int] = set()
        for tensor in (t for thing in things for t in tensors_in(thing, seen)):
            if tensor.device.type != device_type or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            if storage.nbytes() == 0 or storage.data_ptr() in known:
                continue
            known.add(storage.data_ptr())
            self.copies.append((storage, storage.cpu() if device_type != "cpu" else storage.clone()))
        for storage, _ in self.copies:
            storage.resize_(0)
        if device_type == "cuda":
            torch.cuda.empty_cache()

    @property
    def num_bytes(self) -> int:
        return sum(copy.nbytes() for _, copy in self.copies)

    def restore(self) -> None:
        for storage, copy in self.copies:
            storage.resize_(copy.nbytes())
            storage.copy_(copy)
        self.copies = []
