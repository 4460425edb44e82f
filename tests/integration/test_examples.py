"""examples/study.yaml from the sweep of its header to the picture, scaled down by overrides alone. Soups of a sweep are
in test_studies.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow]

CHECKOUT = Path(__file__).resolve().parents[2]
SMALL = [
    "model.tokenizer.train_on.options.rows=300",
    "stages.sft.data.options.rows=320",
    "stages.sft.steps=4",
    "stages.grpo.data.options.rows=40",
    "stages.grpo.batch={groups: 4, group_size: 4}",
    "stages.grpo.rollout.name=transformers",
    "stages.grpo.steps=2",
    "stages.exam.data.options.rows=16",
    "stages.exam.rollout.name=transformers",
    "report.tensorboard=false",
]
WEIGHTS = ["--weights", "correct=1,short=1,polite=0", "--weights", "correct=1,short=0,polite=1"]
RUNS = ["correct-1_short-0_polite-1", "correct-1_short-1_polite-0"]


def align(*words: str | Path) -> str:
    """What `align words...` prints, called at the root of the checkout as the header says; it must end well."""
    command = [sys.executable, "-m", "align.cli.main", *map(str, words)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_study_ends_in_a_front_of_three_held_out_objectives(tmp_path: Path) -> None:
    align("sweep", "examples/study.yaml", *WEIGHTS, "--parallel", "2", f"output={tmp_path}", *SMALL)
    root = tmp_path / "study" / "sweep"
    said = align("pareto", root)
    found = json.loads((root / "front.json").read_text())
    assert found["objectives"] == {"right": "reward", "tokens": "cost", "courteous": "reward"}
    assert [point["label"] for point in found["points"]] == RUNS and found["prompts"] == 16
    assert found["notes"] == [], "neither prompts nor rewards of the exam are those of training"
    assert (root / "front.png").is_file() and "hypervolume" in said
