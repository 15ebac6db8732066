"""The command line `soap-hf`. The door is `app`."""

import sys
from collections.abc import Callable

from ..compat import need
from ..runtime.errors import MissingExtraError


def main(prepare: Callable[[], object] | None = None) -> None:
    """Entry point: every command needs what the extra `fit` brings.

    `prepare` is called when the command line is understood and there is work to do.
    """
    try:
        need("datasets", "The command line", "fit")
    except MissingExtraError as error:
        sys.exit(f"Error: {error}")
    from .app import main as run

    run(prepare)
