"""Rows with media: where tags, parts and columns put them, what a row is refused for, and what the report says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from align.data.prepare import prepare
from align.data.tokenizer import load_tokenizer
from align.errors import DataError, ModelError
from align.mediastore import read_frames, tensors_path, view_path
from align.protocols.trees import Segment
from align.recipe.inputs import DataSource
from tests.tiny_vlms import TEMPLATE
from tests.unit.data.media_world import MakeVlm, World, chat, data_uri, encoded, picture, png, shown, write_rows

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture
def world(vlm: MakeVlm, tmp_path: Path) -> World:
    made = World(tmp_path, vlm("qwen2_5_vl"))
    for i, name in enumerate("abc"):
        made.image(f"{name}.png", seed=i, size=(56, 56 + 28 * i))
    return made


def text(world: World, segment: Segment) -> str:
    """The segment's text with each medium's tokens as one [image n] of n tokens."""
    tokenizer = load_tokenizer(world.model)
    out, last = "", 0
    for m in segment.media:
        out += tokenizer.decode(segment.token_ids[last : m.start], False) + f"[{m.kind} {m.length}]"
        last = m.start + m.length
    return out + tokenizer.decode(segment.token_ids[last:], False)


def asked(user: str, *answers: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": "3."}]}


A, B = "<|vision_start|>[image 4]<|vision_end|>", "<|vision_start|>[image 6]<|vision_end|>"


@pytest.mark.parametrize(
    ("row", "user"),
    [
        ({**asked("<image>1+2?"), "images": ["a.png"]}, f"{A}1+2?"),
        ({**asked("1<image>+<image>2?"), "images": ["b.png", "a.png"]}, f"1{B}+{A}2?"),
        ({**asked("1+2?"), "images": ["a.png", "b.png"]}, f"{A}{B}1+2?"),
        ({**asked("1+2?"), "image": "a.png"}, f"{A}1+2?"),
        (chat(shown("a.png"), "1+2?"), f"{A}1+2?"),
        (chat("1+", {"type": "image"}, "2?") | {"images": ["b.png"]}, f"1+{B}2?"),
        (chat({"type": "image_url", "image_url": {"url": data_uri(png(picture(56, 56)))}}, "?"), f"{A}?"),
        (chat({"type": "image", "base64": data_uri(png(picture(56, 56)))[22:]}, "?"), f"{A}?"),
        (chat({"type": "image", "path": "a.png", "text": None}, "?"), f"{A}?"),
        (asked("a tag <image> without any column is text"), "a tag <image> without any column is text"),
        ({"prompt": "1+2?", "completion": "3.", "image": "a.png"}, f"{A}1+2?"),
        ({"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "3."}], "images": "a.png"},
         f"{A}?"),
        ({"instruction": "<image>1+2?", "output": "3.", "images": ["a.png"]}, f"{A}1+2?"),
        ({"query": "<image>1+2?", "response": "3.", "images": ["a.png"]}, f"{A}1+2?"),
    ],
)  # fmt: skip
def test_media_stand_where_tags_parts_and_columns_say(row: dict[str, Any], user: str, world: World) -> None:
    [tree] = world.prepare([row]).items
    expected = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n3.<|im_end|>"
    assert text(world, tree.trunk) == expected
    scored = load_tokenizer(world.model).decode(tree.trunk.token_ids[tree.trunk.loss_mask], False)
    assert scored == "3.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**asked("<image><image>?"), "images": ["a.png"]}, "2 places for images .* and the row has 1"),
        ({**asked("<image>?"), "images": ["a.png", "b.png"]}, "1 places for images .* and the row has 2"),
        ({**asked("<image>?"), "images": []}, "has a <image> tag, and the row has no image"),
        ({**asked("?"), "images": ["a.png", None]}, "an item of `images` is null"),
        ({**asked("?"), "images": ["a.png"], "image": "a.png"}, "two columns of images; use one of them"),
        (chat({"type": "image"}, "?"), "a content part of type 'image' says nowhere what it shows"),
        (chat({"type": "hologram", "x": 1}), "a content part of type 'hologram' .known: text, image"),
        ({**asked("<audio>?"), "audios": ["a.mp3"]}, "the model takes images and videos, and the row has an audio"),
        ({"text": "plain <image>", "images": ["a.png"]}, "a row of plain `text` cannot show media"),
        ({**asked("?"), "images": ["none.png"]}, "there is no file none.png"),
        ({**asked("?"), "images": ["../../x.png"]}, "lies outside the data file's folder"),
        ({**asked("?"), "images": ["http://169.254.169.254/x"]}, "the host 169.254.169.254 is not allowed"),
        ({**asked("?"), "images": [data_uri(b"no picture")]}, "image data URI is no picture that is read"),
        (asked("do <|image_pad|> this"), "holds the text '<|image_pad|>', which the model takes for media"),
        ({"messages": [{"role": "assistant", "content": "3."}], "images": ["a.png"]}, "no user's turn that could show"),
        ({**asked("?"), "images": [data_uri(encoded(picture(2, 900), "PNG"))]}, "the model's processor refuses image"),
    ],
)  # fmt: skip
def test_rows_whose_media_cannot_be_used_say_why(row: dict[str, Any], reason: str, world: World) -> None:
    good = {**asked("?"), "images": ["a.png"]}
    rows = [{"text": "fine"}, row] if "text" in row else [good, row]
    made = world.prepare(rows, on_bad_row="skip")
    [refused] = made.report.refused
    assert re.search(reason.replace("|", r"\|"), refused.reason), refused.reason
    assert refused.row == 1 and refused.origin.endswith("data.jsonl:2")
    assert len(made.items) == 1


def test_a_model_of_text_refuses_rows_with_media(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path, [{**asked("?"), "images": ["a.png"]}])
    with pytest.raises(DataError, match="the row has images, and the model takes text alone"):
        prepare((DataSource(path=str(path)),), "conversation", load_tokenizer(tiny_tokenizer_folder), seed=0)


def test_bytes_in_parquet_and_mapped_columns_are_read(world: World) -> None:
    rows = [{"q": "1+2?", "a": "3.", "pics": [{"bytes": png(picture(56, 56)), "path": None}]}]
    rows.append({"q": "1+1?", "a": "2.", "pics": [{"bytes": None, "path": "b.png"}]})
    pq.write_table(pa.Table.from_pylist(rows), world.folder / "data.parquet")
    columns = {"prompt": "q", "completion": "a", "images": "pics"}
    made = world.prepare(world.folder / "data.parquet", columns=columns).items
    assert [text(world, tree.trunk).split("\n")[1] for tree in made] == [f"{A}1+2?<|im_end|>", f"{B}1+1?<|im_end|>"]
    [one, _] = world.prepare(world.folder / "data.parquet", "prompt", columns=columns).items
    assert one.row["pics"] == [{"bytes": None, "path": None}], "bytes do not travel with samples"


def test_a_prompt_names_for_rewards_the_file_that_shows_each_medium(world: World) -> None:
    row = {"prompt": [{"role": "user", "content": "<image>or<image>?"}], "images": ["a.png", "b.png"], "more": 1}
    [item] = world.prepare([row], "prompt").items
    [message] = item.messages
    paths = [str(view_path(medium)) for medium in item.media]
    assert message["content"] == [
        {"type": "image", "path": paths[0]}, {"type": "text", "text": "or"}, {"type": "image", "path": paths[1]},
        {"type": "text", "text": "?"},
    ]  # fmt: skip
    assert [Image.open(path).size for path in paths] == [(56, 56), (56, 84)]
    assert (
        item.row["more"] == 1
        and [m.length for m in item.media] == [4, 6]
        and [m.patches for m in item.media] == [16, 24]
    )


# ------------------------------------------------------------------------------------------------- pairs


def pair(prompt: Any = None, **more: Any) -> dict[str, Any]:
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    return {**({} if prompt is None else {"prompt": prompt}), **answers, **more}


def test_the_image_of_a_pairs_prompt_stands_once_in_its_trunk(world: World) -> None:
    [tree] = world.prepare([pair([{"role": "user", "content": "<image>?"}], images=["a.png"])], "pair").items
    assert text(world, tree.trunk) == f"<|im_start|>user\n{A}?<|im_end|>\n<|im_start|>assistant\n"
    assert [text(world, b) for b in tree.branches] == ["chosen<|im_end|>", "rejected<|im_end|>"]
    assert len(tree.media) == 1
    plain = {"prompt": "?", "chosen": "a", "rejected": "b", "image": "a.png"}
    [tree] = world.prepare([plain], "pair").items
    assert text(world, tree.trunk) == f"<|im_start|>user\n{A}?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("way", ["parts", "rejected_images", "with a message before"])
def test_sides_that_show_something_else_part_before_it(way: str, world: World) -> None:
    def side(name: str, answer: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": ["1", shown(name), "2?"]}, {"role": "assistant", "content": answer}]

    system = [{"role": "system", "content": "0"}] if way == "with a message before" else []
    row: dict[str, Any] = {"chosen": system + side("a.png", "x"), "rejected": system + side("b.png", "x")}
    if way == "rejected_images":
        row = {**asked("1<image>2?"), "rejected_response": "3.", "images": ["a.png"], "rejected_images": ["b.png"]}
    [tree] = world.prepare([row], "pair").items
    head = "<|im_start|>system\n0<|im_end|>\n" if system else ""
    answer = "3." if way == "rejected_images" else "x"
    assert text(world, tree.trunk) == f"{head}<|im_start|>user\n1<|vision_start|>"
    rest = f"<|vision_end|>2?<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    assert [text(world, b) for b in tree.branches] == [f"[image 4]{rest}", f"[image 6]{rest}"]
    assert not tree.trunk.media and [len(b.media) for b in tree.branches] == [1, 1]
    decoded = [load_tokenizer(world.model).decode(b.token_ids[b.loss_mask], False) for b in tree.branches]
    assert decoded == [f"{answer}<|im_end|>"] * 2


def test_a_rejected_side_may_lack_the_image(world: World) -> None:
    chosen = [{"role": "user", "content": [shown("a.png"), "?"]}, {"role": "assistant", "content": "x"}]
    rejected = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    [tree] = world.prepare([{"chosen": chosen, "rejected": rejected}], "pair").items
    assert text(world, tree.trunk) == "<|im_start|>user\n"
    assert text(world, tree.branches[1]) == "?<|im_end|>\n<|im_start|>assistant\nx<|im_end|>"
    assert tree.branches[0].media and not tree.branches[1].media


# ------------------------------------------------------------------------------------------------- lengths


def test_media_count_in_max_length_and_are_never_cut(world: World) -> None:
    row = {**asked("12<image>34?"), "images": ["c.png"]}
    [whole] = world.prepare([row]).items
    [medium] = whole.media
    n = len(whole.trunk)
    with pytest.raises(DataError, match=f"{n} tokens, more than max_length {n - 1}"):
        world.prepare([row], max_length=n - 1)
    pad = load_tokenizer(world.model).token_id("<|image_pad|>")
    for length in range(6, n, 3):
        [tree] = world.prepare([row], max_length=length, too_long="left").items
        assert len(tree.trunk) <= length
        assert tree.trunk.token_ids.tolist() == whole.trunk.token_ids[-len(tree.trunk) :].tolist()
        places = np.flatnonzero(tree.trunk.token_ids == pad).tolist()
        assert places == [p for m in tree.media for p in range(m.start, m.start + m.length)]
        assert len(places) in (0, medium.length)


@pytest.mark.parametrize("too_long", ["left", "right"])
def test_a_picture_that_goes_with_what_is_cut_is_told(world: World, too_long: str) -> None:
    said = ["<image>1?", "x", "2?", "y", "<image>3?", "z"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    row = {"messages": messages, "images": ["a.png", "c.png"]}
    [whole] = world.prepare([row]).items
    first, second = (medium.start + 1 for medium in whole.media)  # behind a picture's first token
    length = len(whole.trunk) - first if too_long == "left" else second
    made = world.prepare([row, {**asked("4?"), "images": []}], max_length=length, too_long=too_long)
    [tree, _] = made.items
    [kept] = tree.media
    assert kept.key == whole.media[1 if too_long == "left" else 0].key
    media = made.report.sources[0].media
    assert media["counts"] == {"image": 1} and media["cut"] == {"image": 1} and media["first_cut"].endswith(":1")
    assert any("1 image went with what `too_long` cut off" in line for line in made.report.summary)
    assert not world.prepare([row]).report.sources[0].media["cut"]


# ------------------------------------------------------------------------------------------------- the store


def test_equal_images_are_processed_once_and_never_again(world: World) -> None:
    rows = [{**asked(f"{i}?"), "images": ["a.png"]} for i in range(5)] + [chat(shown("b.png"))]
    made = world.prepare(rows)
    assert world.processed == 2 and made.report.sources[0].media["distinct"] == 2
    world.prepare(rows, "prompt")
    assert world.processed == 0
    keys = {tree.media[0].key for tree in made.items}
    assert len(keys) == 2 and all(tensors_path(world.store, key).is_file() for key in keys)


def test_an_edited_image_is_noticed_and_so_is_a_lost_one(world: World, tmp_path: Path) -> None:
    rows, cache = [{**asked("?"), "images": ["a.png"]}], tmp_path / "cache"
    [first] = world.prepare(rows, cache=cache).items
    [again] = world.prepare(rows, cache=cache).items
    assert world.processed == 0 and again.media == first.media
    assert (again.trunk.token_ids == first.trunk.token_ids).all()
    tensors_path(world.store, first.media[0].key).unlink()
    [restored] = world.prepare(rows, cache=cache).items
    assert world.processed == 1 and restored.media == first.media
    world.image("a.png", seed=77, size=(84, 84))
    [edited] = world.prepare(rows, cache=cache).items
    assert edited.media[0].key != first.media[0].key and edited.media[0].length == 9


def test_limits_are_part_of_what_a_medium_is(vlm: MakeVlm, tmp_path: Path) -> None:
    row = [{**asked("?"), "images": ["a.png"]}]
    sizes = []
    for limits in ({}, {"max_pixels": 56 * 56}, {"min_pixels": 140 * 140}):
        world = World(tmp_path, vlm("qwen2_5_vl"), **limits)
        world.image("a.png", size=(84, 84))
        [tree] = world.prepare(row).items
        sizes.append((Image.open(view_path(tree.media[0])).size, tree.media[0].length))
    assert sizes == [((84, 84), 9), ((56, 56), 4), ((140, 140), 25)]


# ------------------------------------------------------------------------------------------------- templates and videos

PARTS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content if p.type == 'image' %}"
    + IMAGE
    + "{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRINGS_ONLY = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_a_template_that_reads_only_parts_gets_parts(world: World) -> None:
    rows = [{**asked("1<image>2?"), "images": ["a.png"]}, asked("1+2?")]
    one, other = world.prepare(rows, template=PARTS_ONLY).items
    assert text(world, one.trunk) == f"<|im_start|>user\n{A}12?<|im_end|>\n<|im_start|>assistant\n3.<|im_end|>\n"
    assert text(world, other.trunk).startswith("<|im_start|>user\n1+2?<|im_end|>")
    assert load_tokenizer(world.model).decode(other.trunk.token_ids[other.trunk.loss_mask], False) == "3.<|im_end|>"


def test_a_template_that_writes_no_placeholder_is_named(world: World) -> None:
    with pytest.raises(DataError, match=r"writes 0 <\|image_pad\|> for 1 images; name a template that knows"):
        world.prepare([{**asked("?"), "images": ["a.png"]}], template=STRINGS_ONLY)


VIDEO_TEMPLATE = TEMPLATE.replace("@@", "{{ '<|vision_start|><|' + p.type + '_pad|><|vision_end|>' }}")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_video_becomes_its_frames(family: str, vlm: MakeVlm, tmp_path: Path) -> None:
    world = World(tmp_path, vlm(family), video_frames=4)
    frames = [world.image(f"{i}.png", seed=i, size=(64, 64)) for i in range(6)]
    row = {**asked("<video>what?"), "videos": [frames]}
    [tree] = world.prepare([row], template=VIDEO_TEMPLATE).items
    [medium] = tree.media
    assert medium.kind == "video" and medium.length > 4 and medium.patches > 0
    kept = read_frames(medium)
    assert kept.shape[0] == 4 and kept.dtype == np.uint8
    tokens = tree.trunk.token_ids[medium.start : medium.start + medium.length]
    pad = load_tokenizer(world.model).token_id("<|video_pad|>")
    assert int((tokens == pad).sum()) * 4 == medium.patches
    report = world.prepare([row], template=VIDEO_TEMPLATE).report.sources[0].media
    assert report["counts"] == {"video": 1}


# ------------------------------------------------------------------------------------------------- the report


def test_the_report_counts_sizes_tokens_conversions_and_refusals(world: World) -> None:
    (world.folder / "p.png").write_bytes(encoded(picture(56, 56).quantize(16), "PNG"))
    (world.folder / "k.jpg").write_bytes(encoded(picture(112, 56).convert("CMYK"), "JPEG"))
    (world.folder / "broken.png").write_bytes(png()[:100])
    names = ["a.png", "a.png", "p.png", "k.jpg", "broken.png"]
    report = world.prepare([{**asked("?"), "image": name} for name in names], on_bad_row="skip").report
    media = report.sources[0].media
    assert media["counts"] == {"image": 4} and media["distinct"] == 3 and media["processed"] == 4
    assert media["tokens"] == {"min": 4, "median": 4.0, "max": 8, "sum": 20}
    assert media["source_sizes"] == ["56x56", "56x56", "112x56"] and media["converted"] == {"palette": 1, "CMYK": 1}
    assert list(media["refused"].values()) == [1] and "broken.png is truncated" in next(iter(media["refused"]))
    lines = "\n".join(report.summary)
    assert "media: 4 images (3 different), sizes 56x56/56x56/112x56 -> 56x56/56x56/112x56" in lines
    assert "tokens each 4/4/8 (min/median/max)" in lines and "converted: 1 CMYK, 1 palette" in lines
    assert "1 row refused for their media" in lines


def test_a_folder_without_a_processor_says_what_to_copy(vlm: MakeVlm, tmp_path: Path) -> None:
    from align.data.media.process import Processor

    with pytest.raises(ModelError, match="processor"):
        Processor(tmp_path)
