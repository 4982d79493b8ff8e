"""`rorqual serve`: the application under uvicorn, with an orderly end."""

from __future__ import annotations

import logging
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

LOCAL = ("127.0.0.1", "::1", "localhost")


class Server(uvicorn.Server):
    """Says that it is draining as soon as it is told to stop; a second signal ends it at once."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop."""
        self.config.app.state.service.draining = True  # type: ignore[union-attr]
        super().handle_exit(sig, frame)


def run(app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> None:
    """Serve until told to stop; answers under way are then finished, for as long as the settings say."""
    settings = app.state.service.settings
    logger = logging.getLogger("rorqual.serve")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    if host not in LOCAL and not settings.keys:
        logger.warning("listening on %s without API keys: whoever can reach it can use it", host)
    given = {"log_level": "warning", "access_log": False, "server_header": False, **options}
    config = uvicorn.Config(app, host=host, port=port, timeout_graceful_shutdown=int(settings.drain), **given)
    logger.info("serving %s on http://%s:%d", settings.name, host, port)
    Server(config).run()
