"""What huggingface_hub does when the Hub fails, run by `python -m tests.hub_server` in a process of its own."""

import os
from importlib import import_module
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from .plugin import WEIGHTS, put, statuses
from .server import HubServer

RemoteProtocolError = import_module(HTTPError.__module__).RemoteProtocolError
"""Of httpx2, or before huggingface_hub 2 of httpx."""


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, BadRequestError),
        (401, RepositoryNotFoundError),
        (403, HfHubHTTPError),
        (404, HfHubHTTPError),
        (409, HfHubHTTPError),
        (412, HfHubHTTPError),
        (429, HfHubHTTPError),
        (500, HfHubHTTPError),
        (503, HfHubHTTPError),
    ],
)
def test_refused_commit(
    api: HfApi, hub: HubServer, repo: str, status: int, error: type[Exception], waits: list[float]
) -> None:
    """The commit itself is sent once."""
    head = api.model_info(repo).sha
    hub.faults.add(status=status, method="POST", path="/commit/", times=9)
    with pytest.raises(error) as refused:
        put(api, repo)
    assert (type(refused.value), refused.value.response.status_code) == (error, status)
    assert (statuses(hub, "POST", "/commit/"), waits, api.model_info(repo).sha) == ([status], [], head)


@pytest.mark.parametrize("path", ["/preupload/", "/objects/batch", "/lfs/", "/verify"])
def test_upload_tries_again(api: HfApi, hub: HubServer, repo: str, path: str, waits: list[float]) -> None:
    """All but the commit: 503 and a lost answer after 1, 2, 4, 8 s, 429 after Retry-After and one second more."""
    hub.faults.add(status=503, path=path, times=2)
    hub.faults.add(status=429, path=path, retry_after=5)
    hub.faults.add("cut", path=path)
    put(api, repo, "new.safetensors", os.urandom(100))
    assert (waits, "new.safetensors" in hub.store[repo].files()) == ([1, 2, 6, 8], True)


def test_upload_gives_up(api: HfApi, hub: HubServer, repo: str, waits: list[float]) -> None:
    hub.faults.add(status=503, method="PUT", path="/lfs/", times=9)
    with pytest.raises(RuntimeError, match="Error while uploading") as refused:
        put(api, repo, "new.safetensors", os.urandom(100))
    assert isinstance(refused.value.__cause__, HfHubHTTPError)
    assert (waits, len(statuses(hub, "PUT", "/lfs/"))) == ([1, 2, 4, 8, 8], 6)


@pytest.mark.parametrize(("kind", "committed"), [("cut", True), ("drop", False)])
def test_commit_without_an_answer(api: HfApi, hub: HubServer, repo: str, kind: str, committed: bool) -> None:
    """A reply cut short does not say that the commit is there."""
    hub.faults.add(kind, method="POST", path="/commit/")
    with pytest.raises(RemoteProtocolError):
        put(api, repo)
    assert ("new.txt" in hub.store[repo].files()) is committed


@pytest.mark.parametrize(("chunk", "second"), [(10_000, 206), (None, 200)])
def test_download_cut_short(
    hub: HubServer,
    repo: str,
    cache: Path,
    waits: list[float],
    chunk: int | None,
    second: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Goes on after the last full chunk, which is 10 MiB: a smaller file starts again."""
    if chunk is not None:
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    hub.faults.add("cut", method="GET", path="model.safetensors")
    path = hf_hub_download(repo, "sub/model.safetensors", cache_dir=cache)
    assert Path(path).read_bytes() == WEIGHTS
    assert (statuses(hub, "GET", "model.safetensors"), waits) == ([200, second], [1])


def test_download_cut_every_time(hub: HubServer, repo: str, cache: Path, waits: list[float]) -> None:
    hub.faults.add("drop", method="GET", path="config.json", times=9)
    with pytest.raises(RemoteProtocolError):
        hf_hub_download(repo, "config.json", cache_dir=cache)
    assert (waits, list(cache.glob("*/snapshots/*/*"))) == ([1] * 5, [])


def test_download_with_a_wrong_byte(hub: HubServer, repo: str, cache: Path) -> None:
    """The client compares sizes only: it takes the file, and keeps it."""
    hub.faults.add("wrong_checksum", path="model.safetensors")
    data = Path(hf_hub_download(repo, "sub/model.safetensors", cache_dir=cache)).read_bytes()
    assert (len(data), data == WEIGHTS) == (len(WEIGHTS), False)
    assert hf_hub_download(repo, "sub/model.safetensors", cache_dir=cache)
    assert statuses(hub, "GET", "model.safetensors") == [200]


def test_slow_hub(hub: HubServer, repo: str, cache: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """HEAD: a second attempt with a limit of 60 s, or the cached file; GET: again after a second."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.faults.add(delay=0.8, method="HEAD")
    slow = hub.faults.add(delay=0.8, method="GET")
    path = hf_hub_download(repo, "config.json", cache_dir=cache, etag_timeout=0.3)
    assert (waits, slow.seen) == ([1], 1)
    slow = hub.faults.add(delay=0.8, method="HEAD", times=9)
    assert hf_hub_download(repo, "config.json", cache_dir=cache, etag_timeout=0.3) == path
    assert slow.seen == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_metadata_refused(hub: HubServer, repo: str, cache: Path, status: int, waits: list[float]) -> None:
    """HEAD: one attempt, then the cached file; six more if there is none."""
    path = hf_hub_download(repo, "config.json", cache_dir=cache)
    hub.faults.add(status=status, method="HEAD", times=9)
    assert hf_hub_download(repo, "config.json", cache_dir=cache) == path
    with pytest.raises(LocalEntryNotFoundError) as refused:
        hf_hub_download(repo, "config.json", cache_dir=cache / "2")
    assert isinstance(refused.value.__cause__, HfHubHTTPError)
    assert waits == ([2] * 5 if status == 429 else [1, 2, 4, 8, 8])


@pytest.mark.parametrize("status", [429, 500])
def test_body_refused(hub: HubServer, repo: str, cache: Path, status: int, waits: list[float]) -> None:
    """GET: only 429 is tried again."""
    hub.faults.add(status=status, method="GET", path="config.json")
    if status == 429:
        assert hf_hub_download(repo, "config.json", cache_dir=cache)
    else:
        with pytest.raises(HfHubHTTPError) as refused:
            hf_hub_download(repo, "config.json", cache_dir=cache)
        assert refused.value.response.status_code == 500
    assert waits == ([2] if status == 429 else [])
