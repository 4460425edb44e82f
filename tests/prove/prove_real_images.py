"""Real pictures: a small model learns to answer questions about pictures it has not seen, and every set is used.

    python -m tests.prove real_images

easy_vqa: a Qwen2.5-VL from scratch sees 128 of the 160 pictures in SFT and a short GRPO; its answers about the other 32
are compared with the commonest answer to each question. The other sets pass whole through SFT, DPO and GRPO of
a few steps each, two images in a prompt and videos included; what the data reports say of them is compared with the
files and with SOURCES.md.
ALIGN_PROVE_SETS=easy_vqa or others proves a part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.prove.easy_vqa import AIM, easy_vqa
from tests.prove.entry import CHECKOUT, conclude
from tests.prove.prove_real_data import align_run, lines_of
from tests.prove.real_images import (
    EVERYTHING,
    QUESTIONS,
    SETS,
    Found,
    all_finite,
    config,
    facts,
    names_of,
    pictures_said,
    recipe,
    report_of,
    reported,
    rollouts,
    rows_of,
    rows_said,
)

PATCH = 14
MAX_PIXELS = 32 * (2 * PATCH) ** 2
# ------------------------------------------------------------------------------------------------- the other sets

ASKED = {
    "nlvr/vqa.jsonl": {"prompt": "sentence", "completion": "label"},
    "nlvr/two_image_vqa.jsonl": QUESTIONS,
    "receipts/vqa.jsonl": QUESTIONS,
    "mllm_demo": {},
}
PREFERRED = ("nlvr/preference_pairs.jsonl", "caption_contest/preference_pairs.jsonl", "easy_vqa/preference_pairs.jsonl")
DRAWN = (*list(ASKED)[:3], "mllm_demo/mllm_demo.json", "mllm_demo/mllm_video_demo.json")
SHOW_ALL = ("nlvr/vqa.jsonl", "receipts/vqa.jsonl", *PREFERRED)  # every picture of their folder
SOUNDS = 6  # rows of mllm_demo whose medium, or one of whose media, is a sound


def source(name: str, **more: Any) -> dict[str, Any]:
    return {"path": str(SETS / name), "columns": ASKED.get(name, {}), **more}


def others_recipe(folder: Path) -> Path:
    asked = [source(name, on_bad_row="skip" if name == "mllm_demo" else "error") for name in ASKED]
    stages: list[dict[str, Any]] = [
        {
            "id": "sft", "kind": "sft", "adapter": EVERYTHING, "data": asked, "batch": {"sequences": 32}, "steps": 13,
            "optim": {"lr": 2e-3}, "save": {"every": "50%"},
        },
        {
            "id": "dpo", "kind": "preference", "from": "sft", "loss": [{"name": "dpo"}], "reference": "start",
            "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
            "data": [source(name) for name in PREFERRED], "batch": {"pairs": 16}, "steps": 6,
            "optim": {"lr": 2e-4}, "save": {"every": "50%"},
        },
        {
            "id": "grpo", "kind": "online", "from": "dpo", "data": [source(name, weight=1) for name in DRAWN],
            "batch": {"groups": 12, "group_size": 4}, "steps": 4, "optim": {"lr": 2e-4}, "save": {"every": "50%"},
            "rollout": {"name": "vllm", "temperature": 1.0, "max_tokens": 16},
            "rewards": [{"use": "exact"}, {"use": "overlap", "args": {"metric": "chrf"}}],
        },
    ]  # fmt: skip
    texts = [source(name) for name in list(ASKED)[:3]]
    model = {
        "dtype": "float32",
        "config": config(PATCH, window=56),
        "tokenizer": {"train_on": texts, "vocab_size": 1024},
    }
    media = {"max_pixels": MAX_PIXELS, "video_frames": 2}
    return recipe(folder, "others", {"model": model, "media": media, "stages": stages})


def report_checks(run: Path, stage: str, names: tuple[str, ...]) -> Found:
    """Each source of a stage's report against SOURCES.md and the files; videos are counted only."""
    figures, checks = {}, {}
    for name, told in zip(names, report_of(run, stage)["sources"], strict=True):
        media, rows = told["media"], rows_of(SETS / name)
        refused = Counter(row["reason"] for row in told["refused"])
        figures[name] = {"rows": told["read"], "refused": dict(refused), **media}
        right = told["read"] == rows_said(name) == len(rows) and sum(refused.values()) == told["read"] - told["kept"]
        if "mllm" in name:
            videos = sum(len(row["videos"]) for row in rows if "videos" in row and "audios" not in row)
            right &= media["counts"].get("video", 0) == videos
            right &= sum(refused.values()) == (SOUNDS if name == "mllm_demo" else 0)
            right &= all("audio" in reason for reason in refused)
        else:
            right &= reported(told) == facts(rows, SETS / Path(name).parent, max_pixels=MAX_PIXELS, patch=PATCH)
        if name in SHOW_ALL:
            right &= len(names_of(rows)) == pictures_said(str(Path(name).parent / "images"))
        checks[f"{stage}: the report on {name} says what is there"] = right
    return figures, checks


