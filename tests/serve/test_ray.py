"""deploy/ray_app.py under a real Ray Serve, where one is installed: two replicas, one address, sticky conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rorqual
from tests.serve.conftest import until
from tests.serve.processes import free_port
from tests.serve.test_real import speaking

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
httpx = pytest.importorskip("httpx2")
pytestmark = pytest.mark.slow
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from deploy.ray_app import build

    place, port = tmp_path_factory.mktemp("ray"), free_port()
    rorqual.save(speaking("v3", "v31"), place / "tiny")
    root = str(Path(rorqual.__file__).parents[1])
    environment = {"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(
            build({"model": str(place / "tiny"), "gpus": 0, "replicas": 2, "options": "--max-tokens 9"})
        )
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(address: str, session: str | None = None, **more: Any) -> Any:
    headers = {} if session is None else {"x-session-id": session}
    body = {"prompt": "Hello " * 40, "temperature": 0, **more}
    return httpx.post(address + PATH, json=body, headers=headers, timeout=60)


def test_whole_and_streamed(address: str) -> None:
    whole = ask(address, max_tokens=5).json()["choices"][0]["text"]
    streamed = ask(address, max_tokens=5, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    told = [json.loads(line)["choices"] for line in lines[:-1]]
    assert "".join(choices[0]["text"] for choices in told if choices) == whole
    refused = ask(address, temperature=9)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "temperature"
    assert httpx.get(address + "/v1/models").json()["data"][0]["id"] == "tiny"


def test_a_conversation_stays_with_its_replica(address: str) -> None:
    """Its prompt is found in the cache there, and the other replica has not seen it."""
    hits: dict[str, list[int]] = {}
    for name in ("a", "b", "c", "d"):
        for _ in range(4):
            usage = ask(address, name, prompt=f"conversation {name} " * 30, max_tokens=2).json()["usage"]
            hits.setdefault(name, []).append(usage["prompt_cache_hit_tokens"])
    assert all(later > 0 for found in hits.values() for later in found[1:]), hits


def test_a_client_that_leaves_takes_its_request_along(address: str) -> None:
    with httpx.stream(
        "POST", address + PATH, json={"prompt": "x", "max_tokens": 3000, "stream": True, "n": 2}, timeout=60
    ) as answer:
        next(answer.iter_raw())

    def idle() -> bool:
        pages = [httpx.get(address + "/metrics", headers={"x-session-id": name}).text for name in "abcdefgh"]
        return all("rorqual_active 0.0" in page for page in pages)

    until(idle, 30)
