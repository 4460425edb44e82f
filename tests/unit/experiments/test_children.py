"""Several runs at once, as real processes that stand in for `align run`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from align.errors import Interrupted
from align.experiments import children
from align.experiments.children import Child, Slot, run_all, slots

WORKER = """
import json, os, sys, time
begun = time.time()
what, out = sys.argv[1:]
try:
    time.sleep(20 if what == "long" else 0.4)
except KeyboardInterrupt:
    print("error: stopped after step 3", file=sys.stderr)
    sys.exit(130)
json.dump([begun, time.time(), os.environ.get("CUDA_VISIBLE_DEVICES")], open(out, "w"))
if what == "bad":
    print("error: stage 'grpo': no such thing\\n  -> mend it", file=sys.stderr)
    sys.exit(1)
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """run_all over children that do what their labels' first words say."""

    def words(child: Child, slot: Slot, plugins: Path) -> list[str]:
        return [sys.executable, "-c", WORKER, child.label.partition("-")[0], str(tmp_path / f"{child.label}.json")]

    monkeypatch.setattr(children, "command", words)
    said: list[str] = []

    def run(labels: list[str], free: list[Slot]):
        runs = [Child(label, tmp_path / "recipe.yaml", tmp_path / label) for label in labels]
        return run_all(runs, free, plugins=tmp_path, logs=tmp_path / "logs", tell=said.append)

    run.said = said  # type: ignore[attr-defined]
    return run


def times(folder: Path) -> list[tuple[float, float]]:
    return [tuple(json.loads(path.read_text())[:2]) for path in folder.glob("*.json")]


def test_as_many_run_at_once_as_there_are_slots(start, tmp_path):
    outcomes = start([f"short-{n}" for n in range(5)], [Slot(1, ("0",)), Slot(1, ("1",))])
    assert [(o.label, o.state) for o in outcomes] == [(f"short-{n}", "finished") for n in range(5)]
    spans = times(tmp_path)
    most = max(sum(a <= begin < b for a, b in spans) for begin, _ in spans)
    assert most == 2
    assert {json.loads(path.read_text())[2] for path in tmp_path.glob("*.json")} == {"0", "1"}


def test_a_run_that_fails_ends_no_other_and_its_own_words_are_kept(start):
    outcomes = start(["bad-1", "short-1", "short-2"], [Slot(1)])
    assert [o.state for o in outcomes] == ["failed", "finished", "finished"]
    assert outcomes[0].message == "stage 'grpo': no such thing -> mend it"


def test_ctrl_c_reaches_every_run_starts_no_more_and_waits_for_them(start, tmp_path):
    def interrupt() -> None:
        while not start.said:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted, match="0 of 3 runs finished"):
        start(["long-1", "long-2", "long-3"], [Slot(1), Slot(1)])
    assert sorted(start.said) == ["long-1: started", "long-1: stopped", "long-2: started", "long-2: stopped"]
    assert start.said[-1].endswith("stopped"), "each ends when it can: in no order"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_has_begun_is_resumed_and_told_its_share_of_the_machine(tmp_path):
    child = Child("a", tmp_path / "a.yaml", tmp_path / "a")
    assert children.command(child, Slot(3), tmp_path)[3:] == [
        "run", str(tmp_path / "a.yaml"), "--plugins", str(tmp_path), "--cores", "3",
    ]  # fmt: skip
    child.run.mkdir()
    (child.run / "run.json").write_text("{}")
    assert children.command(child, Slot(3), tmp_path)[-1] == "--resume"


def test_gpus_and_cores_are_divided_evenly(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert slots(2, 9, 4) == [Slot(4, ("2", "3")), Slot(4, ("5", "7"))]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert slots(3, 9, 4) == [Slot(3, ("0",)), Slot(3, ("1",)), Slot(3, ("2",))]
    assert slots(2, 1, 0) == [Slot(1), Slot(1)]
