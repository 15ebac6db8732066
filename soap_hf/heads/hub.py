"""Pushing a head: one commit with all it needs, tried again until it is there, and nothing local in it."""

import json
import os
import shlex
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from ..layout.references import BackboneReference
from ..runtime import modeling_soap
from ..runtime.errors import HubError, SOAPError, first_sentence
from ..runtime.head_files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    HeadSource,
    check_same_architecture,
    is_head_config,
)
from ..runtime.vision_backbone import tower_config
from .adapters import has_adapter
from .card import CARD_FILE, is_edited, write_card
from .card_command import is_hub_id
from .config import SOAPConfig
from .hub_requests import check_repository, reason, retried
from .opening import BACKBONE_FOLDER, INCLUDED_BACKBONE, OPTIONAL_FILES, STATISTICS_FILES, HeadRecord
from .provenance import SOAP
from .saving import refer_to_included, save_backbone

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "code/configuration_soap.SOAPConfig",
    "AutoModel": "code/modeling_soap.SOAPModelWrapper",
    "AutoBackbone": "code/modeling_soap.SOAPBackbone",
}
"""Which class of the pushed code loads what, where this package is not installed."""

CODE_FOLDER = "code"
CODE_OF_0_1_0 = (
    *("backbones.py", "call_convention.py", "configuration_soap.py", "errors.py", "head_files.py"),
    *("layout_evidence.py", "modeling_soap.py", "modeling_soap_backbone.py", "patch_layout.py", "pooling.py"),
    *("probing.py", "projection.py", "saved_head.py", "semantic_invariance.py", "soap_statistics.py"),
    *("tensor_files.py", "token_statistics.py"),
)
"""What version 0.1.0 pushed beside a head; it is removed when the head is pushed again."""


@dataclass(frozen=True)
class Push:
    """Where a head goes, and how.

    Args:
        repo_id (`str`): the repository, e.g. `"me/soap-vit-mae-base"`; made if it is not there.
        backbone_id (`str`, *optional*): hub id of the backbone, for a head that refers to a local folder; of one
            that is pushed too, what the card says it is.
        include_backbone (`bool`, defaults to `False`): push the backbone as well, so that the head needs nothing else.
        statistics (`bool`, defaults to `True`): push them, so that others can `reweight`.
        private (`bool`, *optional*): make a new repository private; default: what the account has chosen.
        revision (`str`, *optional*): branch, made if it is not there; default: `main`.
        create_pr (`bool`, defaults to `False`): open a pull request instead of writing to the branch.
        commit_message (`str`, *optional*): default: what was fitted.
        license (`str`, *optional*): the Hub's identifier of a licence; default: the card's, else the backbone's.
        force (`bool`, defaults to `False`): write into a repository that holds something else.
        token (`str` or `bool`, *optional*): default: the one that `hf auth login` stored, or `HF_TOKEN`.

    Raises:
        HubError: `repo_id` or `backbone_id` cannot be the name of a repository.
    """

    repo_id: str
    backbone_id: str | None = None
    include_backbone: bool = False
    statistics: bool = True
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    license: str | None = None
    force: bool = False
    token: str | bool | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in (self.repo_id,) if self.backbone_id is None else (self.repo_id, self.backbone_id):
            check_repository(name)

    def command(self, folder: str | os.PathLike) -> str:
        """The command line that does this push, without the token."""
        words = ["soap-hf", "push", os.fspath(folder), self.repo_id]
        for option in fields(self)[1:]:
            value, name = getattr(self, option.name), option.name.replace("_", "-")
            if option.name == "token" or value == option.default:
                continue
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no-'}{name}")
            else:
                words += [f"--{name}", str(value)]
        return shlex.join(words)


def push_model(model: Any, repo_id: str, **options: Any) -> str:
    """Pushes a head from memory; see [`SOAPModelWrapper.push_to_hub`]."""
    push = Push(repo_id, **options)
    _refuse_local_backbone(model.config.backbone_name_or_path, push)
    if has_adapter(model) and not push.include_backbone:
        raise HubError(
            "A head is pushed without adapters: pass include_backbone=True to push it with its adapter merged, or "
            "push the head that it was trained on and, to another repository, the folder that save_pretrained writes."
        )
    folder = Path(tempfile.mkdtemp(prefix="soap-head-"), repo_id.rpartition("/")[2])
    model.save_pretrained(folder, include_backbone=push.include_backbone)
    address = push_head(folder, push)
    shutil.rmtree(folder.parent)  # not before: the message of an error names it
    return address


