"""Several `align run` at once, each a process of its own on a part of this machine. One that fails ends no other."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from align.errors import Interrupted
from align.stages.runfolder import RUN

_POLL_S = 0.1
_FORWARDED = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Child:
    """A run to start, or to go on with where its folder is there. recipe: a resolved one."""

    label: str
    recipe: Path
    run: Path


@dataclass(frozen=True)
class Outcome:
    """state: kept (finished before), finished, failed, stopped (by the user, with a checkpoint) or "not started".
    message: the run's own last error."""

    label: str
    state: Literal["kept", "finished", "failed", "stopped", "not started"]
    seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class Slot:
    """What one run has of the machine. gpus: ids as CUDA_VISIBLE_DEVICES takes them; None where it is left alone."""

    cores: int
    gpus: tuple[str, ...] | None = None


def slots(parallel: int, cores: int, gpus: int) -> list[Slot]:
    """The machine in `parallel` equal parts; what does not divide is left over."""
    if not gpus:
        return [Slot(max(1, cores // parallel))] * parallel
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = [d.strip() for d in named.split(",") if d.strip()] or [str(n) for n in range(gpus)]
    each = gpus // parallel
    return [Slot(max(1, cores // parallel), tuple(devices[n * each : (n + 1) * each])) for n in range(parallel)]


def run_all(
    children: Sequence[Child], free: Sequence[Slot], *, plugins: Path, logs: Path, tell: Callable[[str], None]
) -> list[Outcome]:
    """Run every child, as many at once as there are slots; what each prints goes to `logs`/<label>.log.

    plugins: the folder where reward plugins are looked for. Raises Interrupted after Ctrl-C or SIGTERM, once every
    running child has saved a checkpoint and ended; a second one ends them at once.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running, done = list(children), dict[int, Any](), dict[str, Outcome]()
    places = dict(enumerate(free))
    with _signals(running) as stop:
        while running or (waiting and not stop):
            while waiting and not stop and len(running) < len(places):
                number = next(n for n in places if n not in running)
                child = waiting.pop(0)
                running[number] = (child, _start(child, places[number], plugins, logs), time.monotonic())
                tell(f"{child.label}: started")
            time.sleep(_POLL_S)
            for number, (child, process, begun) in list(running.items()):
                if process.poll() is not None:
                    del running[number]
                    done[child.label] = _outcome(child, process.returncode, time.monotonic() - begun, logs)
                    tell(f"{child.label}: {done[child.label].state}")
    if stop:
        raise Interrupted(
            f"stopped with {sum(o.state == 'finished' for o in done.values())} of {len(children)} runs finished",
            remedy="the same command with --resume continues",
        )
    return [done[child.label] for child in children]


def command(child: Child, slot: Slot, plugins: Path) -> list[str]:
    words = [sys.executable, "-m", "align.cli.main", "run", str(child.recipe), "--plugins", str(plugins)]
    words += ["--cores", str(slot.cores)]
    return words + (["--resume"] if (child.run / RUN).is_file() else [])


def _start(child: Child, slot: Slot, plugins: Path, logs: Path) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if slot.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    with (logs / f"{child.label}.log").open("ab") as log:
        return subprocess.Popen(
            command(child, slot, plugins),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches it through us alone
            preexec_fn=_ends_with_parent if sys.platform.startswith("linux") else None,
        )


def _ends_with_parent() -> None:
    """A run whose study is killed saves a checkpoint and ends, as after Ctrl-C."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG, prctl(2)


@contextlib.contextmanager
def _signals(running: Mapping[Any, Any]) -> Iterator[list[int]]:
    """Inside the block, signals to end go on to every running child; the list yielded is empty until the first."""
    came: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for _, process, _ in list(running.values()):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for _, process, _ in running.values():  # only where the loop itself failed
            process.terminate()
            process.wait()


def _outcome(child: Child, code: int, seconds: float, logs: Path) -> Outcome:
    if code == 0:
        return Outcome(child.label, "finished", seconds)
    path = logs / f"{child.label}.log"
    stopped = code == Interrupted.exit_code
    return Outcome(child.label, "stopped" if stopped else "failed", seconds, _last_error(path) or f"exit code {code}")


def _last_error(log: Path) -> str:
    """The last `error: ...` of a log, with its remedy."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    starts = [n for n, line in enumerate(lines) if line.startswith("error: ")]
    if not starts:
        return ""
    first, *rest = lines[starts[-1] :]
    more = [line.strip() for line in rest[:4] if line.startswith("  ->")]
    return " ".join([first.removeprefix("error: "), *more])
