from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align.errors import ExportError, ModelError, Unsupported, UserError
from align.export import load_probe
from align.export.export import export
from align.export.load_proof import compare, run_child
from align.model import adapters
from align.model.load import load_model
from tests.unit.model.tiny import LLAMA, QWEN3, logits, lora, write_tiny

exporting = importlib.import_module("align.export.load_proof")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "qwen3", QWEN3)


def in_this_process(loader, folder, request, time_limit_s):
    """The child's work without the child: the tests of children are few, as each imports transformers."""
    return load_probe.probe(loader, folder, request), 0.0


@pytest.mark.slow
def test_an_exported_folder_is_proved_by_children_that_load_it(folder, tmp_path):
    report = export(folder, tmp_path / "out", engines=("transformers",))
    assert [(check.loader, check.status) for check in report.checks] == [
        ("transformers", "proved"),
        ("transformers", "proved"),
    ]
    plain, engine = report.checks
    assert plain.max_difference == 0 and engine.max_difference < 1e-4
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(load_model(folder, dtype=torch.float32))
    )
    written = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert written["checks"][1]["status"] == "proved" and written["dtype"] == "float32"
    assert set(report.files) == {p.name for p in folder.iterdir()} | {"model.safetensors"}


def test_a_cast_export_is_compared_at_its_dtype_s_bound(tmp_path, monkeypatch):
    folder = write_tiny(tmp_path / "base", LLAMA)
    monkeypatch.setattr(exporting, "run_child", in_this_process)
    report = export(folder, tmp_path / "out", dtype="bfloat16", engines=("transformers",))
    assert all(check.status == "proved" and 0 < check.mean_difference < check.bound for check in report.checks)
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_an_engine_that_is_not_installed_is_said_to_be_unchecked(folder, tmp_path, monkeypatch):
    def answer(loader, folder, request, time_limit_s):
        if loader == "vllm":
            return {"status": "unavailable", "message": "vLLM is not installed"}, 0.1
        return in_this_process(loader, folder, request, time_limit_s)

    monkeypatch.setattr(exporting, "run_child", answer)
    report = export(folder, tmp_path / "out")
    assert [(c.loader, c.status, c.message) for c in report.checks][1] == (
        "vllm",
        "not checked",
        "vLLM is not installed",
    )
    assert report.checks[1].mean_difference is None


@pytest.mark.parametrize("fault", ["fails", "differs", "differs in plain transformers"])
def test_an_export_that_a_loader_refuses_or_computes_otherwise_leaves_nothing(folder, tmp_path, monkeypatch, fault):
    def answer(loader, where, request, time_limit_s):
        result, seconds = in_this_process("plain", where, request, time_limit_s)
        exported = where != folder
        if loader == "vllm" and fault == "fails":
            result = {"status": "failed", "message": "unknown architecture"}
        if (loader == "vllm" and fault == "differs") or (exported and fault == "differs in plain transformers"):
            result["logps"][2][7] += 0.01
        return result, seconds

    monkeypatch.setattr(exporting, "run_child", answer)
    with pytest.raises(ExportError, match="unknown architecture" if fault == "fails" else "other log-probabilities"):
        export(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_log_probabilities_that_are_not_numbers_are_no_proof():
    found = [np.array([np.nan, -1.0], dtype=np.float32)]
    with pytest.raises(ExportError):
        compare("vllm", found, [np.array([-1.0, -1.0], dtype=np.float32)], torch.bfloat16, 0.0)


def test_a_child_that_hangs_or_dies_is_an_error_with_its_last_words(folder, monkeypatch):
    request = {"tokens": [[1, 2, 3]], "dtype": "float32", "threads": 1, "trust_remote_code": False}
    real = exporting._run
    hang = [sys.executable, "-u", "-c", "import time; print('waiting for a lock'); time.sleep(60)"]
    monkeypatch.setattr(exporting, "_run", lambda command, stream, limit: real(hang, stream, limit))
    started = time.perf_counter()
    with pytest.raises(ExportError, match=r"within 2 s.*waiting for a lock"):
        run_child("plain", folder, request, 2.0)
    assert time.perf_counter() - started < 20
    die = [sys.executable, "-c", "raise SystemExit('out of memory')"]
    monkeypatch.setattr(exporting, "_run", lambda command, stream, limit: real(die, stream, limit))
    with pytest.raises(ExportError, match=r"died \(exit code 1\).*out of memory"):
        run_child("plain", folder, request, 60.0)


def test_what_is_no_whole_model_or_no_known_format_is_refused(folder, tmp_path):
    with pytest.raises(Unsupported, match="gguf"):
        export(folder, tmp_path / "out", format="gguf")
    peft = adapters.attach(load_model(folder, dtype=torch.float32), lora(), None, seed=0)
    adapters.save(peft, tmp_path / "adapter")
    with pytest.raises(ModelError, match="adapter"):
        export(tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(UserError, match="already exists"):
        export(folder, tmp_path / "adapter")


def test_the_probe_names_what_failed(folder, tmp_path):
    request = {"tokens": [[1, 2, 3]], "dtype": "float32", "threads": 1, "trust_remote_code": False}
    assert load_probe.probe("plain", tmp_path, request)["status"] == "failed"
    answer = load_probe.probe("plain", folder, request)
    assert answer["status"] == "loaded" and len(answer["logps"][0]) == 2


@pytest.mark.parametrize(
    ("off", "words"),
    [
        ({5: 1.6e-3}, None),  # one token in an ill-conditioned context
        ({5: 0.01}, "largest difference 1.00e-02"),  # one token that is read otherwise
        (dict.fromkeys(range(200), 1.5e-4), "mean difference 1.50e-04"),
    ],
)
def test_in_float32_mean_and_largest_difference_have_bounds_of_their_own(
    off: dict[int, float], words: str | None
) -> None:
    wanted = np.full(200, -9.0, dtype=np.float64)
    found = wanted.copy()
    for n, by in off.items():
        found[n] += by
    if words is None:
        assert compare("vllm", [found], [wanted], torch.float32, 0.0).status == "proved"
        return
    with pytest.raises(ExportError, match=words):
        compare("vllm", [found], [wanted], torch.float32, 0.0)