def push_head(folder: str | os.PathLike, push: Push) -> str:
    """Pushes a head's folder in one commit, with its card and its code; the folder stays as it is.

    Returns:
        Address of the commit, or of the pull request.

    Raises:
        HeadError: the folder holds no valid head.
        HubError: the backbone is local, the repository cannot be written or holds something else, or the network
            failed; says which command repeats the push.
    """
    if Path(folder, ADAPTER_FILE).exists():
        raise HubError(
            f"{folder} holds an adapter, without which heads are pushed: merge it, by AutoModel.from_pretrained(…)"
            f".push_to_hub(…, include_backbone=True), or push the head from a folder without {ADAPTER_FILE}."
        )
    config = HeadRecord.open(folder).config
    if config.plain_backbone is not None and (push.backbone_id or push.include_backbone):
        raise HubError(
            "The head's backbone is a module of another library, which cannot go with it or be named by a hub id; if "
            "transformers has it too, load the head there, from_pretrained(head, backbone=…), and push that one."
        )
    _refuse_local_backbone(config.backbone_name_or_path, push)
    with tempfile.TemporaryDirectory() as staging:
        config = _stage(Path(folder), Path(staging), push)
        try:
            return _send(Path(staging), config, push)
        except SOAPError:
            raise
        except (HfHubHTTPError, HTTPError, OSError, ValueError, KeyError) as error:
            raise HubError(
                f"The push to {push.repo_id} failed: {reason(error)}. The head in {folder} is whole; "
                f"`{push.command(folder)}` repeats the push."
            ) from error


def check_push(push: Push, backbone: str) -> None:
    """Finds out before a long fit whether its head can be pushed; the errors are those of `push_head`."""
    _refuse_local_backbone(backbone, push)
    api = HfApi(token=push.token)
    try:
        user = retried(api.whoami)["name"]
        repo_id = push.repo_id if "/" in push.repo_id else f"{user}/{push.repo_id}"
        if retried(lambda: api.repo_exists(repo_id)):
            _refuse_something_else(api, repo_id, push)
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise HubError(f"A head could not be pushed to {push.repo_id}: {reason(error)}.") from error


def code_files() -> list[Path]:
    """The modules that load a head where this package is not installed."""
    entry = modeling_soap.__file__
    return sorted({Path(entry), *map(Path, get_relative_import_files(entry))})


def _refuse_local_backbone(reference: str | None, push: Push) -> None:
    """Refuses a head whose backbone others could not load."""
    made = BackboneReference.parse(reference or "")  # a module of another library
    is_public = reference == INCLUDED_BACKBONE or (is_hub_id(reference) and not os.path.isdir(str(reference)))
    is_public = is_public or (made is not None and not made.is_local)
    if not (is_public or push.backbone_id or push.include_backbone):
        raise HubError(
            f"The head's backbone is local ({reference or 'in memory'}), which means nothing to others: give the hub "
            "id of the same backbone (--backbone-id, backbone_id=…) or push the backbone too (--include-backbone, "
            "include_backbone=True)."
        )


