"""Images and video in a packed row: read from the store, run through the tower together, and laid where their tokens
stand.

transformers' multimodal models take what their towers give as `mm_encoder_outputs` and do the rest (scatter, deep
features). So a medium is computed once for all rows that hold it, a prompt's image once for its G completions, and all
media of a row in one run. Where neither tower nor projector learns, what they make of a medium never changes, and is
kept between microbatches, passes and epochs.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from align.errors import ModelError
from align.mediastore import read_tensors
from align.protocols.trees import Medium

TILED = 5  # dimensions of pixel values that have an axis of tiles: [images, tiles, C, H, W]
USED = ("pooler_output", "deepstack_features")  # what the models' forwards read of a tower's output


class Placed(NamedTuple):
    """A medium and where its tokens stand in a row: those of them that its features replace, `slots`."""

    medium: Medium
    slots: int


Features = dict[str, dict[str, Any]]  # by key of the medium: the parts of a tower's output that are USED


class MediaFeatures:
    """What one model's towers make of media.

    limit: bytes of features that are kept (on the CPU); 0 keeps none. computed, patches: media that ran through a
    tower since the start, and their patches.
    """

    def __init__(self, model: Any, limit: int):
        self.whole = model.base_model
        self.limit = limit
        self.computed = self.patches = 0
        self.kinds: dict[str, type] = {}  # the class of a tower's output, by modality
        self._kept: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._bytes = 0

    def features(self, placed: Sequence[Placed], device: torch.device) -> Features:
        """What the towers make of media: each computed once, or taken from what is kept; with gradient where they
        learn."""
        constant = self.constant()
        wanted = {p.medium.key: p for p in placed}
        found = {key: self._take(key, device) for key in wanted if constant and key in self._kept}
        missing = [p for key, p in wanted.items() if key not in found]
        # What is kept is computed alone: its last bits then do not depend on what it first stood beside, and a run that
        # is resumed, with nothing kept, goes on as it would have.
        groups = [[p] for p in missing] if constant and self.limit else [missing]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
            for group in (alike for some in groups for alike in _alike(some)):
                found |= self._compute(group, device)
        if constant:
            for p in missing:
                self._keep(p.medium.key, found[p.medium.key])
        return found

    def laid(self, placed: Sequence[Placed], features: Features) -> dict[str, Any]:
        """`mm_encoder_outputs` for media in the order of their tokens; the same medium may stand there many times."""
        return {
            way: self.kinds[way](**_joined([features[p.medium.key] for p in placed if self._way(p.medium) == way]))
            for way in dict.fromkeys(self._way(p.medium) for p in placed)
        }

    def outputs(self, placed: Sequence[Placed], device: torch.device) -> dict[str, Any]:
        """`features` and `laid` at once, for a row that is computed as it is."""
        return self.laid(placed, self.features(placed, device))

    def nothing(self, media: Sequence[Medium], device: torch.device) -> Tensor:
        """0, with a gradient of 0 for the towers, which have run; where nothing of them learns, 0 alone."""
        zero = torch.zeros((), device=device)
        if self.constant():
            return zero
        for medium in media:
            output = self._run(self._way(medium), [read_tensors(medium)], device)
            for value in (getattr(output, name, None) for name in USED):
                zero = zero + sum(0.0 * t.float().sum() for t in _leaves(value))
        return zero

    def _way(self, medium: Medium) -> str:
        """The modality as which the model computes a medium: to some, a video is images (InternVL, SmolVLM)."""
        return medium.kind if hasattr(self.whole, f"get_{medium.kind}_features") else "image"

    def constant(self) -> bool:
        """Whether features never change: nothing of tower and projector learns, has an adapter, or drops anything.

        An adapter that is switched off, in a reference pass, is still an adapter: its parameters look frozen then.
        """
        for module in self.towers():
            if hasattr(module, "lora_A") or any(p.requires_grad for p in module.parameters(recurse=False)):
                return False
            chance = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
            if module.training and isinstance(chance, float) and chance > 0:
                return False
        return True

    def towers(self) -> Iterator[nn.Module]:
        """Every module of the model that is not its language model's."""
        text = self.whole.get_decoder()
        inside = {id(module) for module in text.modules()}
        return (module for module in self.whole.modules() if id(module) not in inside)

    def _compute(self, group: list[tuple[Placed, dict[str, Tensor]]], device: torch.device) -> dict[str, Any]:
        way = self._way(group[0][0].medium)
        output = self._run(way, [tensors for _, tensors in group], device)
        self.computed += len(group)
        self.patches += sum(p.medium.patches for p, _ in group)
        slots = [p.slots for p, _ in group]
        parts: list[dict[str, Any]] = [{} for _ in group]
        for name in USED:
            value = getattr(output, name, None)
            if value is None:
                continue
            layers = name == "deepstack_features"
            cut = [_cut(layer, slots, way) for layer in (value if layers else [value])]
            for n, part in enumerate(parts):
                part[name] = [layer[n] for layer in cut] if layers else cut[0][n]
        return {p.medium.key: part for (p, _), part in zip(group, parts, strict=True)}

    def _run(self, way: str, media: Sequence[dict[str, Tensor]], device: torch.device) -> Any:
        """One run of the tower over several media."""
        run = getattr(self.whole, f"get_{way}_features")
        known = inspect.signature(run).parameters
        output = run(**{n: t.to(device) for n, t in merged(media).items() if n in known}, return_dict=True)
        self.kinds[way] = type(output)
        return output

    def _take(self, key: str, device: torch.device) -> dict[str, Any]:
        self._kept.move_to_end(key)
        return _mapped(self._kept[key], lambda t: t.to(device))

    def _keep(self, key: str, part: dict[str, Any]) -> None:
        size = _size(part)
        if size > self.limit:
            return
        # a copy: a slice of a batch's output would keep the whole of it
        self._kept[key] = _mapped(part, lambda t: t.detach().to("cpu", copy=True))
        self._bytes += size
        while self._bytes > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)


