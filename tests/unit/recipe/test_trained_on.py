"""What a model folder says of its own weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.recipe.trained_on import quantisation

PACKED = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"quantization_config": PACKED}, PACKED),
        ({"text_config": {"quantization_config": PACKED}}, PACKED),  # a model that sees keeps it there
        ({"text_config": {}, "quantization_config": None}, None),
        ({}, None),
    ],
)
def test_packed_weights_are_told_from_weights_in_full_precision(tmp_path: Path, config: Any, found: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantisation(tmp_path) == found


def test_a_folder_without_configuration_is_of_full_precision(tmp_path: Path) -> None:
    assert quantisation(tmp_path) is None
