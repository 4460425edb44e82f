"""Soups of adapters: exact in delta W, whatever the adapters' ranks, scales and targets; loadable by peft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from align.errors import ExportError, ModelError, Unsupported, UserError
from align.export import soup as soups
from align.export.merge import merge
from align.export.soup import kept, soup
from align.model import adapters
from align.model.adapter_config import recipe_adapter
from align.model.load import load_model
from align.recipe.adapter import Quant
from align.recipe.adapter_folder import QuantisedBase, quantised_base
from tests.unit.model.tiny import QWEN3, logits, lora, train_a_little, write_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "qwen3", QWEN3)


@pytest.fixture(scope="module")
def two(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Unrelated adapters of one shape."""
    root = tmp_path_factory.mktemp("adapters")
    return [trained(base, root / str(seed), seed) for seed in (1, 2)]


def trained(base: Path, out: Path, seed: int, **changes) -> Path:
    peft = adapters.attach(load_model(base, dtype=torch.float32), lora(**changes), None, seed=seed)
    train_a_little(peft, seed=seed)
    adapters.save(peft, out)
    return out


def by_peft(base: Path, out: Path, seed: int, **config) -> Path:
    torch.manual_seed(seed)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **config))
    train_a_little(peft, seed=seed)
    peft.save_pretrained(out)
    return out


