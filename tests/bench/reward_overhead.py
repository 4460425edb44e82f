"""What the reward pool itself costs: a trivial plugin on many samples, and a judge that takes two seconds to answer.

    python -m tests.bench.reward_overhead [--samples 10000 --judged 1024 --concurrency 256 --seconds 2]
        [--record]      write the figures to tests/bench/results/

The trivial plugin is examples/brevity_reward.py in one process of its own, in batches of 64; goal 20,000 samples per
second. The judge is rewards/builtins/judge.py against an endpoint in another process on this machine, that waits and
answers; goal 1,024 samples in 12 seconds, where 8 are the endpoint's own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from rewards import Sample
from rewards.plugin import PluginSpec
from rewards.pool import RewardPool
from tests.bench import common

GOAL_PER_SECOND = 20_000
GOAL_JUDGED_S = 12.0
ROUNDS = 5
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def trivial(count: int) -> dict[str, Any]:
    """Samples per second through one process, by round: of the pool's own clock, from first call to last answer."""
    samples = [Sample("some words " * 10, group_id=i // 8, token_ids=list(range(24))) for i in range(count)]
    with RewardPool([PluginSpec("brevity_reward.py:brevity")], EXAMPLES, 0) as pool:
        pool.score_sync(samples[:64])
        seconds = [pool.score_sync(samples).metrics["reward/brevity/seconds"] for _ in range(ROUNDS)]
    rates = [count / one for one in seconds]
    return {"samples": count, "samples_per_second": {"median": median(rates), "min": min(rates), "max": max(rates)}}


def judged(count: int, concurrency: int, seconds: float) -> dict[str, Any]:
    """A judge that answers after `seconds`: how long `count` samples take with so many in flight."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(seconds, send), daemon=True)
    server.start()
    try:
        args = {"base_url": f"http://127.0.0.1:{receive.recv()}/v1", "model": "any"}
        spec = PluginSpec("judge", args=args, options={"concurrency": concurrency})
        with RewardPool([spec], EXAMPLES, 0) as pool:
            pool.run(pool.start())
            started = time.perf_counter()
            result = pool.score_sync([Sample(f"answer {n}") for n in range(count)])
            taken = time.perf_counter() - started
        assert all(row == [7.0] for row in result.scores), "every sample has its score"
        latencies = sorted(result.series["reward/judge/latency"])
    finally:
        server.terminate()
        server.join()
    return {
        "samples": count,
        "concurrency": concurrency,
        "endpoint_seconds": seconds,
        "seconds": taken,
        "at_least": -(-count // concurrency) * seconds,
        "latency_p50": latencies[len(latencies) // 2],
        "latency_p95": latencies[int(0.95 * len(latencies))],
    }


def serve(seconds: float, port: Any) -> None:
    """An endpoint that answers every chat request with [[7]] after `seconds`; tells its port."""
    body = json.dumps({"choices": [{"message": {"content": "[[7]]"}}]}).encode()
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                await reader.readexactly(int(head.split("content-length:")[1].split("\r\n")[0]))
                await asyncio.sleep(seconds)
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0, backlog=1024)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def main(words: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--judged", type=int, default=1024)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args(words)
    started = time.perf_counter()
    plain = trivial(arguments.samples)
    rate = plain["samples_per_second"]
    print(
        f"trivial plugin, one process: {rate['median']:,.0f} samples/s of {arguments.samples:,} "
        f"({rate['min']:,.0f} to {rate['max']:,.0f} over {ROUNDS} rounds); goal {GOAL_PER_SECOND:,}",
        flush=True,
    )
    asked = judged(arguments.judged, arguments.concurrency, arguments.seconds)
    print(
        f"judge of {arguments.seconds:g} s, concurrency {arguments.concurrency}: {asked['samples']:,} samples in "
        f"{asked['seconds']:.1f} s (the endpoint alone {asked['at_least']:g} s), p95 of a call "
        f"{asked['latency_p95']:.2f} s; goal {GOAL_JUDGED_S:g} s",
        flush=True,
    )
    met = rate["median"] >= GOAL_PER_SECOND and asked["seconds"] < GOAL_JUDGED_S
    print(f"goals: {'met' if met else 'missed'}")
    if arguments.record:
        common.write_result(
            "reward-overhead",
            goal=f"a trivial plugin scores {GOAL_PER_SECOND:,} samples per second and process, and a judge of 2 s with "
            f"concurrency 256 scores 1,024 samples in less than {GOAL_JUDGED_S:g} s",
            met=met,
            figures={"trivial": plain, "judge": asked},
            started=started,
        )
    return {"trivial": plain, "judge": asked}


if __name__ == "__main__":
    main(sys.argv[1:])
