"""easy_vqa: what a small model from scratch learns of 128 pictures, examined on 32 that it has not seen.

128 pictures are few to learn seeing from, so each is shown mirrored and moved too, and asked the set's other
questions, where the answer follows from the answers it has: a red circle is no teal shape. Nothing is made of the
32 pictures and their questions, which the set's own answers judge.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
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

AIM = 0.9
HELD_OUT = 32
PATCH = 8
VIEWS = 24
MAX_PIXELS = 64 * 64  # as they are
SHAPES = ("circle", "rectangle", "triangle")
ATTRIBUTES = {*SHAPES, "black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


def easy_recipe(folder: Path, named: Path, train: Path, held_out: Path) -> Path:
    """To see comes first (`named`: rows whose answer is a shape or a colour): three questions in four are of yes or no,
    and hide from a tower that knows nothing what it should look at."""
    data = {"path": str(train), "columns": QUESTIONS}
    learning = {
        "adapter": EVERYTHING,
        "batch": {"sequences": 64},
        "optim": {"lr": 2e-3, "schedule": "cosine", "warmup": 0.05},
        "save": {"every": "50%"},
    }
    exact = [{"use": "exact", "as": "correct"}]
    stages: list[dict[str, Any]] = [
        {"id": "see", "kind": "sft", "data": {**data, "path": str(named)}, "steps": 300, **learning},
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
        "config": config(PATCH, window=32),
        "tokenizer": {"train_on": texts, "vocab_size": 384},
    }
    media = {"folders": [str(SETS / "easy_vqa")], "max_pixels": MAX_PIXELS}
    return recipe(folder, "easy", {"model": model, "media": media, "stages": stages})


def divided(folder: Path) -> tuple[Path, Path, Path]:
    """Files of the rows of 128 pictures, first those that ask for a name, then all, and of the other 32's, drawn by
    SEED."""
    rows = rows_of(SETS / "easy_vqa/vqa.jsonl")
    names = sorted(names_of(rows))
    random.Random(SEED).shuffle(names)
    held_out = set(names[:HELD_OUT])
    train = [row for row in rows if row["image"] not in held_out]
    draw = random.Random(SEED)
    named = [
        {**row, "image": name}
        for row in train
        if question_type(row) != "yes or no"
        for name in views(folder, row["image"])
    ]
    asked = asked_anew(train) + train * 8
    return (
        write_rows(folder / "easy-named.jsonl", named),
        write_rows(
            folder / "easy-train.jsonl", [{**row, "image": draw.choice(views(folder, row["image"]))} for row in asked]
        ),
        write_rows(folder / "easy-held-out.jsonl", [row for row in rows if row["image"] in held_out]),
    )


def asked_anew(rows: list[Row]) -> list[Row]:
    """Every picture with every question of `rows` whose answer follows from what the set says of the picture: its
    shape and its colour. The answers of the set's own rows follow so too, or this raises ValueError."""
    known: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        known[row["image"]] |= {row["answer"]} - {"yes", "no"}
        known[row["image"]] |= set(row["question"].rstrip("?").split()) & ATTRIBUTES if affirmed(row) else set()
    for row in rows:
        if answer(row["question"], known[row["image"]]) not in (row["answer"], None):
            raise ValueError(f"{row} does not follow from {known[row['image']]}")
    questions = sorted({row["question"] for row in rows})
    return [
        {"image": image, "question": question, "answer": said}
        for image, attributes in sorted(known.items())
        for question in questions
        if (said := answer(question, attributes)) is not None
    ]


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


def views(folder: Path, name: str) -> list[str]:
    """VIEWS pictures of what a picture shows, written below `folder`: mirrored, and elsewhere in it where it is whole.
    No answer of the set minds."""
    names = [f"{Path(name).stem}-{number}.png" for number in range(VIEWS)]
    if not (folder / names[-1]).exists():
        draw = random.Random(name)
        with Image.open(SETS / "easy_vqa" / name) as image:
            sides = image.convert("RGB"), image.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for number, file in enumerate(names):
            view = sides[number % 2]
            (view if number < 2 else moved(view, draw)).save(folder / file)
    return names


