"""What trains on one GPU needs neither clusters nor engines: the rooms that compute import where those packages are
not installed, and answer where one is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ABSENT = ("ray", "vllm", "deepspeed", "bitsandbytes", "datasets")
ROOMS = ("align/model", "align/train", "align/losses", "align/objectives")

HIDE = """
import importlib, importlib.machinery, importlib.util, json, sys
absent, names = json.loads(sys.argv[1]), json.loads(sys.argv[2])

class Others(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)

sys.meta_path[:] = [Others if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
assert not any(importlib.util.find_spec(name) for name in absent)
failed = {}
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {error}"
print(json.dumps(failed))
"""


def without(absent: tuple[str, ...], names: list[str]) -> dict[str, str]:
    """Import `names` in a fresh interpreter that finds none of `absent`; which fail, and how."""
    command = [sys.executable, "-c", HIDE, json.dumps(absent), json.dumps(names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def modules(room: str) -> list[str]:
    found = [file.relative_to(ROOT).with_suffix("").parts for file in sorted((ROOT / room).rglob("*.py"))]
    return [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in found]


@pytest.mark.slow
def test_rooms_that_compute_import_without_ray_vllm_deepspeed_bitsandbytes_and_datasets() -> None:
    names = [name for room in ROOMS for name in modules(room)]
    assert len(names) > 100
    assert without(ABSENT, names) == {}


def test_a_package_that_is_hidden_is_missed_by_what_needs_it() -> None:
    found = without(ABSENT, ["align.errors", "ray", "align.actors.places"])
    assert sorted(found) == ["align.actors.places", "ray"]
    assert found["ray"] == "ModuleNotFoundError: No module named 'ray'"
