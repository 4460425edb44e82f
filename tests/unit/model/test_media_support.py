"""Which models with more than a language model are taken, by their config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.errors import Unsupported
from align.model.media.support import has_media, refuse_unsupported_media

VISION: dict[str, Any] = {"vision_config": {}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "paligemma", **VISION}, "both ways"),
        ({"model_type": "mllama", **VISION}, "cross-attention"),
        ({"model_type": "gemma4", **VISION, "audio_config": {}}, "masks around its images"),
        ({"model_type": "florence2", **VISION}, "an encoder and a decoder"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"model_type": "qwen2_audio", "audio_config": {}}, "audio alone"),
    ],
)
def test_what_packed_trees_do_not_describe_is_refused_with_the_reason(config: dict[str, Any], said: str) -> None:
    with pytest.raises(Unsupported, match=said) as caught:
        refuse_unsupported_media(config, Path("/models/one"))
    assert "/models/one" in str(caught.value) and "Qwen-VL" in str(caught.value)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "llava_next", "smolvlm"])
def test_families_that_the_probe_judges_pass(name: str) -> None:
    refuse_unsupported_media({"model_type": name, **VISION}, Path("/models/one"))
    assert has_media({"model_type": name, **VISION}) and not has_media({"model_type": "qwen3"})
