"""What `align doctor` says about versions, and how it ends."""

from __future__ import annotations

import argparse
from importlib import metadata
from typing import Any

import pytest

from align.cli import doctor

REQUIREMENTS = ["torch==2.13.0", "datasets<6,>=5", 'trl==1.16.0; extra == "dev"', 'vllm==0.32.0; extra == "gpu"']


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, for the test to change."""
    versions = {"torch": "2.13.0+cpu", "datasets": "5.2.0", "trl": "1.16.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "requires", lambda name: REQUIREMENTS)
    monkeypatch.setattr(metadata, "version", version)
    return versions


def packages() -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in doctor._packages()}


def test_a_local_label_fits_the_pin_and_an_extra_that_was_not_chosen_is_no_finding(environment: Any) -> None:
    found = packages()
    assert set(found) == {"torch", "trl", "other packages"}
    assert not any(finding.remedy for finding in found.values())


def test_a_version_other_than_the_pin_names_the_command_that_installs_it(environment: dict[str, str]) -> None:
    environment["torch"] = "2.12.1"
    assert packages()["torch"] == doctor.Finding("torch", "2.12.1", "pip install 'torch==2.13.0'")


def test_a_missing_package_and_one_out_of_range_are_things_to_do(environment: dict[str, str]) -> None:
    environment["datasets"] = "6.0.0"
    del environment["torch"]
    found = packages()
    assert found["datasets"].found == "6.0.0"
    assert found["datasets"].remedy == "pip install 'datasets<6,>=5'"
    assert found["torch"].found == "not installed"


def test_a_child_that_fails_gives_the_last_line_of_its_error() -> None:
    assert doctor.in_child("print('one'); print('two')") == (True, "two")
    assert doctor.in_child("import no_such_package") == (
        False,
        "ModuleNotFoundError: No module named 'no_such_package'",
    )


@pytest.mark.parametrize(("remedy", "code", "last"), [(None, 0, "all right"), ("do this", 2, "1 thing to do")])
def test_the_exit_code_says_whether_something_is_to_be_done(
    remedy: str | None, code: int, last: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("thing", "as found", remedy)])
    assert doctor.run(argparse.Namespace(fix=False)) == code
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == last
    assert printed[0].split() == (["ok"] if remedy is None else ["TO", "DO"]) + ["thing", "as", "found"]
    assert (remedy is not None) == any("-> do this" in line for line in printed)


def test_fix_repairs_before_it_examines_and_fails_where_it_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(doctor.torch_cpu, "repair", lambda folder: calls.append("repair") or ["mended"])
    monkeypatch.setattr(doctor, "examine", lambda: calls.append("examine") or [])
    monkeypatch.setattr(doctor, "_show", lambda findings: None)
    assert doctor.run(argparse.Namespace(fix=True)) == 0
    assert calls == ["repair", "examine"]
    assert "mended" in capsys.readouterr().out

    def fail(folder: Any) -> list[str]:
        raise PermissionError("read-only")

    monkeypatch.setattr(doctor.torch_cpu, "repair", fail)
    assert doctor.run(argparse.Namespace(fix=True)) == 1
    assert "error: read-only" in capsys.readouterr().err