def _stage(folder: Path, staging: Path, push: Push) -> SOAPConfig:
    """Gathers in `staging` what will be pushed except config and card, and nothing else that lies in `folder`."""
    patterns = {CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, *OPTIONAL_FILES, f"{BACKBONE_FOLDER}/*"}
    if not push.statistics:
        patterns.remove(STATISTICS_FILES)
    for path in (path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
        target = staging / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (staging / CODE_FOLDER).mkdir()
    for path in code_files():
        shutil.copyfile(path, staging / CODE_FOLDER / path.name)
    config = HeadSource.open(staging).config(SOAPConfig)
    if push.include_backbone and not (staging / BACKBONE_FOLDER).is_dir():
        head = modeling_soap.SOAPModelWrapper.from_pretrained(folder)
        save_backbone(head.backbone, head.config.backbone, staging)
        refer_to_included(config)
    if push.backbone_id is not None and config.backbone_name_or_path == INCLUDED_BACKBONE:
        config.base_model, config.base_model_revision = push.backbone_id, None
    return config


def _send(staging: Path, config: SOAPConfig, push: Push) -> str:
    """Sends what was staged; the address of the commit, or of the pull request."""
    api = HfApi(token=push.token)
    license = _point_to_backbone(api, config, push)
    config.auto_map, config.architectures = dict(AUTO_MAP), [modeling_soap.SOAPModelWrapper.__name__]
    config.to_json_file(staging / CONFIG_FILE)
    repo_id = retried(lambda: api.create_repo(push.repo_id, private=push.private, exist_ok=True)).repo_id
    if push.revision is not None and not push.create_pr and not push.revision.startswith("refs/"):
        retried(lambda: api.create_branch(repo_id, branch=str(push.revision), exist_ok=True))
    there, card = _refuse_something_else(api, repo_id, push), staging / CARD_FILE
    old = card.read_text(encoding="utf-8") if card.exists() else None
    if CARD_FILE in there and (old is None or not is_edited(old)):  # else a person has edited the one beside the head
        remote = api.hf_hub_download(repo_id, CARD_FILE, revision=push.revision)
        old = Path(remote).read_text(encoding="utf-8")
    write_card(config, staging, name=repo_id, license=push.license, fallback_license=license, old=old)
    layers = zip(config.ranks, config.hidden_sizes, config.layers, strict=True)
    removed = " and ".join(f"{rank} of {size} directions of layer {layer}" for rank, size, layer in layers)
    kind = "SOAP" if config.method == SOAP else config.method
    fit = f", fitted on {config.fit['num_images']} images of {config.fit['dataset']}" if config.fit else ""
    commit = retried(
        lambda: api.upload_folder(
            repo_id=repo_id,
            folder_path=staging,
            revision=push.revision,
            create_pr=push.create_pr,
            commit_message=push.commit_message or f"{kind} head: {removed}{fit}",
            delete_patterns=[*OPTIONAL_FILES, f"{BACKBONE_FOLDER}/*", f"{CODE_FOLDER}/*", *CODE_OF_0_1_0],
        ),
        # a pull request may have been opened by a request whose reply was lost
        lost_replies=not push.create_pr,
    )
    return commit.pr_url or commit.commit_url


def _point_to_backbone(api: HfApi, config: SOAPConfig, push: Push) -> str | None:
    """Pins the backbone to a commit of its repository; returns the licence that it has there."""
    if config.backbone_name_or_path == INCLUDED_BACKBONE:
        return _license_of_base(api, config)
    if config.plain_backbone is not None:
        return None  # how it is made stands in the config already
    if push.backbone_id is not None:
        config.backbone_name_or_path, config.backbone_revision = push.backbone_id, None
    hub_id = str(config.backbone_name_or_path)
    info = retried(lambda: api.model_info(hub_id, revision=config.backbone_revision))
    config.backbone_revision = info.sha
    if push.backbone_id is not None and config.backbone is not None:
        there = AutoConfig.from_pretrained(hub_id, revision=info.sha, token=push.token)
        check_same_architecture(config.backbone, tower_config(there) or there)
    return info.card_data.license if info.card_data is not None else None


def _license_of_base(api: HfApi, config: SOAPConfig) -> str | None:
    """The licence of the repository that an included backbone came from; none if it cannot be asked any more."""
    if not config.base_model:
        return None
    try:
        info = api.model_info(config.base_model, revision=config.base_model_revision)
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        logger.warning(f"The licence of {config.base_model} is not known ({first_sentence(error)}); pass license=….")
        return None
    return info.card_data.license if info.card_data is not None else None


def _refuse_something_else(api: HfApi, repo_id: str, push: Push) -> set[str]:
    """Names of the files in a repository that is empty or holds a head."""
    there = set(retried(lambda: api.list_repo_files(repo_id, revision=push.revision)))
    is_head = False
    if CONFIG_FILE in there:
        config = Path(api.hf_hub_download(repo_id, CONFIG_FILE, revision=push.revision))
        with suppress(ValueError):
            is_head = is_head_config(json.loads(config.read_text(encoding="utf-8")))
    if there - {".gitattributes", CARD_FILE} and not is_head and not push.force:
        raise HubError(
            f"The repository {repo_id} holds something else than a head; choose another name, or force the push "
            "(--force, force=True)."
        )
    return there
