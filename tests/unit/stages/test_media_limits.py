"""Limits of the recipe in the processors of written folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.recipe.inputs import Media
from align.stages.media_limits import carry_limits

SIZE = {"shortest_edge": 100, "longest_edge": 5000}


def written(folder: Path, name: str, settings: dict[str, Any], media: Media) -> dict[str, Any]:
    (folder / name).write_text(json.dumps(settings))
    carry_limits(folder, media)
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
def test_a_processor_that_counts_pixels_gets_the_limits(tmp_path: Path, name: str) -> None:
    own = {"merge_size": 2, "size": SIZE, "max_pixels": 5000, "patch_size": 14}
    nested = name == "processor_config.json"
    found = written(tmp_path, name, {"image_processor": own} if nested else own, Media(max_pixels=2000, min_pixels=300))
    settings = found["image_processor"] if nested else found
    assert settings["size"] == {"shortest_edge": 300, "longest_edge": 2000}
    assert settings["max_pixels"] == 2000 and "min_pixels" not in settings and settings["patch_size"] == 14


def test_one_limit_moves_the_other_where_they_would_cross(tmp_path: Path) -> None:
    own = {"merge_size": 2, "size": SIZE}
    found = written(tmp_path, "preprocessor_config.json", own, Media(min_pixels=9000))
    assert found["size"] == {"shortest_edge": 9000, "longest_edge": 9000}
    found = written(tmp_path, "preprocessor_config.json", own, Media(max_pixels=50))
    assert found["size"] == {"shortest_edge": 50, "longest_edge": 50}


def test_other_processors_and_models_of_text_stay_as_they_are(tmp_path: Path) -> None:
    fixed = {"size": {"height": 56, "width": 56}, "merge_size": 2}
    assert written(tmp_path, "preprocessor_config.json", fixed, Media(max_pixels=9)) == fixed
    by_edge = {"size": SIZE}  # the lengths of two edges, no areas
    assert written(tmp_path, "preprocessor_config.json", by_edge, Media(max_pixels=9)) == by_edge
    (tmp_path / "preprocessor_config.json").unlink()
    carry_limits(tmp_path, Media(max_pixels=9))
    assert not list(tmp_path.iterdir())
