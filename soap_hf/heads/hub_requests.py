"""Talking to the Hub: faults that pass are waited for, the others are put into words."""

import re
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..compat import TransportError
from ..runtime.errors import HubError, first_sentence

logger = logging.get_logger(__name__)
T = TypeVar("T")

TRANSIENT = {408, 429, 500, 502, 503, 504}
"""HTTP statuses that may be gone at the next try."""

REPOSITORY = re.compile(r"/api/(models|datasets)/([^/?]+/[^/?]+)")
"""Which one a request was about."""

WAITS = (1, 2, 4, 8)
"""Seconds before each further try."""


def retried(call: Callable[[], T], lost_replies: bool = True) -> T:
    """The result of a call to the Hub, tried again after faults that pass; the others are raised, and the last.

    `lost_replies`: also after the connection broke, when the call may have been carried out all the same.
    """
    for number, wait in enumerate(WAITS):
        try:
            return call()
        except OfflineModeIsEnabled:
            raise
        except (HfHubHTTPError, TransportError, ConnectionError) as error:
            status, headers = _reply(error)
            if not (status in TRANSIENT or (status is None and lost_replies)):
                raise
            tell = logger.info if number else logger.warning  # once is enough
            tell(
                f"The Hub did not answer as it should ({first_sentence(error)}); trying up to {len(WAITS)} times more."
            )
            asked = headers.get("Retry-After", "")
            time.sleep(min(float(asked), 60) if asked.isdecimal() else wait)
    return call()


def _reply(error: Exception) -> tuple[int | None, Mapping[str, str]]:
    """Status and headers of what the Hub replied, if it did."""
    response = getattr(error, "response", None)
    return (None, {}) if response is None else (response.status_code, response.headers)


def reason(error: Exception) -> str:
    """Why the Hub refused, in words that follow a colon."""
    status, _ = _reply(error)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "the Hub does not know you; log in with `hf auth login`, or set HF_TOKEN to a token with write access"
    if status == 403:
        return f"your token has no right to do this ({first_sentence(error)})"
    if isinstance(error, RepositoryNotFoundError) and (found := REPOSITORY.search(str(error.response.url))):
        kind = "data set" if found[1] == "datasets" else "model"
        return f"there is no {kind} {found[2]} on the Hub, or your token may not see it"
    if status in (409, 412):
        return "somebody else has written to the repository at the same time"
    return first_sentence(error)


def check_repository(repo_id: str) -> None:
    """Refuses what cannot be the name of a repository; a `HubError` says why."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a repository ({first_sentence(error)}).") from error
