from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from align.errors import DataError, EngineError, Unsupported
from align.model import adapters
from align.model.generate.engine import TransformersEngine
from align.model.load import load_model
from align.protocols.ends import end_ids
from align.protocols.fleet import Completion, PromptItem, Sampling
from align.protocols.trainer import Publication
from align.train.policy import write_weights
from rollout.base import Request, generate
from tests.unit.model.tiny import LLAMA, QWEN3, logits, lora, train_a_little, write_tiny

BASE = Publication(0, "base", "", "")


@dataclass(frozen=True)
class Spec:
    folder: str
    dtype: str = "float32"
    threads: int = 1
    max_model_len: int | None = None
    trust_remote_code: bool = False
    end_ids: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "qwen3", QWEN3)


@pytest.fixture
def engine(folder) -> TransformersEngine:
    engine = TransformersEngine(Spec(str(folder)))
    engine.publish(BASE)
    return engine


def prompt(seed: int, length: int, group_id: int = 0) -> PromptItem:
    tokens = np.random.default_rng(seed).integers(3, 280, length)
    return PromptItem(group_id=group_id, token_ids=tokens, seed=seed * 7919 + 1)


def adapter(folder: Path, out: Path, seed: int = 0, version: int = 1) -> tuple[Publication, torch.Tensor]:
    """A trained adapter as a trainer publishes it, and the policy's logits."""
    peft = adapters.attach(load_model(folder, dtype=torch.float32), lora(), None, seed=seed)
    train_a_little(peft, seed)
    adapters.save(peft, out)
    return Publication(version, "adapter", str(out), adapters.digest(peft, torch.float32), 4), logits(peft)


def by_hand(model, prompt: np.ndarray, completion: Completion, temperature: float) -> np.ndarray:
    """Log-probabilities of a completion by one forward over prompt and completion."""
    ids = torch.tensor(np.concatenate([prompt, completion.token_ids]))
    with torch.no_grad():
        logps = torch.log_softmax(model(input_ids=ids[None]).logits[0] / temperature, -1)
    at = len(prompt) - 1 + torch.arange(len(completion.token_ids))
    return logps[at, ids[at + 1]].numpy()


