"""A Hugging Face Hub on 127.0.0.1: the real clients talk to it over HTTP, its repositories live in memory."""

from .faults import Fault, FaultPlan
from .server import HubServer, LoggedRequest
from .store import Blob, Commit, HubError, PullRequest, Repo, Store

__all__ = [
    "Blob",
    "Commit",
    "Fault",
    "FaultPlan",
    "HubError",
    "HubServer",
    "LoggedRequest",
    "PullRequest",
    "Repo",
    "Store",
]