def others(folder: Path) -> Found:
    run = align_run(others_recipe(folder), folder)
    figures: dict[str, Any] = {}
    checks: dict[str, bool] = {}
    for stage, names in (("sft", tuple(ASKED)), ("dpo", PREFERRED), ("grpo", DRAWN)):
        figures[stage], found = report_checks(run, stage, names)
        checks |= found
    drawn = rollouts(run / "grpo" / "rollouts")
    media: dict[str, set[int]] = defaultdict(set)
    for row in drawn:
        media[row["origin"].removeprefix(f"{SETS}/").rsplit(":", 1)[0]].add(len(row["media"]))
    figures["drawn"] = {name: sorted(counts) for name, counts in sorted(media.items())}
    figures["rollout"] = {"completions": len(drawn), "steps": len(lines_of(run, "grpo"))}
    checks |= {
        "every metric of every step is finite": all_finite(run, "sft", "dpo", "grpo"),
        "completions were drawn for prompts of every set": set(media) == set(DRAWN),
        "prompts of two_image_vqa show two images": media["nlvr/two_image_vqa.jsonl"] == {2},
    }
    figures["eight frames"], found = films(folder, run / "sft" / "model")
    return figures, checks | found


# ------------------------------------------------------------------------------------------------- longer videos


def films_recipe(folder: Path, name: str, rollout: str, base: Path) -> Path:
    data = source("mllm_demo/mllm_video_demo.json")
    stages: list[dict[str, Any]] = [
        {
            "id": "grpo", "kind": "online", "data": data, "batch": {"groups": 3, "group_size": 2}, "steps": 1,
            "rollout": {"name": rollout, "temperature": 1.0, "max_tokens": 8},
            "rewards": [{"use": "overlap", "args": {"metric": "chrf"}}],
        },
    ]  # fmt: skip
    media = {"max_pixels": MAX_PIXELS, "video_frames": 8}
    return recipe(folder, name, {"model": {"path": str(base), "dtype": "float32"}, "media": media, "stages": stages})


def films(folder: Path, base: Path) -> Found:
    """Eight frames of a video: transformers samples, and vLLM, which would place them elsewhere, says so."""
    run = align_run(films_recipe(folder, "films", "transformers", base), folder)
    drawn = rollouts(run / "grpo" / "rollouts")
    refused = subprocess.run(
        [sys.executable, "-m", "align.cli.main", "run", str(films_recipe(folder, "refused", "vllm", base)),
         f"output={folder}"],
        cwd=CHECKOUT, capture_output=True, text=True,
    )  # fmt: skip
    said = " ".join(refused.stderr.split())
    figures = {"completions": len(drawn), "vllm": said[-600:].replace(str(folder), ""), "exit": refused.returncode}
    checks = {
        "transformers samples prompts with 8 frames": len(drawn) == 6 and all(len(r["media"]) == 1 for r in drawn),
        "vLLM refuses them, and says why and what to do": refused.returncode != 0
        and "positions in time" in said
        and "media.video_frames" in said,
    }
    return figures, checks


PROOFS: dict[str, tuple[Callable[[Path], Found], str]] = {
    "easy_vqa": (
        easy_vqa,
        f"a small model from scratch learns to see: about pictures it has not seen it is right far more often than who "
        f"gives the commonest answer to each question (aim: {AIM:g} of them)",
    ),
    "others": (
        others,
        "every real set with images or videos is loaded, trained on and sampled, with reports that equal the files",
    ),
}


def main() -> int:
    begun = time.monotonic()
    wanted = os.environ.get("ALIGN_PROVE_SETS", ",".join(PROOFS)).split(",")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in wanted:
            start = time.monotonic()
            found, checks = PROOFS[name][0](Path(temporary))
            figures[name] = {**found, "seconds": round(time.monotonic() - start), "checks": checks}
            print(json.dumps({name: figures[name]}, indent=1), flush=True)
    return conclude(
        "real-images",
        claim="; ".join(PROOFS[name][1] for name in wanted),
        command=f"ALIGN_PROVE_SETS={','.join(wanted)} python -m tests.prove real_images",
        figures=figures,
        begun=begun,
    )


if __name__ == "__main__":
    sys.exit(main())
