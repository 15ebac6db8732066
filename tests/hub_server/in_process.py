"""Point the clients of a process that has already imported them at a Hub, until the test ends."""

import os
import sys
from pathlib import Path

import pytest

from .server import HubServer


def attach(
    hub: HubServer, patch: pytest.MonkeyPatch, home: Path, token: str | None = "write", offline: bool = False
) -> None:
    """For huggingface_hub and transformers, even if HF_HUB_OFFLINE was set at import; not for datasets."""
    from huggingface_hub import constants, hf_api

    for key, value in hub.environment(home, token, offline).items():
        patch.setenv(key, value)
    if token is None:
        patch.delenv("HF_TOKEN", raising=False)
    values = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": os.path.join(home, "hub"),
        "HF_ASSETS_CACHE": os.path.join(home, "assets"),
        "HF_TOKEN_PATH": os.path.join(home, "token"),
        "HF_STORED_TOKENS_PATH": os.path.join(home, "stored_tokens"),
    }
    for name, constant in values.items():
        patch.setattr(constants, name, constant)
    patch.setattr(hf_api.api, "endpoint", hub.endpoint)
    if "transformers" in sys.modules:  # it keeps one HfApi, which has the endpoint of its first use
        from transformers.utils import hub as transformers_hub

        patch.setattr(transformers_hub, "hf_api", lambda: hf_api.HfApi(endpoint=hub.endpoint))
