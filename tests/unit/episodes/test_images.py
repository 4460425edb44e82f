"""Images in episodes, of rows, tools, `respond` and `reset`: in the engine and in every forward of the trainer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.data.tokenizer import load_tokenizer
from align.episodes.images import opened_images
from align.episodes.looking import observed
from align.episodes.spec import EpisodeSpec
from align.mediastore import view_path
from align.protocols.fleet import Completion, Sampling
from rollout.base import EngineSpec, Request
from tests.unit.data.media_world import data_uri, picture, png, shown
from tests.unit.episodes import stage
from tests.unit.episodes.album import STOPS, World, call, computed, episode, opened, play, question


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("album"))


# ------------------------------------------------------------------------------------------------- with a real model


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_vl", "internvl", "llava_onevision", "smolvlm")]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", *SLOW])
def test_packed_is_padded_is_alone_is_the_engine_with_images_of_rows_resets_and_turns(
    family: str, tmp_path: Path
) -> None:
    world = World(tmp_path, family)
    rows = [question("What is ", shown("0.png"), " this?"), question("Only text")]
    prompts = world.prompts(*rows)
    assert [len(prompt.media) for prompt in prompts] == [1, 0]
    groups = []
    for args in ({}, {"opens": True}, {"opens": True, "own": True}):
        groups += play(world.spec("transformers", args=args), prompts, max_tokens=60, stop_token_ids=STOPS)
    groups = [replace(g, prompt=replace(g.prompt, group_id=n)) for n, g in enumerate(groups)]
    assert [len(g.prompt.media) for g in groups] == [1, 0, 2, 1, 1, 0], (
        "the images of resets that differ are each's own"
    )
    counts = [[len(c.media) for c in g.completions] for g in groups]
    assert counts == [[2, 2]] * 4 + [[3, 3]] * 2
    for group in groups:
        for completion in group.completions:
            assert completion.sampled is not None
            inside = np.zeros(len(completion.token_ids), bool)
            for medium in completion.media:
                inside[medium.start : medium.start + medium.length] = True
                assert view_path(medium).is_file()
            assert not (inside & completion.sampled).any()
    found = computed(world.model, groups)
    np.testing.assert_allclose(found["packed"], found["padded"], atol=1e-5)
    np.testing.assert_allclose(found["packed"], found["alone"], atol=1e-5)
    np.testing.assert_allclose(found["packed"], found["engine"], atol=1e-4)


# ------------------------------------------------------------------------------------------------- with written replies


def looked(world: World, *hows: str, spec: EngineSpec | None = None) -> tuple[Completion, list[Request]]:
    """An episode that looks so at page 1, 2, ..., a turn each, and then is truncated; what its engine was asked."""
    asked: list[Request] = []
    replies = iter([*(call(n + 1, how) for n, how in enumerate(hows)), "word " * 300])

    def script(text: str, request: Request) -> str:
        asked.append(request)
        return next(replies)

    spec = spec or world.spec(max_turns=len(hows) + 1)
    [group] = play(spec, world.prompts(question("Look.")), 1, stage.Scripted(world.tokenizer, script), max_tokens=200)
    return group.completions[0], asked


def said(completion: Completion) -> list[Any]:
    return [turn["content"] for turn in episode(completion).turns if turn["role"] == "tool"]


@pytest.mark.parametrize("how", ["image", "bytes", "file", "url", "cmyk"])
def test_an_image_of_a_tool_becomes_the_tokens_of_the_processor_and_goes_with_the_next_turn(
    world: World, how: str
) -> None:
    drawn, asked = looked(world, how)
    [medium] = drawn.media
    pad = world.tokenizer.token_id("<|image_pad|>")
    inside = drawn.token_ids[medium.start : medium.start + medium.length]
    assert (medium.length > 3 and (inside == pad).sum() == medium.length - 2) or (inside == pad).all()
    assert (drawn.token_ids == pad).sum() == (inside == pad).sum() and drawn.sampled is not None
    assert not drawn.sampled[medium.start : medium.start + medium.length].any()
    first, second = (request.prompt for request in asked)
    assert first.media == () and second.media[0].key == medium.key
    at = second.media[0].start
    assert second.token_ids[at : at + medium.length].tolist() == inside.tolist()
    assert said(drawn) == [[{"type": "image", "path": str(view_path(medium))}]]
    counts = episode(drawn).counts
    assert (counts["images"], counts["refused_images"], counts["call_errors"]) == (1, 0, 0)


def test_images_stand_among_texts_and_several_in_their_order(world: World) -> None:
    drawn, asked = looked(world, "parts", "image")
    assert [len(request.prompt.media) for request in asked] == [0, 2, 3]
    text = world.tokenizer.decode(drawn.token_ids.tolist(), skip_special_tokens=False)
    one = text.index("Page one: <|vision_start|><|image_pad|>")
    assert one < text.index("\nand two: <|vision_start|><|image_pad|>")
    keys = [medium.key for medium in drawn.media]
    assert keys[2] == keys[1] or len(set(keys)) == 3


def test_text_beside_an_image_becomes_no_token_of_the_template_or_the_processor(world: World) -> None:
    drawn, _ = looked(world, "forged")
    [medium] = drawn.media
    pad = world.tokenizer.token_id("<|image_pad|>")
    [outside] = np.where(drawn.token_ids == pad)
    assert ((outside >= medium.start) & (outside < medium.start + medium.length)).all()
    text = world.tokenizer.decode(drawn.token_ids.tolist(), skip_special_tokens=False)
    assert "<|im_end|><|image_pad|><|vision_start|>" in text, "it is read as letters"


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("damaged", "Look: \nerror: an image was not shown: image data URI is no picture"),
        ("absent", "error: FileNotFoundError"),
        ("large", "error: ValueError: an image of 9,437,184 bytes; 8,388,608 are the most"),
        ("video", "error: an image was not shown: no image"),
    ],
)
def test_what_cannot_be_shown_is_told_and_counted(world: World, how: str, why: str) -> None:
    drawn, asked = looked(world, how)
    assert drawn.media == () and len(asked) == 2
    [told] = said(drawn)
    assert told.startswith(why), told
    counts = episode(drawn).counts
    assert counts["call_errors"] == 1 and counts["images"] == 0
    assert counts["refused_images"] == (how in ("damaged", "video"))


def test_more_than_max_media_are_an_error_that_the_policy_reads(world: World) -> None:
    drawn, asked = looked(world, "image", "parts", spec=world.spec(max_media=2))
    assert [len(request.prompt.media) for request in asked] == [0, 1, 2]
    told = said(drawn)[1]
    assert [part["type"] for part in told] == ["text", "image", "text", "text"]
    assert told[3]["text"] == "\nerror: an image was not shown: at most 2 images an episode are shown"
    counts = episode(drawn).counts
    assert (counts["images"], counts["refused_images"], counts["call_errors"]) == (2, 1, 1)


def test_an_image_beyond_the_budget_of_an_answer_is_told_with_its_size(world: World) -> None:
    spec = world.spec()
    assert isinstance(spec.environment, EpisodeSpec)
    content = [{"type": "image", "image": data_uri(png(picture(60, height)))} for height in (40, 41)]
    with opened_images(spec.environment.sight) as images:
        seen = asyncio.run(observed(images, 0, content, left=9, of=9, tokens=10))
    assert [part["type"] for part in seen.content] == ["image", "text"] and seen.refused == 1
    [one] = seen.shown
    left = 10 - len(one.token_ids)
    assert seen.content[1]["text"].endswith(f" tokens, and an answer may add {left}; make it smaller")


def test_whatever_a_process_sends_as_parts_is_text_or_told(world: World) -> None:
    content = ["words", {"type": "text", "text": 5}, {"type": 7}, {"type": "image", "image": "/etc/hostname"}]
    spec = world.spec()
    assert isinstance(spec.environment, EpisodeSpec)
    with opened_images(spec.environment.sight) as images:
        seen = asyncio.run(observed(images, 0, content, left=9, of=9))
    assert seen.refused == 1 and seen.shown == [], "a path is read by the environment's own process, or not at all"
    assert (
        seen.content.startswith("words5") and "error: an image was not shown: no image with a data URL" in seen.content
    )


def test_a_model_that_sees_none_is_told_so(world: World) -> None:
    drawn, _ = looked(world, "parts", spec=world.spec(sight=False))
    assert drawn.media == () and said(drawn)[0] == (
        "Page one: \nerror: an image was not shown: the model sees no images\n"
        "and two: \nerror: an image was not shown: the model sees no images"
    )


def with_tools(world: World, folder: Path, otherwise: str) -> EngineSpec:
    """An engine whose template writes tools, and of a part that is no text what `otherwise` says."""
    template = (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'text' %}{{ p.text }}{% else %}" + otherwise + "{% endif %}{% endfor %}{% endif %}"
        "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "tools.jinja").write_text(template)
    spec = world.spec(tools_in="template", parser="hermes")
    assert isinstance(spec.environment, EpisodeSpec)
    tokenizer = load_tokenizer(world.model, chat_template=str(folder / "tools.jinja"))
    return replace(spec, environment=replace(spec.environment, tokenizer=tokenizer))


def test_a_template_that_writes_images_of_tools_is_given_them_as_they_are(world: World, tmp_path: Path) -> None:
    spec = with_tools(world, tmp_path, "<|vision_start|><|image_pad|><|vision_end|>")
    drawn, asked = looked(world, "parts", spec=spec)
    assert [len(request.prompt.media) for request in asked] == [0, 2]
    text = world.tokenizer.decode(drawn.token_ids.tolist(), skip_special_tokens=False)
    assert "<|im_start|>tool\nPage one: <|vision_start|><|image_pad|>" in text
    assert [part["type"] for part in said(drawn)[0]] == ["text", "image", "text", "image"]


def test_a_template_that_writes_no_images_of_tools_is_told_of(world: World, tmp_path: Path) -> None:
    drawn, _ = looked(world, "image", spec=with_tools(world, tmp_path, ""))
    assert drawn.media == () and "the chat template writes 0 <|image_pad|> for 1 images" in said(drawn)[0]
    counts = episode(drawn).counts
    assert (counts["images"], counts["refused_images"], counts["call_errors"]) == (0, 1, 1)


def test_images_of_groups_that_were_answered_long_ago_may_leave_the_store(world: World) -> None:
    rows = [question(f"Look {n}.") for n in range(4)]
    spec = world.spec(max_turns=2, kept=2)

    def script(text: str, request: Request) -> str:
        return call(request.prompt.group_id, "image") if not request.prompt.media else "word " * 300

    inner = stage.Scripted(world.tokenizer, script)
    with opened(spec, inner) as engine:
        leases = world.folder / "shown" / "leases"
        for n, one in enumerate(world.prompts(*rows)):
            stage.played(engine, [Request(n, one, 1, Sampling(max_tokens=100))])
        engine._loop._images._thread.submit(int).result()  # what was answered last is noted behind its answer
        [lease] = leases.iterdir()
        assert len(lease.read_text().split()) == 2
    assert not list(leases.iterdir())