def dense(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Delta W of every module in float64, as peft computes it: merged weights minus the base's."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    peft = PeftModel.from_pretrained(plain, adapter, autocast_adapter_dtype=False).double()
    after = peft.merge_and_unload().state_dict()
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def interpolated(base: Path, folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, delta in dense(base, folder).items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
    return total


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative to what is wanted, over all modules together."""
    assert found.keys() == wanted.keys()
    off = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return (off / sum(float(delta.square().sum()) for delta in wanted.values())) ** 0.5


# -------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("weights", [[0.3, 0.7], [1.0, 0.0], [1.5, -0.5]])
def test_a_soup_is_the_interpolation_of_delta_w_to_one_in_a_million(base, two, tmp_path, weights):
    report = soup(two, weights, tmp_path / "soup")
    assert distance(dense(base, tmp_path / "soup"), interpolated(base, two, weights)) < 1e-6
    assert report.error < 1e-6 and report.rank == 4 * sum(w != 0 for w in weights) and report.modules == 14


def test_averaging_a_and_b_apart_is_far_off_for_unrelated_adapters(base, two, tmp_path):
    averaged = tmp_path / "averaged"
    shutil.copytree(two[0], averaged)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in two)
    save_file({key: (one[key] + other[key]) / 2 for key in one}, averaged / "adapter_model.safetensors")
    wanted = interpolated(base, two, [0.5, 0.5])
    assert 0.6 < distance(dense(base, averaged), wanted) < 0.8  # 1 / sqrt(2) where nothing is shared
    soup(two, [0.5, 0.5], tmp_path / "soup")
    assert distance(dense(base, tmp_path / "soup"), wanted) < 1e-6


def test_adapters_of_other_ranks_scales_targets_and_makers_go_together(base, tmp_path):
    folders = [
        trained(base, tmp_path / "ours", 1, rank=2, alpha=16.0, targets=("q_proj", "down_proj")),
        by_peft(base, tmp_path / "rs", 2, r=5, lora_alpha=3, use_rslora=True, target_modules=["v_proj", "q_proj"]),
        by_peft(
            base,
            tmp_path / "patterns",
            3,
            r=3,
            lora_alpha=6,
            target_modules=["q_proj", "o_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 7},
            alpha_pattern={"o_proj": 1},
            layers_to_transform=[1],
        ),
    ]
    weights = [0.5, 0.3, 0.2]
    report = soup(folders, weights, tmp_path / "soup")
    assert distance(dense(base, tmp_path / "soup"), interpolated(base, folders, weights)) < 1e-6
    assert report.rank == 2 + 5 + 7
    state = load_file(tmp_path / "soup" / "adapter_model.safetensors")
    assert {t.shape[0 if "lora_A" in k else 1] for k, t in state.items()} == {14}, (
        "one rank, so that any engine loads it"
    )


def test_a_soup_is_a_plain_adapter_that_trains_on_and_merges(base, two, tmp_path):
    soup(two, [0.25, 0.75], tmp_path / "soup")
    config = json.loads((tmp_path / "soup" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8 and config["base_model_name_or_path"] == str(base)
    peft = adapters.attach(load_model(base, dtype=torch.float32), None, tmp_path / "soup", seed=0)
    assert recipe_adapter(tmp_path / "soup").rank == 8
    merge(base, tmp_path / "soup", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logits(peft), logits(merged), atol=1e-5)


def test_a_soup_of_one_adapter_at_weight_one_computes_the_same(base, two, tmp_path):
    soup(two[:1], [1.0], tmp_path / "soup")
    model = load_model(base, dtype=torch.float32)
    one = logits(adapters.attach(model, None, two[0], seed=0))
    again = adapters.attach(load_model(base, dtype=torch.float32), None, tmp_path / "soup", seed=0)
    assert torch.allclose(one, logits(again), atol=1e-5)


def test_a_soup_that_is_there_is_known_by_its_adapters_and_weights(two, tmp_path):
    report = soup(two, [0.5, 0.5], tmp_path / "soup")
    assert kept(two, [0.5, 0.5], tmp_path / "soup") == report
    assert kept(two, [0.4, 0.6], tmp_path / "soup") is None and kept(two, [0.5, 0.5], tmp_path / "none") is None


# -------------------------------------------------------------------------------------------------- refused


def test_adapters_of_different_bases_are_refused_unless_the_folders_hold_the_same_model(base, two, tmp_path):
    copy, other = tmp_path / "copy", write_tiny(tmp_path / "other", QWEN3, seed=5)
    shutil.copytree(base, copy)
    on_copy, on_other = trained(copy, tmp_path / "a", 3), trained(other, tmp_path / "b", 3)
    soup([two[0], on_copy], [0.5, 0.5], tmp_path / "soup")
    with pytest.raises(ModelError, match=r"different bases[\s\S]*--base"):
        soup([two[0], on_other], [0.5, 0.5], tmp_path / "refused")
    assert soup([two[0], on_other], [0.5, 0.5], tmp_path / "told", base=base).base == str(base)
    wide = write_tiny(tmp_path / "wide", {**QWEN3, "hidden_size": 64})
    with pytest.raises(ModelError, match="different bases"):
        soup([two[0], trained(wide, tmp_path / "c", 3)], [0.5, 0.5], tmp_path / "refused", base=base)
    assert not (tmp_path / "refused").exists()


def test_adapters_of_one_packed_base_make_a_soup_of_it_and_others_are_refused(base, two, tmp_path):
    packed = [shutil.copytree(folder, tmp_path / f"packed-{n}") for n, folder in enumerate(two)]
    said = QuantisedBase(Quant(), ("language",), "float32")
    for folder in packed:
        said.write(folder)
    soup(packed, [0.5, 0.5], tmp_path / "soup")
    assert quantised_base(tmp_path / "soup") == said
    with pytest.raises(ModelError, match="full precision"):
        soup([packed[0], two[1]], [0.5, 0.5], tmp_path / "refused")


def test_what_is_more_than_lora_is_refused(base, two, tmp_path):
    dora = by_peft(base, tmp_path / "dora", 1, r=4, use_dora=True, target_modules=["q_proj"])
    with pytest.raises(Unsupported, match="DoRA"):
        soup([two[0], dora], [0.5, 0.5], tmp_path / "soup")
    embedded = tmp_path / "embedded"
    shutil.copytree(two[0], embedded)
    state = load_file(embedded / "adapter_model.safetensors")
    save_file({**state, "base_model.model.lm_head.weight": torch.ones(2, 2)}, embedded / "adapter_model.safetensors")
    with pytest.raises(Unsupported, match=r"lm_head.weight, which is no LoRA weight"):
        soup([two[0], embedded], [0.5, 0.5], tmp_path / "soup")


@pytest.mark.parametrize("weights", [[0.5], [0.0, 0.0], [float("nan"), 1.0]])
def test_weights_that_do_not_fit_are_refused(two, tmp_path, weights):
    with pytest.raises(UserError):
        soup(two, weights, tmp_path / "soup")


def test_weights_that_are_not_finite_and_ranks_that_lie_are_refused(two, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(two[0], broken)
    state = load_file(broken / "adapter_model.safetensors")
    first = next(iter(state))
    save_file({**state, first: state[first] * float("nan")}, broken / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="not finite"):
        soup([broken], [1.0], tmp_path / "soup")
    shutil.copyfile(two[0] / "adapter_model.safetensors", broken / "adapter_model.safetensors")
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    with pytest.raises(ModelError, match=r"has rank 4, and adapter_config.json says 2"):
        soup([broken], [1.0], tmp_path / "soup")


def test_a_wrong_sum_is_caught_before_the_folder_takes_its_name(two, tmp_path, monkeypatch):
    right = soups.concatenated
    monkeypatch.setattr(soups, "concatenated", lambda *words: tuple(1.00001 * t for t in right(*words)))
    with pytest.raises(ExportError, match="differs from the sum of its parts"):
        soup(two, [0.5, 0.5], tmp_path / "soup")
    assert not list(tmp_path.iterdir())
