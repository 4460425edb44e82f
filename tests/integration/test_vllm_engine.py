"""The vLLM engine against transformers and against itself in another process. Two engines are started here, one after
the other (adapters, whole weights), and one more in a Ray actor."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.errors import AlignError, DataError, EngineError, RecipeError, SetupError, Unsupported
from align.export.soup import soup
from align.model.adapters import attach, digest, merged_state, save, use_adapter, weights_digest
from align.protocols.fleet import Completion, FailedPrompt, Group, PromptItem, Sampling, group_seed
from align.protocols.trainer import Publication
from align.protocols.trees import Tree
from align.recipe.adapter import Adapter
from align.stages.monitor import Monitor
from rollout.base import EngineSpec, Request, check_engine_options, generate, make_engine
from rollout.fleet import RayFleet
from rollout.local_fleet import LocalFleet
from rollout.vllm import add_request
from tests.tiny_models import END_ID, write_tiny_qwen3

TEMPERATURE = 0.7
SAMPLING = Sampling(temperature=TEMPERATURE, max_tokens=24)
ADAPTER = Adapter(rank=12, alpha=18.0)  # vLLM has no kernel for rank 12 and rounds up; alpha / rank is no whole number


def prompts(count: int = 6, seed: int = 0) -> list[PromptItem]:
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 40, count)
    return [
        PromptItem(
            group_id=i, token_ids=random.integers(3, 259, n), seed=group_seed(seed, "test", i), origin=f"row {i}"
        )
        for i, n in enumerate(lengths)
    ]


STEP_TOKENS = 256  # tokens that one step of the engine admits: fewer than the prompts of most calls below


def spec(folder: Path, **changes: Any) -> EngineSpec:
    options = {"max_num_batched_tokens": STEP_TOKENS}
    return EngineSpec(name="vllm", folder=str(folder), max_model_len=256, threads=1, engine=options, **changes)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def policy(model_folder: Path) -> Any:
    """The trainer's side: a peft model whose adapter is far from zero."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    peft = attach(model, ADAPTER, None, seed=3)
    randomize(peft, 0)
    return peft


