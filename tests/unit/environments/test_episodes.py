"""Episodes as users write them: reset, tools, turns, rewards, state, one process each."""

from __future__ import annotations

import asyncio
import os
import time
from functools import partial
from pathlib import Path

import pytest

from rewards import PluginError
from rewards.environments.host import Host
from rewards.environments.live import Outcome
from rewards.environments.spec import EnvironmentSpec
from tests.unit.environments.stage import GUESS, begun, hosted, within, write


def test_an_episode_from_reset_to_reward(tmp_path: Path) -> None:
    async def play() -> None:
        async with hosted(write(tmp_path, GUESS), "env.py:GuessNumber", args={"low": 3}) as host:
            assert host.description["name"] == "guess_number"
            assert host.description["objectives"] == {"guess_number": {"kind": "reward", "range": None}}
            live = await host.open()
            assert (await live.reset({"secret": 5}, 0, 0, 5)).value == "It is at least 3."
            [low] = await live.calls([("guess", {"number": 4})], 5)
            assert (low.kind, low.value, low.done) == ("value", "higher", False)
            assert (await live.reward(5)).value == {"values": {"guess_number": 0.0}, "errors": [], "info": {}}
            [right] = await live.calls([("guess", {"number": 5.0})], 5)
            assert (right.value, right.done) == ("right", True)
            assert (await live.reward(5)).value["values"] == {"guess_number": 1.0}
            assert (await live.state(5)).value == {"secret": 5}
            await live.close(5)
            after = await live.reward(5)
            assert after.lost and after.kind == "died" and "closed" in after.message

    within(play)


def test_a_dead_environment_says_where_and_why_at_the_start(tmp_path: Path) -> None:
    cases = {
        "import nothing_of_this_name": "nothing_of_this_name",
        "print('so far'); import os; os._exit(3)": "so far",
        "class Env:\n    def tool(self, x): ...": "has no annotation",
        "class Env:\n    def __init__(self, size): ...\n    def tool(self): ...": "needs the argument 'size'",
        "class Env:\n    pass": "no tool and no `respond`",
        "class Env:\n    reward = 3.0\n    def tool(self): ...": "`reward` of an environment is a method",
        "class Env:\n    def reset(self, prompt): ...\n    def tool(self): ...": "`reset` needs 'prompt'",
        "class Env:\n    def respond(self): ...": "`respond` is given the reply, and cannot be called so",
        "class Env:\n    def reward(self, sample): ...\n    def tool(self): ...": "`reward` is given nothing",
        "class Env:\n    def state(): ...\n    def tool(self): ...": r"write `def state\(self\)`",
        "Env = 3": "an environment is a class",
        "from rewards import environment\n@environment\ndef Env(): ...": "stands above a class",
        "class Env:\n    def get_reward(self): ...\n    def tool(self): ...": "signature: trl",
    }

    async def start(folder: Path) -> None:
        async with hosted(folder):
            pass

    for number, (text, said) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(PluginError, match=said) as caught:
            within(partial(start, write(folder, text)))
        assert caught.value.where and caught.value.remedy, text


TURNS = '''
import asyncio, dataclasses, os, random, sys
from rewards import Objective, Score, environment

@dataclasses.dataclass
class Point:
    x: int
    y: int

@environment(objectives={"won": Objective(), "steps": Objective("cost", range=(0, 10))})
class Env:
    def __init__(self):
        self.steps = 0

    async def reset(self, episode_seed):
        self.task = asyncio.create_task(self._tick())
        self.ticks = 0
        return [{"role": "system", "content": f"{episode_seed} {random.random()}"}]

    async def _tick(self):
        while True:
            self.ticks += 1
            await asyncio.sleep(0.01)

    def respond(self, reply):
        return None if reply == "bye" else {"role": "user", "content": reply.upper()}

    def done(self):
        return self.steps > 2

    def look(self, what: str) -> object:
        """Look."""
        self.steps += 1
        return {"none": None, "number": 3, "point": Point(1, 2), "dict": {"a": [True, None]}, "object": object(),
                "parts": [{"type": "text", "text": "seen"}, {"type": "image_url", "image_url": {"url": "data:,"}}],
                "ticks": self.ticks}[what]

    def runs_a_loop(self) -> str:
        return asyncio.run(self._value())

    async def _value(self):
        return "from a loop of its own"

    async def wait(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "waited"

    def reward(self):
        return Score({"won": None, "steps": 11}, info={"why": "too long"})
'''


