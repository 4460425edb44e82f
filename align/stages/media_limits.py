"""The recipe's limits on pictures, written into a model folder's processor: it is served as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.recipe.inputs import Media

FILES = ("processor_config.json", "preprocessor_config.json")


def carry_limits(folder: Path, media: Media) -> None:
    """Write `media.min_pixels` and `max_pixels` into the image processor of `folder`, where it counts pixels (Qwen's:
    its `size` has two edges that are areas). Others resize as they are made to; there is nothing to write."""
    limits = {"shortest_edge": media.min_pixels, "longest_edge": media.max_pixels}
    for name in FILES:
        file = folder / name
        if not file.is_file():
            continue
        settings = json.loads(file.read_text(encoding="utf-8"))
        if _limit(settings.get("image_processor", settings), limits):
            file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _limit(settings: dict[str, Any], limits: dict[str, int | None]) -> bool:
    """Whether these settings of an image processor were changed."""
    size = settings.get("size")
    wanted = {edge: pixels for edge, pixels in limits.items() if pixels is not None}
    if "merge_size" not in settings or not isinstance(size, dict) or not limits.keys() <= size.keys() or not wanted:
        return False
    size |= wanted
    size["longest_edge"] = max(size["longest_edge"], wanted.get("shortest_edge", 0))
    size["shortest_edge"] = min(size["shortest_edge"], size["longest_edge"])
    old = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    settings.update({key: value for key, value in old.items() if key in settings})
    return True
