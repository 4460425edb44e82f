"""Tokens and places of media, for every family: equal to what the family's own processor makes of the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from align.mediastore import read_tensors, view_path
from align.protocols.trees import Medium, Segment
from tests.tiny_vlms import FAMILIES
from tests.unit.data.media_world import MakeVlm, World, chat, shown


def processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def stand_for(segment: Segment, medium: Medium) -> np.ndarray:
    return segment.token_ids[medium.start : medium.start + medium.length]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_rows_with_no_one_and_two_images_have_the_ids_that_the_familys_processor_makes_of_the_whole(
    family: str, vlm: MakeVlm, tmp_path: Path
) -> None:
    folder = vlm(family)
    world = World(tmp_path, folder)
    names = [world.image(f"{i}.png", seed=i, size=size) for i, size in enumerate([(60, 40), (30, 100)])]
    rows = [chat("1+2?"), chat(shown(names[0]), "1+2?"), chat("1+", shown(names[1]), "2 or ", shown(names[0]), "?")]
    trees = world.prepare(rows).items
    theirs = processor(folder)
    for tree, row, pictures in zip(trees, rows, ([], names[:1], [names[1], names[0]]), strict=True):
        text = theirs.apply_chat_template(row["messages"], tokenize=False)
        images = [Image.open(tmp_path / name).convert("RGB") for name in pictures]
        expected = theirs(text=[text], images=images or None, add_special_tokens=False, return_tensors="pt")
        trunk = tree.trunk
        assert trunk.token_ids.tolist() == expected["input_ids"][0].tolist()
        assert len(trunk.media) == len(pictures)
        for medium in trunk.media:
            assert not trunk.loss_mask[medium.start : medium.start + medium.length].any()
            assert medium.patches > 0
        assert trunk.loss_mask.any()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_saved_picture_gives_the_engines_processor_the_same_tokens_and_pixels(
    family: str, vlm: MakeVlm, tmp_path: Path
) -> None:
    folder = vlm(family)
    for limits in ({}, {"max_pixels": 40 * 40, "min_pixels": 20 * 20}):
        world = World(tmp_path, folder, **limits)
        rows = [chat(shown(world.image("a.png", size=(90, 50))), "?")]
        [tree] = world.prepare(rows).items
        [medium] = tree.media
        theirs = processor(folder)
        view = Image.open(view_path(medium))
        kwargs = {}
        if limits and "qwen" in family:
            kwargs["size"] = {"shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]}
        again = theirs(text=[theirs.image_token], images=[view], return_tensors="pt", images_kwargs=kwargs)
        ids = again["input_ids"][0].tolist()
        tokens = stand_for(tree.trunk, medium).tolist()
        assert any(ids[i : i + len(tokens)] == tokens for i in range(len(ids))), "the PNG gives other tokens"
        tensors = read_tensors(medium)
        assert set(tensors) == set(again) - {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
        for name, tensor in tensors.items():
            assert torch.equal(tensor, torch.as_tensor(again[name])), name
        if limits:
            assert view.size[0] * view.size[1] <= limits["max_pixels"]
