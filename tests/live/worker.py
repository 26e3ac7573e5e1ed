"""A real worker without a LiveKit server: `python -m tests.live.worker OPTIONS`.

Three jobs of six turns each: one is refused at its first dial, one interrupts a turn, and one is
killed. Each writes what its `stats()` say into the folder, the worker the page, and the log is on
stderr. A line on stdout says that all jobs have ended; the worker goes on until stdin closes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

import xai_pool_patch

xai_pool_patch.install()

from livekit import api  # noqa: E402 - as in a worker's own module
from livekit.agents import AgentServer, JobContext, JobExecutorType  # noqa: E402
from livekit.agents.job import JobAcceptArguments, RunningJobInfo  # noqa: E402
from livekit.plugins import xai  # noqa: E402
from livekit.protocol import agent  # noqa: E402

from benchmarks.servers import Address, address_of, client_session  # noqa: E402
from tests.kit import API_KEY, quick, speak  # noqa: E402
from xai_pool_patch.testing import FakeServer  # noqa: E402

JOBS = ("refused", "interrupted", "killed")
TURNS = 6


async def entrypoint(job: JobContext) -> None:
    told = json.loads(job._info.accept_arguments.metadata)
    address: Address = pickle.loads(base64.b64decode(told["address"]))
    async with client_session(address) as http:
        tts = xai.TTS(api_key=API_KEY, http_session=http)
        tts.prewarm()
        await asyncio.sleep(told["pause"])
        turns = TURNS
        if told["kind"] == "interrupted":
            turns -= 1
            async with tts.stream() as stream:
                stream.push_text("This is a long sentence that is cut off.")
                stream.end_input()
                await stream.__anext__()
        for number in range(turns):
            await speak(tts, f"Turn {number}.")
            await asyncio.sleep(told["pause"])
        killed = told["kind"] == "killed"
        if not killed:
            await tts.aclose()
        folder = Path(told["folder"], f"{told['kind']}.json")
        folder.write_text(json.dumps(xai_pool_patch.stats()))
        if killed and told["executor"] == "process":
            os.kill(os.getpid(), signal.SIGKILL)
    job.shutdown()


def job_info(metadata: dict[str, Any]) -> RunningJobInfo:
    return RunningJobInfo(
        accept_arguments=JobAcceptArguments("agent", "agent", json.dumps(metadata)),
        job=agent.Job(id=metadata["kind"], room=api.Room(name="room")),
        url="ws://127.0.0.1",
        token="",
        worker_id="worker",
        fake_job=True,
    )


async def main(arguments: argparse.Namespace) -> None:
    server = AgentServer(
        host="127.0.0.1",
        port=0,
        prometheus_port=arguments.port,
        prometheus_multiproc_dir=arguments.directory or None,
        job_executor_type=JobExecutorType(arguments.executor),
        num_idle_processes=arguments.idle,
    )
    server.rtc_session(entrypoint)
    running = asyncio.create_task(server.run(unregistered=True))
    started = asyncio.Event()
    server.on("worker_started", lambda *_: started.set())
    await asyncio.wait(
        {running, asyncio.ensure_future(started.wait())}, return_when="FIRST_COMPLETED"
    )
    async with FakeServer(behaviour=quick(pace=20.0, speech_per_character=0.02)) as service:
        address = base64.b64encode(pickle.dumps(address_of(service))).decode()
        await asyncio.sleep(arguments.pause)
        for kind in JOBS:
            if kind == "refused":
                service.behaviour.refuse_next = [429]
            told = {
                "kind": kind,
                "address": address,
                "folder": arguments.folder,
                "executor": arguments.executor,
                "pause": arguments.pause,
            }
            await server._proc_pool.launch_job(job_info(told))
            while not Path(arguments.folder, f"{kind}.json").exists():
                await asyncio.sleep(0.05)
        await asyncio.sleep(1.0 + arguments.pause)
        url = f"http://127.0.0.1:{arguments.port}/metrics"
        async with aiohttp.ClientSession() as http:
            began = time.monotonic()
            async with http.get(url) as response:
                page = await response.text()
        Path(arguments.folder, "page.txt").write_text(page)
        print(f"{time.monotonic() - began:.3f}", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.aclose()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--executor", default="process")
    parser.add_argument("--directory", default="")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--idle", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.05)
    return parser.parse_args()


if __name__ == "__main__":
    import logging

    # As LiveKit's command line does it: after install().
    logging.basicConfig(
        level=logging.INFO, format="%(process)d %(levelname)s %(name)s %(filename)s %(message)s"
    )
    asyncio.run(main(parsed()))
