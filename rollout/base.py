"""What an engine is: how one is described, what it can do, and how it is found by name.

Standard library and numpy only. What is known of an engine before it starts: `align.engines`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from align.engines import facts_of_ours
from align.errors import DataError, EngineError, Unsupported
from align.protocols.fleet import FailedPrompt, Group, PromptItem, Sampling
from align.protocols.trainer import Publication
from align.protocols.trees import Medium


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything an engine needs to start, picklable and without tensors.

    name: a key of `align.engines.ENGINES`, or `package.module:Class` of one's own. folder: model and tokenizer in
    transformers layout. dtype: "float32", "bfloat16" or "float16". group_size, max_tokens, temperature, stop: what will
    be asked of it, for engines that plan memory. end_ids: tokens that end a turn, beside those that the folder names.
    max_model_len: longest prompt + completion in tokens; None is the model's own.
    lora_rank: the largest rank that will be published, 0 where none will (weights or base only). versions: how many
    may be in use at once (staleness + 1). in_flight: whole weights are loaded between two steps of the requests that
    run, which go on with them. seed: of the run. threads: CPU threads to compute with; passive: others compute on
    their cores at the same time. media: the largest number of each kind of media in one prompt, {} where prompts
    are text. pixels: the recipe's min_pixels and max_pixels where it sets them, so that an engine's processor
    leaves alone what the trainer's has resized. trust_remote_code: code in the folder may run. engine: the engine's
    own options, checked by `check_engine_options`. environment: what completions take turns with, an
    `align.episodes.spec.EpisodeSpec`; None where each is an answer.
    """

    name: str
    folder: str
    dtype: str = "float32"
    group_size: int = 1
    max_tokens: int = 512
    max_model_len: int | None = None
    lora_rank: int = 0
    versions: int = 1
    in_flight: bool = False
    seed: int = 0
    threads: int = 1
    passive: bool = False
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()
    trust_remote_code: bool = False
    media: Mapping[str, int] = field(default_factory=dict)
    pixels: Mapping[str, int] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    environment: Any = None


@dataclass(frozen=True, slots=True)
class Request:
    """A group to draw: group_size completions of prompt under sampling. ticket: the caller's number for it, unique
    among the requests that an engine holds. plain: answers are wanted, also of an engine that plays episodes."""

    ticket: int
    prompt: PromptItem
    group_size: int
    sampling: Sampling
    plain: bool = False


EPISODES = ("align.episodes.engine", "EpisodeEngine")
"""The engine that plays episodes by another. By name, as engines are: it lies above this room."""

Answer = tuple[int, Group | FailedPrompt]
"""A request's ticket, and what became of it."""


class Engine(Protocol):
    """A model that generates, in this process, a step at a time. One thread uses it.

    What an idle engine computes is a function of the requests that are added before its next step: the same prompts,
    seeds and weights then give the same completions, bit for bit, on the same machine with the same number of threads.
    """

    @property
    def version(self) -> int | None:
        """The version that new requests are sampled from; None before the first `publish`."""
        ...

    @property
    def running(self) -> int:
        """Requests that are held and unanswered."""
        ...

    def add(self, requests: Sequence[Request]) -> None:
        """Take requests on, all G completions of each. A prompt that does not fit is answered as a FailedPrompt.

        Raises:
            EngineError: nothing was published yet. Unsupported: see `check_sampling`.
        """
        ...

    def step(self) -> list[Answer]:
        """Compute a little further; what has finished by then, in any order. Nothing to do: an empty list.

        Raises:
            EngineError: the engine failed, or the policy gives numbers that are not finite.
        """
        ...

    def abandon(self, tickets: Sequence[int]) -> None:
        """Drop those of these requests that are unanswered. They are never answered."""
        ...

    def accepts(self, publication: Publication) -> bool:
        """Whether `publish` may be called now. False: requests that run must finish first. An idle engine accepts."""
        ...

    def publish(self, publication: Publication) -> str:
        """Load a version for the requests to come and return the digest of what is held in memory now. Requests that
        run finish on the version that they began with, or go on with this one where `EngineSpec.in_flight` says so.

        An adapter's or a model's files are read before this returns and not again: who wrote them deletes them. When
        this raises, the engine still serves the version it held before, unless the message says otherwise.

        Raises:
            EngineError: what is held differs from `publication.digest`, or is not applied.
        """
        ...

    def logps(self, token_ids: Sequence[np.ndarray], media: Sequence[Sequence[Medium]] = ()) -> list[np.ndarray]:
        """token_ids: i64[n] per sequence -> f32[n - 1] each: log-probability of every token after the first, at
        temperature 1, under the version held now. media: per sequence, what stands in it; () where all are text. For an
        idle engine."""
        ...

    def close(self) -> None:
        """Free the model. The engine cannot be used afterwards; closing twice is harmless."""
        ...


