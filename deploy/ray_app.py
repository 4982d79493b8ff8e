"""Several replicas behind one address, by Ray Serve: each replica is one `rorqual serve` with GPUs of its own.

    pip install 'rorqual[serve]' 'ray[serve]'
    serve run deploy.ray_app:build model=deepseek-v3 replicas=2 gpus=8 options="--max-requests 8"

Ray starts the replicas where GPUs are free, looks after their health, starts those anew that fail and shares requests
out. Requests with the same `x-session-id` header go to the same replica (Ray's ring of hashes), which has their
conversation in its prefix cache; without the header they go where the load is lowest.
"""

import contextlib
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve.config import RequestRouterConfig

STICKY = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "host", "content-length"}
"""Headers that are one connection's own."""
DRAIN = 60.0

app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


async def _pieces(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.content.iter_any():
            yield piece
    except aiohttp.ClientError:
        return  # the replica went in the middle of an answer: what came stands
    finally:
        answer.close()


# Ray sends the class to its workers with what it knows here: what it uses must stand above it.
@serve.deployment
@serve.ingress(app)
class Replica:
    """A server and the way to it. `arguments`: of `rorqual serve`, without a port."""

    def __init__(self, arguments: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [
            sys.executable,
            "-m",
            "rorqual",
            "serve",
            *arguments,
            "--port",
            str(port),
            "--drain",
            str(DRAIN),
        ]
        self.process = subprocess.Popen(command)
        self.session: aiohttp.ClientSession | None = None
        self._wait()

    def _wait(self) -> None:
        """Until the model is loaded; Ray counts a replica in once it is made."""
        host, port = self.url.removeprefix("http://").split(":")
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"rorqual serve ended with code {self.process.returncode}")
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                return
            time.sleep(0.5)

    async def check_health(self) -> None:
        """Ray asks this every few seconds; an error has the replica started anew."""
        if self.process.poll() is not None:
            raise RuntimeError(f"rorqual serve ended with code {self.process.returncode}")
        async with self._client().get(self.url + "/health", timeout=aiohttp.ClientTimeout(10)) as answer:
            answer.raise_for_status()

    def _client(self) -> aiohttp.ClientSession:
        if (
            self.session is None
        ):  # made in the loop that uses it; the server has its own limits of time and number
            none = aiohttp.ClientTimeout(total=None)
            self.session = aiohttp.ClientSession(
                timeout=none, connector=aiohttp.TCPConnector(limit=0), auto_decompress=False
            )
        return self.session

    @app.api_route("/{path:path}", methods=["GET", "POST", "OPTIONS"])
    async def forward(self, request: Request) -> Response:
        """Hand a request on, and its answer back as it comes. A client that leaves takes the request with it."""
        headers = {name: value for name, value in request.headers.items() if name not in HOP}
        target = self.url + request.url.path + (f"?{request.url.query}" if request.url.query else "")
        body = request.stream() if request.method == "POST" else None
        call = self._client().request(
            request.method, target, headers=headers, data=body, allow_redirects=False
        )
        try:
            answer = await call
        except aiohttp.ClientError:
            return Response(
                '{"error":{"message":"the replica is gone","code":"unavailable"}}',
                503,
                {"retry-after": "1"},
                "application/json",
            )
        told = {name: value for name, value in answer.headers.items() if name.lower() not in HOP}
        return StreamingResponse(_pieces(answer), answer.status, told)

    def __del__(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(DRAIN + 20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def build(arguments: dict[str, Any]) -> Any:
    """The application. `model`; `replicas`; `gpus` of each (0: on the CPU); `options`: more of `rorqual serve`, as on
    its command line. Keys come from the environment of Ray's workers, RORQUAL_API_KEYS."""
    gpus = int(arguments.get("gpus", 1))
    told = [str(arguments["model"])] if "model" in arguments else []
    told += ["--gpus", str(gpus)] if gpus > 1 else ["--device", "cpu"] if gpus == 0 else []
    told += shlex.split(str(arguments.get("options", "")))
    chosen = Replica.options(
        num_replicas=int(arguments.get("replicas", 1)),
        max_ongoing_requests=4096,
        ray_actor_options={"num_gpus": gpus, "num_cpus": int(arguments.get("cpus", 1))},
        graceful_shutdown_timeout_s=DRAIN + 30,
        health_check_timeout_s=30,
        request_router_config=RequestRouterConfig(request_router_class=STICKY),
    )
    return chosen.bind(told)
