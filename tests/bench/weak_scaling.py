"""Weak scaling: tokens per second of W ranks with one core each, over W times those of one, at a fixed batch per rank;
and the bytes that a rank sends in a step, counted, against what a ring sends.

    python -m tests.bench.weak_scaling [--ranks 2] [--adapter lora|full] [--dtype float32|bfloat16] [--pairs 8]
        [--steps 2 --repeats 5]     updates of a round, and rounds
        [--strategy zero2]          of a trainer that has strategies
        [--record]                  write the figures to tests/bench/results/

Sides run in turn: one rank on its core; W ranks on a core each, with W times the pairs; and, for what the machine
itself allows, W ranks that say nothing to each other ("apart"), since cores share memory and clock. Updates are of DPO
on pairs of 96 + 2 x 32 random tokens, the same for every rank, so that what is lost is lost to talking and waiting.

Bytes are given three times: counted by `align.train.ranks.Ranks`, by collective; the theory, 2 (W-1)/W times 4 bytes
per trained element (gradients are summed in float32, whatever the dtype; so are flags, one per tensor, that say whether
any rank has it), of an all-reduce by a ring, which is also the volume of ZeRO 1 and 2 (a reduce-scatter and an
all-gather; Rajbhandari et al. 2020, section 7); and what the kernel says that the sockets of a rank sent, headers
included.
"""

from __future__ import annotations

import argparse
import functools
import os
import socket
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tests.bench import common, work

GOAL = 0.8
PROMPT, COMPLETION = 96, 32
WIRE_TOLERANCE = 0.02  # headers, and the padding of pickles
TCP_INFO_BYTES_SENT = 200  # offset of tcpi_bytes_sent in struct tcp_info (linux/tcp.h, since 4.19)


@dataclass(frozen=True)
class Job:
    """What every process is told. pairs: per rank."""

    folder: Path
    adapter: str
    dtype: str
    pairs: int
    steps: int
    strategy: str
    toy: bool


class Worker:
    """One rank, in a process of its own with one torch thread: of a policy that it trains alone, and of one that all
    train together."""

    def __init__(self, job: Job) -> None:
        self.job, self.taken = job, 0
        common.use_threads(1)

    def start(self, rank: int, size: int, core: int) -> None:
        """Meet the others and load the models."""
        os.sched_setaffinity(0, {core})
        from align.train.ranks import Ranks

        job = self.job
        together = Ranks.join(rank, size, init_method=f"file://{job.folder}/meet")
        make = functools.partial(
            work.make_trainer, job.folder, {"name": "dpo"}, dtype=job.dtype, device="cpu", full=job.adapter == "full"
        )
        more = {} if job.strategy == "single" else {"strategy": job.strategy}
        self.trainers = {"alone": make(ranks=Ranks()), "together": make(ranks=together, **more)}

    def elements(self) -> list[int]:
        """Of every trained tensor."""
        return [p.numel() for p in self.trainers["together"].parameters]

    def update(self, name: str) -> dict[str, Any]:
        """The updates of a round, "alone" or "together". All figures are of one step: seconds of the mean, bytes of the
        last."""
        trainer, vocabulary = self.trainers[name], (work.TOY if self.job.toy else work.BENCH).vocabulary
        ranks, metrics, wired = trainer.ranks, {}, 0
        trees = work.random_trees(self.job.pairs * ranks.size, PROMPT, COMPLETION, vocabulary=vocabulary)
        before, said, started = Counter(ranks.sent), ranks.traffic(), time.perf_counter()
        for _ in range(self.job.steps):
            before, wired = Counter(ranks.sent), bytes_on_the_wire()
            metrics = trainer.step(trees, step=self.taken, progress=0.0)
            self.taken += 1
        seconds = (time.perf_counter() - started) / self.job.steps
        talking = (ranks.traffic().seconds - said.seconds) / self.job.steps
        sent = {kind: total - before[kind] for kind, total in ranks.sent.items() if total > before[kind]}
        assert metrics.get("comm/bytes", 0.0) == sum(sent.values()), "a metric that says something else"
        return {"seconds": seconds, "talking": talking, "sent": sent, "wire": bytes_on_the_wire() - wired}

    def leave(self) -> None:
        self.trainers["together"].ranks.leave()


