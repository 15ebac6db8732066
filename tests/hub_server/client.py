"""Fixtures for tests that are clients of a Hub in this process: `hub, _client = client.hub, client.client`."""

import pytest

from soap_hf.heads import hub_requests

from .in_process import attach
from .server import HubServer


@pytest.fixture(scope="module")
def hub():
    with HubServer() as running:
        yield running
    assert not running.errors


@pytest.fixture(autouse=True)
def client(hub, monkeypatch, tmp_path):
    """This process is a client of the Hub with an empty cache, and waits no time between tries."""
    hub.reset()
    hub.store.repos.clear()
    attach(hub, monkeypatch, tmp_path / "home")
    monkeypatch.setattr(hub_requests, "WAITS", (0, 0, 0, 0))
