"""The score head: what it is loaded from, what is refused, and that plain transformers and peft compute our scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from align.data.packing import collate
from align.errors import ModelError, Unsupported
from align.model import adapters
from align.model.load import load_model
from align.model.policy_module import PolicyModule
from align.model.probe.choose import probe
from align.model.score_head import MEANING, WEIGHT, adapter_labels, folder_labels, load_score_model, model_labels
from align.model.scoring_class import SEEING
from align.protocols.trees import Segment, Tree
from align.recipe.labels import Labels
from tests.tiny_vlms import write_tiny_vlm
from tests.unit.core.trees import conversation, pair
from tests.unit.model.tiny import LLAMA, QWEN3, lora, train_a_little, write_tiny

F32 = torch.float32


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "model", QWEN3 if request.param == "tied" else LLAMA)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def trees() -> list[Tree]:
    rng = np.random.default_rng(0)
    return [pair(rng, 0), conversation(rng, 1), pair(rng, 2)]


def plain_ids(trees: list[Tree]) -> list[list[int]]:
    found = []
    for tree in trees:
        ends = tree.branches or (Segment(np.zeros(0, np.int64), np.zeros(0, bool)),)
        found += [[*tree.trunk.token_ids.tolist(), *end.token_ids.tolist()] for end in ends]
    return found


@torch.no_grad()
def transformers_scores(model: Any, sequences: list[list[int]]) -> torch.Tensor:
    """f32[S, 1] of one right-padded batch, as anybody would compute them."""
    pad, longest = model.config.pad_token_id, max(map(len, sequences))
    ids = torch.tensor([s + [pad] * (longest - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    scores: torch.Tensor = model.eval()(input_ids=ids, attention_mask=mask).logits.float()
    return scores


@torch.no_grad()
def our_scores(module: PolicyModule, trees: list[Tree]) -> torch.Tensor:
    outputs = module(collate(trees), want=("scores",))
    assert outputs.logps.numel() == 0
    assert outputs.scores is not None
    return outputs.scores


# ------------------------------------------------------------------------------------------------- packing and forward


def test_the_token_that_is_scored_is_the_last_of_each_sequence() -> None:
    some = [*trees(), Tree(3, Segment(np.array([7, 8, 9]), np.array([False, True, True])))]
    batch = collate(some)
    assert batch.score_at.dtype == torch.int64 and batch.score_at.shape == batch.group_ids.shape
    assert batch.token_ids[batch.score_at].tolist() == [ids[-1] for ids in plain_ids(some)]


def test_packed_scores_equal_those_of_a_right_padded_batch(base: Path) -> None:
    model = load_score_model(base, dtype=F32, seed=5)
    sequences = plain_ids(trees())
    expected = transformers_scores(model, sequences)
    module = PolicyModule(model)
    assert probe(module) < 1e-4
    torch.testing.assert_close(our_scores(module, trees()), expected, atol=1e-5, rtol=1e-5)


def test_without_scores_wanted_nothing_but_the_backbone_is_computed(base: Path) -> None:
    outputs = PolicyModule(load_score_model(base, dtype=F32, seed=5))(collate(trees()))
    assert outputs.scores is None and outputs.logps.shape == (0,)


def test_a_backbone_that_looks_ahead_is_found_by_the_probe_whatever_the_length_of_the_head(base: Path) -> None:
    model = load_score_model(base, dtype=F32, seed=5)
    with torch.no_grad():
        model.score.weight.mul_(1e-4)
    layer = model.model.layers[0].mlp
    layer.register_forward_hook(lambda module, args, out: out + 0.5 * out.roll(-1, dims=1))
    with pytest.raises(ModelError, match=r"looks beyond the causal prefix: what model\.layers\.0\.mlp makes"):
        probe(PolicyModule(model))


# ------------------------------------------------------------------------------------------------- loading


def test_a_fresh_head_depends_on_the_seed_alone_and_stays_in_float32(base: Path) -> None:
    torch.manual_seed(1)
    first = load_score_model(base, dtype=torch.bfloat16, seed=3)
    torch.manual_seed(2)
    again, other = (load_score_model(base, dtype=F32, seed=seed) for seed in (3, 4))
    assert first.score.weight.dtype == F32 and first.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.score.weight.std().item() == pytest.approx(0.1, rel=0.5)  # the configuration's initializer_range


def test_a_written_reward_model_is_read_back_with_its_head_and_scores_the_same_in_transformers(
    base: Path, tmp_path: Path
) -> None:
    model = load_score_model(base, dtype=F32, seed=5)
    adapters.save_full(model, tmp_path / "rm", base=base, dtype=F32)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert plain.config.num_labels == 1 and plain.config.architectures == [type(model).__name__]
    assert "lm_head.weight" not in load_file(tmp_path / "rm" / "model.safetensors")
    ours = our_scores(PolicyModule(model), trees())
    torch.testing.assert_close(transformers_scores(plain, plain_ids(trees())), ours, atol=1e-5, rtol=1e-5)
    again = load_score_model(tmp_path / "rm", dtype=F32, seed=99)
    assert torch.equal(again.score.weight, model.score.weight)


def test_the_written_padding_token_is_the_tokenizers_even_where_the_base_names_none(base: Path, tmp_path: Path) -> None:
    edit_json(base / "config.json", pad_token_id=None)
    adapters.save_full(load_score_model(base, dtype=F32, seed=5), tmp_path / "rm", base=base, dtype=F32)
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["pad_token_id"] == 0
    edit_json(base / "config.json", pad_token_id=0)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    base = write_tiny(tmp_path / "base")
    adapters.save_full(load_score_model(base, dtype=F32, seed=5), tmp_path / "rm", base=base, dtype=F32)
    return tmp_path / "rm"


def change_weights(folder: Path, drop: str = "", **extra: torch.Tensor) -> None:
    state = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not drop or drop not in name}
    assert kept.keys() != state.keys() or extra
    save_file(kept | extra, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_reward_model_that_lost_its_head_or_a_layer_is_refused(written: Path) -> None:
    whole = load_file(written / "model.safetensors")
    change_weights(written, drop=WEIGHT)
    with pytest.raises(ModelError, match=r"lacks 1 weights of the model: score\.weight"):
        load_score_model(written, dtype=F32, seed=0)
    save_file(whole, written / "model.safetensors", metadata={"format": "pt"})
    change_weights(written, drop="layers.1.")
    with pytest.raises(ModelError, match=r"lacks \d+ weights of the model: model\.layers\.1"):
        load_score_model(written, dtype=F32, seed=0)


def test_a_causal_model_that_lacks_more_than_the_head_is_refused(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base")
    change_weights(base, drop="layers.0.mlp")
    with pytest.raises(ModelError, match=r"lacks 3 weights of the model: model\.layers\.0\.mlp"):
        load_score_model(base, dtype=F32, seed=0)


def test_heads_of_another_layout_are_refused(written: Path, tmp_path: Path) -> None:
    change_weights(written, **{"score.bias": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"head of another layout \(score\.bias\)"):
        load_score_model(written, dtype=F32, seed=0)
    base = write_tiny(tmp_path / "value")
    change_weights(base, **{"v_head.summary.weight": torch.zeros(1, 32)})
    with pytest.raises(ModelError, match=r"head of another layout \(v_head\.summary\.weight\)"):
        load_score_model(base, dtype=F32, seed=0)


def test_a_classifier_of_several_labels_is_no_reward_model(written: Path) -> None:
    edit_json(written / "config.json", id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    with pytest.raises(ModelError, match="a classifier of 2 labels"):
        load_score_model(written, dtype=F32, seed=0, labels=Labels.numbered(1))


def test_a_tokenizer_without_padding_token_is_refused_with_the_remedy(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base")
    edit_json(base / "tokenizer_config.json", pad_token=None)
    with pytest.raises(ModelError, match="no padding token") as caught:
        load_score_model(base, dtype=F32, seed=0)
    assert "set `pad_token`" in str(caught.value)


def test_a_reward_model_is_no_language_model_though_its_embeddings_could_serve_as_a_head(written: Path) -> None:
    with pytest.raises(ModelError, match="a Qwen3ForSequenceClassification, a model that scores"):
        load_model(written, dtype=F32)


# ------------------------------------------------------------------------------------------------- beside LoRA


def trained(base: Path, folder: Path) -> PolicyModule:
    model = load_score_model(base, dtype=F32, seed=5)
    peft = adapters.attach(model, lora(), None, seed=3)
    train_a_little(peft)
    names = [name for name, p in peft.named_parameters() if p.requires_grad and "lora_" not in name]
    assert names == ["base_model.model.score.modules_to_save.default.weight"]
    with torch.no_grad():
        peft.get_parameter(names[0]).add_(0.3)
    adapters.save(peft, folder)
    return PolicyModule(model).eval()


def test_peft_users_load_adapter_and_head_and_get_our_scores(base: Path, tmp_path: Path) -> None:
    ours = our_scores(trained(base, tmp_path / "adapter"), trees())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert "score" not in config["target_modules"]
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    plain.config.pad_token_id = 0
    theirs = transformers_scores(PeftModel.from_pretrained(plain, tmp_path / "adapter"), plain_ids(trees()))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_training_goes_on_with_adapter_and_head(base: Path, tmp_path: Path) -> None:
    ours = our_scores(trained(base, tmp_path / "adapter"), trees())
    model = load_score_model(base, dtype=F32, seed=77)
    peft = adapters.attach(model, lora(), tmp_path / "adapter", seed=8)
    assert torch.equal(our_scores(PolicyModule(model).eval(), trees()), ours)
    assert sum(p.requires_grad for _, p in peft.named_parameters() if "lora_" not in _) == 1


def test_an_adapter_whose_head_is_missing_is_refused(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "score" not in k}, file)
    with pytest.raises(ModelError, match=r"lacks 1 weights: .*score"):
        adapters.attach(load_score_model(base, dtype=F32, seed=5), lora(), tmp_path / "adapter", seed=8)


def test_a_language_models_adapter_goes_on_under_a_fresh_head(base: Path, tmp_path: Path) -> None:
    policy = adapters.attach(load_model(base, dtype=F32), lora(), None, seed=3)
    train_a_little(policy)
    adapters.save(policy, tmp_path / "sft")
    model = load_score_model(base, dtype=F32, seed=5)
    head = model.score.weight.clone()
    peft = adapters.attach(model, lora(), tmp_path / "sft", seed=8)
    state = dict(policy.named_parameters())
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, state[name]), name
    assert torch.equal(peft.get_base_model().score.modules_to_save["default"].weight, head)


def test_a_reward_models_adapter_is_refused_on_a_language_model(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter")
    with pytest.raises(Unsupported, match="the adapter is a reward model's"):
        adapters.attach(load_model(base, dtype=F32), lora(), tmp_path / "adapter", seed=8)


def test_the_head_is_no_target_of_lora(base: Path) -> None:
    with pytest.raises(ModelError, match="'score' is no linear layer"):
        adapters.attach(load_score_model(base, dtype=F32, seed=5), lora(targets=("score",)), None, seed=8)
    peft = adapters.attach(load_score_model(base, dtype=F32, seed=5), lora(targets=r".*(q_proj|score)"), None, seed=8)
    assert not any("score" in name for name, _ in adapters.lora_layers(peft))


# ------------------------------------------------------------------------------------------------- several labels

LABELS = Labels(("bad", "so-so", "good"), "single_label")


def test_a_head_of_several_labels_is_written_with_their_names_and_read_back(base: Path, tmp_path: Path) -> None:
    model = load_score_model(base, dtype=F32, seed=5, labels=LABELS)
    assert model.score.weight.shape[0] == 3
    adapters.save_full(model, tmp_path / "judge", base=base, dtype=F32)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    assert plain.config.id2label == {0: "bad", 1: "so-so", 2: "good"}
    assert plain.config.label2id == {"bad": 0, "so-so": 1, "good": 2}
    assert plain.config.problem_type == "single_label_classification"
    ours = our_scores(PolicyModule(model), trees())
    torch.testing.assert_close(transformers_scores(plain, plain_ids(trees())), ours, atol=1e-5, rtol=1e-5)
    again = load_score_model(tmp_path / "judge", dtype=F32, seed=99)
    assert folder_labels(tmp_path / "judge") == model_labels(again) == LABELS
    assert torch.equal(again.score.weight, model.score.weight)


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        (LABELS, True),
        (Labels.numbered(3), True),
        (Labels.numbered(3, "single_label"), True),
        (Labels.numbered(2, "single_label"), False),
        (Labels(("good", "so-so", "bad"), "single_label"), False),
        (Labels(LABELS.names, "multi_label"), False),
        (Labels.numbered(1), False),
    ],
)
def test_a_classifier_serves_its_own_labels_and_no_others(written: Path, wanted: Labels, fits: bool) -> None:
    edit_json(written / "config.json", **LABELS.to_config())
    change_weights(written, **{WEIGHT: torch.randn(3, 32)})
    if fits:
        assert model_labels(load_score_model(written, dtype=F32, seed=0, labels=wanted)) == LABELS
    else:
        with pytest.raises(ModelError, match=r"a classifier of 3 labels, single_label of 3 \(bad, so-so, good\)"):
            load_score_model(written, dtype=F32, seed=0, labels=wanted)


def test_labels_that_a_checkpoint_only_numbers_get_the_names_that_are_wanted(written: Path) -> None:
    edit_json(written / "config.json", **Labels.numbered(3).to_config())
    change_weights(written, **{WEIGHT: torch.randn(3, 32)})
    assert model_labels(load_score_model(written, dtype=F32, seed=0, labels=LABELS)) == LABELS


def test_the_adapter_of_somebody_elses_classifier_is_taken_by_its_width(base: Path, tmp_path: Path) -> None:
    model = load_score_model(base, dtype=F32, seed=5, labels=LABELS)
    adapters.save(adapters.attach(model, lora(), None, seed=3), tmp_path / "adapter")
    assert adapter_labels(tmp_path / "adapter") == LABELS
    (tmp_path / "adapter" / MEANING).unlink()
    assert adapter_labels(tmp_path / "adapter") == Labels.numbered(3)
    with pytest.raises(ModelError, match="the adapter has a head for a score of 3"):
        adapters.attach(load_score_model(base, dtype=F32, seed=5), lora(), tmp_path / "adapter", seed=8)


# ------------------------------------------------------------------------------------------------- models that see


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "internvl"])
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vlm(tmp_path_factory.mktemp(request.param) / "model", request.param)


def test_a_model_that_sees_gets_a_head_on_its_language_width_and_is_read_back_with_its_tower(
    seeing: Path, tmp_path: Path
) -> None:
    model = load_score_model(seeing, dtype=F32, seed=5, labels=LABELS)
    assert model.score.weight.shape == (3, model.config.get_text_config().hidden_size)
    assert model.get_output_embeddings() is None
    seen = load_model(seeing, dtype=F32).state_dict()
    shared = {name: value for name, value in model.state_dict().items() if name != WEIGHT}
    assert all(torch.equal(value, seen[name]) for name, value in shared.items()), "backbone and tower are the model's"
    adapters.save_full(model, tmp_path / "judge", base=seeing, dtype=F32)
    assert folder_labels(tmp_path / "judge") == LABELS
    again = load_score_model(tmp_path / "judge", dtype=F32, seed=99).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_its_packed_scores_of_text_equal_those_of_its_own_forward(seeing: Path) -> None:
    model = load_score_model(seeing, dtype=F32, seed=5, labels=LABELS)
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in plain_ids(trees())])
    module = PolicyModule(model)
    assert probe(module) < 1e-4
    torch.testing.assert_close(our_scores(module, trees()), expected.float(), atol=1e-4, rtol=1e-4)


def test_for_which_models_that_see_transformers_has_a_classifier_is_known_without_it() -> None:
    from transformers.models.auto import modeling_auto as known

    there = {*known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} & {
        *known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    }
    assert {name for name in there if name in known.MODEL_MAPPING_NAMES} == {*SEEING}
