"""What is printed for people, which never costs a result."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from rich.console import Console

_failures: list[Exception] = []


def show(what: Any, *, to_stderr: bool = False) -> None:
    """Prints a text or a table of rich; what cannot be printed is left out, and ends nothing.

    A character that the terminal does not know becomes a question mark. A pipe that nobody reads, a full disk or a
    closed stream is remembered for `failure`.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    if stream is not None:
        is_text = isinstance(what, str)
        Console(file=_patient(stream), soft_wrap=is_text).print(what, markup=not is_text, highlight=not is_text)


@contextmanager
def patient_streams() -> Iterator[None]:
    """Inside the block whatever is printed is printed as `show` does it: bars and warnings of others, too."""
    with redirect_stdout(_patient(sys.stdout)), redirect_stderr(_patient(sys.stderr)):
        yield


def failure() -> Exception | None:
    """Why something was not printed, if so; what waits to be printed is given up then."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # it was closed before the start
            continue
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            _failures.append(error)
            with suppress(OSError, ValueError):  # or the interpreter would try once more at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return _failures[0] if _failures else None


class _Patient:
    """A stream that takes everything."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError) as error:
            _failures.append(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            _failures.append(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _patient(stream: TextIO | None) -> TextIO:
    """A stream that takes everything, of one that may not, or of none."""
    return cast(TextIO, stream if stream is None or isinstance(stream, _Patient) else _Patient(stream))
