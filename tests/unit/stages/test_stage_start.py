from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.errors import RecipeError, RunFolderError
from align.recipe.adapter import Adapter
from align.recipe.schema import Recipe
from align.stages.stage_start import Origin, adapter_of, check_adapters, start_of, weights_of

LORA = {"kind": "lora", "rank": 4}
BASE = Path("/models/base")


def recipe(*stages: dict[str, Any]) -> Recipe:
    filled = [{"data": "rows.jsonl", **s} if s["kind"] in ("sft", "preference") else s for s in stages]
    return Recipe.model_validate({"name": "run", "model": {"path": "base"}, "stages": filled})


def sft(name: str = "sft", **more: Any) -> dict[str, Any]:
    return {"id": name, "kind": "sft", **more}


def dpo(**more: Any) -> dict[str, Any]:
    return {"id": "dpo", "kind": "preference", **more}


def done(**artefacts: str) -> dict[str, Any]:
    return {"artefacts": artefacts, "start": {"base": "/models/base", "adapter": None}}


def test_the_first_stage_starts_from_the_model(tmp_path: Path) -> None:
    r = recipe(sft(adapter=LORA))
    start = start_of(r, r.stages[0], Origin(BASE, None), {})
    assert (start.base, start.adapter, start.config.rank, start.artefact) == (BASE, None, 4, "adapter")


def test_an_adapter_is_handed_over_with_its_base_and_configuration() -> None:
    r = recipe(sft(adapter=LORA), dpo(**{"from": "sft"}))
    start = start_of(r, r.stages[1], Origin(BASE, None), {"sft": done(adapter="/run/sft/adapter")})
    assert (start.base, start.adapter, start.config) == (BASE, Path("/run/sft/adapter"), Adapter(rank=4))


def test_the_best_adapter_is_handed_over_where_it_is_asked_for() -> None:
    r = recipe(sft(adapter=LORA), dpo(**{"from": "sft@best"}))
    entry = done(adapter="/last", best_adapter="/best")
    assert start_of(r, r.stages[1], Origin(BASE, None), {"sft": entry}).adapter == Path("/best")
    with pytest.raises(RunFolderError, match="save:"):
        start_of(r, r.stages[1], Origin(BASE, None), {"sft": done(adapter="/last")})


def test_after_a_full_stage_its_folder_is_the_base() -> None:
    r = recipe(sft(adapter={"kind": "full"}), dpo(**{"from": "sft", "adapter": LORA}))
    start = start_of(r, r.stages[1], Origin(BASE, None), {"sft": done(model="/run/sft/model")})
    assert (start.base, start.adapter, start.config.kind) == (Path("/run/sft/model"), None, "lora")
    full = recipe(sft(adapter={"kind": "full"}), dpo(**{"from": "sft"}))
    start = start_of(full, full.stages[1], Origin(BASE, None), {"sft": done(model="/run/sft/model")})
    assert (start.config.kind, start.artefact) == ("full", "model")


def test_after_a_merge_the_folder_is_the_base_and_a_fresh_adapter_of_the_same_kind_is_trained() -> None:
    r = recipe(sft(adapter=LORA), {"id": "merged", "kind": "merge", "from": "sft"}, dpo(**{"from": "merged"}))
    start = start_of(r, r.stages[2], Origin(BASE, None), {"merged": done(model="/run/merged/model")})
    assert (start.base, start.adapter, start.config) == (Path("/run/merged/model"), None, Adapter(rank=4))


def test_an_equal_adapter_continues_and_a_different_one_is_refused() -> None:
    check_adapters(recipe(sft(adapter=LORA), dpo(**{"from": "sft", "adapter": LORA})))
    check_adapters(recipe(sft(adapter=LORA), dpo(**{"from": "sft"})))
    with pytest.raises(RecipeError) as caught:
        check_adapters(recipe(sft(adapter=LORA), dpo(**{"from": "sft", "adapter": {"kind": "lora", "rank": 8}})))
    assert "rank: 4 -> 8" in str(caught.value) and "merge stage between" in str(caught.value)
    with pytest.raises(RecipeError, match="kind"):
        check_adapters(recipe(sft(adapter=LORA), dpo(**{"from": "sft", "adapter": {"kind": "full"}})))


def test_a_merge_between_lifts_the_refusal() -> None:
    merged = {"id": "merged", "kind": "merge", "from": "sft"}
    check_adapters(recipe(sft(adapter=LORA), merged, dpo(**{"from": "merged", "adapter": {"kind": "full"}})))


def test_a_foreign_adapter_is_continued_under_its_own_configuration(tmp_path: Path) -> None:
    config = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["v_proj", "q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    origin = Origin(BASE, tmp_path)
    r = recipe(sft())
    assert adapter_of(r, r.stages[0], origin) == Adapter(rank=64, alpha=16, dropout=0.05, targets=("q_proj", "v_proj"))
    assert start_of(r, r.stages[0], origin, {}).adapter == tmp_path
    with pytest.raises(RecipeError, match=r"model\.adapter"):
        check_adapters(recipe(sft(adapter={"kind": "full"})), origin)


def test_an_adapter_of_another_shape_than_the_recipes_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    config = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["v_proj", "q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    same = {"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0.05}
    check_adapters(recipe(sft(adapter=same)), Origin(BASE, tmp_path))  # its targets are compared with the model at hand
    for key, value in (("rank", 16), ("alpha", 8), ("dropout", 0.0), ("rslora", True), ("kind", "dora")):
        with pytest.raises(RecipeError, match=rf"model\.adapter under another configuration \({key}: ") as caught:
            check_adapters(recipe(sft(adapter={**same, key: value})), Origin(BASE, tmp_path))
        assert "merge stage in front" in str(caught.value)


def test_a_stage_without_from_starts_at_the_model_wherever_it_stands() -> None:
    r = recipe(sft(adapter=LORA), sft("other"))
    start = start_of(r, r.stages[1], Origin(BASE, None), {"sft": done(adapter="/run/sft/adapter")})
    assert (start.base, start.adapter) == (BASE, None)


def test_an_evaluation_reads_the_weights_a_stage_left() -> None:
    r = recipe(sft(adapter=LORA))
    entry = {"sft": done(adapter="/last", best_adapter="/best")}
    assert weights_of(r, "sft", "", entry, Adapter()).adapter == Path("/last")
    assert weights_of(r, "sft", "best", entry, Adapter()).adapter == Path("/best")
