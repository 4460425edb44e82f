"""Pictures of one coloured shape and questions about it, generated: the data of vision-demo.yaml.

A picture is 56 x 56 pixels, as a data URI. Its shape, colour, ground, place and size are drawn from the seed, and one
picture in ten is held out by what it shows, so that no training row ever shows a held-out picture.

A demonstrator is hasty and colour-blind: more often than not he takes a square for a circle and green for red. A model
that imitates him well is therefore right in about seven answers of ten, whatever its seed; preference pairs and rewards
have something left to teach: to look, and brevity.
"""

from __future__ import annotations

import base64
import hashlib
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {"red": (210, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 210), "yellow": (235, 200, 40)}
SHAPES = ("circle", "square", "triangle")
MISTAKEN = {"green": "red", "square": "circle"}
"""What the demonstrator takes for what."""
GROUNDS = ((250, 250, 250), (225, 225, 230), (30, 30, 35))
SIDE = 56
HELD_OUT_SHARE = 10

ASKED = {"colour": "What colour is it?", "shape": "What shape is it?"}
SENTENCE = {"colour": "The colour of the shape is {answer}.", "shape": "The shape in the picture is a {answer}."}

Row = dict[str, object]


@dataclass(frozen=True)
class Picture:
    """One shape. x, y: its centre; radius: half its extent, in pixels."""

    shape: str
    colour: str
    ground: int
    x: int
    y: int
    radius: int

    @property
    def held_out(self) -> bool:
        return hashlib.sha256(repr(self).encode()).digest()[0] % HELD_OUT_SHARE == 0

    def answer(self, asked: str) -> str:
        return self.colour if asked == "colour" else self.shape

    def uri(self) -> str:
        image = Image.new("RGB", (SIDE, SIDE), GROUNDS[self.ground])
        draw, colour, r = ImageDraw.Draw(image), COLOURS[self.colour], self.radius
        box = (self.x - r, self.y - r, self.x + r, self.y + r)
        if self.shape == "circle":
            draw.ellipse(box, fill=colour)
        elif self.shape == "square":
            draw.rectangle(box, fill=colour)
        else:
            draw.polygon([(self.x, self.y - r), (self.x - r, self.y + r), (self.x + r, self.y + r)], fill=colour)
        file = io.BytesIO()
        image.save(file, format="PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def sft(*, rows: int = 6000, seed: int = 0, careless: float = 0.65) -> Iterator[Row]:
    """Demonstrations {messages, images}. careless: how often MISTAKEN is said where it could be. Half are wordy."""
    rng = random.Random(f"sft/{seed}")
    for picture in _pictures(rng, rows, held_out=False):
        asked = rng.choice(("colour", "shape", "shape"))  # shapes take longer to learn
        answer = picture.answer(asked)
        said = MISTAKEN.get(answer, answer) if rng.random() < careless else answer
        yield {
            "messages": [*_question(asked), _reply(asked, said, wordy=rng.random() < 0.5)],
            "images": [picture.uri()],
        }


def pairs(*, rows: int = 1000, seed: int = 0, held_out: bool = False) -> Iterator[Row]:
    """Preferences {prompt, images, chosen, rejected}: what is there over something else, in the same words. Half of the
    time the wrong one is the demonstrator's mistake, where the picture can be mistaken."""
    rng = random.Random(f"pairs/{seed}")
    for picture in _pictures(rng, rows, held_out=held_out):
        asked, wordy = rng.choice(list(ASKED)), rng.random() < 0.5
        answer = picture.answer(asked)
        others = [word for word in (COLOURS if asked == "colour" else SHAPES) if word != answer]
        wrong = MISTAKEN[answer] if answer in MISTAKEN and rng.random() < 0.5 else rng.choice(others)
        yield {
            "prompt": _question(asked),
            "images": [picture.uri()],
            "chosen": [_reply(asked, answer, wordy)],
            "rejected": [_reply(asked, wrong, wordy)],
        }


def prompts(*, rows: int = 1000, seed: int = 0, held_out: bool = False) -> Iterator[Row]:
    """Questions {prompt, images, answer}; with `held_out` about pictures that no training data show."""
    rng = random.Random(f"prompts/{held_out}/{seed}")
    for picture in _pictures(rng, rows, held_out=held_out):
        asked = rng.choice(list(ASKED))
        yield {"prompt": _question(asked), "images": [picture.uri()], "answer": picture.answer(asked)}


def _pictures(rng: random.Random, rows: int, *, held_out: bool) -> Iterator[Picture]:
    while rows > 0:
        radius = rng.randrange(14, 22)
        x, y = (rng.randrange(radius + 1, SIDE - radius - 1) for _ in range(2))
        ground = rng.randrange(len(GROUNDS))
        picture = Picture(rng.choice(SHAPES), rng.choice(list(COLOURS)), ground, x, y, radius)
        if picture.held_out == held_out:
            rows -= 1
            yield picture


def _question(asked: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"<image>{ASKED[asked]}"}]


def _reply(asked: str, answer: str, wordy: bool) -> dict[str, str]:
    return {"role": "assistant", "content": SENTENCE[asked].format(answer=answer) if wordy else answer}
