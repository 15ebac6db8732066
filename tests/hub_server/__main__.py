"""Run pytest on files of tests that are clients of a Hub: python -m tests.hub_server FILE ... [pytest options].

The clients read their settings at import, so the Hub starts first; `plugin.py` has the fixtures of the tests.
"""

import os
import sys

from .server import HubServer


def main(arguments: list[str]) -> int:
    """The exit status of pytest."""
    with HubServer() as hub:
        settings = hub.environment()
        os.environ.clear()
        os.environ.update(settings)

        import pytest

        from .plugin import HubPlugin

        return pytest.main(["--noconftest", "-p", "no:cacheprovider", *arguments], plugins=[HubPlugin(hub)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
