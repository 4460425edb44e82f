"""The files that an engine reads: the tensors of a version, and the adapter that probes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import EngineError
from align.protocols.trainer import Publication


def tensor_shapes(files: Sequence[Path], publication: Publication) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in `files`, from their headers alone.

    Raises:
        EngineError: there is no such file, or one of them is not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for file in files:
            with safe_open(file, framework="np") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise EngineError(f"version {publication.version} cannot be read: {error}", where=publication.path) from error
    if not shapes:
        raise EngineError(f"version {publication.version} has no tensors", where=publication.path)
    return shapes


def read_tensors(files: Sequence[Path], dtype: Any) -> Iterator[tuple[str, Any]]:
    """Name and tensor of everything in `files`, one after the other. EngineError where one has another dtype."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                tensor = tensors.get_tensor(name)
                if tensor.dtype != dtype:
                    raise EngineError(
                        f"{name} was published in {tensor.dtype}, the engine computes in {dtype}", where=file
                    )
                yield name, tensor


def unchanged(name: str, files: Sequence[Path], folder: Path) -> Any:
    """The tensor of this name in `files` where it is, bit for bit, what the model folder holds of it, else None.

    An engine leaves out what a model never computes with (a tower's norm after its last layer, in LLaVA): nothing that
    was trained can be among it.
    """
    import torch
    from safetensors import safe_open

    found = []
    for some in (files, sorted(folder.glob("*.safetensors"))):
        for file in some:
            with safe_open(file, framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118
                    found.append(tensors.get_tensor(name))
    if len(found) != 2 or not torch.equal(found[0], found[1].to(found[0].dtype)):
        return None
    return found[0]


def write_probe_adapter(
    folder: Path, like: Path, shapes: Mapping[str, tuple[int, ...]], silent: Collection[str] = ()
) -> None:
    """An adapter of the shape and configuration of the one in `like`, with standard normal weights; those of tensors in
    `silent` are 0."""
    from safetensors.numpy import save_file

    generator = np.random.default_rng(0)
    save_file(
        {
            name: generator.standard_normal(shape, dtype=np.float32) * np.float32(name not in silent)
            for name, shape in shapes.items()
        },
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_bytes((like / "adapter_config.json").read_bytes())
