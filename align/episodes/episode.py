"""One episode: turns of the policy and of its environment, token by token.

    sample a turn -> read its calls -> act -> append what came of them -> sample -> ...

The next prompt is always the previous ids, exactly as they were sampled, and a join behind them (`joins.py`): nothing
is decoded and encoded again. An episode is a coroutine; who samples for it and where its environment runs are its
caller's business (`engine.py`, `try`, tests).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np

from align.data.records import RowError
from align.episodes.calls import PLAIN, Reply, ToolCall
from align.episodes.looking import Eye
from align.episodes.outcomes import (
    CUT,
    ENDS,
    Ids,
    Lost,
    Played,
    Verdict,
    as_messages,
    lost,
    seed_of,
    verdict_of,
    with_more,
    with_state,
)
from align.episodes.setting import Setting
from align.protocols.fleet import Completion, Episode, FailedPrompt, PromptItem, Sampling
from align.protocols.trees import Medium
from rewards.environments.arguments import check_arguments
from rewards.environments.live import Outcome

Message = Mapping[str, Any]
_COMPLAINTS = 3  # about one turn
Sample = Callable[[PromptItem, Sampling], Awaitable[Completion | FailedPrompt]]
"""Draws one completion of a prompt."""


class World(Protocol):
    """An episode's environment, as `rewards.environments.host.Live` is one."""

    async def reset(self, row: Mapping[str, Any], seed: int, episode_seed: int, timeout_s: float) -> Outcome: ...
    async def calls(self, calls: Sequence[tuple[str, Mapping[str, Any]]], timeout_s: float) -> list[Outcome]: ...
    async def respond(self, reply: str, timeout_s: float) -> Outcome: ...
    async def reward(self, timeout_s: float) -> Outcome: ...
    async def state(self, timeout_s: float) -> Outcome: ...


