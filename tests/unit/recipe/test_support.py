"""The table of adapters, engines and references, and folders of models."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from align.errors import ModelError, RecipeError, Unsupported
from align.hub import looks_like_hub_id, resolve_model_folder
from align.recipe.adapter import Adapter, Quant
from align.recipe.parts import ReferencePath, Rollout
from align.recipe.support import check_adapter, publish_mode, reference_words, refuse_parts_of_text
from rollout.vllm_facts import FACTS, TOWER_OPTION


@pytest.mark.parametrize(
    ("kind", "weights", "mode"),
    [
        ("lora", "auto", "adapter"),
        ("lora", "adapter", "adapter"),
        ("lora", "merged", "weights"),
        ("full", "auto", "weights"),
        ("full", "merged", "weights"),
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_engines_receive_the_adapter_where_there_is_one(kind: str, weights: str, mode: str, engine: str) -> None:
    rollout = Rollout.model_validate({"name": engine, "weights": weights})
    assert publish_mode(Adapter.model_validate({"kind": kind}), rollout) == mode


def test_a_full_fine_tune_has_no_adapter_to_send() -> None:
    with pytest.raises(RecipeError, match="no adapter to send"):
        publish_mode(Adapter(kind="full"), Rollout(weights="adapter"))


def test_only_whole_weights_on_vllm_take_over_in_flight() -> None:
    assert publish_mode(Adapter(kind="full"), Rollout(publish="in_flight")) == "weights"
    assert publish_mode(Adapter(), Rollout(publish="in_flight", weights="merged")) == "weights"
    with pytest.raises(Unsupported, match="with adapters"):
        publish_mode(Adapter(), Rollout(publish="in_flight"))
    with pytest.raises(Unsupported, match="transformers"):
        publish_mode(Adapter(kind="full"), Rollout(publish="in_flight", name="transformers"))


def test_ranks_beyond_vllms_kernels_are_refused_unless_merged() -> None:
    with pytest.raises(Unsupported, match="up to rank 512"):
        publish_mode(Adapter(rank=1024), Rollout())
    assert publish_mode(Adapter(rank=1024), Rollout(weights="merged")) == "weights"
    assert publish_mode(Adapter(rank=1024), Rollout(name="transformers")) == "adapter"


@pytest.mark.parametrize("adapter", [Adapter(kind="qlora"), Adapter(kind="dora"), Adapter(kind="dora", quant=Quant())])
def test_engines_are_sent_what_they_cannot_make_of_the_adapter_alone(adapter: Adapter) -> None:
    check_adapter(adapter)
    for weights in ("auto", "merged"):
        assert publish_mode(adapter, Rollout(weights=weights)) == "weights"
    with pytest.raises(RecipeError, match="four bits" if adapter.quant else "DoRA"):
        publish_mode(adapter, Rollout(weights="adapter"))


def test_four_bits_go_with_their_kinds_alone() -> None:
    assert Adapter(kind="qlora") == Adapter(kind="qlora", quant=Quant()) and Adapter(kind="lora").quant is None
    for given in ({"kind": "lora", "quant": {}}, {"kind": "full", "quant": {}}, {"kind": "full", "rslora": True}):
        with pytest.raises(ValidationError):
            Adapter.model_validate(given)
    with pytest.raises(Unsupported, match="packed a second time"):
        check_adapter(tuned("qlora", projector="full"))


def tuned(kind: str = "lora", **tune: str) -> Adapter:
    return Adapter.model_validate({"kind": kind, "tune": tune})


def test_what_an_adapter_does_not_hold_is_published_as_whole_weights() -> None:
    for adapter in (tuned(vision="full"), tuned(vision="lora"), tuned(projector="lora"), tuned("full", vision="full")):
        assert publish_mode(adapter, Rollout()) == "weights"
    assert publish_mode(tuned(vision="frozen", language="lora"), Rollout()) == "adapter"
    with pytest.raises(RecipeError, match="trained whole"):
        publish_mode(tuned(vision="full"), Rollout(weights="adapter"))


def test_vllm_is_sent_lora_on_a_tower_only_where_it_was_told_to_serve_it() -> None:
    with pytest.raises(Unsupported, match="ignores by default"):
        publish_mode(tuned(vision="lora"), Rollout(weights="adapter"))
    assert publish_mode(tuned(vision="lora"), Rollout(weights="adapter", engine={TOWER_OPTION: True})) == "adapter"
    assert publish_mode(tuned(vision="lora"), Rollout(weights="adapter", name="transformers")) == "adapter"


def test_parts_and_kind_must_not_contradict_each_other() -> None:
    for adapter in (tuned("full", vision="lora"), tuned(language="full"), tuned("full", language="frozen")):
        with pytest.raises(RecipeError, match=r"makes no adapter|puts LoRA on no part|freezes every part"):
            check_adapter(adapter)
    for adapter in (tuned(vision="full"), tuned(vision="lora", language="full"), tuned("full", vision="full")):
        check_adapter(adapter)


def test_a_model_of_text_is_tuned_as_its_kind_says() -> None:
    refuse_parts_of_text(tuned(vision="frozen", language="lora"))
    refuse_parts_of_text(tuned("full", language="full"))
    with pytest.raises(Unsupported, match=r"adapter\.tune\.projector"):
        refuse_parts_of_text(tuned(projector="full"))


def test_a_reference_holds_a_copy_of_what_is_trained_whole() -> None:
    words = reference_words(tuned(vision="full", projector="full"), "start", continues_adapter=False)
    assert "a frozen copy of vision and projector" in words


def test_the_largest_rank_is_the_one_that_vllm_names() -> None:
    config = pytest.importorskip("vllm.config.lora")
    from typing import get_args

    assert max(get_args(config.MaxLoRARanks)) == FACTS.largest_rank


def test_a_reference_is_described_as_it_will_be_had() -> None:
    lora, full = Adapter(), Adapter(kind="full")
    assert reference_words(lora, None, False) == "none"
    assert "adapter off" in reference_words(lora, "start", False)
    assert "frozen copy of the starting adapter" in reference_words(lora, "start", True)
    assert "adapter off" in reference_words(lora, "base", True)
    assert "second copy" in reference_words(full, "start", False)
    assert reference_words(lora, "cached", True) == reference_words(full, "cached", False)
    assert "computed once" in reference_words(full, "cached", False)
    own = reference_words(lora, ReferencePath(path="a/b"), False)
    assert "own" in own and "four bits" not in own
    packed = Adapter(kind="qlora")
    assert "not packed in four bits" in reference_words(packed, ReferencePath(path="a/b"), False)
    assert "four bits" not in reference_words(packed, ReferencePath(path="a/b", adapter="a/c"), False)


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model_folder("model") == tmp_path / "model"
    with pytest.raises(ModelError, match="a local folder"):
        resolve_model_folder("model", "main")


@pytest.mark.parametrize("path", ["./none", "/none/at/all", "a/b/c", "~/none-of-this"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(path: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        resolve_model_folder(path)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(ModelError, match="this is a file"):
        resolve_model_folder(tmp_path / "model.bin")


def test_a_hub_id_that_is_not_here_and_cannot_be_fetched_says_how_to_fetch_it() -> None:
    # tests run with HF_HUB_OFFLINE=1
    with pytest.raises(ModelError, match="hf download no-owner/no-such-model"):
        resolve_model_folder("no-owner/no-such-model", weights=False)


def test_what_has_the_shape_of_a_hub_id() -> None:
    assert looks_like_hub_id("owner/name") and looks_like_hub_id("gpt2")
    assert not looks_like_hub_id("a/b/c") and not looks_like_hub_id("./a") and not looks_like_hub_id("/a")
