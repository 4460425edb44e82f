"""Real sets with images and videos, read whole or in slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_vlms import TEMPLATE
from tests.unit.data.media_world import MakeVlm, World

pytestmark = pytest.mark.realdata
VIDEO_TEMPLATE = TEMPLATE.replace("@@", "{{ '<|vision_start|><|' + p.type + '_pad|><|vision_end|>' }}")


@pytest.fixture
def world(vlm: MakeVlm, tmp_path: Path) -> World:
    return World(tmp_path, vlm("qwen2_5_vl"), max_pixels=112 * 112, video_frames=4)


@pytest.mark.parametrize(
    ("file", "kind", "columns", "rows", "media", "distinct"),
    [
        ("easy_vqa/vqa.jsonl", "conversation", {"prompt": "question", "completion": "answer"}, 60, 60, 7),
        ("easy_vqa/preference_pairs.jsonl", "pair", {}, 40, 40, 5),
        ("nlvr/vqa.jsonl", "conversation", {"prompt": "sentence", "completion": "label"}, 30, 30, 30),
        ("nlvr/two_image_vqa.jsonl", "prompt", {"prompt": "question"}, 20, 40, 40),
        ("nlvr/preference_pairs.jsonl", "pair", {}, 30, 30, 30),
        ("receipts/vqa.jsonl", "conversation", {"prompt": "question", "completion": "answer"}, 9, 9, 3),
        ("caption_contest/preference_pairs.jsonl", "pair", {}, 30, 30, 3),
        ("mllm_demo/mllm_demo.json", "conversation", {}, 6, 8, 3),
    ],
)
def test_images_are_found_and_counted(
    file: str, kind: Any, columns: dict[str, str], rows: int, media: int, distinct: int, world: World, shared_data: Path
) -> None:
    path = shared_data / "multimodal" / file
    made = world.prepare(path, kind, columns=columns, limit=rows)
    report = made.report.sources[0]
    assert len(made.items) == rows and not report.refused
    assert report.media["counts"] == {"image": media}
    assert abs(report.media["distinct"] - distinct) <= 3 and world.processed == report.media["distinct"]
    assert report.media["tokens"]["max"] <= 16
    assert sum(len(item.media) for item in made.items) == media


def test_videos_are_decoded_and_sounds_are_refused_with_the_reason(world: World, shared_data: Path) -> None:
    folder = shared_data / "multimodal" / "mllm_demo"
    made = world.prepare(folder / "mllm_video_demo.json", template=VIDEO_TEMPLATE)
    assert made.report.sources[0].media["counts"] == {"video": 3}
    assert all(tree.media[0].length > 0 and tree.media[0].kind == "video" for tree in made.items)
    for name in ("mllm_audio_demo.json", "mllm_video_audio_demo.json"):
        with pytest.raises(Exception, match="the model takes images and videos, and the row has an audio"):
            world.prepare(folder / name, template=VIDEO_TEMPLATE)


def test_a_folder_of_sets_keeps_what_the_model_reads_and_names_the_rest(world: World, shared_data: Path) -> None:
    made = world.prepare(shared_data / "multimodal" / "mllm_demo", template=VIDEO_TEMPLATE, on_bad_row="skip")
    report = made.report.sources[0]
    assert (report.read, report.kept) == (15, 9)
    assert report.media["counts"] == {"image": 8, "video": 3} and report.media["distinct"] == 6
    origins = {Path(row.origin.rsplit(":", 1)[0]).name for row in report.refused}
    assert origins == {"mllm_audio_demo.json", "mllm_video_audio_demo.json"}
    assert all("the row has an audio" in row.reason for row in report.refused)
