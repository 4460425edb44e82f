"""`align submit` over Ray's own client, against the routes of its job server; jobs are told, not run."""

from __future__ import annotations

import asyncio
import io
import threading
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from ray.dashboard.modules.job.common import JobInfo
from ray.job_submission import JobStatus

from align.cli.main import main
from tests.job_server import application

JOB = "raysubmit_1"


class Told:
    """A cluster whose one job ends as told; what was asked of it is kept."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.packages: dict[str, bytes] = {}
        self.ends, self.exit_code, self.message = JobStatus.SUCCEEDED, 0, "ended"
        self.polls = 0

    async def submit_job(self, **asked: Any) -> str:
        self.asked = asked
        return JOB

    async def get_job_info(self, job: str) -> JobInfo:
        self.polls += 1
        status = self.ends if self.polls > 1 else JobStatus.RUNNING
        return JobInfo(
            status=status, entrypoint=self.asked["entrypoint"], message=self.message, driver_exit_code=self.exit_code
        )

    async def tail_job_logs(self, job: str) -> AsyncIterator[list[str]]:
        yield ["step 1\n"]
        yield ["step 2\n"]

    def has(self, uri: str) -> bool:
        return uri in self.packages

    def put(self, uri: str, data: bytes) -> None:
        self.packages[uri] = data


@pytest.fixture
def server() -> Iterator[tuple[str, Told]]:
    told, loop = Told(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner = web.AppRunner(application(told, told))

    async def serve() -> str:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    try:
        yield asyncio.run_coroutine_threadsafe(serve(), loop).result(10), told
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text("# mine")
    (tmp_path / "a.jsonl").write_text("{}")
    path = tmp_path / "sums.yaml"
    path.write_text(
        "name: sums\nmodel: {path: org/model}\n"
        "stages: [{id: grpo, kind: online, data: a.jsonl, rewards: [{use: rewards.py:mine}]}]\n"
    )
    return str(path)


def submit(recipe: str, address: str, *words: str) -> int:
    return main(["submit", recipe, "--address", address, "output=/shared/runs", *words])


def test_the_recipe_and_its_plugins_are_sent_and_the_log_is_followed_to_the_end(
    recipe: str, server: tuple[str, Told], capsys: pytest.CaptureFixture[str]
) -> None:
    address, told = server
    assert submit(recipe, address, "--resume") == 0
    assert told.asked["entrypoint"] == "python -m align.cli.main run recipe.yaml --address auto --resume"
    [(uri, package)] = told.packages.items()
    assert told.asked["runtime_env"]["working_dir"] == uri
    with zipfile.ZipFile(io.BytesIO(package)) as sent:
        assert {"recipe.yaml", "rewards.py", "a.jsonl"} <= set(sent.namelist())
        assert b"output: /shared/runs" in sent.read("recipe.yaml")
    shown = capsys.readouterr().out
    assert JOB in shown and "/shared/runs/sums" in shown and shown.endswith("step 1\nstep 2\n")


@pytest.mark.parametrize(
    ("ends", "exit_code", "code", "said"),
    [
        (JobStatus.FAILED, 2, 2, ""),
        (JobStatus.FAILED, None, 1, "job raysubmit_1 failed: no room"),
        (JobStatus.STOPPED, None, 130, ""),
    ],
)
def test_it_exits_as_the_run_does(
    recipe: str,
    server: tuple[str, Told],
    capsys: pytest.CaptureFixture[str],
    ends: JobStatus,
    exit_code: int | None,
    code: int,
    said: str,
) -> None:
    address, told = server
    told.ends, told.exit_code, told.message = ends, exit_code, "no room"
    assert submit(recipe, address) == code
    assert said in capsys.readouterr().err


def test_detached_it_leaves_after_the_jobs_id(
    recipe: str, server: tuple[str, Told], capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(recipe, server[0], "--detach") == 0
    shown = capsys.readouterr().out
    assert f"ray job logs --address {server[0]} {JOB}" in shown and "step 1" not in shown


def test_where_no_job_server_is_and_what_it_needs_is_said(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(recipe, "http://127.0.0.1:1") == 2
    assert "ray[default]" in capsys.readouterr().err
    assert submit(recipe, "127.0.0.1:6379") == 2
    assert "http://HEAD:8265" in capsys.readouterr().err


def test_a_folder_beside_the_recipe_is_no_place_for_the_runs_of_a_job(
    recipe: str, server: tuple[str, Told], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", recipe, "--address", server[0]]) == 2
    assert "output=/a/shared/path" in capsys.readouterr().err