def generate(engine: Engine, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling) -> list[Group]:
    """G completions of each prompt by an idle engine, in the order of `prompts`.

    Raises:
        DataError: a prompt does not fit. Whatever the engine raises.
    """
    engine.add([Request(number, prompt, group_size, sampling) for number, prompt in enumerate(prompts)])
    answers: dict[int, Group | FailedPrompt] = {}
    while engine.running:
        answers.update(engine.step())
    return [require_group(answers[number]) for number in range(len(prompts))]


def require_group(answer: Group | FailedPrompt) -> Group:
    """The group; DataError for a prompt that could not be sampled."""
    if isinstance(answer, Group):
        return answer
    prompt = answer.prompt
    raise DataError(
        answer.message,
        where=prompt.origin or f"group {prompt.group_id}",
        remedy="raise rollout.max_model_len, lower rollout.max_tokens, or set data.max_length with `too_long: drop`",
    )


def check_sampling(group_size: int, sampling: Sampling) -> None:
    """Raise Unsupported for a group whose completions would all be the same."""
    if sampling.temperature == 0 and group_size > 1:
        raise Unsupported(
            f"greedy sampling would draw {group_size} equal completions of each prompt",
            where="rollout.temperature",
            remedy="set a temperature above 0, or ask for one completion",
        )


_MEMORY_WORDS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "no available memory",
    "free memory on device",
    "kv cache memory",
    "memoryerror",
)


def start_error(error: BaseException, folder: str) -> EngineError:
    """What kept an engine from starting, as an EngineError; one that is for want of memory says what asks for less."""
    said = f"{type(error).__name__}: {error}"
    memory = any(word in said.lower() for word in _MEMORY_WORDS)
    return EngineError(
        f"the engine did not start with {folder}{', for want of memory' if memory else ''}: {said}",
        remedy="ask for less: rollout.max_model_len, rollout.engine.max_num_seqs, rollout.engine.kv_cache_memory_bytes "
        "or gpu_memory_utilization, fewer rollout.workers on a device"
        if memory
        else "rollout.max_model_len and rollout.engine (kv_cache_memory_bytes, ...) reach the engine unchanged",
    )


def make_engine(spec: EngineSpec) -> Engine:
    """Import the engine that `spec.name` names and start it.

    Raises:
        RecipeError: no engine of that name, or an option it does not have.
        SetupError: the engine's package is not installed.
    """
    check_engine_options(spec.name, spec.engine)
    engine: Engine = _factory(spec.name)(spec)
    if spec.environment is None:
        return engine
    episodes: Engine = getattr(importlib.import_module(EPISODES[0]), EPISODES[1])(spec, engine)
    return episodes


def load_libraries(name: str) -> None:
    """Import what an engine of that name is made of, where its class has a `load_libraries` that does."""
    load = getattr(_factory(name), "load_libraries", None)
    if load is not None:
        load()


def _factory(name: str) -> Any:
    path = name if ":" in name else facts_of_ours(name).engine
    module_name, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module_name), attribute)


def check_engine_options(name: str, options: Mapping[str, Any]) -> None:
    """`EngineFacts.check`, of one of ours; a user's was asked by the check, in a child."""
    if ":" not in name:
        facts_of_ours(name).check(options)
