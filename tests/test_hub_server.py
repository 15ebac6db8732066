"""The Hub on 127.0.0.1: what it refuses, and what the real clients do with it (in processes of their own)."""

import hashlib
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import AutoModel, PreTrainedModel

from tests.conftest import ROOT

from .hub_server import HubServer
from .hub_server.cards import problems
from .hub_server.in_process import attach


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running
    assert not running.errors


def send(
    hub: HubServer, method: str, path: str, content: object = None, token: str | None = None
) -> tuple[int, bytes]:
    """Status and body; `content` goes as JSON unless it is bytes."""
    data = content if isinstance(content, bytes) or content is None else json.dumps(content).encode()
    request = Request(hub.endpoint + path, data, {"Authorization": f"Bearer {token}"} if token else {}, method=method)
    try:
        with urlopen(request) as reply:
            return reply.status, reply.read()
    except HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize("flows", [("hub_flows.py", "fault_flows.py"), ("model_flows.py",)])
def test_clients(flows: tuple[str, ...]) -> None:
    files = [str(ROOT / "tests/hub_server" / name) for name in flows]
    command = [sys.executable, "-m", "tests.hub_server", "-p", "no:xdist", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hf_test" not in done.stdout + done.stderr


def test_in_process(hub: HubServer, vit: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline mode, which conftest.py sets, blocks the client; `attach` lifts it until the end of the test."""
    with pytest.raises(OfflineModeIsEnabled):
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("blocked")
    with monkeypatch.context() as patch:
        attach(hub, patch, tmp_path)
        vit.push_to_hub("attached")
        assert AutoModel.from_pretrained("tester/attached").config.hidden_size == 32
        assert "tester/attached/model.safetensors" in hub.fetched()
        attach(hub, patch, tmp_path, offline=True)
        hub.requests.clear()
        assert AutoModel.from_pretrained("tester/attached").config.hidden_size == 32
        assert hub.requests == []
    with pytest.raises(OfflineModeIsEnabled):
        HfApi(endpoint=hub.endpoint, token=hub.token).whoami()


@pytest.mark.parametrize("name", ["", "a b", "-a", "a.", "a--b", "a..b", "a.git", "x" * 97, "é", "a/b", "../a", None])
def test_bad_names(hub: HubServer, name: str | None) -> None:
    assert send(hub, "POST", "/api/repos/create", {"name": name, "type": "model"}, hub.token)[0] == 400
    assert hub.store.repos == {}


@pytest.mark.parametrize("path", ["../a", "/a", "a//b", "a/../b", ".git/config", "a\\b", ""])
def test_bad_paths(hub: HubServer, path: str) -> None:
    hub.store.create("tester/m")
    lines = [
        {"key": "header", "value": {"summary": "s"}},
        {"key": "file", "value": {"path": path, "content": ""}},
    ]
    body = "\n".join(map(json.dumps, lines)).encode()
    assert send(hub, "POST", "/api/models/tester/m/commit/main", body, hub.token)[0] == 400
    assert list(hub.store["tester/m"].files()) == [".gitattributes"]


def test_bad_commits(hub: HubServer) -> None:
    """Nothing of a refused commit stays."""
    hub.store.write("tester/m", {"a": b"1"})
    header = {"key": "header", "value": {"summary": "s"}}
    new = {"key": "file", "value": {"path": "b", "content": "2"}}
    missing = {"key": "lfsFile", "value": {"path": "c", "algo": "sha256", "oid": "0" * 64}}
    gone = {"key": "deletedFile", "value": {"path": "d"}}
    under = {"key": "file", "value": {"path": "a/b", "content": "2"}}
    tries = [([new], 400), ([header, new, missing], 400), ([header, new, gone], 404), ([header, new, under], 400)]
    for lines, status in tries:
        body = "\n".join(map(json.dumps, lines)).encode()
        assert send(hub, "POST", "/api/models/tester/m/commit/main", body, hub.token)[0] == status
    assert send(hub, "POST", "/api/models/tester/m/commit/main", b"not json", hub.token)[0] == 400
    assert sorted(hub.store["tester/m"].files()) == [".gitattributes", "a"]


def test_tokens(hub: HubServer, capfd: pytest.CaptureFixture[str]) -> None:
    hub.store.create("tester/m")
    create = ("POST", "/api/repos/create", {"name": "n"})
    found = [send(hub, *create, token)[0] for token in (None, "hf_wrong", hub.read_token, hub.token)]
    assert found == [401, 401, 403, 200]
    assert send(hub, "POST", "/api/repos/create", {"name": "n", "organization": "other"}, hub.token)[0] == 403
    assert send(hub, "DELETE", "/api/repos/delete", {"name": "n"}, hub.read_token)[0] == 403
    assert send(hub, "GET", "/api/models/tester/m?token=" + hub.token)[0] == 200
    seen = repr(hub.requests) + "".join(capfd.readouterr())
    assert hub.token not in seen
    assert hub.read_token not in seen


def test_large_file(hub: HubServer) -> None:
    """An upload needs the signed address, and the bytes that were announced."""
    hub.store.create("tester/m")
    oid = hashlib.sha256(b"data").hexdigest()
    asked = {"objects": [{"oid": oid, "size": 4}]}
    status, body = send(hub, "POST", "/tester/m.git/info/lfs/objects/batch", asked, hub.token)
    address = json.loads(body)["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.endpoint)
    assert status == 200
    assert send(hub, "PUT", f"/lfs/{oid}?signature=0", b"data")[0] == 403
    assert send(hub, "PUT", address, b"date")[0] == 400
    assert send(hub, "PUT", address, b"data")[0] == 200
    assert hub.store.objects == {oid: b"data"}


def test_missing_file_and_route(hub: HubServer) -> None:
    hub.store.create("tester/m")
    with pytest.raises(HTTPError) as missing:
        urlopen(f"{hub.endpoint}/tester/m/resolve/main/no.json")
    assert (missing.value.code, missing.value.headers["X-Error-Code"]) == (404, "EntryNotFound")
    assert missing.value.headers["X-Repo-Commit"] == hub.store["tester/m"].branches["main"]
    assert send(hub, "GET", "/api/models/tester/no")[0] == 401
    assert send(hub, "GET", "/api/models/tester/no", token=hub.token)[0] == 404
    assert send(hub, "GET", "/nowhere")[0] == 404


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 500, 503])
def test_faults(hub: HubServer, status: int) -> None:
    hub.faults.add(status=status, method="GET", path="whoami", times=2)
    assert [send(hub, "GET", "/api/whoami-v2", token=hub.token)[0] for _ in range(3)] == [status, status, 200]
    assert [request.status for request in hub.requests] == [status, status, 200]


def test_retry_after(hub: HubServer) -> None:
    hub.faults.add(status=429, retry_after=5)
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{hub.endpoint}/api/whoami-v2")
    assert refused.value.headers["Retry-After"] == "5"


def test_delay(hub: HubServer) -> None:
    """A client that gives up has no answer, yet the request was carried out."""
    slow = hub.faults.add(delay=0.3, path="/create")
    request = Request(
        hub.endpoint + "/api/repos/create",
        b'{"name": "late"}',
        {"Authorization": f"Bearer {hub.token}"},
        method="POST",
    )
    with pytest.raises(TimeoutError):
        urlopen(request, timeout=0.1)
    old = hub.requests
    hub.reset()
    for _ in range(50):
        if old:
            break
        time.sleep(0.05)
    assert (slow.seen, old, hub.requests) == (1, [("POST", "/api/repos/create", 0)], [])
    assert hub.store["tester/late"]


def test_fault_arguments(hub: HubServer) -> None:
    for options in ({}, {"kind": "melt"}, {"kind": "cut", "status": 500}):
        with pytest.raises(ValueError, match=r"fault|kind"):
            hub.faults.add(**options)


def test_end() -> None:
    """A connection that a client keeps open is closed, and no other is accepted."""

    def ask() -> bytes:
        kept.request("GET", "/api/whoami-v2")
        return kept.getresponse().read()

    with HubServer() as hub:
        kept = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))
        assert ask() == ask()
        kept.auto_open = 0  # the same connection
        home = Path(hub.environment()["HF_HOME"])
        assert home.is_dir()
    with pytest.raises((http.client.HTTPException, OSError)):
        ask()
    with pytest.raises(URLError):
        urlopen(hub.endpoint)
    assert not home.exists()


def test_environment(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "/elsewhere")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy")
    found = hub.environment(tmp_path)
    assert (found["HF_HOME"], found["HF_TOKEN"], found["HF_HUB_OFFLINE"]) == (str(tmp_path), hub.token, "0")
    assert not {"HF_HUB_CACHE", "HTTP_PROXY"} & set(found)
    assert "HF_TOKEN" not in hub.environment(token=None)
    assert hub.environment()["HF_HOME"] != hub.environment()["HF_HOME"]


@pytest.mark.parametrize(
    ("metadata", "errors", "warnings"),
    [
        ("license: mit\ntags: [a]\nbase_model: user/m\ndatasets: [user/d]", 0, 0),
        ("license: mine", 1, 0),
        ("tags: a", 1, 0),
        ("base_model: /home/me/model", 1, 0),
        ("a: [", 1, 0),
        ("- a", 1, 0),
        ("", 0, 1),
        ("model-index: [{name: m}]", 1, 0),
        ("model-index: [{name: m, results: [{task: {type: t}, metrics: [{type: a, value: 1}]}]}]", 2, 0),
        ("model-index: [{name: m, results: [{task: {type: t}, dataset: {name: d, type: e}, metrics: [{}]}]}]", 1, 0),
    ],
)
def test_cards(metadata: str, errors: int, warnings: int) -> None:
    assert tuple(map(len, problems(f"---\n{metadata}\n---\n# Text"))) == (errors, warnings)
