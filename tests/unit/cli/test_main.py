"""The command: verbs, exit codes, overrides anywhere, and one message for whatever goes wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from align.cli import check
from align.cli.main import NO_VERBS, _parse, main
from align.errors import EngineError, Interrupted


def raising(error: BaseException) -> Callable[[Any], int]:
    def verb(arguments: Any) -> int:
        raise error

    return verb


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (
            EngineError("it broke", where="engine 0", remedy="look there"),
            1,
            "error: engine 0: it broke\n  -> look there",
        ),
        (Interrupted("stopped"), 130, "error: stopped"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (ZeroDivisionError("by zero"), 1, "error: ZeroDivisionError: by zero"),
    ],
)
def test_every_failure_is_one_message_and_an_exit_code(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ALIGN_DEBUG", raising=False)
    monkeypatch.setattr(check, "run", raising(error))
    assert main(["check", "x.yaml"]) == code
    err = capsys.readouterr().err
    assert err.startswith(says) and "Traceback" not in err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "run", raising(ZeroDivisionError("by zero")))
    assert main(["check", "x.yaml", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("ALIGN_DEBUG", "1")
    assert main(["check", "x.yaml"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_overrides_may_stand_before_and_after_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(check, "run", lambda arguments: seen.append(arguments) or 0)
    assert main(["check", "x.yaml", "a=1", "--data", "b=2", "c.d=[1, 2]"]) == 0
    assert seen[0].overrides == ["a=1", "b=2", "c.d=[1, 2]"] and seen[0].data is True


@pytest.mark.parametrize(
    "words", [["run"], ["check", "x.yaml", "--nothing"], ["check", "x.yaml", "--data", "word"], ["fly"], []]
)
def test_wrong_words_are_answered_with_usage_and_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "usage: align" in err and "Traceback" not in err


def test_help_and_version_are_no_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and main(["run", "--help"]) == 0 and main(["--version"]) == 0
    out = capsys.readouterr().out
    for verb in ("run", "check", "doctor", "merge", "--resume", "--from-stage", "--address"):
        assert verb in out


def test_python_m_align_is_the_command(tmp_path: Path) -> None:
    """Where the folder of scripts is not on the path, whatever lies in the working directory."""
    (tmp_path / "rewards.py").write_text("raise SystemExit('the wrong file')\n")
    command = [sys.executable, "-m", "align", "check", "nowhere.yaml"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2 and "nowhere.yaml: no such recipe" in done.stderr


def test_every_module_of_the_command_is_a_verb_that_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    folder = Path(check.__file__).parent
    for file in folder.glob("*.py"):
        verb = import_module(f"align.cli.{file.stem}")
        if file.stem in NO_VERBS:
            assert not hasattr(verb, "add")
            continue
        said = (verb.__doc__ or "").partition("\n")[0]
        assert said.startswith(f"`align {file.stem}`: ") and callable(verb.run)
        assert f"{file.stem} {said.partition(': ')[2].partition('. ')[0].removesuffix('.')}" in told
        assert main([file.stem, "--help"]) == 0
        assert "--debug" in capsys.readouterr().out


def test_debug_may_stand_before_and_after_a_verb_of_a_verb() -> None:
    for words in (["rewards", "--debug", "list"], ["rewards", "list", "--debug"]):
        assert _parse(words).debug is True
    assert _parse(["rewards", "list"]).debug is False


def test_verbs_are_imported_when_they_are_called() -> None:
    code = (
        "import sys; import align.cli.main; heavy = ('torch', 'ray', 'pydantic', 'yaml', 'align.cli.run'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_merge_writes_a_folder_that_is_proved_and_says_what_was_measured(
    tmp_path: Path, tiny_model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from align.model.adapters import attach, save
    from align.model.load import load_model
    from align.recipe.adapter import Adapter

    base, adapter, out = tiny_model_folder(), tmp_path / "adapter", tmp_path / "merged"
    peft = attach(load_model(base, dtype=torch.float32), Adapter(rank=4), None, seed=1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(2))
    save(peft, adapter)
    words = ["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(out)]
    assert main(words) == 0
    assert "merged 14 modules" in capsys.readouterr().out and (out / "model.safetensors").is_file()
    assert main(words) == 2
    assert str(out) in capsys.readouterr().err


def test_merge_of_a_folder_that_is_no_adapter_is_the_users_mistake(
    tmp_path: Path, tiny_model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = str(tiny_model_folder()), str(tmp_path / "out")
    assert main(["merge", "--base", base, "--adapter", base, "--out", out]) == 2
    assert "adapter_config.json" in capsys.readouterr().err
    assert main(["merge", "--base", str(tmp_path / "no"), "--adapter", base, "--out", out]) == 2
    assert "no such folder" in capsys.readouterr().err and not Path(out).exists()
