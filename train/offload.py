"""Take what only the update needs off the GPU during the rollout, and bring it back, bit for bit.

What is moved is storages, not tensors: DeepSpeed's optimizers hold flat buffers and hand out views of them, and every view has to
stay one. So a storage's bytes are copied to the host and the storage is emptied; bringing it back fills it again in place.
(DeepSpeed's own `offload_states` knows neither its bfloat16 optimizer nor torch's Adam.) The host's buffers are pinned, which makes
a copy several times faster, and are kept from step to step, for pinning takes longer than copying. What is all zeros, as sums
of gradients are behind a step, takes no place on the host.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Iterator, Sequence

import torch
from torch import Tensor, nn

from common.errors import warn
from common.launch import local_world_size
from models.memory import free_host_memory, free_memory

if TYPE_CHECKING:
    from common.dist import Stopwatch
    from train.loop import Trainer

GIB = 2**30
CHUNK_BYTES = GIB
"""Of a host buffer. A power of two: torch rounds what it pins up to one."""
HOST_SHARE = 0.8
"""Of the free host memory, what all ranks of a machine may fill by themselves."""


# ---------------------------------------------------------------------------------------------------- storages, to the host


def tensors_in(thing: Any, seen: dict[int, Any]) -> Iterator[Tensor]:
    """Every tensor that a module, an optimizer or a container holds, however deep. seen: what has been looked at, by its id."""
    if id(thing) in seen:
        return
    seen[id(thing)] = thing  # kept alive, so that its id is no other's
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
    elif isinstance(thing, torch.optim.Optimizer) or "Optimizer" in type(thing).__name__:  # DeepSpeed's are none of torch's
        yield from tensors_in(vars(thing), seen)


class HostBuffer:
    """Memory of the host that grows and is never given back, in chunks; addressed by the byte."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.chunks: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        return sum(chunk.numel() for chunk in self.chunks)

    def grow_to(self, num_bytes: int) -> None:
        while (missing := num_bytes - self.num_bytes) > 0:
            if self.chunks and self.chunks[-1].numel() < CHUNK_BYTES:  # only the last one is ever smaller
                missing += self.chunks.pop().numel()
            self.chunks.append(self._allocate(min(CHUNK_BYTES, 1 << (missing - 1).bit_length())))

    def _allocate(self, num_bytes: int) -> Tensor:
        if self.pinned:
            try:
                return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                warn(f"no more host memory could be pinned ({reason}): states go to the host and back more slowly")
                self.pinned = False
        return torch.empty(num_bytes, dtype=torch.uint8)

    def pieces(self, start: int, num_bytes: int) -> Iterator[Tensor]:
        """Those bytes, chunk by chunk."""
        while num_bytes:
            chunk, first = self.chunks[start // CHUNK_BYTES], start % CHUNK_BYTES
            piece = chunk[first : first + num_bytes]
            yield piece
            start, num_bytes = start + piece.numel(), num_bytes - piece.numel()


@dataclass
class Moved:
    """One storage that is, or is about to be, on the host."""

    storage: torch.UntypedStorage
    num_bytes: int
    start: int | None
    """Where in the host's buffer; None: it is not there."""
    is_zero: bool = False
    """It is all zeros."""


class HostCopy:
    """What was offloaded of one model's training: storages emptied on their device, and a copy of their bytes on the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = HostBuffer(pinned=device.type == "cuda")
        self.moved: list[Moved] = []

    @property
    def num_bytes(self) -> int:
        """That are off the device now."""
        return sum(one.num_bytes for one in self.moved)

    @torch.no_grad()
    def offload(self, things: list[Any], stays: list[Any], scratch: Sequence[Any] = (), new_host_bytes: float = math.inf) -> bool:
        """Empty all storages on the device that `things` hold and `stays` do not: nothing may compute with them until `reload`.

        scratch: what nobody reads before it is written, so its contents are not kept. new_host_bytes: what the host's buffers may
        grow by; False, with nothing moved, where that is too little.
        """
        assert not self.moved, "offloaded already"
        self._synchronize()  # whoever still writes to them on another stream
        seen: dict[int, Any] = {}
        known = {t.untyped_storage().data_ptr() for thing in stays for t in tensors_in(thing, seen) if self._is_here(t)}
        moved, start = [], 0
        for group, is_kept in ((scratch, False), (things, True)):
            seen = {}
            for tensor in (t for thing in group for t in tensors_in(thing, seen) if self._is_here(t)):
                storage = tensor.untyped_storage()
                if storage.nbytes() == 0 or storage.data_ptr() in known:
                    continue
                known.add(storage.data_ptr())
                is_zero = is_kept and _is_zero(storage)
                goes = is_kept and not is_zero
                moved.append(Moved(storage, storage.nbytes(), start if goes else None, is_zero))
                start += storage.nbytes() if goes else 0
        if start - self.host.num_bytes > new_host_bytes:
            return False
        self.host.grow_to(start)
        for one in moved:
            for piece, copy in self._pairs(one):
                copy.copy_(piece, non_blocking=True)
        self._synchronize()
        self.moved = moved  # from here on `reload` mends whatever an interrupt leaves
        for one in moved:
            one.storage.resize_(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    @torch.no_grad()
    def reload(self) -> None:
        """Fill them again; nothing to do where none is offloaded."""
        for one in self.moved:
            one.storage.resize_(one.num_bytes)
            if one.is_zero:
                _bytes_of(one.storage).zero_()
            for piece, copy in self._pairs(one):
                piece.copy_(copy, non_blocking=True)
        if self.moved:
            self._synchronize()
        self.moved = []

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device.type and tensor.layout == torch.strided

    def _pairs(self, one: Moved) -> Iterator[tuple[Tensor, Tensor]]:
        """(piece of the storage, its place on the host), uint8."""
        if one.start is None:
            return
        content, first = _bytes_of(one.storage), 0
        for copy in self.host.pieces(one.start, one.num_bytes):
            yield content[first : first + copy.numel()], copy
            first += copy.numel()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """uint8 [bytes], the storage itself."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _is_zero(storage: torch.UntypedStorage) -> bool:
    """Whether every bit is 0, so not where a float is -0.0."""
    content = _bytes_of(storage)
    return not (content.view(torch.int64) if content.numel() % 8 == 0 else content).any()


# ----------------------------------------------------------------------------------------------- who is offloaded, and when


class Frozen:
    """A model that is never trained and that only the update reads, in the place of a trainer."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.host_copy = module, HostCopy(device)

    @property
    def is_offloaded(self) -> bool:
        return bool(self.host_copy.moved)

    def offload(self, keeps_weights: bool, new_host_bytes: float = math.inf) -> bool:
        """As `Trainer.offload`."""
        return self.host_copy.offload([self.module], [self.module] if keeps_weights else [], new_host_bytes=new_host_bytes)

    def reload(self) -> None:
        self.host_copy.reload()


class RolloutOffload:
    """What is offloaded while the engine samples: of every trainer that may, the optimizer's states, gradients, and weights that no
    engine reads. Offloaded before the engine takes memory for its cache, reloaded before an update or a state is written.

    auto: it pays where the free memory does not hold the keys and values of all sequences that may be in flight, beside the
    engine's workspace: fewer would be then. Every rank decides for itself: nothing here is collective.
    """

    def __init__(self, watch: Stopwatch, device: torch.device) -> None:
        self.watch, self.device = watch, device
        self.trainers: list[tuple[Trainer | Frozen, str, bool]] = []
        self.wanted_bytes = 0.0
        """By the engine to have all in flight (train/memory_engine.py)."""
        self.most_bytes = 0
        """That were off the device at a time, since `take_metrics`."""
        self.has_warned = False

    def add(self, trainer: Trainer | Frozen, choice: str, keeps_weights: bool) -> None:
        """choice: auto, always or never; keeps_weights: the engine samples with this trainer's own. Who is added first, is
        offloaded first."""
        self.trainers.append((trainer, choice, keeps_weights))

    def offload(self) -> None:
        """As often as one likes: a step may have several rounds of rollouts. The engine has its weights."""
        for trainer, choice, keeps_weights in self.trainers:
            is_short = self.device.type == "cuda" and free_memory(self.device) < self.wanted_bytes
            if trainer.is_offloaded or not (choice == "always" or (choice == "auto" and is_short)):
                continue
            most = math.inf if choice == "always" else self._new_host_bytes()
            with self.watch("offload"):
                has_room = trainer.offload(keeps_weights, most)
            if not has_room and not self.has_warned and self._speaks_for_the_machine():
                self.has_warned = True
                warn(
                    "memory: sampling would be faster with optimizer states on the host meanwhile, but of its memory only "
                    f"{free_host_memory() / GIB:.0f} GiB are free: they stay (training.offload_optimizer=always moves them even so)"
                )
        self.most_bytes = max(self.most_bytes, sum(trainer.host_copy.num_bytes for trainer, _, _ in self.trainers))

    def reload(self) -> None:
        if any(trainer.is_offloaded for trainer, _, _ in self.trainers):
            with self.watch("offload"):
                for trainer, _, _ in self.trainers:
                    trainer.reload()

    def take_metrics(self) -> dict[str, float]:
        """GiB that were off this rank's device in this step, where any were."""
        most, self.most_bytes = self.most_bytes, sum(trainer.host_copy.num_bytes for trainer, _, _ in self.trainers)
        return {"memory/offloaded_gib": most / GIB} if most else {}

    def _speaks_for_the_machine(self) -> bool:
        """Its ranks share one host: one warning is enough."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def _new_host_bytes(self) -> float:
        """This rank's part of what the host has free."""
        return HOST_SHARE * free_host_memory() / local_world_size()
