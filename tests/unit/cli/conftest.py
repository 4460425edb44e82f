from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.check.workshop import Workshop, open_workshop


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A sound recipe with its data, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return open_workshop(tmp_path)
