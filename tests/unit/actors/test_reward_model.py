"""The reward `reward_model` against transformers, and what is no such model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from align.actors.plugins import plugin_spec
from align.actors.reward_model import Opened, _opened
from align.check.inputs import describe_reward
from align.data.tokenizer import load_tokenizer
from align.errors import PluginError
from align.model import adapters
from align.model.score_head import load_score_model
from align.recipe.load import load_document
from align.recipe.parts import Reward
from rewards import Sample
from rewards.plugin import PluginSpec
from rewards.pool import RewardPool
from tests.tiny_models import write_byte_tokenizer, write_tiny_qwen3

TURNS = [{"role": "user", "content": "What is 3+4?"}]
SAMPLES = [
    Sample(text, TURNS if n % 3 else [{"role": "text", "content": "3+4="}])
    for n, text in enumerate(("3+4 = 7.", "7", "It is more than 5, and less than 9: 7.", "no", "3", "8 or 9"))
]


@pytest.fixture(scope="module")
def written(tiny_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model as our stage writes it."""
    base, folder = tiny_model_folder(), tmp_path_factory.mktemp("rm") / "rm"
    adapters.save_full(load_score_model(base, dtype=torch.float32, seed=5), folder, base=base, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three labels, whose tokenizer has no chat template."""
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    folder = write_tiny_qwen3(tmp_path_factory.mktemp("classifier"))
    config = Qwen3Config.from_pretrained(folder, id2label={0: "kind", 1: "neutral", 2: "toxic"})
    torch.manual_seed(3)
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pool(written: Path) -> Iterator[RewardPool]:
    """The reward model beside another reward: one process of each for the tests of this file."""
    reward = {"use": "reward_model", "args": {"path": str(written), "max_length": 120}, "max_error_rate": 0.5}
    specs = [plugin_spec(Reward.model_validate(reward)), PluginSpec("contains", args={"texts": ["7"]})]
    with RewardPool(specs, written.parent, seed=0) as pool:
        yield pool


def alone(folder: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0]


def test_a_batch_of_scores_equals_transformers_one_by_one(written: Path, pool: RewardPool) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(written)
    result = pool.score_sync(SAMPLES)
    assert result.objectives == ("reward_model", "contains") and not result.failures
    assert [row[1] for row in result.scores] == [1, 1, 1, 0, 0, 0]
    found = [row[0] for row in result.scores]
    assert len(set(found)) == len(found)
    for sample, score in zip(SAMPLES, found, strict=True):
        if sample.messages[0]["role"] == "text":
            ids = tokenizer("3+4=" + sample.completion, add_special_tokens=False)["input_ids"]
            ids.append(tokenizer.eos_token_id)
        else:
            turns = [*sample.messages, {"role": "assistant", "content": sample.completion}]
            start = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            parts = (start, text.removeprefix(start))  # as in training, where nothing merges across the two
            ids = [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
        assert score == pytest.approx(float(alone(written, ids)), abs=1e-4), sample


@pytest.mark.slow
def test_of_several_labels_one_is_chosen_and_its_probability_is_the_score(classifier: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(classifier)
    samples = [Sample(text, TURNS) for text in ("be kind", "be quick")]
    args = {"path": str(classifier), "label": "toxic"}
    reward = Reward.model_validate({"use": "reward_model", "as": "toxic", "args": args})
    with RewardPool([plugin_spec(reward)], classifier.parent, seed=0) as alone_in_its_pool:
        result = alone_in_its_pool.score_sync(samples)
    assert result.objectives == ("toxic",)
    for sample, [score] in zip(samples, result.scores, strict=True):
        ids = tokenizer("What is 3+4?", sample.completion)["input_ids"]
        assert score == pytest.approx(float(alone(classifier, ids).softmax(-1)[2]), abs=1e-5)


def test_without_a_template_the_token_that_is_scored_is_the_eos_that_was_trained(
    classifier: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

    folder = write_tiny_qwen3(tmp_path / "rm")
    torch.manual_seed(4)
    Qwen3ForSequenceClassification(Qwen3Config.from_pretrained(folder, num_labels=1)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = _opened(str(folder), None, None, "float32", "cpu")
    samples = [Sample("7.", [{"role": "text", "content": "3+4="}]), Sample("7.", [{"role": "user", "content": "3+4="}])]
    ids = [*tokenizer("3+4=7.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert model.read(samples) == [ids, ids]
    assert model.scores([ids]) == pytest.approx([float(alone(folder, ids))], abs=1e-5)
    assert _opened(str(classifier), None, "toxic", "float32", "cpu").read(samples) == [ids[:-1], ids[:-1]]
    _opened.cache_clear()


def test_a_conversation_is_scored_with_the_tools_and_template_arguments_of_its_row(tmp_path: Path) -> None:
    template = (
        "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}{{ mood }}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    write_byte_tokenizer(tmp_path)
    chat = load_tokenizer(tmp_path, chat_template=template)
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
    row = {"tools": [tool], "chat_template_kwargs": {"mood": "kind "}}
    [ids] = Opened(None, chat, None, 0, "cpu").read([Sample("7", TURNS, row=row)])
    assert chat.decode(ids, False) == "<add>kind user:What is 3+4?<|im_end|>assistant:7<|im_end|>"


def test_a_sequence_that_is_too_long_is_a_failure_of_its_own(pool: RewardPool) -> None:
    result = pool.score_sync([Sample("7", TURNS), Sample("7 " * 100, TURNS), Sample("8", TURNS)])
    assert [row[0] is None for row in result.scores] == [False, True, False]
    assert "more than 120" in result.failures[0].message


def test_check_describes_it_without_torch_and_refuses_what_is_no_such_model(
    written: Path, classifier: Path, tiny_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def refused(message: str, **args: Any) -> None:
        with pytest.raises(PluginError) as caught:
            describe_reward(Reward(use="reward_model", args=args), tmp_path)
        assert message in str(caught.value)

    described = describe_reward(Reward(use="reward_model", args={"path": str(written)}), tmp_path)
    assert described["objectives"] == {"reward_model": {"kind": "reward", "range": None}}
    refused("no such folder", path="./nothing/there")
    refused("is a Qwen3ForCausalLM, not a *ForSequenceClassification", path=str(tiny_model_folder()))
    refused("has 3 labels; choose one with `label`: kind, neutral, toxic", path=str(classifier))
    refused("has no label 'rude'", path=str(classifier), label="rude")
    refused("needs the argument 'path'")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("is an adapter; merge it", path=str(tmp_path))


def test_its_path_starts_at_the_recipes_folder(tmp_path: Path, written: Path) -> None:
    (tmp_path / "rm").symlink_to(written)
    rewards = [{"use": "reward_model", "args": {"path": "rm"}}, "length", {"use": "regex", "args": {"pattern": "x"}}]
    stage = {"id": "grpo", "kind": "online", "data": "x.jsonl", "rewards": rewards, "steps": 1}
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "model": {"path": "m/m"}, "stages": [stage]}))
    recipe, _ = load_document(str(tmp_path / "r.yaml"), [])
    assert recipe.stages[0].rewards[0].args == {"path": str(tmp_path / "rm")}  # type: ignore[union-attr]
