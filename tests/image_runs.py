"""Runs with pictures for tests and proofs, beside those of `tests.runs`: rows, a judge that looks, stages of a tiny
Qwen2.5-VL."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests import generators, runs

JUDGE = '''"""What it says of a picture can be computed again from the file that the rollouts name."""

from PIL import Image

from rewards import reward


@reward(max_error_rate=0)
def looks(samples):
    """How blue the picture is, in [0, 1]; -1 where there is none."""
    return [_blueness(s) for s in samples]


def _blueness(sample):
    shown = [part for m in sample.messages if isinstance(m["content"], list) for part in m["content"]]
    if not sample.media:
        assert all(part["type"] == "text" for part in shown), sample.messages
        return -1.0
    [medium] = sample.media
    assert medium["type"] == "image", medium
    assert [part["path"] for part in shown if part["type"] == "image"] == [medium["path"]], sample.messages
    with Image.open(medium["path"]) as picture:
        assert picture.mode == "RGB"
        return picture.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))[2] / 255


@reward
def brevity(samples):
    return [-0.1 * len(s.token_ids) for s in samples]
'''


def write_data(folder: Path) -> None:
    """model/, judge.py, and sft.jsonl, pairs.jsonl and prompts.jsonl with pictures as files, a fourth without."""
    from tests.tiny_vlms import write_tiny_vlm

    write_tiny_vlm(folder / "model", "qwen2_5_vl")
    shapes = generators.load("shapes")
    runs.write_jsonl(folder / "sft.jsonl", _rows(shapes.sft(rows=32), folder / "pictures" / "sft"))
    runs.write_jsonl(folder / "pairs.jsonl", _rows(shapes.pairs(rows=16), folder / "pictures" / "pairs"))
    runs.write_jsonl(folder / "prompts.jsonl", _rows(shapes.prompts(rows=16), folder / "pictures" / "prompts"))
    (folder / "judge.py").write_text(JUDGE)


def _rows(rows: Iterable[dict[str, Any]], pictures: Path) -> list[dict[str, Any]]:
    pictures.mkdir(parents=True)
    found = []
    for number, row in enumerate(rows):
        [uri] = row.pop("images")
        if number % 4 == 3:
            turns = row["messages" if "messages" in row else "prompt"]
            turns[0]["content"] = turns[0]["content"].replace("<image>", "")
        else:
            (pictures / f"{number}.png").write_bytes(base64.b64decode(uri.partition(",")[2]))
            row["images"] = [f"pictures/{pictures.name}/{number}.png"]
        found.append(row)
    return found


def write_recipe(folder: Path, name: str, stages: list[dict[str, Any]], **changes: Any) -> Path:
    """A recipe over the data of `write_data`; returns its path."""
    return runs.write_recipe(folder, name, stages, **{"model": {"path": "model", "dtype": "float32"}, **changes})


SFT = {  # the tower whole, the language model by LoRA
    "id": "sft", "kind": "sft", "data": "sft.jsonl", "batch": {"sequences": 8}, "steps": 8, "optim": {"lr": 3e-3},
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "tune": {"vision": "full", "projector": "full"}},
    "eval": {"data": {"path": "sft.jsonl", "limit": 8}, "every": 8, "at_start": True},
}  # fmt: skip
DPO = {
    "id": "dpo", "kind": "preference", "from": "whole", "data": "pairs.jsonl", "batch": {"pairs": 8}, "steps": 4,
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8}, "optim": {"lr": 1e-3},
}  # fmt: skip
GRPO = {
    "id": "grpo", "kind": "online", "from": "dpo", "data": "prompts.jsonl", "batch": {"groups": 4, "group_size": 4},
    "rollout": {"max_tokens": 8}, "rewards": [{"use": "judge.py:looks"}, {"use": "judge.py:brevity"}],
    "loss": {"name": "grpo", "kl": 0.01}, "optim": {"lr": 1e-3}, "steps": 2, "save": {"every": 1},
}  # fmt: skip
EXAM = {
    "id": "exam", "kind": "evaluate", "of": ["release"], "data": "prompts.jsonl",
    "rewards": [{"use": "judge.py:looks"}], "rollout": {"max_tokens": 8, "temperature": 0.0},
}  # fmt: skip
SEEING = {  # the engine applies adapters to the language model alone: it is given merged weights
    **GRPO, "from": None, "steps": 3,
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "tune": {"vision": "lora", "projector": "lora"}},
}  # fmt: skip
