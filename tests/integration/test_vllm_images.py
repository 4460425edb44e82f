"""Prompts with pictures in vLLM against transformers' own forward and the trainer's packed one: two families here, all
eight in `tests.prove.prove_vllm_families`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.data.packing import collate, text_positions
from align.errors import EngineError, Unsupported
from align.mediastore import view_path
from align.model.media.placeholders import positions_of
from align.model.policy_module import PolicyModule
from align.protocols.fleet import Group, PromptItem, Sampling
from align.protocols.trainer import Publication
from align.stages.groups import to_trees
from rollout import vllm as calls
from rollout.base import Request, generate
from rollout.vllm_files import write_probe_adapter
from tests.tiny_media import forward_logps, picture
from tests.vllm_families import LANGUAGE, RANK, SAMPLING, TOLERANCE, Family, largest_gap

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm")

TOWER = {"enable_tower_connector_lora": True}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def engine(qwen: Family) -> Iterator[Any]:
    with qwen.engine(lora_rank=RANK, versions=2, engine=TOWER) as engine:
        yield engine


@pytest.fixture(scope="module")
def policy(qwen: Family) -> Any:
    """With LoRA on the language model, the projector and the tower."""
    return qwen.policy("all-linear")


@pytest.fixture(scope="module")
def first(qwen: Family, policy: Any) -> Publication:
    return qwen.adapter(policy)


# ------------------------------------------------------------------------------------------------ parity


def test_the_base_has_the_log_probabilities_of_transformers(qwen: Family, engine: Any) -> None:
    assert largest_gap(engine, qwen.model(), qwen.prompts(), qwen.as_it_is()) < TOLERANCE


def test_adapters_on_language_model_and_tower_are_applied_as_in_transformers(
    qwen: Family, engine: Any, policy: Any, first: Publication
) -> None:
    assert largest_gap(engine, policy, qwen.prompts(), first) < TOLERANCE


def test_the_trainers_packed_forward_has_the_engines_log_probabilities(
    qwen: Family, engine: Any, policy: Any, first: Publication
) -> None:
    engine.publish(first)
    groups = generate(engine, qwen.prompts(), 4, SAMPLING)
    sampled = np.concatenate([c.logps for group in groups for c in group.completions])
    trees = to_trees(groups, np.zeros(16, np.float32), np.zeros(16, dtype=bool))
    assert [tree.media for tree in trees] == [prompt.media for prompt in qwen.prompts()]
    model = policy.get_base_model()
    attention = model.config.get_text_config()._attn_implementation
    with torch.no_grad():
        batch = collate(trees, positions_of(model, text_positions))
        packed = PolicyModule(model)(batch).logps.numpy()
    model.set_attn_implementation({"text_config": attention})
    np.testing.assert_allclose(packed, sampled, atol=TOLERANCE)


def test_scored_sequences_with_pictures_have_the_log_probabilities_that_they_were_sampled_with(
    qwen: Family, engine: Any, first: Publication
) -> None:
    engine.publish(first)
    prompt = qwen.prompts()[2]
    [group] = generate(engine, [prompt], 1, SAMPLING)
    drawn = group.completions[0]
    [seen] = engine.logps([np.concatenate([prompt.token_ids, drawn.token_ids])], [prompt.media])
    np.testing.assert_allclose(seen[len(prompt.token_ids) - 1 :], drawn.logps, atol=1e-5)


# ------------------------------------------------------------------------------------------------ caches


def test_equal_text_after_another_picture_shares_nothing_in_the_prefix_cache(
    qwen: Family, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a prompt runs, the same one finds its blocks in the cache, and one with another picture finds none."""
    engine.publish(qwen.as_it_is())
    long = " and then some more of it" * 8
    same, also, other = (
        qwen.media.prompt([picture(seed), long], number) for number, seed in enumerate((21, 21, 22), start=1)
    )
    assert same.token_ids.tolist() == other.token_ids.tolist()
    assert len(same.token_ids) > calls.block_size(engine._llm)
    cached: dict[str, int] = {}
    step = calls.step

    def watched(llm: Any) -> list[Any]:
        outputs = step(llm)
        cached.update({output.request_id: int(output.num_cached_tokens or 0) for output in outputs})
        return outputs

    monkeypatch.setattr(calls, "step", watched)
    sampling = Sampling(max_tokens=16)
    engine.add([Request(1, same, 1, sampling)])
    engine.step()  # its prompt is read, and its blocks stay
    engine.add([Request(2, also, 1, sampling), Request(3, other, 1, sampling)])
    groups: dict[int, Any] = {}
    while engine.running:
        groups |= dict(engine.step())
    found = [cached[name] for name in sorted(cached, key=int)]
    assert found[0] == 0 and found[1] > 0 and found[2] == 0
    model = qwen.model()
    for group in groups.values():
        mine = forward_logps(model, group.prompt, group.completions[0].token_ids)
        np.testing.assert_allclose(group.completions[0].logps, mine, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------------ refusals


def refused(engine: Any, prompt: PromptItem, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        generate(engine, [prompt], 1, SAMPLING)


def test_a_prompt_that_cannot_be_read_as_the_trainer_reads_it_is_an_error_and_the_engine_goes_on(
    qwen: Family, engine: Any, tmp_path: Path
) -> None:
    engine.publish(qwen.as_it_is())
    prompt = qwen.media.prompt(["a ", picture(31), " b"], 0)
    [medium] = prompt.media
    shorter = replace(medium, length=medium.length - 1)
    cut = replace(prompt, token_ids=np.delete(prompt.token_ids, medium.start + 2), media=(shorter,))
    refused(engine, cut, EngineError, f"makes 8 tokens of a medium of kind image for which the prompt has {9}")
    view_path(medium).rename(tmp_path / "away.png")
    refused(engine, prompt, EngineError, "view of a medium cannot be read")
    (tmp_path / "away.png").rename(view_path(medium))
    many = qwen.media.prompt([picture(n) for n in (31, 32, 33)], 0)
    refused(engine, many, Unsupported, "has 3 media of kind image, the engine was started for 2")
    sound = replace(medium, kind="audio")
    refused(engine, replace(prompt, media=(sound,)), Unsupported, "takes no audio in vLLM")
    [group] = generate(engine, [prompt], 1, SAMPLING)
    assert isinstance(group, Group)


def test_a_tower_whose_adapter_does_nothing_is_caught_at_the_start(
    engine: Any, first: Publication, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The language model's part alone would have passed."""

    def tower_left_out(folder: Path, like: Path, shapes: Any, silent: Any) -> None:
        tower = {name for name in shapes if ".visual." in name}
        write_probe_adapter(folder, like, shapes, {*silent, *tower})

    monkeypatch.setattr(engine._weights, "_probed", False)
    with monkeypatch.context() as patched:
        patched.setattr("rollout.vllm_probe.write_probe_adapter", tower_left_out)
        with pytest.raises(EngineError, match="not applied: one with large random weights on the tower of images"):
            engine.publish(replace(first, version=7))
    assert engine.publish(first) == first.digest


# ------------------------------------------------------------------------------------------------ engines of their own
# (after the tests of the engine above: one that stops takes the process groups of others in its process with it)


def test_merged_weights_of_the_tower_are_what_pictures_are_seen_with_from_then_on(qwen: Family, policy: Any) -> None:
    prompts = qwen.prompts()
    with qwen.engine() as engine:
        base = qwen.as_it_is()
        assert largest_gap(engine, qwen.model(), prompts, base) < TOLERANCE  # now its caches know the pictures
        assert largest_gap(engine, policy, prompts, qwen.weights(policy)) < TOLERANCE


def test_a_family_of_tiles_agrees_with_an_adapter_on_its_language_model(tmp_path: Path) -> None:
    family = Family("internvl", tmp_path)
    policy, prompts = family.policy(LANGUAGE), family.prompts()
    with family.engine(lora_rank=RANK) as engine:
        assert largest_gap(engine, family.model(), prompts, family.as_it_is()) < TOLERANCE
        assert largest_gap(engine, policy, prompts, family.adapter(policy)) < TOLERANCE


def test_an_adapter_on_a_tower_that_the_engine_ignores_is_refused(qwen: Family, first: Publication) -> None:
    with qwen.engine(lora_rank=RANK) as engine, pytest.raises(EngineError, match=r"not applied|ignored the adapter"):
        engine.publish(first)


def test_image_tokens_that_see_each_other_both_ways_are_refused_on_a_cpu(tmp_path: Path) -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM's attention on this device can")
    family = Family("gemma3", tmp_path)
    with pytest.raises(Unsupported, match="see each other both ways"), family.engine():
        pass
