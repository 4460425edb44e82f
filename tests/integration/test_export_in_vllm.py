"""A merged and exported folder in the engine that it is for."""

from __future__ import annotations

import pytest
import torch

from align.export.export import export
from align.export.merge import merge
from align.model import adapters
from align.model.load import load_model
from tests.unit.model.tiny import QWEN3, lora, train_a_little, write_tiny

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm")


def test_a_merged_model_with_an_untied_head_is_proved_by_loading_it_in_vllm(tmp_path):
    base = write_tiny(tmp_path / "base", QWEN3 | {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1})
    peft = adapters.attach(load_model(base, dtype=torch.float32), lora(targets=("q_proj", "lm_head")), None, seed=0)
    train_a_little(peft)
    adapters.save(peft, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    report = export(tmp_path / "merged", tmp_path / "release")
    plain, engine = report.checks
    assert (engine.loader, engine.status) == ("vllm", "proved"), engine
    assert engine.max_difference < 1e-4 and plain.max_difference == 0
    assert (tmp_path / "release" / "export_report.json").is_file()
