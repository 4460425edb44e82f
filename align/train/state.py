"""Everything of a trainer that a resumed run needs to be the same run: parameters, optimizer, random state.

Tensors are in safetensors, numbers in JSON; nothing here is pickled. Parameters are kept in their training dtype,
beside the adapter or model folder that other programs load.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align.errors import CheckpointError

PARAMETERS, OPTIMIZER, RANDOM, NUMBERS = (
    "parameters.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "trainer.json",
)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def save_state(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    numbers: dict[str, Any],
    random: Sequence[dict[str, Tensor]],
) -> None:
    """Write parameters, optimizer moments, every rank's random state and `numbers` into an existing folder."""
    parameters = trainable(module)
    save_file({k: v.detach().cpu().contiguous() for k, v in parameters.items()}, folder / PARAMETERS)
    moments: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            # 8-bit AdamW counts its steps in an int, and its parameters share their tables: a file cannot
            tensor = torch.as_tensor(value).detach().cpu().contiguous()
            moments[f"{name}|{key}"] = tensor.clone() if key.startswith("qmap") else tensor
    save_file(moments, folder / OPTIMIZER)
    states = {f"{rank}/{name}" if rank else name: s for rank, own in enumerate(random) for name, s in own.items()}
    save_file(states, folder / RANDOM)
    (folder / NUMBERS).write_text(json.dumps(numbers, indent=1))


def load_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0) -> dict[str, Any]:
    """Restore what `save_state` wrote; returns its numbers. Raises CheckpointError where the parameters differ.

    A rank that the checkpoint does not know (it was made on fewer) keeps the random state it has.
    """
    parameters = trainable(module)
    saved = load_file(folder / PARAMETERS)
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())
        raise CheckpointError(
            f"the checkpoint trains other parameters than this stage: {odd[0]} and {len(odd) - 1} more",
            where=folder,
            remedy="resume with the recipe the checkpoint was made with",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if saved[name].shape != parameter.shape:
                raise CheckpointError(
                    f"{name} is {tuple(parameter.shape)} here and {tuple(saved[name].shape)} in the checkpoint",
                    where=folder,
                )
            parameter.copy_(saved[name])
    moments = load_file(folder / OPTIMIZER)
    optimizer.state.clear()
    for key, value in moments.items():
        name, _, field = key.rpartition("|")
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU unless fused on CUDA, as torch's own load_state_dict does.
        device = parameter.device if field != "step" or parameter.is_cuda else torch.device("cpu")
        counts = field == "step" and not value.is_floating_point()
        optimizer.state[parameter][field] = int(value) if counts else value.to(device)
    prefix = f"{rank}/" if rank else ""
    saved_random = load_file(folder / RANDOM)
    _restore_random_state({k.removeprefix(prefix): s for k, s in saved_random.items() if k.startswith(prefix)})
    numbers: dict[str, Any] = json.loads((folder / NUMBERS).read_text())
    return numbers


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
