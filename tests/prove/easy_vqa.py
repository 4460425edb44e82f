"""easy_vqa: what a small model from scratch learns of 128 pictures, examined on 32 that it has not seen.

128 pictures are few to learn seeing from, so what each shows is shown elsewhere too, mirrored, in other sizes, in the
colours and on the grounds of others among them; and is asked all questions of the set whose answer follows from the
answers it has: a red circle is no teal shape. Nothing is made of the 32 pictures and their questions, which the set's
own answers judge.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from tests.prove.prove_real_data import align_run, lines_of
from tests.prove.real_images import (
    EVERYTHING,
    QUESTIONS,
    SEED,
    SETS,
    Found,
    Row,
    all_finite,
    config,
    digests,
    facts,
    names_of,
    pictures_said,
    recipe,
    report_of,
    reported,
    rollouts,
    rows_of,
    rows_said,
    write_rows,
)

AIM = 0.9  # said with the figures
LEAST_ERRORS = 4.0
HELD_OUT = 32
PATCH = 8
VIEWS = 48
SIDE = 64
LEAST_SIDE, MOST_SIDE = 12, 56  # the longer side of what is shown, in pixels
MAX_PIXELS = SIDE * SIDE  # as they are
SHAPES = ("circle", "rectangle", "triangle")
ATTRIBUTES = {*SHAPES, "black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


@dataclass(frozen=True)
class Files:
    """Rows to train on, whose answer is a shape; a shape or a colour; anything: and the rows of the exam."""

    shapes: Path
    names: Path
    train: Path
    held_out: Path


def easy_recipe(folder: Path, files: Files) -> Path:
    """To see comes first, and shapes before all: a colour is told by any patch of it, and a model that has learned to
    tell colours stays there for long; questions of yes or no hide what one should look at."""
    train, held_out = files.train, files.held_out
    data = {"path": str(train), "columns": QUESTIONS}
    learning = {
        "adapter": EVERYTHING,
        "batch": {"sequences": 64},
        "optim": {"lr": 2e-3, "schedule": "cosine", "warmup": 0.05},
        "save": {"every": "50%"},
    }
    exact = [{"use": "exact", "as": "correct"}]
    stages: list[dict[str, Any]] = [
        {"id": "shapes", "kind": "sft", "data": {**data, "path": str(files.shapes)}, "steps": 300, **learning},
        {"id": "see", "kind": "sft", "from": "shapes", "data": {**data, "path": str(files.names)}, "steps": 200}
        | learning,
        {"id": "sft", "kind": "sft", "from": "see", "data": data, "steps": 400, **learning},
        {
            "id": "grpo",
            "kind": "online",
            "from": "sft",
            "data": data,
            "batch": {"groups": 16, "group_size": 4},
            "rollout": {"name": "vllm", "temperature": 1.0, "max_tokens": 4},
            "rewards": exact,
            "optim": {"lr": 2e-4},
            "steps": 8,
            "save": {"every": "50%"},
        },
        {
            "id": "exam",
            "kind": "evaluate",
            "of": ["sft", "grpo"],
            "data": {"path": str(held_out), "columns": QUESTIONS},
            "rewards": exact,
            "rollout": {"name": "vllm", "temperature": 0, "max_tokens": 4},
        },
    ]
    texts = {"path": str(train), "columns": QUESTIONS, "limit": 2000}
    model = {
        "dtype": "float32",
        "config": config(PATCH, window=4 * PATCH),
        "tokenizer": {"train_on": texts, "vocab_size": 384},
    }
    media = {"folders": [str(SETS / "easy_vqa")], "max_pixels": MAX_PIXELS}
    return recipe(folder, "easy", {"model": model, "media": media, "stages": stages})


def divided(folder: Path) -> Files:
    """Files of rows about views of 128 pictures, and of the other 32's own rows, drawn by SEED."""
    rows = rows_of(SETS / "easy_vqa/vqa.jsonl")
    names = sorted(names_of(rows))
    random.Random(SEED).shuffle(names)
    held_out = set(names[:HELD_OUT])
    train = [row for row in rows if row["image"] not in held_out]
    shown = views(folder, known(train))
    questions = sorted({row["question"] for row in train})
    draw = random.Random(SEED)
    named = [row for view in shown for row in drawn(view, questions, draw, names=2, others=0)]
    asked = [row for view in shown for row in drawn(view, questions, draw, names=2, others=6)]
    parts = {
        "shapes": [row for row in named if question_type(row) == "shape"],
        "names": named,
        "train": asked,
        "held_out": [row for row in rows if row["image"] in held_out],
    }
    return Files(
        **{part: write_rows(folder / f"easy-{part}.jsonl", map(question_first, own)) for part, own in parts.items()}
    )


