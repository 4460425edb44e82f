"""Reward plugins that go wrong on samples whose completion is "bad", in every way that a plugin can."""

import asyncio
import ctypes
import math
import os
import re
import sys
import time

from rewards import Objective, Score, reward

TIMEOUT = 0.7


def bad(samples):
    return any(s.completion == "bad" for s in samples)


def ones(samples):
    return [1.0] * len(samples)


@reward
def raises(samples):
    if bad(samples):
        raise RuntimeError("the judge is out")
    return ones(samples)


@reward
def not_a_number(samples):
    return [math.nan if s.completion == "bad" else 1.0 for s in samples]


@reward
def infinite(samples):
    return [math.inf if s.completion == "bad" else 1.0 for s in samples]


@reward
def beyond_float32(samples):
    return [1e300 if s.completion == "bad" else 1.0 for s in samples]


@reward
def text(samples):
    return ["0.5" if s.completion == "bad" else 1.0 for s in samples]


@reward
def wrong_length(samples):
    return ones(samples)[1:] if bad(samples) else ones(samples)


@reward
def wrong_name(samples):
    return [Score({"wrong": 1.0} if s.completion == "bad" else {"wrong_name": 1.0}) for s in samples]


@reward
def missing_name(samples):
    return [Score({} if s.completion == "bad" else {"missing_name": 1.0}) for s in samples]


@reward(objectives={"ranged": Objective(range=(0, 1))})
def ranged(samples):
    return [1.5 if s.completion == "bad" else 1.0 for s in samples]


@reward(timeout_s=TIMEOUT)
def python_loop(samples):
    while bad(samples):
        pass
    return ones(samples)


@reward(timeout_s=TIMEOUT)
def loop_holding_the_gil(samples):
    if bad(samples):
        re.match(r"(a+)+$", "a" * 60 + "b")
    return ones(samples)


@reward(timeout_s=TIMEOUT)
def sleeps(samples):
    if bad(samples):
        time.sleep(3600)
    return ones(samples)


@reward
def exits(samples):
    if bad(samples):
        os._exit(3)
    return ones(samples)


@reward
def sys_exits(samples):
    if bad(samples):
        sys.exit("enough")
    return ones(samples)


@reward
def segfaults(samples):
    if bad(samples):
        ctypes.string_at(0)
    return ones(samples)


@reward(memory_mb=512)
def eats_memory(samples):
    if bad(samples):
        bytearray(10 * 2**30)
    return ones(samples)


@reward(timeout_s=TIMEOUT, batch=2)
async def never_awaits(samples):
    while bad(samples):
        pass
    await asyncio.sleep(0.05)
    return ones(samples)


@reward(timeout_s=TIMEOUT, batch=2)
async def awaits_forever(samples):
    await asyncio.sleep(3600 if bad(samples) else 0.05)
    return ones(samples)


@reward(batch=2)
async def exits_while_others_wait(samples):
    await asyncio.sleep(0.05)
    if bad(samples):
        os._exit(3)
    await asyncio.sleep(0.2)
    return ones(samples)


@reward(batch=2)
async def async_raises(samples):
    await asyncio.sleep(0.01)
    if bad(samples):
        raise ValueError("no")
    return ones(samples)


@reward
def prints_a_lot(samples):
    print("x" * 100_000)
    print("noise", file=sys.stderr)
    os.write(1, b"\x00\x00\x00\x00\x00\x00\x00\x05hello")
    return ones(samples)


@reward
def always_raises(samples):
    raise RuntimeError("nothing works")


@reward(scope="group")
def group_rank(samples):
    """Rank inside the group by length; fails on a group with a bad sample."""
    assert len({s.group_id for s in samples}) == 1, "a group alone"
    if bad(samples):
        raise RuntimeError("bad group")
    order = sorted(len(s.completion) for s in samples)
    return [float(order.index(len(s.completion))) for s in samples]
