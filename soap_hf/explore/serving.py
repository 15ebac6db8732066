"""Serving the page: on this computer alone unless told otherwise, with nothing asked of the network."""

import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..runtime.errors import SOAPError, first_sentence
from .explorer import Explorer
from .page import build, gr

HOST = "127.0.0.1"
TEMPLATES = Path(__file__).parent / "templates"

MOST_SESSIONS = 32
LARGEST_FILE = "50mb"

NO_ANALYTICS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",  # gradio would keep and summarise 10,000 events, for its own page of them
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9),
}

FONT, MONOSPACE = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
"""Those of the reader's device: none is fetched."""


@contextmanager
def served(
    explorer: Explorer,
    images: Sequence[str | os.PathLike] = (),
    *,
    host: str = HOST,
    port: int | None = None,
    share: bool = False,
) -> Iterator[str]:
    """Serves the page while the block runs, and gives its address.

    An uploaded file is deleted as soon as it is read, and what is left of uploads at the end.

    Args:
        explorer ([`Explorer`]), images: as in [`build`].
        host (`str`, defaults to `"127.0.0.1"`): `"0.0.0.0"` answers other computers too, as in a Space.
        port (`int`, *optional*): default: a free one.
        share (`bool`, defaults to `False`): also a public address, through servers of gradio, which gradio prints.

    Raises:
        SOAPError: the port is in use, or cannot be had.
        DataError: an example cannot be read.
    """
    port = free_port(port, host)
    folder = tempfile.TemporaryDirectory(prefix="soap-hf-explore-", ignore_cleanup_errors=True)
    with (
        folder as uploads,
        _environment(GRADIO_TEMP_DIR=uploads, NO_PROXY=_direct(), no_proxy=_direct(), **NO_ANALYTICS),
    ):
        page = build(explorer, images)
        try:
            _, local, _ = page.launch(
                server_name=host,
                server_port=port,
                share=share,
                inbrowser=False,
                quiet=not share,
                prevent_thread_lock=True,
                show_error=False,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                num_workers=1,
                max_file_size=LARGEST_FILE,
                state_session_capacity=MOST_SESSIONS,
                theme=gr.themes.Default(font=FONT, font_mono=MONOSPACE),
                css=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
            )
        except OSError as error:  # somebody was faster
            raise SOAPError(f"Port {port} cannot be had ({first_sentence(error)}); choose another --port.") from error
        try:
            yield local
        finally:
            page.close(verbose=False)


def serve(
    explorer: Explorer,
    images: Sequence[str | os.PathLike] = (),
    *,
    started: Callable[[str], object] = print,
    **options: Any,
) -> None:
    """As [`served`], until it is interrupted or ended; `started` is told the address, `options` are [`served`]'s."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with suppress(KeyboardInterrupt), served(explorer, images, **options) as address:
        started(address)
        while True:
            time.sleep(1)


def free_port(port: int | None, host: str = HOST) -> int:
    """The port, or a free one; a `SOAPError` says that it is in use or cannot be had."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(os.name != "nt"))  # as the server does
        try:
            probe.bind((host, port or 0))
        except (OSError, OverflowError) as error:
            reason = first_sentence(error)
            raise SOAPError(f"Port {port} of {host} cannot be had ({reason}); choose another, or none.") from error
        return int(probe.getsockname()[1])


def _direct() -> str:
    """This computer is asked directly, whatever proxy there is: gradio asks itself whether it answers."""
    return ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1", "localhost"]))


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