@pytest.mark.parametrize("config", [QWEN3, LLAMA], ids=["qwen3", "llama"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probabilities_are_those_of_a_plain_forward_at_the_sampling_temperature(tmp_path, config, temperature):
    folder = write_tiny(tmp_path / "model", config)
    engine = TransformersEngine(Spec(str(folder)))
    engine.publish(BASE)
    prompts = [prompt(1, 3), prompt(2, 11), prompt(3, 6)]
    groups = generate(engine, prompts, 1 if temperature == 0 else 3, Sampling(temperature, max_tokens=9))
    model = load_model(folder, dtype=torch.float32)
    for group in groups:
        for completion in group.completions:
            assert completion.logps.dtype == np.float32 and completion.token_ids.dtype == np.int64
            expected = by_hand(model, group.prompt.token_ids, completion, temperature or 1.0)
            assert np.allclose(completion.logps, expected, atol=2e-5)
            assert np.array_equal(completion.versions, np.zeros(len(completion.logps), dtype=np.int32))
            assert len(completion.token_ids) == 9 or completion.finish == "eos"


def test_a_completion_depends_on_its_prompt_seed_and_number_and_not_on_its_company(engine):
    sampling = Sampling(1.0, max_tokens=12)
    prompts = [prompt(n, 4 + 3 * n, group_id=n) for n in range(4)]
    together = generate(engine, prompts, 40, sampling)  # more rows than one batch holds
    alone = [generate(engine, [item], 5, sampling)[0] for item in reversed(prompts)][::-1]
    for group, single in zip(together, alone, strict=True):
        for a, b in zip(group.completions[:5], single.completions, strict=True):
            assert np.array_equal(a.token_ids, b.token_ids)
            assert np.allclose(a.logps, b.logps, atol=1e-5)
    again = generate(engine, prompts, 40, sampling)
    assert all(
        np.array_equal(a.logps, b.logps)
        for one, two in zip(together, again, strict=True)
        for a, b in zip(one.completions, two.completions, strict=True)
    )
    assert len({tuple(c.token_ids) for c in together[0].completions}) > 30


def test_tokens_are_drawn_from_the_model_s_distribution(engine, folder):
    item = prompt(5, 6)
    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        logps = model(input_ids=torch.as_tensor(item.token_ids)[None]).logits[0, -1] / 0.5
    expected = torch.softmax(logps, -1).numpy()
    first = [
        int(completion.token_ids[0])
        for n in range(100)
        for completion in generate(engine, [PromptItem(0, item.token_ids, seed=n)], 64, Sampling(0.5, max_tokens=1))[
            0
        ].completions
    ]
    counts = np.bincount(first, minlength=len(expected))
    likely = np.argsort(expected)[-8:]
    error = np.sqrt(expected[likely] * (1 - expected[likely]) / len(first))
    assert np.all(np.abs(counts[likely] / len(first) - expected[likely]) < 4.5 * error)


def test_every_way_to_finish_is_named_and_the_token_that_finishes_is_kept(engine):
    items = [prompt(n, 5) for n in range(6)]
    free = [c for g in generate(engine, items, 8, Sampling(1.0, max_tokens=30)) for c in g.completions]
    lengths = [c for c in free if c.finish == "length"]
    assert lengths and all(len(c.token_ids) == 30 for c in lengths)
    ended = [c for c in free if c.finish == "eos"]
    assert ended and all(c.token_ids[-1] == 2 and 2 not in c.token_ids[:-1] for c in ended)
    assert all("<|im_end|>" not in c.text for c in ended)
    longest = max(free, key=lambda c: len(c.token_ids))
    by_id = Sampling(1.0, max_tokens=30, stop_token_ids=(int(longest.token_ids[4]),))
    stopped = [c for g in generate(engine, items, 8, by_id) for c in g.completions if c.finish == "stop"]
    assert stopped and all(c.token_ids[-1] == by_id.stop_token_ids[0] for c in stopped)
    engine._sampler.end_ids = end_ids(Path(engine.spec.folder), 2, by_id.stop_token_ids)  # as of a spec that names them
    ended = [c for g in generate(engine, items, 8, Sampling(1.0, max_tokens=30)) for c in g.completions]
    assert {int(c.token_ids[-1]) for c in ended if c.finish == "eos"} == {2, by_id.stop_token_ids[0]}
    engine._sampler.end_ids = end_ids(Path(engine.spec.folder), 2)
    letters = [c for c in free if "e" in c.text]
    by_text = [c for g in generate(engine, items, 8, Sampling(1.0, max_tokens=30, stop=("e",))) for c in g.completions]
    stopped = [c for c in by_text if c.finish == "stop"]
    assert len(stopped) == len(letters)
    assert all(c.text.count("e") >= 1 and "e" not in engine._sampler.decode(c.token_ids[:-1].tolist()) for c in stopped)


@pytest.fixture(scope="module")
def marking(tmp_path_factory) -> TransformersEngine:
    """An engine whose every fourth token is special, as tags of answers, tools and thoughts are in some tokenizers."""
    folder = write_tiny(tmp_path_factory.mktemp("models") / "marking", QWEN3)
    path = folder / "tokenizer.json"
    held = json.loads(path.read_text())
    held["model"]["merges"] = []
    known = {token["id"] for token in held["added_tokens"]}
    for text, number in list(held["model"]["vocab"].items()):
        if number % 4 == 3 and number not in known:
            named = f"<mark{number}>"
            held["model"]["vocab"][named] = held["model"]["vocab"].pop(text)
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            held["added_tokens"].append({"id": number, "content": named, "special": True, **flags})
    path.write_text(json.dumps(held))
    engine = TransformersEngine(Spec(str(folder)))
    engine.publish(BASE)
    return engine


def test_a_completion_is_had_as_it_was_generated_too_without_what_ends_it(marking):
    drawn = [
        c for g in generate(marking, [prompt(n, 5) for n in range(4)], 8, Sampling(1.0, 20)) for c in g.completions
    ]
    assert {c.finish for c in drawn} == {"eos", "length"}
    for c in drawn:
        ids = c.token_ids.tolist()
        marks = [i for i in ids if i in marking._sampler.end_ids or i % 4 == 3 or i < 3]
        spoken = ids[:-1] if c.finish == "eos" else ids
        assert c.text == marking._sampler.decode(ids) and "<mark" not in c.text
        if set(marks) - marking._sampler.end_ids:
            assert c.raw == marking._sampler.decode(spoken, skip_special=False) and "<|im_end|>" not in c.raw
        else:
            assert c.raw is None
    assert any(c.raw is not None and c.finish == "eos" for c in drawn)


def test_a_stop_string_may_be_or_hold_a_special_token_and_no_other_is_found_in_the_name_of_one(marking):
    items = [prompt(n, 5) for n in range(4)]
    free = [c for g in generate(marking, items, 8, Sampling(1.0, 20)) for c in g.completions]
    first = next(c.token_ids.tolist() for c in free if (c.token_ids % 4 == 3).any())
    mark = next(f"<mark{i}>" for i in first if i % 4 == 3)
    drawn = [c for g in generate(marking, items, 8, Sampling(1.0, 20, stop=(mark,))) for c in g.completions]
    stopped = [c for c in drawn if c.finish == "stop"]
    assert stopped and all(c.raw.endswith(mark) and c.raw.count(mark) == 1 and mark not in c.text for c in stopped)
    assert [c for c in drawn if mark in (c.raw or "")] == stopped
    named = [c for g in generate(marking, items, 8, Sampling(1.0, 20, stop=("mark",))) for c in g.completions]
    assert not any(c.finish == "stop" for c in named)


def test_prompts_that_cannot_fit_and_useless_groups_are_refused(folder):
    engine = TransformersEngine(Spec(str(folder), max_model_len=16))
    with pytest.raises(EngineError, match="before a version was published"):
        generate(engine, [prompt(0, 4)], 1, Sampling())
    engine.publish(BASE)
    with pytest.raises(DataError, match="a prompt of 9 tokens"):
        generate(engine, [prompt(0, 9)], 2, Sampling(max_tokens=8))
    with pytest.raises(Unsupported, match="greedy"):
        generate(engine, [prompt(0, 4)], 2, Sampling(0.0, max_tokens=4))
    assert generate(engine, [], 2, Sampling(max_tokens=4)) == []


def test_published_adapters_take_over_one_after_another_and_the_base_can_come_back(engine, folder, tmp_path):
    ids = [prompt(9, 12).token_ids]
    base = engine.logps(ids)[0]
    seen = [base]
    for version in (1, 2, 3):
        publication, _ = adapter(folder, tmp_path / f"v{version}", seed=version, version=version)
        assert engine.publish(publication) == publication.digest
        assert engine.version == version
        seen.append(engine.logps(ids)[0])
        peft = adapters.attach(load_model(folder, dtype=torch.float32), None, tmp_path / f"v{version}", seed=0)
        with torch.no_grad():
            logps = torch.log_softmax(peft(input_ids=torch.as_tensor(ids[0])[None]).logits[0, :-1], -1)
        expected = logps.gather(-1, torch.as_tensor(ids[0])[1:, None])[:, 0].numpy()
        assert np.allclose(seen[-1], expected, atol=1e-5)
    assert all(np.abs(a - b).max() > 1e-3 for n, a in enumerate(seen) for b in seen[:n])
    assert sum("lora_A" in name for name, _ in engine._weights.model.named_parameters()) == 14
    engine.publish(Publication(4, "base", "", ""))
    assert np.array_equal(engine.logps(ids)[0], base)
    group = generate(engine, [prompt(9, 12)], 2, Sampling(max_tokens=3))[0]
    assert set(group.completions[0].versions.tolist()) == {4}


def test_an_adapter_that_is_not_the_published_one_is_refused_and_the_version_before_serves_on(engine, folder, tmp_path):
    ids = [prompt(9, 12).token_ids]
    good, _ = adapter(folder, tmp_path / "v1")
    wrong = Publication(1, "adapter", good.path, "0" * 64, 4)
    before = engine.logps(ids)[0]
    with pytest.raises(EngineError, match="other weights"):
        engine.publish(wrong)
    assert engine.version == 0 and np.array_equal(engine.logps(ids)[0], before)
    engine.publish(good)
    served = engine.logps(ids)[0]
    damaged, _ = adapter(folder, tmp_path / "v2", seed=2, version=2)
    file = Path(damaged.path) / "adapter_model.safetensors"
    tensors = load_file(file)
    next(t for k, t in tensors.items() if "lora_B" in k).view(torch.int32)[0, 0] ^= 1
    save_file(tensors, file)
    with pytest.raises(EngineError, match="other weights"):
        engine.publish(damaged)
    file.unlink()
    with pytest.raises(EngineError, match="cannot be loaded"):
        engine.publish(damaged)
    assert engine.version == 1 and np.array_equal(engine.logps(ids)[0], served)


def test_whole_weights_are_copied_in_and_answered_with_their_digest(engine, folder, tmp_path):
    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    publication = write_weights(dict(adapters.full_state(model)), tmp_path / "w", 5, torch.float32)
    assert engine.publish(publication) == publication.digest
    ids = prompt(9, 12).token_ids
    with torch.no_grad():
        expected = torch.log_softmax(model(input_ids=torch.as_tensor(ids)[None]).logits[0, :-1], -1)
    expected = expected.gather(-1, torch.as_tensor(ids)[1:, None])[:, 0].numpy()
    assert np.allclose(engine.logps([ids])[0], expected, atol=1e-6)
    with pytest.raises(EngineError, match="base weights were replaced"):
        engine.publish(Publication(6, "base", "", ""))
    with pytest.raises(EngineError, match="other weights"):
        engine.publish(Publication(7, "weights", publication.path, "0" * 64))
    with pytest.raises(EngineError, match="before a version"):
        generate(engine, [prompt(0, 4)], 1, Sampling(max_tokens=2))
    engine.close()


def test_requests_are_answered_batch_by_batch_and_one_that_waits_gets_the_newest_version(engine):
    engine.add([Request(n, prompt(n, 5), 40, Sampling(max_tokens=3)) for n in range(3)])
    engine.add(
        [Request(3, prompt(3, 5), 2, Sampling(max_tokens=3)), Request(4, prompt(4, 5), 2, Sampling(max_tokens=2))]
    )
    first = engine.step()
    assert [ticket for ticket, _ in first] == [0], "64 rows hold one group of 40"
    assert engine.running == 4
    engine.abandon([1])
    engine.publish(Publication(1, "base", "", ""))
    rest = [engine.step() for _ in range(3)]
    assert [[ticket for ticket, _ in answers] for answers in rest] == [[2], [3], [4]]
    assert {int(v) for answers in rest for _, group in answers for c in group.completions for v in c.versions} == {1}
    assert engine.running == 0 and engine.step() == []
