"""What an episode asks of its environment, and what the policy reads of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from align.episodes.calls import Reply, ToolCall
from align.episodes.joins import Joins
from align.episodes.outcomes import Verdict, as_messages, lost, verdict_of, with_more, with_state
from align.episodes.setting import Setting
from align.episodes.spoken import Message
from rewards.environments.arguments import check_arguments
from rewards.environments.live import Outcome

_COMPLAINTS = 3  # about one turn


class World(Protocol):
    """An episode's environment, as `rewards.environments.host.Live` is one."""

    async def reset(self, row: Mapping[str, Any], seed: int, episode_seed: int, timeout_s: float) -> Outcome: ...
    async def calls(self, calls: Sequence[tuple[str, Mapping[str, Any]]], timeout_s: float) -> list[Outcome]: ...
    async def respond(self, reply: str, timeout_s: float) -> Outcome: ...
    async def reward(self, timeout_s: float) -> Outcome: ...
    async def state(self, timeout_s: float) -> Outcome: ...


class Acting:
    """One episode's environment. Every method raises Lost where the episode cannot go on.

    joins: of the episode's prompt. counts: of the episode; `calls`, `call_errors` and `invalid_calls` grow here.
    Attributes seconds: of each call, by tool or method; waited: their sum.
    """

    def __init__(self, world: World, setting: Setting, joins: Joins, counts: dict[str, float]):
        self.rules = setting.rules
        self.seconds: dict[str, list[float]] = {}
        self.waited = 0.0
        self._world, self._setting, self._joins, self._counts = world, setting, joins, counts

    async def reset(self, row: Mapping[str, Any], seed: int, episode_seed: int) -> list[Message]:
        """What it says before the first turn."""
        outcome = await self._world.reset(row, seed, episode_seed, self.rules.timeout_s)
        _require(outcome, "reset")
        return as_messages(outcome.value, "reset")

    async def act(self, reply: Reply) -> tuple[list[Message], bool]:
        """What the environment says to a reply, () where the episode is over; and whether it says so itself."""
        if reply.calls or reply.invalid:
            return await self._answers(reply)
        if not self._setting.has.get("respond"):
            return [], False
        outcome = await self._world.respond(reply.content, self.rules.timeout_s)
        self._time("respond", outcome)
        _require(outcome, "respond")
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
        schema = self._setting.schema(call.name)
        if schema is None:
            names = ", ".join(s["function"]["name"] for s in self._setting.schemas)
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

    def _time(self, what: str, outcome: Outcome) -> None:
        self.seconds.setdefault(what, []).append(outcome.seconds)
        self.waited += outcome.seconds

    async def verdict(self) -> Verdict:
        """What it says of the episode, which is over. Raises Lost where it is gone: what it would have said is unknown,
        and the episode is played again, as wherever else it is gone."""
        verdict = Verdict()
        if self._setting.has.get("reward"):
            outcome = await self._world.reward(self.rules.timeout_s)
            if outcome.lost:
                raise lost(outcome, "reward")
            verdict = verdict_of(outcome)
        if self._setting.has.get("state"):
            verdict = with_state(verdict, await self._world.state(self.rules.timeout_s))
        return verdict


def _require(outcome: Outcome, what: str) -> None:
    if outcome.kind != "value":
        raise lost(outcome, what)