# ------------------------------------------------------------------------------------------------- tensors of media


def _alike(placed: Sequence[Placed]) -> list[list[tuple[Placed, dict[str, Tensor]]]]:
    """Media with their tensors, in groups that one run of a tower takes."""
    groups: dict[Any, list[tuple[Placed, dict[str, Tensor]]]] = {}
    for p in placed:
        tensors = read_tensors(p.medium)
        shapes = tuple((name, t.dim(), t.shape[2 if _tiled(tensors) else 1 :]) for name, t in sorted(tensors.items()))
        groups.setdefault((p.medium.kind, shapes), []).append((p, tensors))
    return list(groups.values())


def _tiled(tensors: dict[str, Tensor]) -> bool:
    return any(t.dim() == TILED and name == "pixel_values" for name, t in tensors.items())


def merged(media: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several media as their processor gives them for all together: one after another, and tiles filled up
    with zeros where images have an axis of them (LLaVA-OneVision, Idefics 3)."""
    assert media, "no media"
    if _tiled(media[0]):
        most = max(one["pixel_values"].shape[1] for one in media)
        media = [{name: _filled(t, most) if t.dim() > 2 else t for name, t in one.items()} for one in media]
    return {name: torch.cat([one[name] for one in media]) for name in media[0]}


def _filled(tensor: Tensor, tiles: int) -> Tensor:
    return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, tiles - tensor.shape[1]))


# ------------------------------------------------------------------------------------------------- features of media


def _cut(value: Any, slots: Sequence[int], way: str) -> list[Any]:
    """A tower's output for several media, medium by medium: a tensor [tiles, n, D] or [n, D], or one [n, D] for each
    image (and each frame of a video)."""
    if isinstance(value, Tensor):
        each = value.shape[1] if value.dim() == 3 else 1
        parts = list(value.split([n // each for n in slots])) if value.shape[0] * each == sum(slots) else []
    else:
        parts, at = [], 0
        for n in slots:
            start = at
            while at < len(value) and sum(len(one) for one in value[start:at]) < n:
                at += 1
            parts.append(tuple(value[start:at]))
        if [sum(len(one) for one in part) for part in parts] != list(slots):
            parts = []
    if len(parts) != len(slots):
        raise ModelError(
            f"the tower gives other features than {way} tokens stand in the row ({sum(slots)})",
            remedy="prepare the data with the processor that belongs to this model",
        )
    return parts


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Features of media one after another, in the layout in which they were cut."""
    found: dict[str, Any] = {}
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        if name == "deepstack_features":
            found[name] = [_cat(list(layer)) for layer in zip(*values, strict=True)]
        else:
            assert value is not None
            found[name] = _cat(values)
    return found


def _cat(values: list[Any]) -> Any:
    if not isinstance(values[0], Tensor):
        return tuple(one for value in values for one in value)
    if len({value.shape[1:] for value in values}) > 1:  # videos of different lengths
        return torch.cat([value.flatten(0, 1) for value in values])[None]
    return torch.cat(values)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(one, change) for name, one in value.items()}
    return type(value)(_mapped(one, change) for one in value)


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)


def _size(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in _leaves(value))
