"""The HTTP side of Ray's job server, for an installation that has not `ray[default]`: the routes of
ray/dashboard/modules/job/job_head.py that `align submit` asks for, and no more.

`python -m tests.job_server CLUSTER PORT` serves a cluster: Ray's own JobManager and package store do the work.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any, Protocol

import ray
from aiohttp import web

routes = web.RouteTableDef()


class Packages(Protocol):
    def has(self, uri: str) -> bool: ...

    def put(self, uri: str, data: bytes) -> None: ...


class ClusterPackages:
    """The store of a cluster, in the memory of its head."""

    def has(self, uri: str) -> bool:
        from ray._private.runtime_env.packaging import package_exists

        return bool(package_exists(uri))

    def put(self, uri: str, data: bytes) -> None:
        from ray._private.runtime_env.packaging import upload_package_to_gcs

        upload_package_to_gcs(uri, data)


MANAGER = web.AppKey("manager", object)
PACKAGES = web.AppKey("packages", object)


def application(manager: Any, packages: Packages) -> web.Application:
    """manager: Ray's JobManager, or what answers to submit_job, get_job_info and tail_job_logs."""
    app = web.Application(client_max_size=1 << 28)
    app[MANAGER], app[PACKAGES] = manager, packages
    app.add_routes(routes)
    return app


def _uri(request: web.Request) -> str:
    return f"{request.match_info['protocol']}://{request.match_info['name']}"


@routes.get("/api/version")
async def version(request: web.Request) -> web.Response:
    return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})


@routes.get("/api/packages/{protocol}/{name}")
async def has_package(request: web.Request) -> web.Response:
    return web.Response(status=200 if request.app[PACKAGES].has(_uri(request)) else 404)


@routes.put("/api/packages/{protocol}/{name}")
async def put_package(request: web.Request) -> web.Response:
    await asyncio.to_thread(request.app[PACKAGES].put, _uri(request), await request.read())
    return web.Response()


@routes.post("/api/jobs/")
async def submit(request: web.Request) -> web.Response:
    asked = await request.json()
    known = ("entrypoint", "submission_id", "runtime_env", "metadata")
    job = await request.app[MANAGER].submit_job(**{name: asked[name] for name in known if name in asked})
    return web.json_response({"job_id": job, "submission_id": job})


@routes.get("/api/jobs/{job}")
async def info(request: web.Request) -> web.Response:
    job = request.match_info["job"]
    found = await request.app[MANAGER].get_job_info(job)
    fields = dataclasses.asdict(found) | {"type": "SUBMISSION", "submission_id": job}
    return web.json_response(fields, dumps=lambda value: json.dumps(value, default=str))


@routes.get("/api/jobs/{job}/logs/tail")
async def tail(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for lines in request.app[MANAGER].tail_job_logs(request.match_info["job"]):
        await socket.send_str("".join(lines))
    return socket


async def _serve(address: str, port: int) -> None:
    from ray._raylet import GcsClient
    from ray.dashboard.modules.job.job_manager import JobManager

    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, namespace="jobs")
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    runner = web.AppRunner(application(JobManager(GcsClient(address=address), str(logs)), ClusterPackages()))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print("serving", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
