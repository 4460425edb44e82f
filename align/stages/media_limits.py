"""The recipe's limits on pictures, written into a model folder's processor: it is served as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.mediastore import pixel_bounds, processor_files
from align.recipe.inputs import Media


def carry_limits(folder: Path, media: Media) -> None:
    """Write `media.min_pixels` and `max_pixels` into the image processor of `folder`, where it counts pixels (Qwen's:
    its `size` has two edges that are areas). Others resize as they are made to; there is nothing to write."""
    for file in processor_files(folder):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if _limit(settings.get("image_processor", settings), media):
            file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _limit(settings: dict[str, Any], media: Media) -> bool:
    """Whether these settings of an image processor were changed."""
    size, edges = settings.get("size"), {"shortest_edge", "longest_edge"}
    if "merge_size" not in settings or not isinstance(size, dict) or not edges <= size.keys():
        return False
    if media.min_pixels is None and media.max_pixels is None:
        return False
    least, most = pixel_bounds(size["shortest_edge"], size["longest_edge"], media.min_pixels, media.max_pixels)
    size |= {"shortest_edge": least, "longest_edge": most}
    old = {"min_pixels": least, "max_pixels": most}
    settings.update({key: value for key, value in old.items() if key in settings})
    return True
