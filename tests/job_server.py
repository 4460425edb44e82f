"""The HTTP side of Ray's job server, for an installation that has not `ray[default]`: `python -m tests.job_server
CLUSTER PORT`. Ray's own JobManager and package store do the work; only the routes between them and Ray's own client are
written out here, as in ray/dashboard/modules/job/job_head.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import sys
from typing import Any

import ray
from aiohttp import web

routes = web.RouteTableDef()


@routes.get("/api/version")
async def version(request: web.Request) -> web.Response:
    return web.json_response(
        {"version": "4", "ray_version": ray.__version__, "ray_commit": ray.__commit__, "session_name": ""}
    )


def _uri(request: web.Request) -> str:
    return f"{request.match_info['protocol']}://{request.match_info['name']}"


@routes.get("/api/packages/{protocol}/{name}")
async def has_package(request: web.Request) -> web.Response:
    from ray._private.runtime_env.packaging import package_exists

    return web.Response(status=200 if package_exists(_uri(request)) else 404)


@routes.put("/api/packages/{protocol}/{name}")
async def put_package(request: web.Request) -> web.Response:
    from ray._private.runtime_env.packaging import upload_package_to_gcs

    await asyncio.to_thread(upload_package_to_gcs, _uri(request), await request.read())
    return web.Response()


@routes.post("/api/jobs/")
async def submit(request: web.Request) -> web.Response:
    asked = await request.json()
    known = ("entrypoint", "submission_id", "runtime_env", "metadata")
    job = await request.app["manager"].submit_job(**{name: asked[name] for name in known if name in asked})
    return web.json_response({"job_id": job, "submission_id": job})


@routes.get("/api/jobs/{job}")
async def info(request: web.Request) -> web.Response:
    found: Any = await request.app["manager"].get_job_info(request.match_info["job"])
    if found is None:
        return web.Response(status=404)
    fields = dataclasses.asdict(found) | {"type": "SUBMISSION", "submission_id": request.match_info["job"]}
    return web.json_response(fields, dumps=lambda value: json.dumps(value, default=str))


@routes.get("/api/jobs/{job}/logs/tail")
async def tail(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for lines in request.app["manager"].tail_job_logs(request.match_info["job"]):
        await socket.send_str("".join(lines))
    return socket


async def _serve(address: str, port: int) -> None:
    from ray._raylet import GcsClient
    from ray.dashboard.modules.job.job_manager import JobManager

    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, namespace="jobs")
    logs = os.path.join(ray._private.worker._global_node.get_session_dir_path(), "logs")
    app = web.Application(client_max_size=1 << 28)
    app["manager"] = JobManager(GcsClient(address=address), logs)
    app.add_routes(routes)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print("serving", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
