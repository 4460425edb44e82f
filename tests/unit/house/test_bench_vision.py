"""The benches of images: what they count, what a padded batch is, and that all sides compute the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align.protocols.trees import Medium, Segment, Tree
from tests.bench import vision, vision_grpo_update, vision_sft_against_trl, work

pytestmark = pytest.mark.slow  # each runs a bench through, at a toy size

TINY = ["--toy", "--repeats", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.write_model(work.TOY, vision.TOY_TOWER, tmp_path_factory.mktemp("vision"), real=False)


@pytest.fixture(scope="module")
def pictures(folder: Path) -> vision.Pictures:
    return vision.Pictures(folder)


def test_counted_operations_of_the_tower_are_those_that_torch_counts(folder: Path, pictures: vision.Pictures) -> None:
    """A picture of one window: attention over all pairs in every block. Its embedding, a convolution, is counted."""
    import torch
    from PIL import Image
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForImageTextToText

    from align.mediastore import read_tensors

    medium = pictures.add("one window", Image.fromarray(np.zeros((112, 112, 3), dtype=np.uint8)))
    assert (medium.length, medium.patches) == (16, 64)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.get_image_features(**read_tensors(medium))
    counted = vision.TOY_TOWER.forward_flop(medium.length, work.TOY.hidden)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_towers_share_is_that_of_qwens_7b() -> None:
    """Per image token, of the language model's matrices: 0.39 there (see `tests.bench.vision`)."""
    layers = work.BENCH.layers * sum(a * b for a, b in work.BENCH.linears().values())
    few = 64  # of a picture so small that attention costs little
    assert vision.TOWER.forward_flop(few, work.BENCH.hidden) / (2 * few * layers) == pytest.approx(0.38, abs=0.03)


def test_a_text_is_spelled_with_its_pictures_tokens(pictures: vision.Pictures) -> None:
    """As the model's own processor spells it."""
    from PIL import Image

    made = [Image.fromarray(np.full((size, 56, 3), 9, dtype=np.uint8)) for size in (56, 112)]
    media = [pictures.add(f"spelled-{k}", picture) for k, picture in enumerate(made)]
    text = f"<|im_start|>a{vision.PICTURE}b{vision.PICTURE}c"
    ids, placed = pictures.spell(text, media)
    whole = pictures.processor(text=[text], images=made, return_tensors="np")
    assert ids.tolist() == whole["input_ids"][0].tolist()
    mark = pictures.processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert [int(ids[m.start - 1]) for m in placed] == [mark] * 2
    assert all((ids[m.start : m.start + m.length] == pictures.pad).all() for m in placed)


def test_padded_batches_hold_every_sequence_with_its_prompt() -> None:
    group = work.random_trees(1, 6, 3, vocabulary=99, branches=3, rollout=True)
    assert [[len(t.branches) for t in window] for window in vision.padded_windows(group, 2, by_length=False)] == [
        [1, 1],
        [1],
    ]
    talks = [Tree(n, Segment(np.arange(n), np.ones(n, dtype=bool))) for n in (7, 3, 5)]
    assert [[t.id for t in w] for w in vision.padded_windows(talks, 2, by_length=False)] == [[7, 3], [5]]
    assert [[t.id for t in w] for w in vision.padded_windows(talks, 2, by_length=True)] == [[3, 5], [7]]
    layout = work.padded_layout(vision.padded_windows(talks, 2, by_length=True), compact_head=True)
    assert (layout.tokens, layout.scored) == (2 * 5 + 7, 15)


def test_a_groups_picture_is_counted_for_every_completion_where_rows_are_padded() -> None:
    (tree,) = work.random_trees(1, 9, 2, vocabulary=99, branches=4, rollout=True)
    tree = replace(tree, trunk=replace(tree.trunk, media=(Medium("image", "k", "s", 1, 4, 16),)))
    assert vision.images_of([tree], once=True) == [4]
    assert vision.images_of([tree], once=False) == [4] * 4


@pytest.mark.parametrize("tower", ["frozen", "trained"])
def test_a_grpo_update_about_a_picture_is_compared_on_the_same_work(
    tower: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--groups", "1", "--group-size", "4", "--batches", "2", "--max-tokens", "256", "--tower", tower]
    figures = vision_grpo_update.main([*TINY, *options])
    printed = capsys.readouterr().out
    assert "same work, padded batches of our engine" in printed and "same work, float32" in printed
    sides = figures["sides"]
    assert set(sides) - {"ours, known", "ours, no cache"} == {"ours", "padded", "TRL"}
    assert ("ours, known" in sides) == (tower == "frozen")
    assert sides["ours"]["tflop"] < sides["padded"]["tflop"] < sides["TRL"]["tflop"]


@pytest.mark.realdata
def test_sft_on_real_questions_is_compared_on_the_same_work(
    shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--share", "0.005", "--select-rows", "4", "--batches", "4", "--max-tokens", "512"]
    figures = vision_sft_against_trl.main([*TINY, *options])
    printed = capsys.readouterr().out
    assert "same work, padded batches of our engine" in printed and "same work, float32" in printed
    assert set(figures["ratio_to"]) == {"TRL", "ours, later epochs", "ours, no cache", "padded", "padded, by length"}
    assert figures["sides"]["ours, later epochs"]["tflop"] < figures["sides"]["ours"]["tflop"]
