"""Questions about Python's standard library, answered by its own documentation: the data of real.yaml.

The texts are real and on every machine: the first paragraphs of some two thousand docstrings, written by Python's
authors. What is generated is the question and, in it, an instruction on the form of the answer that a program can
verify, of IFEval's kinds (2311.07911) and with its names, so that the reward `ifeval` judges it. Which functions are
held out depends on their names alone. Another minor version of Python documents a few other functions.

A model that is only taught these forgets how to answer anything else, so a share of the rows that train (`general`)
asks what general.jsonl asks and answers; the exam's general questions are others.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import random
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

MODULES = [
    "abc", "argparse", "array", "ast", "asyncio", "base64", "binascii", "bisect", "bz2", "calendar", "codecs",
    "collections", "colorsys", "configparser", "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal",
    "difflib", "doctest", "email.utils", "enum", "fileinput", "fnmatch", "fractions", "ftplib", "functools", "gc",
    "getpass", "glob", "graphlib", "gzip", "hashlib", "heapq", "hmac", "html", "http.client", "http.cookies",
    "imaplib", "inspect", "io", "ipaddress", "itertools", "json", "linecache", "locale", "logging", "lzma",
    "mailbox", "math", "mimetypes", "mmap", "numbers", "operator", "os", "os.path", "pathlib", "pickle", "pkgutil",
    "platform", "plistlib", "pprint", "queue", "random", "re", "sched", "secrets", "select", "shelve", "shlex",
    "shutil", "signal", "smtplib", "socket", "sqlite3", "ssl", "stat", "statistics", "string", "struct",
    "subprocess", "sysconfig", "tarfile", "tempfile", "textwrap", "threading", "time", "timeit", "tokenize",
    "traceback", "types", "unicodedata", "unittest", "urllib.parse", "urllib.request", "uuid", "warnings", "wave",
    "weakref", "xml.etree.ElementTree", "zipfile", "zlib", "builtins",
]  # fmt: skip
SENTENCE = re.compile(r"[A-Z][a-z]+ [^`*{}<>|\[\]\\]{15,90}\.")  # a paragraph in words; no signature, no table
HELD_OUT_SHARE = 10  # one function in ten is held out

QUESTIONS = (
    "What does {name} do in Python?",
    "Explain {name} from Python's standard library.",
    "What is {name} for?",
)
ENDINGS = ("That is all.", "I hope this helps.", "Is there anything else?")
BESIDE = Path(__file__).parent

Row = dict[str, Any]


@dataclass(frozen=True)
class Instruction:
    """One of IFEval's kinds. place: what of the answer it is about; two about one place are never asked for together.
    follow: the answer, changed so that it obeys."""

    kind: str
    place: str
    words: str
    follow: Callable[[str], str]
    kwargs: Row = field(default_factory=dict)


def _instructions(rng: random.Random, name: str) -> list[Instruction]:
    """One of every kind, in the order in which they can be obeyed one after another."""
    ending = rng.choice(ENDINGS)
    return [
        Instruction("detectable_format:number_highlighted_sections", "body",
                    "Highlight at least one part of your answer like *this*.",
                    lambda text: f"*{name}*: {text}", {"num_highlights": 1}),
        Instruction("detectable_content:postscript", "end", "Add a postscript at the end that starts with P.S.",
                    lambda text: f"{text}\n\nP.S. See also its module.", {"postscript_marker": "P.S."}),
        Instruction("startend:end_checker", "end", f'Finish your answer with exactly this phrase: "{ending}"',
                    lambda text: f"{text} {ending}", {"end_phrase": ending}),
        Instruction("detectable_format:title", "start",
                    "Give your answer a title in double angular brackets: <<title>>.",
                    lambda text: f"<<{name}>>\n{text}"),
        Instruction("change_case:english_lowercase", "case", "Write in lowercase letters only, without any capitals.",
                    str.lower),
        Instruction("startend:quotation", "quotes", "Wrap your whole answer in double quotation marks.",
                    lambda text: f'"{text}"'),
    ]  # fmt: skip


def sft(*, rows: int = 1000, seed: int = 0, careless: float = 0.5, general: float = 0.0) -> Iterator[Row]:
    """Demonstrations {messages}: the documentation's sentence. careless: how often the instruction is forgotten.
    general: the share of other questions, half of which have no instruction."""
    for subject, rng in _drawn("sft", rows, seed, general=general):
        asked = _asked(subject.name, rng, 1)
        if subject.general and rng.random() < 0.5:
            asked = []
        reply = subject.text if rng.random() < careless else _followed(asked, subject.text)
        yield {"messages": [*_question(subject, asked, rng), _turn(reply)]}


def pairs(*, rows: int = 400, seed: int = 0, held_out: bool = False, general: float = 0.0) -> Iterator[Row]:
    """Preferences {prompt, chosen, rejected}: the sentence that obeys the instruction over the same sentence that obeys
    none, or another one. held_out: of functions that no training data show. general: the share of other questions."""
    for subject, rng in _drawn("pairs", rows, seed, held_out=held_out, general=general):
        asked, other = rng.sample(_instructions(rng, subject.name), 2)
        plain = asked.place == other.place or rng.random() < 0.5
        yield {
            "prompt": _question(subject, [asked], rng),
            "chosen": [_turn(asked.follow(subject.text))],
            "rejected": [_turn(subject.text if plain else other.follow(subject.text))],
        }


def prompts(
    *, rows: int = 400, seed: int = 0, held_out: bool = False, part: str = "docs", general: float = 0.0
) -> Iterator[Row]:
    """Questions {prompt, answer, instruction_id_list, kwargs, part} with two or three instructions at once, which no
    demonstration has. The answer is the documentation's sentence. general: the share of other questions."""
    for subject, rng in _drawn(f"prompts/{held_out}", rows, seed, held_out=held_out, general=general):
        asked = _asked(subject.name, rng, rng.choice((2, 3)))
        question = _question(subject, asked, rng)
        yield {"prompt": question, "answer": subject.text, "part": part, **_verifiable(asked)}


