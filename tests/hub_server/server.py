"""The HTTP server: `HubServer` on 127.0.0.1 and what it needs of HTTP."""

import contextlib
import json
import os
import re
import secrets
import select
import socket
import tempfile
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

from . import downloads, uploads  # noqa: F401  register their routes
from .faults import Fault, FaultPlan
from .routes import Reply, Request, answer
from .store import HubError, Store

PER_REPO = re.compile(r"/api/(models|datasets|spaces)/.+|/.+/resolve/.+")
SETTINGS = re.compile(
    r"(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS)_.*|(HTTPS?|ALL|NO)_PROXY|XDG_CACHE_HOME", re.IGNORECASE
)


class LoggedRequest(NamedTuple):
    """One request; `path` is decoded and without its query, `status` is 0 for a request without an answer."""

    method: str
    path: str
    status: int


class HubServer:
    """A Hub on a free port of 127.0.0.1, running inside a with block.

    `token` may write and `read_token` only read; both belong to `user`. `requests` is the log, `errors` holds the
    tracebacks of the server's own faults (empty unless this server has a bug), `store` the repositories.
    """

    def __init__(self, user: str = "tester", organizations: tuple[str, ...] = ("test-org",), page_size: int = 1000):
        self.user, self.organizations, self.page_size = user, organizations, page_size
        self.token = f"hf_test{secrets.token_hex(14)}"
        self.read_token = f"hf_test{secrets.token_hex(14)}"
        self.secret = secrets.token_hex(16)
        self.store, self.faults = Store(), FaultPlan()
        self.requests: list[LoggedRequest] = []
        self.errors: list[str] = []

    def __enter__(self) -> "HubServer":
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._folder = tempfile.TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()
        self._thread.join()
        self._folder.cleanup()

    def environment(
        self, home: Path | str | None = None, token: str | None = "write", offline: bool = False
    ) -> dict[str, str]:
        """The whole environment of a client process that knows this Hub only.

        `home` becomes HF_HOME (a new folder without it); `token` is "write", "read", a token, or None for no token.
        """
        token = {"write": self.token, "read": self.read_token}.get(token or "", token)
        values = {key: value for key, value in os.environ.items() if not SETTINGS.fullmatch(key)}
        return (
            values
            | ({"HF_TOKEN": token} if token else {})
            | {
                "HF_ENDPOINT": self.endpoint,
                "HF_HOME": str(home or tempfile.mkdtemp(dir=self._folder.name)),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_UPDATE_CHECK": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_OFFLINE": str(int(offline)),
                "HF_DATASETS_OFFLINE": str(int(offline)),
                "NO_PROXY": "127.0.0.1",
                "no_proxy": "127.0.0.1",
            }
        )

    def reset(self) -> None:
        """Empty log, no faults, no errors; a request still under way is left out of the new log."""
        self.faults.clear()
        self.requests, self.errors = [], []

    def fetched(self) -> list[str]:
        """Repository and path of each file that clients downloaded (from revisions without a slash, or refs/pr/N)."""
        found = [request.path for request in self.requests if request.method == "GET" and request.status in (200, 206)]
        return [re.sub(r"/resolve/(refs/pr/)?[^/]+/", "/", path[1:]) for path in found if "/resolve/" in path]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def __init__(self, *args: object) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args)  # type: ignore[arg-type]

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self.connections.add(request)
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self.connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """Clients keep connections open; nothing may be answered after the end."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no error; nothing goes to stderr."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 45 ms a request otherwise
    server: _Server

    def log_message(self, *_: object) -> None:
        """Silent: `HubServer.requests` is the log."""

    def serve(self) -> None:
        """Answer one request, with the fault that is planned for it."""
        hub = self.server.hub
        self.log, self.late = hub.requests, False
        raw, _, query = self.path.partition("?")
        path = unquote(raw)
        body = self._body()  # read it all before any reply, or the next request on this connection is garbled
        fault = hub.faults.take(self.command, path)
        self.late = fault is not None and fault.delay > 0 and self._left_alone()
        if fault is not None and fault.kind == "drop":
            return self._hang_up(path)
        try:
            if fault is not None and fault.status is not None:
                raise HubError(fault.status, str(fault.message), fault.code)
            request = Request(
                self.command,
                raw,
                parse_qs(query),
                self.headers,
                body,
                self._role(),
                hub.endpoint,
                hub.user,
                hub.organizations,
                hub.secret,
                hub.page_size,
            )
            with hub.store.lock:
                reply = answer(request, hub.store)
        except HubError as error:
            reply = refusal(error, raw, fault)
        except Exception:
            hub.errors.append(traceback.format_exc())
            reply = refusal(HubError(501, "This test server has a bug, see HubServer.errors"), raw, None)
        self._send(reply, path, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def _role(self) -> str | None:
        hub, given = self.server.hub, self.headers.get("Authorization")
        if given is None:
            return None
        roles = {f"Bearer {hub.token}": "write", f"Bearer {hub.read_token}": "read"}
        if given not in roles:
            raise HubError(401, "Invalid credentials in Authorization header")
        return roles[given]

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _send(self, reply: Reply, path: str, fault: Fault | None) -> None:
        body, kind = reply.body, fault.kind if fault is not None else None
        if kind == "cut" and (self.command == "HEAD" or len(body) < 2):
            return self._hang_up(path)
        if kind == "wrong_checksum" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if self.late:
            return self._hang_up(path)
        self.log.append(LoggedRequest(self.command, path, reply.status))
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("X-Request-Id", secrets.token_hex(8))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and reply.status != 304:
            self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)
        if kind == "cut":
            self.close_connection = True

    def _hang_up(self, path: str) -> None:
        self.log.append(LoggedRequest(self.command, path, 0))
        self.close_connection = True

    def _left_alone(self) -> bool:
        """Has the client, tired of waiting, closed the connection?"""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""


def refusal(error: HubError, path: str, fault: Fault | None) -> Reply:
    """The Hub's error replies: JSON, and headers that the client turns into exceptions."""
    headers = {"Content-Type": "application/json; charset=utf-8", "X-Error-Message": error.message}
    code = error.code
    if error.status == 401 and error.message == "Invalid username or password." and PER_REPO.fullmatch(path):
        code = code or "RepoNotFound"  # the client takes this from the address, but only if that is https
    if code:
        headers["X-Error-Code"] = code
    if fault is not None and fault.retry_after is not None:
        headers["Retry-After"] = str(fault.retry_after)
    return Reply(error.status, json.dumps({"error": error.message}).encode(), headers)