def question_first(row: Row) -> Row:
    """The picture after its question: each patch then knows what is asked, and compares for itself."""
    return {**row, "question": f"{row['question']}\n<image>"}


def known(rows: list[Row]) -> dict[str, set[str]]:
    """Shape and colour of every picture whose rows tell both. Raises ValueError where a row's answer does not follow
    from them."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        found[row["image"]] |= {row["answer"]} - {"yes", "no"}
        found[row["image"]] |= set(row["question"].rstrip("?").split()) & ATTRIBUTES if affirmed(row) else set()
    for row in rows:
        if answer(row["question"], found[row["image"]]) not in (row["answer"], None):
            raise ValueError(f"{row} does not follow from {found[row['image']]}")
    return {image: attributes for image, attributes in found.items() if len(attributes) == 2}


def drawn(view: View, questions: list[str], draw: random.Random, *, names: int, others: int) -> list[Row]:
    """Rows about a view: so many that ask for its shape or colour, and so many of yes or no."""
    asked: dict[str, list[Row]] = {"shape": [], "colour": [], "yes or no": []}
    for question in draw.sample(questions, len(questions)):
        said = answer(question, view.attributes)
        if said is not None:
            row = {"image": view.name, "question": question, "answer": said}
            asked[question_type(row)].append(row)
    of_names = [row for kind in ("shape", "colour") for row in asked[kind][: names // 2]]
    return of_names + asked["yes or no"][:others]


def affirmed(row: Row) -> bool:
    """Whether the attribute that a question names is the picture's."""
    return row["answer"] not in ("yes", "no") or (row["answer"] == "yes") != negated(row["question"])


def negated(question: str) -> bool:
    return bool({"no", "not"} & set(question.split()))


def answer(question: str, attributes: set[str]) -> str | None:
    """The answer about a picture of these attributes; None where they do not tell, or the question is of another."""
    named = set(question.rstrip("?").split()) & ATTRIBUTES
    shape, colour = (next(iter(attributes & kind), None) for kind in (set(SHAPES), ATTRIBUTES - set(SHAPES)))
    if question.startswith("what"):
        asked = colour if "color" in question else shape
        return asked if named <= attributes else None
    if not named or (shape if named & set(SHAPES) else colour) is None:
        return None
    return "yes" if (named <= attributes) != negated(question) else "no"


@dataclass(frozen=True)
class View:
    """A picture made of what another shows. attributes: its shape and colour."""

    name: str
    attributes: set[str]


@dataclass(frozen=True)
class Thing:
    """What stands on the even ground of a picture: where, as a mask, and both colours."""

    shape: str
    colour: str
    mask: Image.Image
    paint: tuple[int, ...]
    ground: tuple[int, ...]


