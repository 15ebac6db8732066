"""The command line `soap-hf`. The door is `app`."""

import sys

from ..compat import need
from ..runtime.errors import MissingExtraError


def main() -> None:
    """Entry point: every command needs what the extra `fit` brings."""
    try:
        need("datasets", "The command line", "fit")
    except MissingExtraError as error:
        sys.exit(f"Error: {error}")
    from .app import main as run

    run()
