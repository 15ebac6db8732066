"""Faults that the server plays on request."""

import threading
import time
from dataclasses import dataclass

KINDS = ("cut", "drop", "wrong_checksum")
MESSAGES = {
    400: "Bad request",
    401: "Invalid username or password.",
    403: "Forbidden: the token lacks a permission",
    404: "Not found",
    409: "Conflict",
    412: "A commit has happened since. Please refresh and try again.",
    429: "Too many requests",
    500: "Internal error",
    503: "Service unavailable",
}


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match.

    `kind` is "cut" (the request is carried out; half of the reply's body is sent, then the connection is closed),
    "drop" (closed without a reply, nothing carried out) or "wrong_checksum" (one byte of the reply's body is flipped).
    A request that a client gave up during `delay` is carried out all the same, as a real server would.
    """

    status: int | None = None
    kind: str | None = None
    method: str | None = None
    path: str = ""
    times: int = 1
    delay: float = 0.0
    retry_after: int | None = None
    code: str | None = None
    message: str | None = None
    seen: int = 0

    def matches(self, method: str, path: str) -> bool:
        """The request's path holds the fault's path anywhere; a HEAD has no byte to flip."""
        flips = self.kind == "wrong_checksum" and method == "HEAD"
        return self.seen < self.times and self.method in (None, method) and self.path in path and not flips


class FaultPlan:
    """The faults still to come; the first that matches a request is the one played."""

    def __init__(self) -> None:
        self.plan: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, kind: str | None = None, *, status: int | None = None, **options: object) -> Fault:
        """Plan a fault; see `Fault` for the options. A delay alone slows the request down."""
        fault = Fault(status=status, kind=kind, **options)  # type: ignore[arg-type]
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind is one of {KINDS}, not {kind!r}")
        if kind is not None and status is not None:
            raise ValueError("a fault has a status or a kind, not both")
        if kind is None and status is None and not fault.delay:
            raise ValueError("a fault needs a status, a kind or a delay")
        if status == 429 and fault.retry_after is None:
            fault.retry_after = 1
        if status is not None:
            fault.message = fault.message or MESSAGES.get(status, f"Status {status}")
        with self._lock:
            self.plan.append(fault)
        return fault

    def clear(self) -> None:
        """Forget all faults."""
        with self._lock:
            self.plan.clear()

    def take(self, method: str, path: str) -> Fault | None:
        """The fault of this request, after its delay."""
        with self._lock:
            fault = next((fault for fault in self.plan if fault.matches(method, path)), None)
            if fault is None:
                return None
            fault.seen += 1
        time.sleep(fault.delay)
        return fault