def test_what_methods_may_return(tmp_path: Path) -> None:
    async def play() -> None:
        async with hosted(write(tmp_path, TURNS)) as host:
            live = await host.open()
            reset = await live.reset({}, 7, 8, 5)
            [message] = reset.value
            assert message["role"] == "system" and message["content"].startswith("8 0.")
            looks = ["none", "number", "point", "dict", "parts", "object"]
            several = [(await live.calls([("look", {"what": what})], 5))[0] for what in looks]
            none, number, point, mapping, parts, thing = several
            assert (none.value, none.was_none, number.value) == ("", True, "3")
            assert (point.value, mapping.value) == ('{"x": 1, "y": 2}', '{"a": [true, null]}')
            assert [part["type"] for part in parts.value] == ["text", "image"]
            assert thing.kind == "raised" and "returned a object" in thing.message
            assert [o.done for o in (none, number, point)] == [False, False, True]
            calls = [("look", {"what": "point"}), ("look", {"what": "number"}), ("wait", {"seconds": 0})]
            point, *rest = await live.calls(calls, 5)
            assert point.done and {one.value for one in rest} == {"not called: the episode is over"}
            assert (await live.respond("hello", 5)).value == [{"role": "user", "content": "HELLO"}]
            assert (await live.respond("bye", 5)).value is None
            reward = (await live.reward(5)).value
            assert reward["values"] == {"won": None, "steps": None} and reward["info"] == {"why": "too long"}
            [[objective, cause, _]] = reward["errors"]
            assert (objective, cause) == ("steps", "out_of_range")
            [unknown] = await live.calls([("fly", {})], 5)
            assert unknown.kind == "raised" and "there is no tool 'fly'; there are: look" in unknown.message
            [own] = await live.calls([("runs_a_loop", {})], 5)
            assert own.value == "from a loop of its own"

    within(play)


def test_coroutines_run_side_by_side_and_tasks_go_on_between_requests(tmp_path: Path) -> None:
    async def play() -> None:
        async with hosted(write(tmp_path, TURNS)) as host:
            live = await begun(host)
            started = time.monotonic()
            calls = [("wait", {"seconds": 0.5})] * 8 + [("wait", {"seconds": 30}), ("look", {"what": "number"})]
            *waits, hung, number = await live.calls(calls, 1.0)
            assert time.monotonic() - started < 3.0
            assert {w.value for w in waits} == {"waited"} and number.value == "3"
            assert (hung.kind, hung.lost) == ("timeout", False)
            [before] = await live.calls([("look", {"what": "ticks"})], 5)
            await asyncio.sleep(0.3)
            [after] = await live.calls([("look", {"what": "ticks"})], 5)
            assert int(after.value) > int(before.value) + 3

    within(play)


SHARED = """
import os, random, tempfile
counter = []
class Env:
    seen = []
    def reset(self, seed):
        self.draw = random.random()
    def add(self) -> list:
        self.seen.append(1); counter.append(1)
        return [len(self.seen), len(counter)]
    def where(self) -> list[str]:
        return [tempfile.gettempdir(), str(os.getpid()), str(self.draw), str(list({"a", "b", "c", "d"}))]
"""


def test_episodes_share_nothing_and_equal_seeds_begin_alike(tmp_path: Path) -> None:
    async def play() -> None:
        async with hosted(write(tmp_path, SHARED)) as host, hosted(tmp_path) as other:
            lives = [await begun(h, seed=seed) for h, seed in ((host, 1), (host, 1), (host, 2), (other, 1))]
            for live in lives:
                [first, second] = await live.calls([("add", {}), ("add", {})], 5)
                assert (first.value, second.value) == ("[1, 1]", "[2, 2]")
            found = [(await live.calls([("where", {})], 5))[0].value for live in lives]
            folders, pids, draws, orders = zip(*map(eval, found), strict=True)
            assert len(set(folders)) == len(set(pids)) == 4
            assert draws[0] == draws[1] == draws[3] != draws[2] and len(set(orders)) == 1
            assert all(os.path.isdir(folder) for folder in folders)
            for live in lives[:2]:
                await live.close(5)
            assert [os.path.isdir(folder) for folder in folders] == [False, False, True, True]

    within(play)


