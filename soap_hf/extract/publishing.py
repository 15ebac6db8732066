"""Features on the Hub: the folder as a data set; what is there is not sent again."""

import os
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..compat import TransportError
from ..heads.hub_requests import check_repository, reason, retried
from ..runtime.errors import HubError, OutputError
from .folder import CARD, MANIFEST, PARTS, SHARDS, read_manifest


def push_features(
    folder: str | os.PathLike, repo_id: str, *, private: bool | None = None, token: str | bool | None = None
) -> str:
    """Uploads a folder of features as a data set; what has arrived of a push that failed is not sent again.

    Args:
        folder (`str` or `os.PathLike`): what [`extract_features`] wrote.
        repo_id (`str`): the data set, e.g. `"me/features"`; made if it is not there.
        private (`bool`, *optional*): make a new one private; default: what the account has chosen.
        token (`str` or `bool`, *optional*): default: the one that `hf auth login` stored, or `HF_TOKEN`.

    Returns:
        `str`: address of the data set.

    Raises:
        OutputError: the folder holds no complete features.
        HubError: it holds something else, cannot be written, or the network failed; the same call goes on.
    """
    check_repository(repo_id)
    folder = Path(folder)
    manifest = read_manifest(folder)
    if not manifest.get("complete"):
        raise OutputError(f"The features in {folder} are not complete; go on with soap-hf extract --resume.")
    api = HfApi(token=token)
    try:
        address = retried(lambda: api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True))
        _refuse_something_else(api, address.repo_id)
        retried(
            lambda: api.upload_folder(  # in several commits where it is large, from huggingface_hub 2.0 on
                repo_id=address.repo_id,
                folder_path=folder,
                repo_type="dataset",
                commit_message=f"Features of {manifest['rows']} images",
                allow_patterns=[CARD, MANIFEST, f"{SHARDS}/{PARTS}"],
                delete_patterns=[f"{SHARDS}/{PARTS}"],  # of others
            )
        )
    except (HfHubHTTPError, TransportError, OSError) as error:
        raise HubError(
            f"The features could not be pushed to {repo_id}: {reason(error)}. They are in {folder}; the same command "
            "with --resume sends what is missing."
        ) from error
    return str(address)


def _refuse_something_else(api: HfApi, repo_id: str) -> None:
    there = set(retried(lambda: api.list_repo_files(repo_id, repo_type="dataset"))) - {".gitattributes", CARD}
    if not there:
        return
    if MANIFEST in there:
        with suppress(OutputError):
            read_manifest(Path(api.hf_hub_download(repo_id, MANIFEST, repo_type="dataset")).parent)
            return
    raise HubError(f"The data set {repo_id} holds something else than features; choose another name.")
