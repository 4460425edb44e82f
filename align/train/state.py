"""Everything of a trainer that a resumed run needs to be the same run: parameters, optimizer, random state.

Tensors are in safetensors, numbers in JSON; nothing here is pickled. Parameters are kept in their training dtype,
beside the adapter or model folder that other programs load.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.errors import CheckpointError
from align.oserrors import naming
from align.train.strategy import Strategy, moment_key

PARAMETERS, OPTIMIZER, RANDOM, NUMBERS = (
    "parameters.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "trainer.json",
)


def save_state(folder: Path, strategy: Strategy, numbers: dict[str, Any], random: Sequence[dict[str, Tensor]]) -> None:
    """Write parameters, optimizer moments, every rank's random state and `numbers` into an existing folder, in a form
    that does not depend on how they are spread over ranks. All ranks call it; the one that writes writes."""
    parameters: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, value, own in strategy.state():
        if strategy.shards.writes:
            parameters[name] = value.contiguous()
            moments |= {moment_key(name, key): moment.contiguous() for key, moment in own.items()}
    if not strategy.shards.writes:
        return
    with naming(folder):
        save_file(parameters, folder / PARAMETERS)
        save_file(moments, folder / OPTIMIZER)
    states = {f"{rank}/{name}" if rank else name: s for rank, own in enumerate(random) for name, s in own.items()}
    save_file(states, folder / RANDOM)
    (folder / NUMBERS).write_text(json.dumps(numbers, indent=1))


def load_state(folder: Path, strategy: Strategy, shapes: Mapping[str, torch.Size], rank: int = 0) -> dict[str, Any]:
    """Restore what `save_state` wrote; returns its numbers. Raises CheckpointError where the parameters differ.

    shapes: of the parameters that are trained. A rank that the checkpoint does not know (it was made on fewer) keeps
    the random state it has.
    """
    with safe_open(folder / PARAMETERS, "pt") as one, safe_open(folder / OPTIMIZER, "pt") as other:
        saved, moments = _Stored(one), _Stored(other)
        _require_shapes(saved, shapes, folder)
        strategy.load(saved, moments)
    prefix = f"{rank}/" if rank else ""
    saved_random = load_file(folder / RANDOM)
    _restore_random_state({k.removeprefix(prefix): s for k, s in saved_random.items() if k.startswith(prefix)})
    numbers: dict[str, Any] = json.loads((folder / NUMBERS).read_text())
    return numbers


class _Stored(Mapping[str, Tensor]):
    """Tensors of a file, each read when it is asked for: no rank needs the memory for all."""

    def __init__(self, file: Any):
        self.file, self.names = file, set(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        tensor: Tensor = self.file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(name).get_shape())


def _require_shapes(saved: _Stored, shapes: Mapping[str, torch.Size], folder: Path) -> None:
    if saved.keys() != shapes.keys():
        odd = sorted(saved.keys() ^ shapes.keys())
        raise CheckpointError(
            f"the checkpoint trains other parameters than this stage: {odd[0]} and {len(odd) - 1} more",
            where=folder,
            remedy="resume with the recipe the checkpoint was made with",
        )
    for name, shape in shapes.items():
        if saved.shape(name) != tuple(shape):
            raise CheckpointError(
                f"{name} is {tuple(shape)} here and {saved.shape(name)} in the checkpoint",
                where=folder,
            )


def random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def _restore_random_state(state: dict[str, Tensor]) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda:{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda:{i}"], i)
