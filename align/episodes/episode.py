"""One episode: turns of the policy and of its environment, token by token.

    sample a turn -> read its calls -> act -> append what came of them -> sample -> ...

The next prompt is the previous ids, exactly as they were sampled, and a join behind them (`joins.py`): nothing is
decoded and encoded again. Under `history: template` that holds as long as the template writes earlier turns as they
were sampled (`history.py`); where it does not, another sequence begins with what it writes. An episode is a coroutine;
who samples for it and where its environment runs are its caller's business (`engine.py`, `try`, tests).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from align.data.records import RowError
from align.episodes.acting import Acting, World
from align.episodes.calls import PLAIN, Reply, ToolCall
from align.episodes.history import History
from align.episodes.ids import Ids
from align.episodes.looking import Eye
from align.episodes.outcomes import CUT, ENDS, Lost, Played, Verdict, seed_of, with_more
from align.episodes.setting import Setting
from align.protocols.fleet import Completion, Episode, FailedPrompt, PromptItem, Sampling
from align.protocols.trees import Medium

Message = Mapping[str, Any]
Sample = Callable[[PromptItem, Sampling], Awaitable[Completion | FailedPrompt]]
"""Draws one completion of a prompt."""


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
        self._sample = sample
        self._ids = Ids(prompt.token_ids.tolist(), media=list(prompt.media))
        self._messages: list[Message] = list(prompt.messages)
        self._first = self._own = len(self._messages)
        self._last: Completion | None = None
        self._reply = Reply("", None, (), ())
        self._raw = ("", False)  # what it was read from; see `History.stands`
        self._counts = {"turns": 0.0, "calls": 0.0, "call_errors": 0.0, "invalid_calls": 0.0, "cut_answers": 0.0}
        self._joins = setting.joins_of(prompt.arguments)
        most = self.rules.images(setting.images is not None)
        self._eye = Eye(setting.images, self._joins, prompt, self._counts, most)
        self._acting = Acting(world, setting, self._joins, self._counts)
        self._made_ids = 0
        self._history: History | None = None
        if self.rules.history == "template":
            self._history = History(self._joins, self._parse)
            self._counts["forks"] = 0.0

    async def play(self) -> Played:
        """Raises Lost, which says what stands for the episode where the recipe scores what was killed (`on_kill`)."""
        try:
            ended = await self._turns()
            return self._played(self._completion(ended, await self._acting.verdict()))
        except Lost as lost:
            if self.rules.on_kill is not None and lost.killed and self._last is not None:
                lost.stands = self._played(self._completion("killed", Verdict(killed=True)))
            raise

    def so_far(self) -> tuple[np.ndarray, Completion | None, tuple[Medium, ...]]:
        """What an episode that was given up has come to, as `Played`; no completion before its first turn."""
        done = None if self._last is None else self._completion("unfinished", Verdict())
        prompt, media = self._ids.beginning
        return prompt, done, media

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
            added, done = await self._acting.act(self._reply)
            over = "done" if done else "reply" if not added else None
            if over is None and self._counts["turns"] >= self.rules.max_turns:
                over = "turns"
            added = await self._eye.within(added, self.rules.max_observation_tokens, self.setting.tokenizer)
            if over is not None:  # what was said last is read by rewards, if by no policy
                self._messages += added
                self._eye.close()
                return over
            if not await self._append(added, drawn):
                return "context"

    async def _reset(self) -> None:
        episode_seed = seed_of(self.prompt.seed, "episode", self.number)
        seed = seed_of(self.prompt.seed, "reset")
        given = await self._acting.reset(self.prompt.row, seed, episode_seed)
        added = [(await self._eye.look(message))[0] for message in given]
        if self.rules.signature == "trl" and len(added) == 1 and added[0]["role"] == "user":
            # TRL writes what a reset gives behind the prompt's last words, in the same message
            added = [with_more(self._messages.pop(), added[0]["content"])]
            self._own -= 1
        if added or self.rules.tools_in == "prompt":
            try:
                ids, media, added = await self._eye.opening(self._messages, added)
            except RowError as error:
                raise Lost("template", f"reset: the prompt cannot be written: {error}", killed=False) from error
            self._require_bounded(len(ids))
            self._ids = Ids(ids, media=list(media))
            self._messages += added
        self._ids.start = len(self._ids.tokens)
        if self._history is not None:
            self._history.begin(self._messages)

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
        return self._ids.spent

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
        self._raw = (drawn.text if drawn.raw is None else drawn.raw, thinking)
        self._reply = self._numbered(self._parse(*self._raw))
        self._messages.append(self._reply.message())
        return drawn

    def _parse(self, text: str, thinking: bool) -> Reply:
        return (self.setting.format or PLAIN).parse(text, thinking)

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

    async def _append(self, added: Sequence[Message], drawn: Completion) -> bool:
        """Join what the environment says; False where it is not put behind the turn, since no other would have room."""
        last = int(drawn.token_ids[-1])
        end = last if drawn.finish == "eos" else None
        try:
            if self._history is not None and not self._history.stands(self._messages, added, *self._raw):
                return await self._begin_anew(added, end)
            ids, media, added = self._eye.join(self._messages, added, end)
        except RowError as error:
            raise Lost("template", f"the turn cannot be continued: {error}", killed=False) from error
        self._messages += added
        if len(self._ids.tokens) + len(ids) >= self.setting.context:
            return False
        self._ids.join(ids, media)
        return True

    async def _begin_anew(self, added: Sequence[Message], end: int | None) -> bool:
        """Go on behind what the template writes now; False where no turn would have room behind it. Raises RowError
        where it refuses the conversation."""
        whole, new = await self._eye.anew(self._messages, added, end, own=self._own)
        self._messages += whole.added
        if len(whole.ids) >= self.setting.context:
            return False
        self._ids.begin_anew(whole.ids, whole.media, new)
        self._counts["forks"] += 1
        return True

    # ------------------------------------------------------------------------------------------------- the end

    def _played(self, completion: Completion) -> Played:
        prompt, media = self._ids.beginning
        return Played(prompt, completion, media)

    def _completion(self, ended: str, verdict: Verdict) -> Completion:
        last = self._last
        assert last is not None, "an episode has a turn"
        *forks, ids = self._ids.sequences
        finish: Literal["eos", "stop", "length"] = "length" if ended in CUT else last.finish
        counts = {
            **self._counts,
            "waited_seconds": self._acting.waited,
            **{f"ended_by_{word}": float(word == ended) for word in ENDS},
        }
        episode = Episode(
            turns=tuple(self._messages[self._first :]),
            state=verdict.state,
            scores=verdict.scores,
            failure=verdict.failure,
            infos=verdict.infos,
            counts=counts,
            seconds={name: tuple(values) for name, values in self._acting.seconds.items()},
            ended=ended,
            killed=verdict.killed,
            environment=self.rules.as_ or "",
        )
        return Completion(
            token_ids=ids.token_ids,
            logps=ids.logps,
            versions=ids.versions,
            text=last.text,
            finish=finish,
            raw=last.raw,
            sampled=ids.sampled,
            episode=episode,
            media=ids.media,
            forks=tuple(forks),
        )