def randomize(peft: Any, seed: int, scale: float = 0.1) -> None:
    """Scale 0: the adapter changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def published(peft: Any, folder: Path, version: int) -> Publication:
    save(peft, folder)
    return Publication(version, "adapter", str(folder), digest(peft, torch.float32), rank=ADAPTER.rank)


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> Iterator[Any]:
    engine = make_engine(spec(model_folder, lora_rank=ADAPTER.rank))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def first(policy: Any, tmp_path_factory: pytest.TempPathFactory) -> Publication:
    return published(policy, tmp_path_factory.mktemp("versions") / "v1", 1)


@pytest.fixture
def serving(engine: Any, first: Publication) -> Any:
    engine.publish(first)
    return engine


def trainer_logps(model: Any, group: Group, temperature: float) -> list[np.ndarray]:
    out = []
    for completion in group.completions:
        ids = torch.from_numpy(np.concatenate([group.prompt.token_ids, completion.token_ids]))[None]
        start = len(group.prompt.token_ids)
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1] / temperature
        out.append(logits.log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0].numpy())
    return out


def largest_gap(model: Any, groups: Sequence[Group], temperature: float = TEMPERATURE) -> float:
    return max(
        float(np.abs(mine - completion.logps).max())
        for group in groups
        for mine, completion in zip(trainer_logps(model, group, temperature), group.completions, strict=True)
    )


def as_json(groups: Sequence[Group]) -> list[Any]:
    """Tokens, and log-probabilities as their bits."""
    return [[[c.token_ids.tolist(), c.logps.view(np.int32).tolist()] for c in group.completions] for group in groups]


# ------------------------------------------------------------------------------------------------ the installed vLLM


def test_the_installed_vllm_has_every_call_that_the_engine_makes() -> None:
    from rollout.vllm_version import missing_calls

    assert missing_calls() == [], "the installed vLLM does not fit rollout/vllm_version.py: change it and its docstring"


def test_a_vllm_that_lacks_a_call_is_described_by_name() -> None:
    from rollout.vllm_version import missing_calls

    assert missing_calls({"vllm:LLM": "generate travel_in_time"}) == ["vllm:LLM has no 'travel_in_time'"]
    assert missing_calls({"vllm:LLMM": ""})[0].startswith("vllm:LLMM is gone")


def test_an_engine_does_not_start_on_a_vllm_that_lacks_a_call(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.vllm_version.missing_calls", lambda: ["vllm:LLM has no 'generate'"])
    with pytest.raises(SetupError, match="has no 'generate'"):
        make_engine(spec(model_folder))


def test_every_call_in_the_list_is_in_the_docstring() -> None:
    from rollout import vllm_version

    words = set(re.findall(r"\w+", vllm_version.__doc__ or ""))
    for target, names in vllm_version.CALLS.items():
        assert target.rpartition(":")[2].partition(".")[0] in words, target
        if not target.endswith(("EngineArgs", "LLM.generate", "parse_fine_tuned_lora_name")):
            assert set(names.split()) <= words, target


def test_the_shipped_list_of_engine_arguments_is_that_of_the_installed_vllm(tmp_path: Path) -> None:
    from rollout.vllm_facts import ARGUMENTS_FILE, REFUSED
    from rollout.vllm_version import write_engine_arguments

    write_engine_arguments(tmp_path / "now.json")
    now = json.loads((tmp_path / "now.json").read_text())
    assert json.loads(ARGUMENTS_FILE.read_text()) == now, "run rollout.vllm_version.write_engine_arguments()"
    assert set(REFUSED) <= set(now["arguments"])


def test_engine_options_are_checked_by_name_before_anything_starts() -> None:
    check_engine_options("vllm", {"max_num_seqs": 64})
    with pytest.raises(RecipeError, match="max_num_seqs"):
        check_engine_options("vllm", {"max_num_seq": 64})
    with pytest.raises(Unsupported, match="log-probabilities"):
        check_engine_options("vllm", {"logits_processors": ["x"]})
    with pytest.raises(RecipeError, match="no options"):
        check_engine_options("transformers", {"max_num_seqs": 64})
    with pytest.raises(RecipeError, match="transformers, vllm"):
        make_engine(EngineSpec(name="vlm", folder=""))


# ------------------------------------------------------------------------------------------------ generation


def test_log_probabilities_are_those_of_transformers_with_the_adapter(serving: Any, policy: Any) -> None:
    groups = generate(serving, prompts(), 4, SAMPLING)
    assert largest_gap(policy, groups) < 1e-4
    with use_adapter(policy, None):
        assert largest_gap(policy, groups) > 0.1  # the adapter matters here, so agreement without it would be no proof


def test_completions_come_with_text_versions_and_the_reason_they_ended(serving: Any) -> None:
    items = prompts(8)
    groups = generate(serving, items, 4, SAMPLING)
    assert [g.prompt.group_id for g in groups] == [p.group_id for p in items]
    finishes = set()
    for completion in (c for g in groups for c in g.completions):
        ended = completion.token_ids[-1] == END_ID
        assert completion.finish == ("eos" if ended else "length")
        assert ended or len(completion.token_ids) == SAMPLING.max_tokens
        assert len(completion.logps) == len(completion.versions) == len(completion.token_ids)
        assert set(completion.versions) == {1}
        assert "<|im_end|>" not in completion.text
        finishes.add(completion.finish)
    assert len({c.token_ids.tobytes() for c in groups[0].completions}) == 4
    assert finishes == {"eos", "length"}


def test_a_stop_string_ends_a_completion_and_stays_in_its_text_and_its_tokens(serving: Any, policy: Any) -> None:
    free = generate(serving, prompts(), 4, SAMPLING)
    letter = next(ch for g in free for c in g.completions for ch in c.text[3:-3] if ch.isascii() and ch.isalpha())
    groups = generate(serving, prompts(), 4, replace(SAMPLING, stop=(letter,)))
    stopped = [c for g in groups for c in g.completions if c.finish == "stop"]
    assert stopped
    for completion in stopped:
        assert completion.text.endswith(letter)
        assert completion.text.count(letter) == 1
    assert largest_gap(policy, groups) < 1e-4


def test_a_stop_token_ends_a_completion_and_is_scored(serving: Any, policy: Any) -> None:
    free = generate(serving, prompts(), 4, SAMPLING)
    token = int(free[0].completions[0].token_ids[2])
    groups = generate(serving, prompts(), 4, replace(SAMPLING, stop_token_ids=(token,)))
    first = groups[0].completions[0]
    assert (first.finish, int(first.token_ids[-1])) == ("stop", token)
    assert largest_gap(policy, groups) < 1e-4


def test_greedy_completions_do_not_depend_on_seeds_and_groups_of_them_are_refused(serving: Any, policy: Any) -> None:
    greedy = replace(SAMPLING, temperature=0.0)
    items = prompts(4)
    again = [replace(item, seed=item.seed // 2) for item in items]
    groups = generate(serving, items, 1, greedy)
    assert as_json(groups) == as_json(generate(serving, again, 1, greedy))
    assert largest_gap(policy, groups, temperature=1.0) < 1e-4
    with pytest.raises(Unsupported, match="greedy"):
        generate(serving, items, 2, greedy)


def test_the_same_call_gives_the_same_bits_again_whatever_ran_before(serving: Any) -> None:
    once = as_json(generate(serving, prompts(), 8, SAMPLING))
    generate(serving, prompts(9, seed=5), 3, SAMPLING)
    assert as_json(generate(serving, prompts(), 8, SAMPLING)) == once


def test_more_prompts_than_one_step_admits_give_the_same_log_probabilities(serving: Any, policy: Any) -> None:
    """vLLM would cut the last prompt that a step admits in two, which it cannot do on CPU with seeded requests."""
    items = [PromptItem(i, np.arange(3, 93) + i, group_seed(2, "many", i)) for i in range(8)]
    assert sum(len(item.token_ids) for item in items) > 2 * STEP_TOKENS
    assert largest_gap(policy, generate(serving, items, 2, SAMPLING)) < 1e-4


def test_computing_a_prompt_in_parts_is_refused_on_cpu(model_folder: Path) -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("generators of other devices can be rewound")
    with pytest.raises(Unsupported, match="in parts"):
        make_engine(replace(spec(model_folder), engine={"enable_chunked_prefill": True}))


def test_long_prompts_shared_by_a_group_give_the_same_bits_again(serving: Any) -> None:
    """Longer than a block of the key-value cache (32 tokens on CPU), so that the completions share cached blocks."""
    ids = np.random.default_rng(1).integers(3, 259, 200)
    items = [PromptItem(i, ids[: 200 - i], group_seed(1, "long", i)) for i in range(3)]
    once = as_json(generate(serving, items, 4, SAMPLING))
    assert as_json(generate(serving, items, 4, SAMPLING)) == once


@pytest.mark.usefixtures("ray_cluster")
def test_an_engine_in_a_ray_actor_gives_the_same_bits(serving: Any, model_folder: Path, first: Publication) -> None:
    async def run() -> list[Group]:
        fleet = RayFleet(spec(model_folder, lora_rank=ADAPTER.rank), 1, cpus=1)
        try:
            assert (await fleet.publish(first))["time/publish"] > 0
            return await fleet.generate(prompts(), 8, SAMPLING)
        finally:
            await fleet.close()

    assert as_json(asyncio.run(run())) == as_json(generate(serving, prompts(), 8, SAMPLING))


def test_a_prompt_that_does_not_fit_is_named(serving: Any) -> None:
    with pytest.raises(DataError, match="256") as caught:
        generate(serving, [replace(prompts(1)[0], token_ids=np.arange(3, 253))], 1, SAMPLING)
    assert caught.value.where == "row 0"


# ------------------------------------------------------------------------------------------------ adapters


def test_publishing_changes_what_is_sampled_and_returns_the_trainers_digest(
    serving: Any, policy: Any, first: Publication, tmp_path: Path
) -> None:
    before = generate(serving, prompts(), 4, SAMPLING)
    randomize(policy, 1)
    try:
        second = published(policy, tmp_path / "v2", 2)
        assert second.digest != first.digest
        assert serving.publish(second) == second.digest
        shutil.rmtree(second.path)  # the files are not needed once the version is held
        groups = generate(serving, prompts(), 4, SAMPLING)
        assert as_json(groups) != as_json(before)
        assert set(groups[0].completions[0].versions) == {2}
        assert largest_gap(policy, groups) < 1e-4
    finally:
        randomize(policy, 0)
    assert serving.publish(first) == first.digest
    assert as_json(generate(serving, prompts(), 4, SAMPLING)) == as_json(before)


def test_a_soup_of_adapters_is_served_as_peft_computes_it(
    serving: Any, model_folder: Path, first: Publication, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    def fresh(adapter: Adapter | None, folder: Path | None, seed: int) -> Any:
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        return attach(model, adapter, folder, seed=seed)

    parts = []
    for seed, rank, targets in ((1, 5, "all-linear"), (2, 7, ("q_proj", "down_proj"))):
        peft = fresh(Adapter(rank=rank, alpha=9.0, targets=targets), None, seed)
        randomize(peft, seed)
        save(peft, tmp_path / str(seed))
        parts.append(tmp_path / str(seed))
    soup(parts, [0.6, 0.4], tmp_path / "soup")
    peft = fresh(None, tmp_path / "soup", 0)
    publication = Publication(2, "adapter", str(tmp_path / "soup"), digest(peft, torch.float32), rank=ADAPTER.rank)
    assert serving.publish(publication) == publication.digest
    groups = generate(serving, prompts(), 4, SAMPLING)
    assert largest_gap(peft, groups) < 1e-4
    with use_adapter(peft, None):
        assert largest_gap(peft, groups) > 0.1
    serving.publish(first)


def test_the_base_serves_without_any_adapter(serving: Any, policy: Any) -> None:
    serving.publish(Publication(7, "base", "", ""))
    groups = generate(serving, prompts(), 2, SAMPLING)
    with use_adapter(policy, None):
        assert largest_gap(policy, groups) < 1e-4


def refused(serving: Any, publication: Publication, match: str) -> AlignError:
    """Publishing must fail, and version 1 must go on serving, unchanged."""
    before = as_json(generate(serving, prompts(2), 2, SAMPLING))
    with pytest.raises(EngineError, match=match) as caught:
        serving.publish(publication)
    assert serving.version == 1
    assert as_json(generate(serving, prompts(2), 2, SAMPLING)) == before
    return caught.value


def test_an_adapter_file_with_one_changed_number_is_refused(serving: Any, first: Publication, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "v2"
    shutil.copytree(first.path, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.1.mlp.up_proj.lora_A" in name)
    tensors[name][0, 0] = torch.nextafter(tensors[name][0, 0], torch.tensor(torch.inf))
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(serving, replace(first, version=2, path=str(folder)), "version 2")


def test_the_previous_version_under_a_new_name_is_refused(
    serving: Any, policy: Any, first: Publication, tmp_path: Path
) -> None:
    randomize(policy, 1)
    newer = digest(policy, torch.float32)
    randomize(policy, 0)
    shutil.copytree(first.path, tmp_path / "v2")
    refused(serving, replace(first, version=2, path=str(tmp_path / "v2"), digest=newer), "version 2")


def test_an_adapter_that_leaves_the_base_as_it_is_is_refused_in_the_place_of_another(
    serving: Any, first: Publication, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(first.path, tmp_path / "v2")
    tensors = load_file(tmp_path / "v2" / "adapter_model.safetensors")
    untrained = {name: tensor * ("lora_B" not in name) for name, tensor in tensors.items()}
    save_file(untrained, tmp_path / "v2" / "adapter_model.safetensors")
    refused(serving, replace(first, version=2, path=str(tmp_path / "v2")), "other weights than version 2")


def test_an_adapter_that_lacks_a_module_is_refused(serving: Any, first: Publication, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(first.path, tmp_path / "v2")
    tensors = load_file(tmp_path / "v2" / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.0.self_attn.v_proj" not in name}
    save_file(kept, tmp_path / "v2" / "adapter_model.safetensors")
    refused(serving, replace(first, version=2, path=str(tmp_path / "v2")), "version 2")


def test_an_engine_that_drops_the_adapter_is_caught(
    serving: Any, first: Publication, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(serving._llm.llm_engine, "add_lora", lambda request: True)
        refused(serving, replace(first, version=2), "holds no adapter")


def without_adapter(add: Any) -> Any:
    """`rollout.vllm.add_request` as a vLLM would have it that forgets the adapter."""
    return lambda llm, request_id, token_ids, parameters, adapter: add(llm, request_id, token_ids, parameters, None)


def test_an_engine_that_holds_the_adapter_but_computes_with_the_base_is_caught(
    serving: Any, first: Publication, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving._weights, "_probed", False)
    with monkeypatch.context() as patched:
        patched.setattr("rollout.vllm.add_request", without_adapter(add_request))
        with pytest.raises(EngineError, match="adapter not applied"):
            serving.publish(replace(first, version=2))
    assert serving.publish(first) == first.digest


def test_an_engine_that_forgets_the_adapter_later_is_seen_by_the_monitor(
    serving: Any, policy: Any, first: Publication, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No check at its start or at a publish sees it: the adapter is held, and was applied."""

    class Policy:
        async def logps(self, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
            [tree] = trees
            [branch] = tree.branches
            prompt = replace(prompts(1)[0], token_ids=tree.trunk.token_ids)
            drawn = Completion(branch.token_ids, branch.behavior_logps, branch.versions, "", "eos")
            return [trainer_logps(policy, Group(prompt, (drawn,)), TEMPERATURE)]

    told: list[str] = []
    trainer: Any = Policy()
    monitor = Monitor(
        trainer, LocalFleet(serving), prompts(1)[0], SAMPLING, tolerance=0.01, ahead=False, tell=told.append
    )

    async def seen() -> float:
        await monitor.published(first.version)
        return (await monitor.difference())["monitor/max_difference"]

    assert asyncio.run(seen()) < 1e-4 and not told
    monkeypatch.setattr("rollout.vllm.add_request", without_adapter(add_request))
    assert asyncio.run(seen()) > 0.01 and "monitor: after version 1" in told[0]


def test_the_previous_version_under_its_own_integer_id_is_refused(
    serving: Any, first: Publication, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM keeps adapters by id: asked to load another under an id that it has, it serves the one it has."""
    with monkeypatch.context() as patched:
        patched.setattr(serving._weights, "_loaded", serving._weights.adapter.lora_int_id - 1)
        refused(serving, replace(first, version=2), "holds an adapter with the id")


def test_a_scaled_adapter_is_refused(serving: Any, first: Publication, tmp_path: Path) -> None:
    shutil.copytree(first.path, tmp_path / "v2")
    file = tmp_path / "v2" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    refused(serving, replace(first, version=2, path=str(tmp_path / "v2")), "version 2")


# ------------------------------------------------------------------------------------------------ versions in flight


def stepped(engine: Any, answers: dict[int, Any], steps: int) -> None:
    for _ in range(steps):
        answers.update(engine.step())


def test_requests_that_run_finish_on_their_version_while_new_ones_get_the_next(
    serving: Any, policy: Any, first: Publication, tmp_path: Path
) -> None:
    """And a version that nobody uses any more is gone from vLLM's memory, its files having gone long before."""
    items, long = prompts(4), replace(SAMPLING, max_tokens=40)
    answers: dict[int, Any] = {}
    randomize(policy, 1)
    second = published(policy, tmp_path / "v2", 2)
    randomize(policy, 0)
    serving.add([Request(i, item, 4, long) for i, item in enumerate(items)])
    stepped(serving, answers, 5)
    assert serving.running == 4 and serving.accepts(second)
    serving.publish(second)
    shutil.rmtree(second.path)
    assert not serving.accepts(replace(second, version=3)), "both of its slots are in use"
    serving.add([Request(10 + i, item, 4, long) for i, item in enumerate(items)])
    while serving.running:
        stepped(serving, answers, 1)
    old, new = [answers[i] for i in range(4)], [answers[10 + i] for i in range(4)]
    for groups, version in ((old, 1), (new, 2)):
        assert {int(v) for g in groups for c in g.completions for v in c.versions} == {version}
    assert largest_gap(policy, old) < 1e-4
    randomize(policy, 1)
    try:
        assert largest_gap(policy, new) < 1e-4
    finally:
        randomize(policy, 0)
    assert len(serving._llm.llm_engine.list_loras()) == 1


def test_log_probabilities_of_several_sequences_are_those_of_each(serving: Any, policy: Any) -> None:
    items = prompts(3)
    for item, found in zip(items, serving.logps([item.token_ids for item in items]), strict=True):
        ids = torch.from_numpy(item.token_ids)[None]
        with torch.no_grad():
            expected = policy(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        assert np.allclose(found, expected, atol=1e-4)


def test_abandoned_requests_are_never_answered(serving: Any) -> None:
    answers: dict[int, Any] = {}
    serving.add([Request(i, item, 4, SAMPLING) for i, item in enumerate(prompts(4))])
    stepped(serving, answers, 2)
    serving.abandon([0, 2, 99])
    while serving.running:
        stepped(serving, answers, 1)
    assert sorted(answers) == [1, 3]
    assert serving._llm.reset_prefix_cache(), "nothing of them is left in the cache"


def test_a_prompt_that_does_not_fit_is_answered_among_those_that_do(serving: Any) -> None:
    items = [replace(prompts(1)[0], token_ids=np.arange(3, 253)), *prompts(2)]
    serving.add([Request(i, item, 2, SAMPLING) for i, item in enumerate(items)])
    answers: dict[int, Any] = {}
    while serving.running:
        stepped(serving, answers, 1)
    assert isinstance(answers[0], FailedPrompt) and answers[0].cause == "too long"
    assert "250 tokens" in answers[0].message and "256" in answers[0].message
    assert isinstance(answers[1], Group) and isinstance(answers[2], Group)


def test_an_adapter_wider_than_the_engine_or_missing_is_refused(
    serving: Any, first: Publication, tmp_path: Path
) -> None:
    refused(serving, replace(first, version=2, rank=64), "rank 12")
    refused(serving, replace(first, version=2, path=str(tmp_path / "nowhere")), "cannot be read")


def test_ranks_are_rounded_up_to_those_that_vllm_has_kernels_for() -> None:
    from rollout.vllm_start import accepted_rank

    assert [accepted_rank(rank) for rank in (0, 1, 2, 12, 16, 17)] == [0, 1, 8, 16, 16, 32]
    with pytest.raises(Unsupported, match="not 1000"):
        accepted_rank(1000)


# ------------------------------------------------------------------------------------------------ whole weights


@pytest.fixture(scope="module")
def whole(model_folder: Path, engine: Any) -> Iterator[Any]:
    """An engine for whole weights; after the tests above it, because a process holds one engine at a time."""
    engine.close()
    whole = make_engine(spec(model_folder))
    whole.publish(Publication(0, "base", "", ""))
    yield whole
    whole.close()


def merged(policy: Any, folder: Path, version: int) -> tuple[Publication, Any]:
    """The policy merged into a plain model, and that model in transformers."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from align.model.adapters import tensors_digest

    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in merged_state(policy, torch.float32)}
    save_file(tensors, folder / "model.safetensors")
    model = AutoModelForCausalLM.from_config(policy.config, dtype=torch.float32).eval()
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    assert weights_digest(model, torch.float32) == tensors_digest(tensors)
    return Publication(version, "weights", str(folder), tensors_digest(tensors)), model


def test_an_engine_without_a_version_does_not_generate(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole._weights, "version", None)
    with pytest.raises(EngineError, match="before a version"):
        generate(whole, prompts(1), 1, SAMPLING)


def test_whole_weights_replace_the_models_own_tied_head_included(whole: Any, policy: Any, tmp_path: Path) -> None:
    before = generate(whole, prompts(), 4, SAMPLING)
    model = None
    for version in (1, 2):
        randomize(policy, version)
        with torch.no_grad():
            policy.get_base_model().get_input_embeddings().weight.mul_(1.25)  # tied: the head must follow
        publication, model = merged(policy, tmp_path / f"v{version}", version)
        assert whole.publish(publication) == publication.digest
        groups = generate(whole, prompts(), 4, SAMPLING)
        assert as_json(groups) != as_json(before)
        assert largest_gap(model, groups) < 1e-4
    with pytest.raises(EngineError, match="replaced"):
        whole.publish(Publication(3, "base", "", ""))


def test_weights_other_than_published_are_refused_and_then_nothing_is_served(
    whole: Any, policy: Any, tmp_path: Path
) -> None:
    randomize(policy, 4)
    publication, _ = merged(policy, tmp_path / "v4", 4)
    with pytest.raises(EngineError, match="version 5"):
        whole.publish(replace(publication, version=5, digest="0" * 64))
    with pytest.raises(EngineError, match="before a version"):
        generate(whole, prompts(1), 1, SAMPLING)
    assert whole.publish(publication) == publication.digest


def test_base_weights_are_refused_in_the_place_of_the_policys_own(
    whole: Any, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the base is what was written, once the engine keeps the base that it has."""
    randomize(policy, 5, scale=0.0)
    base, _ = merged(policy, tmp_path / "base", 5)
    randomize(policy, 6)
    publication, _ = merged(policy, tmp_path / "v6", 6)
    assert base.digest != publication.digest
    with pytest.raises(EngineError, match="other weights than version 6"):
        whole.publish(replace(publication, path=base.path))
    assert whole.publish(base) == base.digest
    with monkeypatch.context() as patched:
        patched.setattr("rollout.vllm.reload_weights", lambda llm, tensors: None)
        with pytest.raises(EngineError, match="other weights than version 6"):
            whole.publish(publication)
    assert whole.publish(publication) == publication.digest


def test_a_parameter_that_was_not_published_is_refused(whole: Any, policy: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    publication, _ = merged(policy, tmp_path / "v6", 6)
    tensors = load_file(tmp_path / "v6" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "v6" / "model.safetensors")
    with pytest.raises(EngineError, match=r"would stay old: model\.norm\.weight"):
        whole.publish(publication)


def test_a_head_that_computes_with_its_old_packed_copy_is_caught(
    whole: Any, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM 0.32 does on CPU when nobody ties the head again."""
    publication, _ = merged(policy, tmp_path / "v8", 8)
    whole.publish(publication)
    with torch.no_grad():
        policy.get_base_model().get_input_embeddings().weight.mul_(1.25)
    publication, _ = merged(policy, tmp_path / "v9", 9)
    with monkeypatch.context() as patched:
        patched.setattr("rollout.vllm_weights.retie", lambda model, groups: None)
        with pytest.raises(EngineError, match="packed copy is older"):
            whole.publish(publication)
    assert whole.publish(publication) == publication.digest


LONG = PromptItem(0, np.random.default_rng(3).integers(3, 259, 200), seed=5)


def test_whole_weights_wait_for_the_requests_that_run_and_leave_nothing_of_theirs_in_the_prefix_cache(
    whole: Any, policy: Any, tmp_path: Path
) -> None:
    """The prompt is longer than a block of the key-value cache: the next version must not find it there."""
    publication, _ = merged(policy, tmp_path / "v10", 10)
    whole.publish(publication)
    whole.add([Request(0, LONG, 2, SAMPLING)])
    whole.step()
    randomize(policy, 10)
    publication, model = merged(policy, tmp_path / "v11", 11)
    assert not whole.accepts(publication)
    with pytest.raises(EngineError, match="1 requests run"):
        whole.publish(publication)
    while whole.running:
        whole.step()
    assert whole.accepts(publication)
    whole.publish(publication)
    assert largest_gap(model, generate(whole, [LONG], 4, SAMPLING)) < 1e-4


def test_a_prefix_cache_that_keeps_the_version_before_is_caught(
    whole: Any, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publication, _ = merged(policy, tmp_path / "v12", 12)
    whole.publish(publication)
    for answer, match in ((True, "still serves 32 tokens"), (False, "could not be emptied")):
        with monkeypatch.context() as patched:
            patched.setattr(whole._llm, "reset_prefix_cache", lambda answer=answer, **options: answer)
            with pytest.raises(EngineError, match=match):
                whole.publish(publication)
    assert whole.publish(publication) == publication.digest


def test_whole_weights_in_flight_take_over_between_two_tokens_and_each_token_knows_its_version(
    whole: Any, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the change everything before it has been read again by the new weights: log-probabilities are theirs."""
    for part in (whole, whole._weights):
        monkeypatch.setattr(part, "spec", replace(whole.spec, in_flight=True))
    models = {}
    publications = {}
    for version in (21, 22):
        randomize(policy, version)
        publications[version], models[version] = merged(policy, tmp_path / f"v{version}", version)
    whole.publish(publications[21])
    items = [*prompts(5), replace(LONG, group_id=5)]
    whole.add([Request(item.group_id, item, 4, replace(SAMPLING, max_tokens=40)) for item in items])
    answers: dict[int, Any] = {}
    stepped(whole, answers, 8)
    assert whole.accepts(publications[22])
    whole.publish(publications[22])
    while whole.running:
        stepped(whole, answers, 1)
    groups = [answers[item.group_id] for item in items]
    seen = set()
    for group in groups:
        by_model = {version: trainer_logps(model, group, TEMPERATURE) for version, model in models.items()}
        for number, completion in enumerate(group.completions):
            versions = completion.versions.tolist()
            assert versions == sorted(versions)
            seen.add(tuple(sorted(set(versions))))
            expected = [by_model[v][number][position] for position, v in enumerate(versions)]
            assert np.abs(np.array(expected) - completion.logps).max() < 1e-4
    assert (21, 22) in seen
