"""What the vLLM engine reads of files, without vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from align.errors import Unsupported
from align.protocols.trees import Medium
from rollout.vllm_files import unchanged, write_probe_adapter
from rollout.vllm_media import check_extent, pixel_arguments

QWEN = {"merge_size": 2, "size": {"shortest_edge": 3136, "longest_edge": 50176}}


@pytest.mark.parametrize(
    ("pixels", "shortest", "longest"),
    [
        ({"max_pixels": 9000}, 3136, 9000),
        ({"max_pixels": 900}, 900, 900),  # no picture is both smaller than 900 and larger than 3136
        ({"min_pixels": 99000}, 99000, 99000),
        ({"min_pixels": 100, "max_pixels": 200}, 100, 200),
    ],
)
def test_a_processor_that_counts_pixels_has_the_recipes_limits(
    pixels: dict[str, int], shortest: int, longest: int, tmp_path: Path
) -> None:
    expected = {"images_kwargs": {"size": {"shortest_edge": shortest, "longest_edge": longest}}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": QWEN}))
    assert pixel_arguments(tmp_path, pixels) == expected
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))
    old = {"merge_size": 2, "min_pixels": 3136, "max_pixels": 50176}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert pixel_arguments(tmp_path, pixels) == expected


@pytest.mark.parametrize(
    ("frames", "seconds", "fits"), [(2, 1.0, True), (4, 0.25, True), (2, 2.0, False), (4, 1.0, False)]
)
def test_a_video_that_is_longer_than_large_is_refused_where_positions_would_differ(
    frames: int, seconds: float, fits: bool
) -> None:
    """10 x 4 patches, joined by twos: 5 positions in space; 4 positions a second."""
    vision = SimpleNamespace(tokens_per_second=4.0, spatial_merge_size=2)
    config = SimpleNamespace(model_type="qwen2_5_vl", vision_config=vision)
    data = {"video_grid_thw": torch.tensor([frames, 4, 10]), "second_per_grid_ts": torch.tensor(seconds)}
    medium = Medium("video", "key", "/store", 0, 8, 1)
    if fits:
        check_extent(config, data, medium)
        return
    with pytest.raises(Unsupported, match="5 in space"):
        check_extent(config, data, medium)
    config.model_type = "qwen3_vl"  # writes the time of each frame as text
    check_extent(config, data, medium)


def test_a_processor_of_tiles_is_given_no_words_that_it_does_not_know(tmp_path: Path) -> None:
    assert pixel_arguments(tmp_path, {"max_pixels": 9}) == {}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 56, "width": 56}}))
    assert pixel_arguments(tmp_path, {"max_pixels": 9}) == {}


def test_a_tensor_that_an_engine_leaves_out_passes_only_where_nothing_of_it_was_trained(tmp_path: Path) -> None:
    base, sent = tmp_path / "base", tmp_path / "sent"
    base.mkdir()
    sent.mkdir()
    norm = torch.tensor([1.0, 2.0])
    save_file({"norm": norm, "head": norm.clone()}, base / "model.safetensors")
    save_file({"norm": norm.bfloat16(), "head": norm + 1, "more": norm}, sent / "model.safetensors")
    files = [sent / "model.safetensors"]
    found = unchanged("norm", files, base)
    assert found is not None and found.dtype == torch.bfloat16 and found.tolist() == [1.0, 2.0]
    assert unchanged("head", files, base) is None
    assert unchanged("more", files, base) is None


def test_the_silent_part_of_a_probe_is_zero_and_the_rest_is_large(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "adapter_config.json").write_text("{}")
    write_probe_adapter(tmp_path, tmp_path / "like", {"a": (20, 20), "b": (20, 20)}, {"b"})
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found["a"].std() > 0.9 and not found["b"].any()
