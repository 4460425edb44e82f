"""Fixtures of every test: data, a Ray cluster, small models on disk; and the check that nothing stays behind."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from align.packages import quick_imports
from tests.ray_local import local_ray

# Before any library reads them: tests use no network, one thread each, and report nothing to anybody.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}.items():
    os.environ.setdefault(_name, _value)

CHECKOUT = Path(__file__).resolve().parents[1]
LAST_CHILD_S = 15.0


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collecting imports torch, transformers and TRL: see `quick_imports`."""
    with quick_imports():
        return (yield)


ENDS_WITH_PARENT = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Children that Python itself keeps until its end."""


@pytest.fixture(scope="session", autouse=True)
def no_child_left() -> Iterator[None]:
    """Every process that a test started has ended when the last test of this session has."""
    yield
    deadline = time.monotonic() + LAST_CHILD_S
    while (left := _children()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, f"processes left behind by tests: {left}"


def _children() -> list[str]:
    left = []
    for child in psutil.Process().children(recursive=True):
        try:
            command = " ".join(child.cmdline())
            if child.status() != psutil.STATUS_ZOMBIE and not any(name in command for name in ENDS_WITH_PARENT):
                left.append(f"{child.pid}: {command[:200]}")
        except psutil.NoSuchProcess:
            continue
    return left


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: ALIGN_SHARED_DATA, or shared/data beside the checkout. CI must have it."""
    folder = Path(os.environ.get("ALIGN_SHARED_DATA", CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        reason = f"no real data at {folder}; set ALIGN_SHARED_DATA"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """A Ray cluster of two CPUs in this process, for the tests of one file; yields the `ray` module. Not for tests that
    call `align run`, which starts its own, and are sure that nothing is left below this process."""
    import ray

    with local_ray():
        yield ray


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that `align.data.scratch` trained on a few lines of arithmetic (read only)."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function of (**changes to the config, seed) that writes a tiny Qwen3 with our tokenizer, each variant once."""
    written: dict[str, Path] = {}

    def write(*, seed: int = 0, **changes: Any) -> Path:
        key = json.dumps([seed, changes], sort_keys=True)
        if key not in written:
            written[key] = write_tiny_model(tmp_path_factory.mktemp("model"), seed=seed, **changes)
        return written[key]

    return write


def write_tokenizer(folder: Path) -> Path:
    from align.data.scratch import train_tokenizer
    from align.recipe.inputs import TokenizerFromScratch

    text = folder / "text.jsonl"
    rows = [{"messages": _turns(a, b)} for a in range(12) for b in range(12)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"train_on": str(text), "vocab_size": 300}
    train_tokenizer(TokenizerFromScratch.model_validate(spec), folder)
    text.unlink()
    return folder


def _turns(a: int, b: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {a}+{b}?"}, {"role": "assistant", "content": f"{a}+{b} = {a + b}."}]


def write_tiny_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Head size 32: the smallest that vLLM's CPU attention takes."""
    from align.model.scratch import write_base
    from align.recipe.inputs import Model

    write_tokenizer(folder)
    config = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        **changes,
    }
    spec = {"config": config, "tokenizer": {"train_on": "unused", "vocab_size": 300}, "dtype": "float32"}
    write_base(Model.model_validate(spec), folder, seed)
    return folder