class Play:
    """Episode `number` of a prompt. `play` gives its prompt's ids, i64[n], and its completion.

    sample: draws a turn. world: its environment, just opened. attempt: how often its group was given up before.
    """

    def __init__(
        self, setting: Setting, prompt: PromptItem, number: int, sampling: Sampling, sample: Sample, world: World,
        *, attempt: int = 0,
    ):  # fmt: skip
        self.setting, self.rules = setting, setting.rules
        self.prompt, self.number, self.sampling, self.attempt = prompt, number, sampling, attempt
        self._sample, self._world = sample, world
        self._ids = Ids(prompt.token_ids.tolist(), media=list(prompt.media))
        self._messages: list[Message] = list(prompt.messages)
        self._first = len(self._messages)
        self._last: Completion | None = None
        self._reply = Reply("", None, (), ())
        self._counts = {"turns": 0.0, "calls": 0.0, "call_errors": 0.0, "invalid_calls": 0.0, "cut_answers": 0.0}
        self._joins = setting.joins_of(prompt.arguments)
        self._eye = Eye(setting.images, self._joins, prompt, self._counts)
        self._seconds: dict[str, list[float]] = {}
        self._waited = 0.0
        self._made_ids = 0

    async def play(self) -> Played:
        """Raises Lost, which says what stands for the episode where the recipe scores what was killed (`on_kill`)."""
        try:
            ended = await self._turns()
            return self._played(await self._finished(ended))
        except Lost as lost:
            if self.rules.on_kill is not None and lost.killed and self._ids.sampled:
                lost.stands = self._played(self._completion("killed", Verdict(killed=True)))
            raise

    def so_far(self) -> tuple[np.ndarray, Completion | None, tuple[Medium, ...]]:
        """What an episode that was given up has come to, as `Played`; no completion before its first turn."""
        start = self._ids.start
        done = None if self._last is None else self._completion("unfinished", Verdict())
        return np.array(self._ids.tokens[:start], np.int64), done, self._ids.media_of(0, start)

    # ------------------------------------------------------------------------------------------------- turns

    async def _turns(self) -> str:
        """Turns to the end; the word for what ended them."""
        await self._reset()
        while True:
            room = self._room()
            if room < 1 and self._last is None:
                size = len(self._ids.tokens)
                raise Lost(
                    "too long", f"a prompt of {size} tokens fills the engine's {self.setting.context}", killed=False
                )
            if room < 1:
                return self._full()
            drawn = await self._turn(room)
            if drawn.finish == "length":
                return "turn" if room == self.sampling.max_tokens else self._full()
            added, done = await self._act(self._reply)
            over = "done" if done else "reply" if not added else None
            if over is None and self._counts["turns"] >= self.rules.max_turns:
                over = "turns"
            added = await self._eye.within(added, self.rules.max_observation_tokens, self.setting.tokenizer)
            if over is not None:  # what was said last is read by rewards, if by no policy
                self._messages += added
                self._eye.close()
                return over
            if not self._append(added, drawn):
                return "context"

    async def _reset(self) -> None:
        episode_seed = seed_of(self.prompt.seed, "episode", self.number)
        seed = seed_of(self.prompt.seed, "reset")
        outcome = await self._world.reset(self.prompt.row, seed, episode_seed, self.rules.timeout_s)
        self._require(outcome, "reset")
        added = [(await self._eye.look(m))[0] for m in as_messages(outcome.value, "reset")]
        if self.rules.signature == "trl" and len(added) == 1 and added[0]["role"] == "user":
            # TRL writes what a reset gives behind the prompt's last words, in the same message
            added = [with_more(self._messages.pop(), added[0]["content"])]
        if added or self.rules.tools_in == "prompt":
            try:
                ids, media, added = await self._eye.opening(self._messages, added)
            except RowError as error:
                raise Lost("template", f"reset: the prompt cannot be written: {error}", killed=False) from error
            self._require_bounded(len(ids))
            self._ids = Ids(ids, media=list(media))
            self._messages += added
        self._ids.start = len(self._ids.tokens)

    def _require_bounded(self, size: int) -> None:
        """Raises Lost where `reset` adds more to the prompt than the check has counted it for."""
        more, most = size - len(self.prompt.token_ids), self.rules.reset_tokens
        if more > most and self.rules.tools_in == "template":
            raise Lost(
                "too long",
                f"reset adds {more} tokens to the prompt, and at most {most} may be: raise "
                "`environment.max_observation_tokens`, or put what every row has into its prompt",
                killed=False,
            )

    def _full(self) -> str:
        """The budget that is used up."""
        return "tokens" if self._spent() >= self.rules.max_tokens else "context"

    def _spent(self) -> int:
        return sum(self._ids.sampled)

    def _room(self) -> int:
        """Tokens that the next turn may have."""
        left = self.setting.context - len(self._ids.tokens)
        return min(self.sampling.max_tokens, self.rules.max_tokens - self._spent(), left)

    async def _turn(self, room: int) -> Completion:
        turn = int(self._counts["turns"])
        seed = seed_of(self.prompt.seed, "turn", self.number, turn, self.attempt)
        ids = np.array(self._ids.tokens, np.int64)
        item = replace(self.prompt, token_ids=ids, media=tuple(self._ids.media), seed=seed)
        thinking = self._joins.in_thoughts(self._ids.tokens)
        drawn = await self._sample(item, replace(self.sampling, max_tokens=room))
        if isinstance(drawn, FailedPrompt):
            raise Lost("too long", drawn.message, killed=False)
        self._ids.sample(drawn)
        self._counts["turns"] += 1
        self._last = drawn
        self._reply = self._numbered(self._read(drawn, thinking))
        self._messages.append(self._reply.message())
        return drawn

    def _read(self, drawn: Completion, thinking: bool) -> Reply:
        form = PLAIN if self.setting.format is None else self.setting.format
        return form.parse(drawn.text if drawn.raw is None else drawn.raw, thinking)

    def _numbered(self, reply: Reply) -> Reply:
        """With an id for each call: nine letters and digits, which every template takes. More calls than the template
        can write are none, and said so."""
        most = self._joins.most_calls or len(reply.calls)
        calls: list[ToolCall] = []
        for call in reply.calls[:most]:
            self._made_ids += 1
            calls.append(replace(call, id=call.id or f"call{self._made_ids:05d}"))
        more = [f"{call.name} was not called: the chat template takes {most} a turn" for call in reply.calls[most:]]
        return replace(reply, calls=tuple(calls), invalid=(*reply.invalid, *more))

    def _append(self, added: Sequence[Message], drawn: Completion) -> bool:
        """Join what the environment says; False where it is not put behind the turn, since no other would have room."""
        last = int(drawn.token_ids[-1])
        end = last if drawn.finish == "eos" else None
        try:
            ids, media, added = self._eye.join(self._messages, added, end)
        except RowError as error:
            raise Lost("template", f"the turn cannot be continued: {error}", killed=False) from error
        self._messages += added
        if len(self._ids.tokens) + len(ids) >= self.setting.context:
            return False
        self._ids.join(ids, media)
        return True

    # ------------------------------------------------------------------------------------------------- acting

    async def _act(self, reply: Reply) -> tuple[list[Message], bool]:
        """What the environment says to a reply, () where the episode is over; and whether it says so itself."""
        if reply.calls or reply.invalid:
            return await self._answers(reply)
        if not self.setting.has.get("respond"):
            return [], False
        outcome = await self._world.respond(reply.content, self.rules.timeout_s)
        self._time("respond", outcome)
        self._require(outcome, "respond")
        return as_messages(outcome.value, "respond"), outcome.done

    async def _answers(self, reply: Reply) -> tuple[list[Message], bool]:
        """An answer to each call, in order, and one to what was no call."""
        texts = [self._refusal(n, call) for n, call in enumerate(reply.calls)]
        asked = [n for n, text in enumerate(texts) if text is None]
        done = False
        if asked:
            calls = [(reply.calls[n].name, reply.calls[n].arguments) for n in asked]
            outcomes = await self._world.calls(calls, self.rules.timeout_s)
            for n, outcome in zip(asked, outcomes, strict=True):
                done |= outcome.done
                texts[n] = self._told(reply.calls[n].name, outcome)
        self._counts["calls"] += len(asked)
        self._counts["invalid_calls"] += len(reply.calls) - len(asked) + len(reply.invalid)
        added: list[Message] = [
            {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": text}
            for call, text in zip(reply.calls, texts, strict=True)
        ]
        if reply.invalid:
            added = self._with_complaint(added, f"error: {'; '.join(reply.invalid[:_COMPLAINTS])}")
        return added, done

    def _with_complaint(self, answers: list[Message], complaint: str) -> list[Message]:
        """With what was wrong with calls that could not be read, for which there is no message in the template."""
        if answers:
            return [*answers[:-1], with_more(answers[-1], f"\n{complaint}")]
        alone = self._joins.takes_answers_alone
        return [{"role": "tool" if alone else "user", "content": complaint}]

    def _refusal(self, number: int, call: ToolCall) -> str | None:
        """What is wrong with a call before it is made; None where nothing is."""
        most = self.rules.max_calls
        if number >= most:
            return f"error: not called, at most {most} call{'s' if most > 1 else ''} a turn"
        schema = self.setting.schema(call.name)
        if schema is None:
            names = ", ".join(s["function"]["name"] for s in self.setting.schemas)
            return f"error: there is no tool {call.name[:100]!r}; there are: {names}"
        wrong = check_arguments(schema, call.arguments)
        return None if wrong is None else f"error: {wrong}"

    def _told(self, tool: str, outcome: Outcome) -> Any:
        """What the policy reads of a call; raises Lost where it is not to read it."""
        self._time(tool, outcome)
        if outcome.kind == "value":
            return outcome.value
        self._counts["call_errors"] += 1
        told = {"raised": self.rules.on_error == "tell", "timeout": self.rules.on_timeout == "tell", "too_large": True}
        if outcome.lost or not told.get(outcome.kind, False):
            raise lost(outcome, tool)
        return f"error: {outcome.message}"

    def _require(self, outcome: Outcome, what: str) -> None:
        if outcome.kind != "value":
            raise lost(outcome, what)

    def _time(self, what: str, outcome: Outcome) -> None:
        self._seconds.setdefault(what, []).append(outcome.seconds)
        self._waited += outcome.seconds

    # ------------------------------------------------------------------------------------------------- the end

    def _played(self, completion: Completion) -> Played:
        start = self._ids.start
        return Played(np.array(self._ids.tokens[:start], np.int64), completion, self._ids.media_of(0, start))

    async def _finished(self, ended: str) -> Completion:
        verdict = Verdict()
        if self.setting.has.get("reward"):
            outcome = await self._world.reward(self.rules.timeout_s)
            if outcome.lost:  # what it would have said is unknown: played again, as wherever else it is gone
                raise lost(outcome, "reward")
            verdict = verdict_of(outcome)
        if self.setting.has.get("state"):
            outcome = await self._world.state(self.rules.timeout_s)
            verdict = with_state(verdict, outcome)
        return self._completion(ended, verdict)

    def _completion(self, ended: str, verdict: Verdict) -> Completion:
        ids, last = self._ids, self._last
        assert last is not None, "an episode has a turn"
        finish: Literal["eos", "stop", "length"] = "length" if ended in CUT else last.finish
        counts = {
            **self._counts,
            "waited_seconds": self._waited,
            **{f"ended_by_{word}": float(word == ended) for word in ENDS},
        }
        episode = Episode(
            turns=tuple(self._messages[self._first :]),
            state=verdict.state,
            scores=verdict.scores,
            failure=verdict.failure,
            infos=verdict.infos,
            counts=counts,
            seconds={name: tuple(values) for name, values in self._seconds.items()},
            ended=ended,
            killed=verdict.killed,
        )
        return Completion(
            token_ids=np.array(ids.tokens[ids.start :], np.int64),
            logps=np.array(ids.logps, np.float32),
            versions=np.array(ids.versions, np.int32),
            text=last.text,
            finish=finish,
            raw=last.raw,
            sampled=np.array(ids.sampled, bool),
            episode=episode,
            media=ids.media_of(ids.start, len(ids.tokens)),
        )
