"""Fixtures for tests that run as clients of a Hub; huggingface_hub is imported when they do, not before."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from .server import HubServer

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHTS = os.urandom(60_000)


class HubPlugin:
    """A pytest plugin around a running Hub."""

    def __init__(self, server: HubServer):
        self.server = server

    @pytest.fixture
    def hub(self) -> Iterator[HubServer]:
        """The running Hub, with an empty log and no faults."""
        self.server.reset()
        yield self.server
        assert not self.server.errors

    @pytest.fixture
    def api(self, hub: HubServer) -> HfApi:
        """Of the user who may write."""
        from huggingface_hub import HfApi

        return HfApi()

    @pytest.fixture
    def repo(self, hub: HubServer, request: pytest.FixtureRequest) -> str:
        """A model with a text file and a large file, named after the test."""
        name = f"tester/{re.sub(r'[^a-z0-9]+', '-', request.node.name).strip('-')}"
        hub.store.write(name, {"config.json": b"{}", "sub/model.safetensors": WEIGHTS})
        return name

    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        """An empty cache folder."""
        return tmp_path / "cache"

    @pytest.fixture
    def waits(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """The seconds that the client would have waited before each new attempt."""
        from huggingface_hub import file_download
        from huggingface_hub.utils import _http

        found: list[float] = []
        clock = SimpleNamespace(sleep=found.append, time=time.time)
        monkeypatch.setattr(_http, "time", clock)
        monkeypatch.setattr(file_download, "time", clock)
        return found


def put(api: HfApi, repo: str, path: str = "new.txt", data: bytes = b"new", **options: object) -> object:
    """Commit one file."""
    return api.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id=repo, **options)


def statuses(hub: HubServer, method: str, path: str) -> list[int]:
    return [request.status for request in hub.requests if request.method == method and path in request.path]