FUNCTIONS = '''
memory = []
def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    :param a: the first
    """
    memory.append(a)
    return a + b
async def recall() -> list:
    return memory
'''


def test_functions_without_a_class(tmp_path: Path) -> None:
    write(tmp_path, FUNCTIONS, "tools.py")
    write(tmp_path, "def shout(text: str):\n    return text.upper()\n", "more.py")
    spec = EnvironmentSpec(tools=("tools.py:add", "tools.py:recall", "more.py:shout"))

    async def play() -> None:
        host = Host(spec, tmp_path, 0)
        try:
            described = await host.start()
            assert [t["function"]["name"] for t in described["tools"]] == ["add", "recall", "shout"]
            assert described["name"] == "tools" and described["objectives"] == {}
            assert described["source"].endswith("tools.py") and "more" in described["modules"]
            live = await begun(host)
            outcomes = await live.calls([("recall", {}), ("add", {"a": 4}), ("shout", {"text": "a"})], 5)
            assert [o.value for o in outcomes] == ["[4]", "5", "A"]
        finally:
            host.close()

    within(play)
    with pytest.raises(PluginError, match="a class or a list of tools"):
        EnvironmentSpec()


def test_a_request_begun_while_another_is_outstanding_is_refused(tmp_path: Path) -> None:
    async def play() -> None:
        async with hosted(write(tmp_path, TURNS)) as host:
            live = await begun(host)
            first = asyncio.create_task(live.calls([("wait", {"seconds": 0.3})], 5))
            await asyncio.sleep(0.05)
            with pytest.raises(RuntimeError, match="still answers"):
                await live.reward(5)
            assert (await first)[0].value == "waited"
            given_up = asyncio.create_task(live.calls([("wait", {"seconds": 30})], 60))
            await asyncio.sleep(0.05)
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up
            assert (await live.reward(5)).lost
            await live.close(5)

    within(play)


def test_a_row_that_cannot_be_sent_is_said(tmp_path: Path) -> None:
    async def play() -> Outcome:
        async with hosted(write(tmp_path, GUESS), "env.py:GuessNumber") as host:
            live = await host.open()
            first = await live.reset({"secret": object()}, 0, 0, 5)
            assert (await live.reset({"secret": 1}, 0, 0, 5)).kind == "value"
            return first

    outcome = within(play)
    assert outcome.kind == "raised" and "cannot be sent" in outcome.message and not outcome.lost


SLOW = '''
import asyncio, time

class Env:
    def hang(self):
        """Hang."""
        time.sleep(60)

    def quick(self):
        """Quick."""
        return "done"

    async def later(self):
        """Later."""
        return "later"
'''


def test_a_turn_of_hanging_calls_costs_one_deadline(tmp_path: Path) -> None:
    async def play() -> None:
        async with hosted(write(tmp_path, SLOW)) as host:
            live = await host.open()
            await live.reset({}, 0, 0, 5)
            begun_at = time.monotonic()
            names = ["quick", "hang", "hang", "quick", "later", "hang"]
            found = await live.calls([(name, {}) for name in names], 1.0)
            assert time.monotonic() - begun_at < 4.0, "of three that hang one was called"
            assert [one.kind for one in found] == ["value", "timeout", "timeout", "timeout", "timeout", "timeout"]
            assert found[0].value == "done" and found[1].message == "not done after 1 s"
            assert {one.message for one in found[2:]} == {"not called: hang took too long"} and not found[2].lost
            [again] = await live.calls([("quick", {})], 5)
            assert again.value == "done", "the next turn goes on"
            await live.close(5)

    within(play)