def moved(image: Image.Image, draw: random.Random) -> Image.Image:
    """What stands on the even ground of a picture, elsewhere on it; the picture itself where it is cut off."""
    pixels = Counter(image.tobytes()[at : at + 3] for at in range(0, 3 * image.width * image.height, 3))
    [(colour, _)] = pixels.most_common(1)
    ground = Image.frombytes("RGB", image.size, colour * (image.width * image.height))
    box = ImageChops.difference(image, ground).getbbox()
    if box is None or min(box) == 0 or box[2] == image.width or box[3] == image.height:
        return image
    thing = image.crop(box)
    place = draw.randint(0, image.width - thing.width), draw.randint(0, image.height - thing.height)
    ground.paste(thing, place)
    return ground


def question_type(row: Row) -> str:
    answer = row["answer"]
    return "yes or no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "colour"


def accuracies(rows: list[Row], right: list[float]) -> dict[str, float]:
    by_type: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, right, strict=True):
        by_type[question_type(row)].append(value)
        by_type["all"].append(value)
    return {name: round(sum(values) / len(values), 4) for name, values in sorted(by_type.items())}


def commonest(train: list[Row], rows: list[Row]) -> list[float]:
    """What one scores who answers each type of question by its commonest answer in training."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        answers[question_type(row)][row["answer"]] += 1
    best = {name: counted.most_common(1)[0][0] for name, counted in answers.items()}
    return [float(row["answer"] == best[question_type(row)]) for row in rows]


def easy_vqa(folder: Path) -> Found:
    named, train, held_out = divided(folder)
    run = align_run(easy_recipe(folder, named, train, held_out), folder)
    own, seen, rows = rows_of(SETS / "easy_vqa/vqa.jsonl"), rows_of(train), rows_of(held_out)
    found = {"baseline": accuracies(rows, commonest(seen, rows))}
    for stage in ("sft", "grpo"):
        answered = rollouts(run / "exam" / "rollouts" / stage)
        by_line = {int(row["origin"].rsplit(":", 1)[1]): row["objective/correct"] for row in answered}
        found[stage] = accuracies(rows, [by_line[number] for number in range(1, len(rows) + 1)])
    trained = report_of(run, "sft")["sources"][0]
    figures = {
        "rows": {"train": len(seen), "held out": len(rows)},
        "pictures": {"train": trained["media"]["distinct"], "held out": len(names_of(rows))},
        "accuracy": found,
        "steps": {stage: len(lines_of(run, stage)) for stage in ("see", "sft", "grpo")},
        "loss": [line["loss/total"] for line in lines_of(run, "sft")][-1],
        "grpo": {"correct": [line["objective/correct/mean"] for line in lines_of(run, "grpo")]},
    }
    checks = {
        "rows and pictures are as many as SOURCES.md says": len(own) == rows_said("easy_vqa/vqa.jsonl")
        and len(names_of(own)) == pictures_said("easy_vqa/images"),
        "no picture of the exam was trained on": not digests(folder, seen) & digests(SETS / "easy_vqa", rows),
        "the data report says what the files are": reported(trained)
        == facts(seen, folder, max_pixels=MAX_PIXELS, patch=PATCH),
        f"SFT answers {AIM:g} of the questions about pictures it has not seen": found["sft"]["all"] >= AIM,
        "GRPO keeps it": found["grpo"]["all"] >= AIM,
        "every metric of every step is finite": all_finite(run, "see", "sft", "grpo"),
        "GRPO's prompts show a picture each": all(len(r["media"]) == 1 for r in rollouts(run / "grpo" / "rollouts")),
    }
    return figures, checks
