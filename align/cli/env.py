"""`align env`: play an environment before a run. Turns, tools, seconds and errors are shown, and tokens as they go."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from align.cli.arguments import add_debug
from align.data.media.library import Library
from align.data.media.opening import takes_media
from align.data.prepare import prepare
from align.data.scratch import train_tokenizer
from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.data.world import Offered
from align.episodes.ids import moved
from align.episodes.images import opened_images
from align.episodes.spec import Sight
from align.episodes.trial import Sample, Trial, Tried, Written, read_replies, try_environment
from align.errors import UserError
from align.mediastore import processor_files
from align.protocols.fleet import Completion, FailedPrompt, PromptItem, Sampling
from align.protocols.trees import REPEATED, Medium
from align.recipe.chat_files import read_settings
from align.recipe.document import parse_value
from align.recipe.environment import Environment
from align.recipe.inputs import DataSource, Media, TokenizerFromScratch
from align.recipe.problems import option_problems, raise_problems
from align.report.screen import shown as on_screen

_TEXT = 400  # characters of a turn on the screen
_CONTEXT = 1 << 15  # tokens, where no model says how many
_TURN = 256  # tokens


def add(parser: argparse.ArgumentParser) -> None:
    """The verb `try`."""
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", dest="action")
    one = verbs.add_parser("try", help="play episodes with written replies or a model, and look for what is wrong")
    add_debug(one)
    one.add_argument("name", help="file.py:Class or package.module:Class; functions as file.py:f,file.py:g")
    one.add_argument("--data", required=True, metavar="FILE", help="rows with prompts, as an online stage reads them")
    one.add_argument("--replies", metavar="FILE", help='a line per episode: ["first reply", "second reply"]')
    one.add_argument("--model", metavar="FOLDER", help="a model that plays, or whose template writes the replies")
    one.add_argument("--limit", type=_whole, default=3, metavar="ROWS", help="episodes to play (default 3)")
    one.add_argument("--args", nargs="+", default=[], metavar="key=value", help="of the constructor; values are YAML")
    one.add_argument("--set", nargs="+", default=[], metavar="key=value", help="keys of `environment:`, as max_turns=4")
    one.add_argument("--signature", choices=["align", "trl"], help="trl: a class for TRL's environment_factory")
    one.add_argument(
        "--max-tokens", type=_whole, metavar="N", help="of a turn (default: 256 of a model's, all of a reply)"
    )
    one.add_argument("--temperature", type=_temperature, default=1.0, metavar="T", help="of the model (default 1)")


def _whole(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number above 0")
    return int(word)


def _temperature(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r} is no number from 0")
    return value


def run(arguments: argparse.Namespace) -> int:
    """0; 1 where an episode was lost, or something is wrong with the environment. Raises UserError."""
    rules = _rules(arguments)
    if arguments.replies is None and arguments.model is None:
        raise UserError("nobody plays", remedy="give --replies FILE, or --model FOLDER, or both")
    folder, data = Path.cwd(), Path(arguments.data).absolute()
    with tempfile.TemporaryDirectory() as aside:
        tokenizer = _tokenizer(arguments.model, data, Path(aside))
        sight = _sight(rules, tokenizer, Path(aside) / "images")
        source = DataSource(path=str(data), limit=arguments.limit)
        sampling = Sampling(temperature=arguments.temperature, max_tokens=_turn_tokens(arguments))

        def prompts(description: Mapping[str, Any]) -> Sequence[PromptItem]:
            offered = Offered.of([rules], [description])
            with closing(Library(Media(), sight.model, sight.store)) if sight else nullcontext() as library:
                read = prepare([source], "prompt", tokenizer, seed=0, offered=offered, media=library)
            items: list[PromptItem] = read.items
            return items[: arguments.limit]

        with _players(arguments, tokenizer) as (sampler, context), opened_images(sight) as images:
            trial = asyncio.run(
                try_environment(
                    rules, folder, tokenizer, prompts, sampler, sampling=sampling, context=context, images=images
                )
            )
    print("\n".join(_lines(trial, tokenizer)))
    return 1 if trial.problems or any(one.lost is not None for one in trial.episodes) else 0


def _turn_tokens(arguments: argparse.Namespace) -> int:
    """Of a turn at most: as said, else what a model should need, and whatever written replies have."""
    return int(arguments.max_tokens or (_CONTEXT if arguments.replies is not None else _TURN))


def _rules(arguments: argparse.Namespace) -> Environment:
    given: dict[str, Any] = _pairs(arguments.set)
    names = arguments.name.split(",")
    if arguments.signature is not None:
        given["signature"] = arguments.signature
    given |= {"use": names[0], "args": _pairs(arguments.args)} if _is_class(names) else {"tools": names}
    try:
        return Environment.model_validate(given)
    except ValidationError as error:
        raise_problems(option_problems(error, given, Environment, "an environment"), "--set")
        raise


def _is_class(names: Sequence[str]) -> bool:
    """One name whose last part begins with a capital letter, as classes do."""
    return len(names) == 1 and names[0].rpartition(":")[2][:1].isupper()


def _pairs(words: Sequence[str]) -> dict[str, Any]:
    bad = next((word for word in words if "=" not in word), None)
    if bad is not None:
        raise UserError(f"{bad!r} is no key=value")
    return {key: parse_value(value) for key, _, value in (word.partition("=") for word in words)}


def _tokenizer(model: str | None, data: Path, aside: Path) -> ChatTokenizer:
    """The model's; without one a byte-level one with our ChatML template: turns are put together as in a run."""
    if model is not None:
        return load_tokenizer(model)
    spec = TokenizerFromScratch.model_validate({"train_on": {"path": str(data), "limit": 100}, "vocab_size": 300})
    train_tokenizer(spec, aside)
    return load_tokenizer(aside)