def bytes_on_the_wire() -> int:
    """What the TCP sockets of this process have sent so far, by the kernel's count."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(link).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
                    total += struct.unpack_from("<Q", info, TCP_INFO_BYTES_SENT)[0]
        except OSError:  # closed meanwhile
            continue
    return total


def ring_bytes(elements: Sequence[int], ranks: int) -> float:
    """What a rank sends in a step by theory: float32 gradients of tensors of so many elements, and a flag for each."""
    return 2 * (ranks - 1) / ranks * 4 * (sum(elements) + len(elements))


def of_all(workers: Sequence[common.Apart], method: str, each: Sequence[tuple[Any, ...]] = ()) -> list[Any]:
    """The answers of all, which work at the same time. each: arguments of every one."""
    for worker, arguments in zip(workers, each or [()] * len(workers), strict=True):
        worker.ask(method, *arguments)
    return [worker.answer(method) for worker in workers]


def measure(job: Job, size: int, repeats: int) -> tuple[common.Rounds, list[dict[str, Any]], list[int]]:
    """Rounds of all sides, what every rank of the policy of `size` ranks said of the last, and the trained tensors."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < size:
        raise SystemExit(f"error: {size} ranks need a core each, and there are {len(cores)}")
    workers = [common.Apart(Worker, job) for _ in range(size)]
    of_all(workers, "start", [(rank, size, core) for rank, core in enumerate(cores[:size])])
    last: list[dict[str, Any]] = []

    def together() -> None:
        last[:] = of_all(workers, "update", [("together",)] * size)

    sides: dict[str, Callable[[], object]] = {
        "1 rank": lambda: workers[0].call("update", "alone"),
        f"{size} ranks": together,
        f"{size} apart": lambda: of_all(workers, "update", [("alone",)] * size),
    }
    for run in sides.values():
        run()
    rounds = common.alternate(sides, repeats)
    elements = workers[0].call("elements")
    of_all(workers, "leave")
    for worker in workers:
        worker.close()
    return rounds, last, elements


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and print; returns what is recorded."""
    arguments = parse(argv)
    started, size = time.perf_counter(), arguments.ranks
    common.use_threads(1)
    shape = work.TOY if arguments.toy else work.BENCH
    with tempfile.TemporaryDirectory() as name:
        job = Job(
            work.write_model(shape, Path(name)), arguments.adapter, arguments.dtype, arguments.pairs, arguments.steps,
            arguments.strategy, arguments.toy,
        )  # fmt: skip
        print(f"dpo, {arguments.adapter}, {shape.parameters / 1e6:.1f}M, {arguments.dtype}, {arguments.strategy}")
        rounds, last, elements = measure(job, size, arguments.repeats)
    figures = {"arguments": {k: v for k, v in vars(arguments).items() if k not in ("toy", "record")}}
    figures |= figures_of(rounds, last, elements, arguments)
    print_figures(figures, size)
    counted, theory = figures["bytes"]["counted"].get("all_reduce", 0), figures["bytes"]["theory"]
    met = figures["efficiency"]["median"] >= GOAL
    if arguments.strategy == "single":
        met = met and counted == theory and abs(figures["bytes"]["wire_over_counted"] - 1) <= WIRE_TOLERANCE
    if arguments.record:
        goal = f"{size} ranks at least {GOAL} times {size} as fast as one, and gradients sent as a ring sends them"
        name = f"weak-scaling-{arguments.adapter}-{arguments.strategy}"
        common.write_result(name, goal=goal, met=met, figures=figures, started=started)
    return figures


def figures_of(
    rounds: common.Rounds, last: Sequence[dict[str, Any]], elements: Sequence[int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Efficiencies by round, bytes of a step of rank 0, and the share of a step that the ranks talk."""
    size, first = arguments.ranks, last[0]
    total = sum(first["sent"].values())
    tokens = arguments.pairs * (PROMPT + 2 * COMPLETION) * arguments.steps
    return {
        "efficiency": rounds.ratio(f"{size} ranks", "1 rank"),
        "efficiency_of_the_machine": rounds.ratio(f"{size} apart", "1 rank"),
        "tokens_per_second": {
            side: tokens * (1 if side == "1 rank" else size) / rounds.median(side) for side in rounds.seconds
        },
        "seconds": rounds.seconds,
        # the least of the ranks: the others wait for it. All that overlapping it with backward could win
        "share_of_a_step_spent_talking": min(rank["talking"] / rank["seconds"] for rank in last),
        "trained_elements": sum(elements),
        "bytes": {
            "counted": first["sent"],
            "theory": ring_bytes(elements, size),
            "wire": first["wire"],
            "wire_over_counted": first["wire"] / total if total else float("nan"),
        },
    }


def print_figures(figures: dict[str, Any], size: int) -> None:
    rows = [["", "tokens/s", "efficiency", "min", "max"]]
    ratios = {f"{size} ranks": figures["efficiency"], f"{size} apart": figures["efficiency_of_the_machine"]}
    for side, rate in figures["tokens_per_second"].items():
        ratio = ratios.get(side)
        spread = [f"{ratio[key]:.3f}" for key in ("median", "min", "max")] if ratio else []
        rows.append([side, f"{rate:.0f}", *spread])
    print(common.columns(rows))
    found = figures["bytes"]
    counted = ", ".join(f"{name} {count:,}" for name, count in found["counted"].items())
    print(f"a rank sends in a step: {counted} bytes; theory of the all_reduce: {found['theory']:,.0f}")
    print(f"on the wire, by the kernel: {found['wire']:,}, {found['wire_over_counted']:.4f} times what is counted")
    print(f"of a step, ranks talk {figures['share_of_a_step_spent_talking']:.1%}; goal: an efficiency of {GOAL}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from align.train.spec import TrainerSpec

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--adapter", choices=("lora", "full"), default="lora")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pairs", type=int, default=8, help="of a rank's share of an update")
    parser.add_argument("--steps", type=int, default=2, help="updates of a round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--strategy", default="single", help="a trainer's, where it has some: zero1, zero2, zero3")
    parser.add_argument("--toy", action="store_true", help="a tiny model")
    parser.add_argument("--record", action="store_true", help="write the result down")
    arguments = parser.parse_args(argv)
    if arguments.strategy != "single" and "strategy" not in {field.name for field in fields(TrainerSpec)}:
        raise SystemExit(
            f"error: --strategy {arguments.strategy}: this trainer sums gradients itself, and has no other"
        )
    return arguments


if __name__ == "__main__":
    main()