def thing(path: Path, attributes: set[str]) -> Thing | None:
    """None where it is cut off by the edge, so that its shape is not whole."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    ground, paint = (colour for _, colour in sorted(image.getcolors(image.width * image.height), reverse=True)[:2])
    even = Image.new("RGB", image.size, ground)
    mask = ImageChops.difference(image, even).convert("L").point(lambda level: 255 if level else 0)
    box = mask.getbbox()
    if box is None or min(box) == 0 or box[2] == image.width or box[3] == image.height:
        return None
    [shape] = attributes & set(SHAPES)
    [colour] = attributes - set(SHAPES)
    return Thing(shape, colour, mask.crop(box), paint, ground)


def views(folder: Path, pictures: dict[str, set[str]]) -> list[View]:
    """VIEWS of what each picture shows, written below `folder`: in a colour and on a ground of any of them."""
    things = [thing(SETS / "easy_vqa" / name, attributes) for name, attributes in sorted(pictures.items())]
    whole = [one for one in things if one is not None]
    paints = {one.colour: one.paint for one in whole}
    draw = random.Random(SEED)
    found = []
    for number, one in enumerate(whole):
        for again in range(VIEWS):
            colour, name = draw.choice(sorted(paints)), f"view-{number}-{again}.png"
            painted(one.mask, paints[colour], draw.choice(whole).ground, draw).save(folder / name)
            found.append(View(name, {one.shape, colour}))
    return found


def painted(mask: Image.Image, paint: tuple[int, ...], ground: tuple[int, ...], draw: random.Random) -> Image.Image:
    """A mask, mirrored or not, larger or smaller, anywhere on the ground."""
    mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else mask
    scale = draw.uniform(LEAST_SIDE, MOST_SIDE) / max(mask.size)
    mask = mask.resize([max(6, round(side * scale)) for side in mask.size], Image.Resampling.BILINEAR)
    image = Image.new("RGB", (SIDE, SIDE), ground)
    out = [side // 6 for side in mask.size]  # as in the set, an edge may cut a little off
    place = draw.randint(-out[0], SIDE - mask.width + out[0]), draw.randint(-out[1], SIDE - mask.height + out[1])
    image.paste(Image.new("RGB", mask.size, paint), place, mask)
    return image


def question_type(row: Row) -> str:
    answer = row["answer"]
    return "yes or no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "colour"


def accuracies(rows: list[Row], right: list[float]) -> dict[str, float]:
    by_type: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, right, strict=True):
        by_type[question_type(row)].append(value)
        by_type["all"].append(value)
    return {name: round(sum(values) / len(values), 4) for name, values in sorted(by_type.items())}


def commonest(train: list[Row], rows: list[Row], by: Callable[[Row], str]) -> list[float]:
    """What one scores who sees no picture, and gives each kind of question its commonest answer in training; to a kind
    that is not there, none."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        answers[by(row)][row["answer"]] += 1
    best = {kind: counted.most_common(1)[0][0] for kind, counted in answers.items()}
    return [float(row["answer"] == best.get(by(row))) for row in rows]


def advantage(right: list[float], blind: list[float]) -> dict[str, float]:
    """Mean difference of paired answers, and in standard errors."""
    differences = [one - other for one, other in zip(right, blind, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return {
        "points": round(statistics.mean(differences), 4),
        "standard_errors": round(statistics.mean(differences) / error, 1),
    }


def easy_vqa(folder: Path) -> Found:
    files = divided(folder)
    run = align_run(easy_recipe(folder, files), folder)
    own, seen, rows = rows_of(SETS / "easy_vqa/vqa.jsonl"), rows_of(files.train), rows_of(files.held_out)
    blind = commonest(seen, rows, by=lambda row: row["question"])
    found = {
        "commonest of the type": accuracies(rows, commonest(seen, rows, by=question_type)),
        "commonest of the question": accuracies(rows, blind),
    }
    above = {}
    for stage in ("sft", "grpo"):
        answered = rollouts(run / "exam" / "rollouts" / stage)
        by_line = {int(row["origin"].rsplit(":", 1)[1]): row["objective/correct"] for row in answered}
        right = [by_line[number] for number in range(1, len(rows) + 1)]
        found[stage], above[stage] = accuracies(rows, right), advantage(right, blind)
    trained = report_of(run, "sft")["sources"][0]
    figures = {
        "rows": {"train": len(seen), "held out": len(rows)},
        "pictures": {"train": trained["media"]["distinct"], "held out": len(names_of(rows))},
        "accuracy": found,
        "above the commonest answers": above,
        "aim": {"accuracy": AIM, "reached": found["grpo"]["all"] >= AIM},
        "steps": {stage: len(lines_of(run, stage)) for stage in ("shapes", "see", "sft", "grpo")},
        "loss": [line["loss/total"] for line in lines_of(run, "sft")][-1],
        "grpo": {"correct": [line["objective/correct/mean"] for line in lines_of(run, "grpo")]},
    }
    checks = {
        "rows and pictures are as many as SOURCES.md says": len(own) == rows_said("easy_vqa/vqa.jsonl")
        and len(names_of(own)) == pictures_said("easy_vqa/images"),
        "no picture of the exam was trained on": not digests(folder, seen) & digests(SETS / "easy_vqa", rows),
        "the data report says what the files are": reported(trained)
        == facts(seen, folder, max_pixels=MAX_PIXELS, patch=PATCH),
        "SFT is right far more often than who knows the questions and sees no picture": above["sft"]["standard_errors"]
        >= LEAST_ERRORS,
        "GRPO keeps it": above["grpo"]["standard_errors"] >= LEAST_ERRORS,
        "every metric of every step is finite": all_finite(run, "shapes", "see", "sft", "grpo"),
        "GRPO's prompts show a picture each": all(len(r["media"]) == 1 for r in rollouts(run / "grpo" / "rollouts")),
    }
    return figures, checks
