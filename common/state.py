"""What a run needs to go on, written so that any number of processes and machines can read it.

trained_<r>_<i>.bin    {name of a weight: {"weight": float32, "exp_avg": ..., ...}}, every tensor whole; r: the rank that wrote it
state.bin              the optimizer's scalars (Adam's count of steps) and the names of its states; random states of every rank

accelerate and DeepSpeed write a file per rank, each on its own machine's disk, cut up for exactly these processes. Here every
weight is put together from the ranks that hold its parts, and the ranks of machine 0, whose run directory it is, write one each in
turn; a reader on machine 0 hands each to all ranks, which keep what is theirs. No other machine needs the run directory, and a run
goes on with other machines, other processes or another ZeRO stage. Values keep every bit.

Of DeepSpeed this knows where a rank's parts are: `_hp_mapping` of a weight (ZeRO-1, 2 and its bfloat16 optimizer) or the
optimizer's `grad_position` (ZeRO-3) say which piece of which flat buffer is whose.
"""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from common import dist
from common.errors import UserError, memory_is_full
from common.run_dir import broken_state

STATE = "state.bin"
FLAT_BUFFERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
"""What DeepSpeed's optimizers (ZeRO-1 and 2, bfloat16, ZeRO-3) call the buffers of this rank."""
WEIGHT = "weight"
MAX_FILE_BYTES = 2 << 30
"""A file is written when its tensors come to this: so many bytes of host memory it takes, per rank of machine 0."""


def save_state(accelerator: Accelerator, folder: Path) -> None:
    """Trained weights, optimizer and random states of what was prepared with `accelerator`, into FOLDER; all ranks together.

    FOLDER need not be there. Frozen weights are where they were read from.
    """
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier(accelerator)
    parts = _parts(accelerator)
    writers = _ranks_of_machine_0(accelerator)
    held: dict[str, dict[str, Tensor]] = {}
    num_bytes = num_files = 0

    def write() -> None:
        nonlocal held, num_bytes, num_files
        if held:
            torch.save(held, folder / f"trained_{accelerator.process_index}_{num_files}.bin")
        held, num_bytes, num_files = {}, 0, num_files + 1

    for index, (name, parameter) in enumerate(parts.parameters()):
        own = {}
        for key in [WEIGHT, *parts.keys()]:
            value = parts.read(parameter, key)
            if accelerator.process_index == index % writers:
                own[key] = value.detach().to("cpu", copy=True).view(parts.shape(parameter))
        if own:
            held[name] = own
            num_bytes += sum(value.nbytes for value in own.values())
            if num_bytes >= MAX_FILE_BYTES:
                write()
    write()
    random_states = dist.gather_objects(accelerator, _random_states())
    if accelerator.is_main_process:
        torch.save({"keys": parts.keys(), "scalars": parts.scalars(), "random": random_states}, folder / STATE)


def load_state(accelerator: Accelerator, folder: Path) -> None:
    """What `save_state` has written, into what is prepared; all ranks together. Only machine 0 reads FOLDER.

    With as many ranks as wrote it each gets its own random states, with more the others stay as they were seeded.
    Raises UserError where FOLDER holds no such state, or one of another model.
    """
    rank, readers = accelerator.process_index, _ranks_of_machine_0(accelerator)
    saved = dist.broadcast_object(accelerator, _read(folder / STATE) if rank == 0 else None)
    own: dict[str, dict[str, Tensor]] = {}
    if rank < readers:
        for file in sorted(folder.glob("trained_*.bin")):
            if int(file.stem.split("_")[1]) % readers == rank:
                own |= _load(file, map_location="cpu", mmap=True)  # read when it is asked for
    reader_of = {name: r for r, names in enumerate(dist.gather_objects(accelerator, list(own))) for name in names}
    parts = _parts(accelerator)
    expected = dict(parts.parameters())
    if reader_of.keys() != expected.keys():
        name = min(reader_of.keys() ^ expected.keys())
        raise UserError(
            f"{folder}: holds the state of other weights ({name} is {'not there' if name in expected else 'not trained here'}): "
            "choose another run directory (experiment.project)"
        )
    parts.begin(saved["scalars"])
    for name, parameter in expected.items():
        for key in [WEIGHT, *saved["keys"]]:
            shape, dtype = parts.shape(parameter), parts.dtype(parameter, key)
            if name in own:
                assert own[name][key].shape == shape, f"{name}: {own[name][key].shape} in {folder}, {shape} here"
                value = own[name][key].to(accelerator.device, dtype)
            else:
                value = torch.empty(shape, dtype=dtype, device=accelerator.device)
            if accelerator.num_processes > 1:
                torch.distributed.broadcast(value, reader_of[name])
            parts.write(parameter, key, value)
    if rank < len(saved["random"]):
        _set_random_states(saved["random"][rank])


def _read(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"{file}: is not there: the state was written by an older version, with which the run can go on")
    return _load(file, weights_only=False)  # the random states of numpy are no tensors


def _load(file: Path, **options: Any) -> Any:
    try:
        return torch.load(file, **options)
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        if memory_is_full(error) is not None:
            raise
        raise broken_state(file, (str(error).strip().splitlines() or [type(error).__name__])[0]) from error


def _ranks_of_machine_0(accelerator: Accelerator) -> int:
    return min(accelerator.num_processes, int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes))


# ---------------------------------------------------------------------------------------------------------- where things are


def _parts(accelerator: Accelerator) -> Whole:
    wrapped, optimizer = accelerator._models[0], accelerator._optimizers[0].optimizer
    kind = Whole if not dist.uses_deepspeed(accelerator) else ByPartition if dist.shards_weights(accelerator) else ByFragment
    return kind(getattr(wrapped, "module", wrapped), optimizer, accelerator.device)