def _sight(rules: Environment, tokenizer: ChatTokenizer, store: Path) -> Sight | None:
    """How images are seen; None where no model is given that sees."""
    folder = tokenizer.folder
    if folder is None or not processor_files(folder) or not takes_media(read_settings(folder / "config.json")):
        return None
    return Sight(rules.images(True), folder.absolute(), store, Media())


Players = tuple[Callable[[int], Sample], int]


@contextmanager
def _players(arguments: argparse.Namespace, tokenizer: ChatTokenizer) -> Iterator[Players]:
    """Who replies in episode n, and how many tokens an episode may have."""
    if arguments.replies is not None:
        replies = read_replies(Path(arguments.replies))
        yield (lambda number: Written(replies[number % len(replies)], tokenizer)), _CONTEXT
        return
    with _engine(arguments.model, tokenizer) as (sample, context):
        yield (lambda number: sample), context


@contextmanager
def _engine(model: str, tokenizer: ChatTokenizer) -> Iterator[tuple[Sample, int]]:
    from align.protocols.trainer import Publication
    from rollout.base import EngineSpec, Request, make_engine

    spec = EngineSpec("transformers", str(Path(model).absolute()), end_ids=tokenizer.eos_ids)
    engine = make_engine(spec)
    try:
        engine.publish(Publication(0, "base", spec.folder, ""))

        async def sample(prompt: PromptItem, sampling: Sampling) -> Completion | FailedPrompt:
            engine.add([Request(0, prompt, 1, sampling)])
            while True:
                for _, answer in engine.step():
                    return answer if isinstance(answer, FailedPrompt) else answer.completions[0]

        config = read_settings(Path(model) / "config.json")
        yield sample, int((config.get("text_config") or config).get("max_position_embeddings") or _CONTEXT)
    finally:
        engine.close()


# ------------------------------------------------------------------------------------------------- what is shown


