"""Rows, folders and models of other projects through real runs, without a word of configuration: verl's Parquet, image,
text and answer, a GGUF file, and a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from tests import generators
from tests.image_runs import _rows
from tests.image_runs import write_recipe as write_image_recipe
from tests.runs import grpo, metrics, rollouts, run, sft, write_data, write_jsonl, write_recipe
from tests.tiny_vlms import write_tiny_vlm
from tests.unit.core.test_gguf import write_gguf

pytestmark = pytest.mark.slow

TRUE = '''
from rewards import reward


@reward(max_error_rate=0)
def near(samples):
    """How near the answer's length is to the ground truth's; the row is verl's, with its objects."""
    assert all(s.row["data_source"] == "sums" and s.row["extra_info"]["index"] >= 0 for s in samples)
    truths = [s.row["reward_model"]["ground_truth"] for s in samples]
    return [-abs(len(s.completion) - len(truth)) / 10 for s, truth in zip(samples, truths, strict=True)]
'''


def test_verls_parquet_trains_grpo_with_its_ground_truth_in_a_reward(tmp_path: Path) -> None:
    write_data(tmp_path)
    rows = [
        {
            "data_source": "sums", "prompt": [{"role": "user", "content": f"{a} + {b} ="}], "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(a + b)}, "extra_info": {"split": "train", "index": a},
        }
        for a in range(8) for b in range(4)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    (tmp_path / "judge.py").write_text(TRUE)
    stage = grpo(
        **{"from": None}, adapter={"kind": "lora", "rank": 4}, data="train.parquet", eval=None, steps=2,
        rollout={"name": "transformers", "max_tokens": 8, "truncated": "keep"}, rewards=[{"use": "judge.py:near"}],
        batch={"groups": 4, "group_size": 4},
    )  # fmt: skip
    said = run(write_recipe(tmp_path, "verl", [stage]))
    assert "32 rows, 32 kept" in said
    drawn = rollouts(tmp_path / "runs" / "verl", "grpo")
    assert len(drawn) == 32 and len({row["objective/near"] for row in drawn}) > 1


def test_image_text_and_answer_train_a_model_that_sees(tmp_path: Path) -> None:
    write_tiny_vlm(tmp_path / "model", "qwen2_5_vl")
    shapes = [
        row for row in _rows(generators.load("shapes").sft(rows=32), tmp_path / "pictures" / "sft") if "images" in row
    ]
    rows = [
        {
            "image": row["images"][0],
            "text": row["messages"][0]["content"].replace("<image>", "").strip(),
            "answer": row["messages"][1]["content"],
        }
        for row in shapes
    ]
    assert len(rows) == 24
    write_jsonl(tmp_path / "rows.jsonl", rows)
    stage: dict[str, Any] = {
        "id": "sft", "kind": "sft", "data": "rows.jsonl", "batch": {"sequences": 8}, "steps": 8, "optim": {"lr": 3e-3},
        "adapter": {"kind": "lora", "rank": 4, "tune": {"vision": "full", "projector": "full"}},
    }  # fmt: skip
    said = run(write_image_recipe(tmp_path, "seen", [stage]))
    assert "24 rows, 24 kept" in said and "media: 24 images" in said
    losses = [line["loss/total"] for line in metrics(tmp_path / "runs" / "seen", "sft")]
    assert losses[-1] < losses[0]


def test_a_gguf_model_is_trained_merged_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    write_data(tmp_path)
    write_gguf(tmp_path, gguf.GGMLQuantizationType.Q8_0)
    stages = [
        sft(adapter={"kind": "lora", "rank": 4}, steps=4, batch={"sequences": 8}, eval=None),
        {"id": "merged", "kind": "merge", "from": "sft"},
        {"id": "release", "kind": "export", "from": "merged"},
    ]
    said = run(write_recipe(tmp_path, "packed", stages, model={"path": "model.gguf", "dtype": "float32"}))
    assert "release: done" in said
    release = tmp_path / "runs" / "packed" / "release" / "model"
    model = AutoModelForCausalLM.from_pretrained(release)
    assert model.config.model_type == "llama" and not hasattr(model.config, "quantization_config")


def test_a_stream_is_trained_on_by_real_actors(tmp_path: Path) -> None:
    write_data(tmp_path)
    data = {"path": "sums.jsonl", "stream": True, "shuffle_buffer": 16}
    said = run(write_recipe(tmp_path, "streamed", [sft(data=data, steps=6, eval=None)]))
    assert "stream, rows 1 to 16:" in said and "it ends (64 rows read so far), and begins again" in said
    assert len(metrics(tmp_path / "runs" / "streamed", "sft")) == 6
