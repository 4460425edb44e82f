"""A run as a job of a Ray cluster (Ray Jobs): submitted over HTTP, followed from here, and it goes on without us."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from align.errors import AlignError, SetupError

_POLL_S = 1.0
_CHATTER = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")  # each sets a level of its own
_STOPPED = 130  # as after Ctrl-C


class Jobs:
    """The job server of a cluster. address: `http://head:8265`. Raises SetupError where none answers there."""

    def __init__(self, address: str):
        if not address.startswith(("http://", "https://")):
            raise SetupError(
                f"{address!r} is no address of a job server",
                where="--address",
                remedy="give http://HEAD:8265, as `ray start --head` prints it; on a machine of the cluster, "
                "`align run --address HOST:PORT` needs no job server",
            )
        for name in _CHATTER:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            self._client = JobSubmissionClient(address)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise SetupError(
                f"no job server answers at {address}: {str(error).splitlines()[0]}",
                where="--address",
                remedy="it is part of `pip install 'ray[default]'` on the head, started by `ray start --head "
                "--dashboard-host 0.0.0.0`; without one, `align run --address HOST:PORT` on a machine of the cluster",
            ) from error

    def submit(self, entrypoint: str, package: Path, metadata: Mapping[str, str]) -> str:
        """Start `entrypoint` in a copy of `package`, which every worker of the job gets too; the job's id."""
        try:
            return str(
                self._client.submit_job(
                    entrypoint=entrypoint, runtime_env={"working_dir": str(package)}, metadata=dict(metadata)
                )
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise AlignError(
                f"the job was not accepted: {str(error).splitlines()[0]}",
                remedy="the same command with --debug shows what the server said",
            ) from error

    def follow(self, job: str, show: Callable[[str], None]) -> int:
        """Show what the job prints until it ends; its exit code."""
        asyncio.run(self._tail(job, show))
        while not (status := JobStatus(self._client.get_job_status(job))).is_terminal():
            time.sleep(_POLL_S)
        info: Any = self._client.get_job_info(job)
        if status == JobStatus.SUCCEEDED:
            return 0
        if status == JobStatus.STOPPED:
            return _STOPPED
        if info.driver_exit_code is None:  # it did not come so far
            raise AlignError(
                f"job {job} failed: {(info.message or 'no message').splitlines()[0]}",
                remedy=f"`ray job logs {job}` has what it printed",
            )
        return int(info.driver_exit_code)

    async def _tail(self, job: str, show: Callable[[str], None]) -> None:
        try:
            async for lines in self._client.tail_job_logs(job):
                show(lines)
        except RuntimeError as error:  # the job goes on
            show(f"the log is no longer followed: {error}\n")