def _lines(trial: Trial, tokenizer: ChatTokenizer) -> Iterator[str]:
    described = trial.description
    has = ", ".join(name for name, there in described["has"].items() if there) or "nothing else"
    yield f"{described['name']} ({described.get('source') or 'no file'}): {has}"
    for tool in described["tools"]:
        function = tool["function"]
        yield f"  tool {function['name']}: {function.get('description') or '(no description)'}"
        yield f"    {json.dumps(function['parameters'], ensure_ascii=False)}"
    if trial.setting.format is not None:
        yield f"  calls are read as {trial.setting.format.name}"
    for name, objective in described["objectives"].items():
        within = f" in [{objective['range'][0]:g}, {objective['range'][1]:g}]" if objective["range"] else ""
        yield f"  objective {name}: {objective['kind']}{within}"
    for number, tried in enumerate(trial.episodes):
        yield ""
        yield from _episode(number, tried, tokenizer)
    yield ""
    yield from (f"problem: {problem}" for problem in trial.problems)
    lost = sum(one.lost is not None for one in trial.episodes)
    episodes, problems = len(trial.episodes), len(trial.problems)
    yield f"{_counted(episodes, 'episode')}, {lost} lost, {_counted(problems, 'problem')}"


def _episode(number: int, tried: Tried, tokenizer: ChatTokenizer) -> Iterator[str]:
    yield f"episode {number} ({tried.origin})"
    if tried.prompt is not None:
        shown = _decoded(tokenizer, tried.prompt.tolist(), tried.media)
        yield from _block("prompt", len(tried.prompt), shown)
    completion = tried.completion
    if completion is not None and completion.episode is not None:
        yield from _tokens(completion, tokenizer)
        episode = completion.episode
        for tool, seconds in episode.seconds.items():
            longest = f", {max(seconds):.3f} s at most" if len(seconds) > 1 else f", {seconds[0]:.3f} s"
            yield f"  {tool}: {_counted(len(seconds), 'call')}{longest}"
        whole = tried.lost is None and tried.unfinished is None
        yield f"  {f'ended by {episode.ended}' if whole else 'so far'}: {', '.join(_counts(episode.counts))}"
        if whole:
            yield f"  scores: {json.dumps(dict(episode.scores))}"
        if episode.failure is not None:
            yield f"  no scores: {episode.failure.cause}: {episode.failure.message}"
        if episode.state is not None:
            yield f"  state: {_short(json.dumps(episode.state, ensure_ascii=False, default=str))}"
    if tried.unfinished is not None:
        yield f"  not at its end: {tried.unfinished}"
    if tried.lost is not None:
        yield f"  lost: {tried.lost}"
    if tried.unused:
        yield f"  over before its written replies were: {tried.unused} had no turn"


def _tokens(completion: Completion, tokenizer: ChatTokenizer) -> Iterator[str]:
    """The episode's tokens in runs: those that were sampled, those that the environment and the template added, and of
    a sequence that does not continue the one before it what the template writes again of the conversation."""
    for one in completion.sequences:
        ids, start = one.token_ids.tolist(), 0
        who = np.where(one.sampled, "sampled", np.where(one.versions == REPEATED, "again", "added"))
        for end in range(1, len(ids) + 1):
            if end == len(ids) or who[end] != who[start]:
                media = moved([m for m in one.media if start <= m.start < end], -start)
                yield from _block(str(who[start]), end - start, _decoded(tokenizer, ids[start:end], media))
                start = end


def _decoded(tokenizer: ChatTokenizer, ids: Sequence[int], media: Sequence[Medium] = ()) -> str:
    """The text of ids, with a word for each medium that stands in them."""
    parts, last = list[str](), 0
    for medium in media:
        text = tokenizer.decode(ids[last : medium.start], skip_special_tokens=False)
        parts += [text, f"[{medium.kind}: {medium.length} tokens, {medium.key[:8]}]"]
        last = medium.start + medium.length
    return "".join([*parts, tokenizer.decode(ids[last:], skip_special_tokens=False)])


def _block(who: str, count: int, text: str) -> Iterator[str]:
    """A run of tokens as it reads, line by line, who wrote it and how many they are beside the first."""
    first, *more = on_screen(_short(text)).split("\n")
    yield f"  {who:>7} {count:5d} | {first}"
    yield from (f"                | {line}" for line in more)


def _counts(counts: Mapping[str, float]) -> Iterator[str]:
    """What there was of each; how it ended is said before."""
    for name, value in counts.items():
        if name == "waited_seconds":
            yield f"waited {value:.3f} s"
        elif value and not name.startswith("ended_by_"):
            yield f"{name} {value:g}"


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[: _TEXT // 2]} [...] {text[-_TEXT // 2 :]}"
