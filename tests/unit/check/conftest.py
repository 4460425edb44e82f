from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.errors import PluginError
from tests.unit.check.workshop import Workshop, open_workshop


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A sound recipe with its data, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return open_workshop(tmp_path)


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's work in this process, which has torch already."""
    from align.model import measure

    def answered(module: str, arguments: list[str], *, name: str, limit_s: float) -> dict[str, Any]:
        assert module == "align.model.measure"
        answer = measure.main(*arguments)
        if "error" in answer:
            raise PluginError(**answer["error"])
        return answer

    monkeypatch.setattr("align.check.trained.describe_in_child", answered)
