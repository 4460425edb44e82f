"""What the import rules promise beyond what import-linter reads: proved by importing in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "transformers", "ray", "vllm")

LIGHT = {
    "recipe": ["align/recipe"],
    "data": ["align/data"],
    "losses": ["align/losses"],
    "objectives": ["align/objectives"],
    "rewards": ["rewards"],
    "engine protocol": ["rollout/base.py", "rollout/vllm_facts.py", "align/model/generate/facts.py"],
    "export formats": ["align/export/formats/__init__.py"],
    "foundations": [f"align/{name}.py" for name in ("describe", "engines", "errors", "plugins", "hub", "torch_cpu")]
    + ["align/protocols"],
    "simulate": ["align/simulate", "align/cli/simulate.py"],
    "check": ["align/check"],
    "command": [f"align/cli/{name}.py" for name in ("main", "arguments", "check", "doctor")],
}
NOT_LIGHT = {"align.data.packing"}


def is_helper_of_losses(file: Path) -> bool:
    """A loss module says what it `needs` before torch is there; what it loads to compute may import torch."""
    return file.parent.name == "losses" and file.stem != "__init__" and "def needs(" not in file.read_text()


IMPORT_ALL = """
import importlib, json, sys
names, heavy = json.loads(sys.argv[1]), json.loads(sys.argv[2])
brought = {}
for name in names:
    importlib.import_module(name)
    for package in heavy:
        if package in sys.modules and package not in brought:
            brought[package] = name
print(json.dumps(brought))
"""


def modules(entries: list[str]) -> list[str]:
    """Dotted names of the files and of everything below the folders; a missing entry is an error."""
    found: list[str] = []
    for entry in entries:
        path = ROOT / entry
        assert path.exists(), f"{entry} is gone: the promise that it imports no torch must move with it"
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            if is_helper_of_losses(file):
                continue
            parts = file.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in found if name not in NOT_LIGHT and not name.endswith("__main__")]


def brought_by(names: list[str], packages: tuple[str, ...]) -> dict[str, str]:
    """Import `names` in order in a fresh interpreter; which of `packages` came in, and by which of the modules."""
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(names), json.dumps(packages)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("room", LIGHT)
def test_importing_every_module_of_a_light_room_brings_no_torch_transformers_ray_or_vllm(room: str) -> None:
    names = modules(LIGHT[room])
    assert names
    assert brought_by(names, HEAVY) == {}


def test_the_probe_sees_torch_where_it_is_imported() -> None:
    assert brought_by(["align.errors", "align.types"], HEAVY) == {"torch": "align.types"}


def test_reward_plugins_and_their_workers_import_nothing_of_align() -> None:
    assert brought_by(modules(["rewards"]), ("align", "rollout")) == {}


def test_the_engine_interface_imports_only_protocols_errors_and_facts_of_align() -> None:
    rooms = tuple(f"align.{path.stem}" for path in sorted((ROOT / "align").iterdir()) if path.stem != "__pycache__")
    allowed = ("align.__init__", "align.protocols", "align.errors", "align.engines")
    others = tuple(room for room in rooms if room not in allowed)
    assert brought_by(["rollout.base"], (*others, "rewards")) == {}


def test_every_folder_of_modules_is_a_package_that_an_installation_includes() -> None:
    for room in ("align", "rewards", "rollout"):
        folders = {file.parent for file in (ROOT / room).rglob("*.py")}
        assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


COMPILED_LATE = """
import json, sys
import align.train.trainer, peft, torch
from align.model.bitsandbytes_import import _compile_at_first_call
loaded = [name for name in ("bitsandbytes", "torch._inductor.compile_fx") if name in sys.modules]
calls = []
twice = _compile_at_first_call(lambda f, **options: calls.append(options) or f, dynamic=False)(lambda x: 2 * x)
print(json.dumps([loaded, torch.compile.__module__, len(calls), twice(3), twice(x=4), calls]))
"""


@pytest.mark.slow
def test_a_trainer_has_bitsandbytes_without_loading_torchs_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED_LATE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [["bitsandbytes"], "torch", 0, 6, 8, [{"dynamic": False}]]