def elsewhere(*, rows: int = 100, file: str = "") -> Iterator[Row]:
    """Prompts {prompt, instruction_id_list, kwargs, part} about anything but Python. file: take them from there, in the
    layout of IFEval's input_data.jsonl, every so many rows, in place of those made here."""
    if file:
        given = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        for row in given[:: max(1, len(given) // rows)][:rows]:
            asked = {key: row[key] for key in ("instruction_id_list", "kwargs")}
            yield {"prompt": [_turn(row["prompt"], "user")], "part": "elsewhere", **asked}
        return
    rng = random.Random("elsewhere")
    topics = (BESIDE / "topics.txt").read_text(encoding="utf-8").splitlines()
    for number in range(rows):
        [asked] = _asked("topic", rng, 1)
        text = f"Write one or two sentences about {topics[number % len(topics)]}. {asked.words}"
        yield {"prompt": [_turn(text, "user")], "part": "elsewhere", **_verifiable([asked])}


def questions() -> Iterator[Row]:
    """General knowledge {prompt, answer, part}: a fixed set; what is right has the answer's word in it."""
    for line in (BESIDE / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield {"prompt": [_turn(row["question"], "user")], "answer": row["answer"], "part": "question"}


@dataclass(frozen=True)
class Subject:
    """What is asked about: its name, the answer, and the question in each of its wordings."""

    name: str
    text: str
    wordings: tuple[str, ...]
    general: bool = False


def _drawn(
    purpose: str, rows: int, seed: int, *, held_out: bool = False, general: float = 0.0
) -> Iterator[tuple[Subject, random.Random]]:
    """`rows` subjects in random order, each with a generator of its own: documented names of one split, and general
    questions as `general` of all; of either, each comes once before any comes again."""
    rng = random.Random(f"{purpose}/{seed}")
    asked = round(rows * general)
    names = [
        Subject(name, text, tuple(wording.format(name=name) for wording in QUESTIONS))
        for name, text in documented().items()
        if _held_out(name) == held_out
    ]
    found = [*_dealt(names, rows - asked, rng), *_dealt(_general() if asked else [], asked, rng)]
    if asked:
        rng.shuffle(found)
    for subject in found:
        yield subject, random.Random(rng.random())


def _dealt(subjects: list[Subject], count: int, rng: random.Random) -> Iterator[Subject]:
    while count > 0:
        rng.shuffle(subjects)
        yield from subjects[:count]
        count -= len(subjects)


def _general() -> list[Subject]:
    lines = (BESIDE / "general.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [Subject(row["topic"], row["answer"], (row["question"],), general=True) for row in rows]


def _asked(name: str, rng: random.Random, count: int) -> list[Instruction]:
    """`count` instructions that can be obeyed together, in that order."""
    every = _instructions(rng, name)
    while True:
        chosen = sorted(rng.sample(range(len(every)), count))
        places = {every[at].place for at in chosen}
        if len(places) == count:
            return [every[at] for at in chosen]


def _followed(asked: list[Instruction], text: str) -> str:
    for one in asked:
        text = one.follow(text)
    return text


def _question(subject: Subject, asked: list[Instruction], rng: random.Random) -> list[Row]:
    text = " ".join([rng.choice(subject.wordings), *(one.words for one in asked)])
    return [_turn(text, "user")]


def _turn(text: str, role: str = "assistant") -> Row:
    return {"role": role, "content": text}


def _verifiable(asked: list[Instruction]) -> Row:
    return {"instruction_id_list": [one.kind for one in asked], "kwargs": [one.kwargs for one in asked]}


def _held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_SHARE == 0


@cache
def documented() -> dict[str, str]:
    """What is documented in one paragraph of plain words: name to paragraph, each paragraph once."""
    found: dict[str, str] = {}
    for module in MODULES:
        for name, thing in _members(importlib.import_module(module), module):
            text = getattr(thing, "__doc__", None) if callable(thing) else None
            paragraph = " ".join(inspect.cleandoc(text).split("\n\n")[0].split()) if isinstance(text, str) else ""
            if SENTENCE.fullmatch(paragraph) and len(paragraph.split()) > 4:
                found.setdefault(paragraph, name)
    return {name: paragraph for paragraph, name in sorted(found.items(), key=lambda item: item[1])}


def _members(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Public names of a module, and of its classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some names only warn that they will go
        for name, thing in sorted(vars(module).items()):
            if name.startswith("_") or inspect.ismodule(thing):
                continue
            yield f"{prefix}.{name}", thing
            if inspect.isclass(thing):
                inner = sorted(vars(thing).items())
                yield from ((f"{prefix}.{name}.{key}", value) for key, value in inner if not key.startswith("_"))