class Whole:
    """Every rank has the whole of everything: one process, DDP."""

    def __init__(self, model: torch.nn.Module, optimizer: Any, device: torch.device) -> None:
        self.model, self.optimizer, self.device = model, optimizer, device
        self.base: torch.optim.Optimizer = optimizer
        """Torch's optimizer, whose state is kept."""

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def holders(self) -> list[Tensor]:
        """The tensors that the optimizer has states of."""
        return [p for _, p in self.parameters()]

    def keys(self) -> list[str]:
        """Names of its states that have an entry for every entry of a weight; none before the first step."""
        state = next((self.base.state[h] for h in self.holders() if self.base.state.get(h)), {})
        return sorted(key for key, value in state.items() if _is_tensor(value))

    def scalars(self) -> dict[str, Any]:
        """Its other states: Adam's count of steps, which all weights share."""
        states = [self.base.state[holder] for holder in self.holders() if self.base.state.get(holder)]
        found = [{key: value for key, value in state.items() if not _is_tensor(value)} for state in states]
        numbers = [{k: float(v) for k, v in scalars.items()} for scalars in found]
        assert all(one == numbers[0] for one in numbers), "weights have been stepped differently often"
        return found[0] if found else {}

    def begin(self, scalars: dict[str, Any]) -> None:
        """Make the states that a first step would have made, if there was one."""
        if not scalars:
            return
        for holder in self.holders():
            state = self.base.state[holder]
            # The tensors come with `write`; their names are those of what is written.
            state.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in scalars.items()})

    def shape(self, parameter: torch.nn.Parameter) -> torch.Size:
        return parameter.shape

    def dtype(self, parameter: torch.nn.Parameter, key: str) -> torch.dtype:
        return parameter.dtype

    def read(self, parameter: torch.nn.Parameter, key: str) -> Tensor:
        """The whole tensor, on every rank; all together."""
        return parameter.data if key == WEIGHT else self.base.state[parameter][key]

    def write(self, parameter: torch.nn.Parameter, key: str, value: Tensor) -> None:
        """Keep of the whole tensor what this rank holds."""
        if key == WEIGHT:
            parameter.data.copy_(value)
        else:
            self.base.state[parameter][key] = value.clone()


class ByFragment(Whole):
    """ZeRO-1, 2: every rank has the weights, and of their float32 copies and states some pieces of flat buffers."""

    def __init__(self, model: torch.nn.Module, optimizer: Any, device: torch.device) -> None:
        super().__init__(model, optimizer, device)
        self.base = optimizer.optimizer
        name = next(name for name in FLAT_BUFFERS if hasattr(optimizer, name))
        self.flats: list[Tensor] = getattr(optimizer, name)

    def holders(self) -> list[Tensor]:
        return self.flats

    def dtype(self, parameter: torch.nn.Parameter, key: str) -> torch.dtype:
        return torch.float32

    def _piece(self, parameter: torch.nn.Parameter, key: str) -> Tensor:
        """This rank's part, as a view of the flat buffer."""
        place = parameter._hp_mapping.hp_fragment_address
        return self._of(self.flats[parameter._hp_mapping.param_group_index], key).narrow(0, place.start, place.numel)

    def _of(self, flat: Tensor, key: str) -> Tensor:
        if key == WEIGHT:
            return flat.data
        state = self.base.state[flat]
        if key not in state:
            state[key] = torch.zeros_like(flat.data)
        return state[key]

    def read(self, parameter: torch.nn.Parameter, key: str) -> Tensor:
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=self.device)
        if parameter._hp_mapping is not None:
            place = parameter._hp_mapping.lp_fragment_address
            whole.narrow(0, place.start, place.numel).copy_(self._piece(parameter, key))
        # Every entry is on one rank. As integers, for -0.0 + 0.0 is 0.0.
        torch.distributed.all_reduce(whole.view(torch.int32), group=parameter._dp_group)
        return whole

    def write(self, parameter: torch.nn.Parameter, key: str, value: Tensor) -> None:
        if parameter._hp_mapping is not None:
            place = parameter._hp_mapping.lp_fragment_address
            self._piece(parameter, key).copy_(value.flatten().narrow(0, place.start, place.numel))
        if key == WEIGHT:
            parameter.data.copy_(value)


class ByPartition(ByFragment):
    """ZeRO-3: of everything, the weights too, every rank has an equal piece, the last one filled up."""

    def shape(self, parameter: torch.nn.Parameter) -> torch.Size:
        return parameter.ds_shape

    def _piece(self, parameter: torch.nn.Parameter, key: str) -> Tensor:
        group, start, numel = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        return self._of(self.flats[group], key).narrow(0, start, numel)

    def read(self, parameter: torch.nn.Parameter, key: str) -> Tensor:
        piece = self._piece(parameter, key).to(self.device)
        group = parameter.ds_process_group
        whole = piece.new_empty(piece.numel() * torch.distributed.get_world_size(group))
        torch.distributed.all_gather(list(whole.split(piece.numel())), piece, group=group)
        return whole[: parameter.ds_numel]

    def write(self, parameter: torch.nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        piece = self._piece(parameter, key)
        first = torch.distributed.get_rank(parameter.ds_process_group) * piece.numel()
        own = value.flatten()[first : first + piece.numel()]
        piece[: own.numel()].copy_(own)
        if key == WEIGHT:
            with GatheredParameters([parameter], modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    parameter.data.copy_(value)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


# ------------------------------------------------------------------------------------------------------------ random states


def _random_states() -> dict[str, Any]:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
