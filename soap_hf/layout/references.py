"""How a module that is no transformers model was made: by torch.hub, by timm, by a function, or by hand."""

import importlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from torch import nn
from transformers.utils import logging

from ..runtime.errors import BackboneError, HeadError, MissingExtraError, first_sentence

logger = logging.get_logger(__name__)

Kind = Literal["torchhub", "timm", "factory", "live"]

COMMIT = re.compile(r"[0-9a-f]{40}")
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

SECONDS = 10
"""How long GitHub may take to say where a branch stands."""


@dataclass(frozen=True)
class BackboneReference:
    """How a module was made, so that a head can say where its backbone is found again.

    Attributes:
        kind (`str`): `"torchhub"`, `"timm"`, `"factory"` (a function that can be imported) or `"live"` (nobody knows).
        name (`str`): repository on GitHub or folder with a `hubconf.py`; timm's name of a model; `package.module`.
        entry (`str`): of torch.hub and a factory, the function that makes the module.
        ref (`str`, *optional*): of torch.hub, the commit, or a branch or tag that may move on.
        arguments (`dict`): what it is called with by name; only what JSON can hold.

    Example:
        >>> BackboneReference.parse("torchhub:facebookresearch/capi:capi_vitl14_lvd").entry
        'capi_vitl14_lvd'
        >>> str(BackboneReference.parse("timm:vit_base_patch16_224.mae"))
        'timm:vit_base_patch16_224.mae'
        >>> BackboneReference.parse("facebook/vit-mae-base") is None
        True
    """

    kind: Kind = "live"
    name: str = ""
    entry: str = ""
    ref: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        texts = (self.kind, self.name, self.entry, self.ref or "")
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.arguments, dict):
            raise HeadError(f"A backbone is referred to by texts and a dict of arguments, not by {texts}.")
        right = {
            "torchhub": bool(self.name and self.entry),
            "timm": bool(self.name),
            "factory": _FACTORY.fullmatch(f"{self.name}:{self.entry}") is not None,
            "live": True,
        }
        if not right.get(self.kind, False):
            raise HeadError(f"{self.kind!r}, {self.name!r} and {self.entry!r} say no way to make a backbone.")

    @classmethod
    def parse(cls, text: str, arguments: dict[str, Any] | None = None) -> "BackboneReference | None":
        """Reads `torchhub:OWNER/REPO[:REF]:ENTRY` (or a folder), `timm:NAME` or `package.module:function`.

        `None` if it is none of them: the name of a transformers model.

        Raises:
            BackboneError: it begins like one, but is none.
        """
        given = arguments or {}
        try:
            json.dumps(given)
        except TypeError as error:
            raise BackboneError(
                f"The arguments of a backbone must be JSON ({error}); make it and pass it live."
            ) from error
        prefix, _, rest = text.partition(":")
        if prefix == "timm" and rest:
            return cls("timm", rest, arguments=given)
        if prefix == "torchhub":
            place, _, entry = rest.rpartition(":")
            if entry and os.path.isdir(place):
                return cls("torchhub", os.path.abspath(place), entry, arguments=given)
            repository, _, ref = place.partition(":")
            if not entry.isidentifier() or not _REPOSITORY.fullmatch(repository):
                raise BackboneError(
                    f"{text!r} is no reference to torch.hub; give torchhub:OWNER/REPOSITORY[:REF]:ENTRY, or "
                    "torchhub:FOLDER:ENTRY of a folder with a hubconf.py."
                )
            return cls("torchhub", repository, entry, ref or None, given)
        if _FACTORY.fullmatch(text) and not os.path.isdir(text):
            return cls("factory", prefix, rest, arguments=given)
        return None

    @classmethod
    def from_dict(cls, values: Any) -> "BackboneReference":
        """The reference in a head's config; a `HeadError` says that it is none."""
        try:
            return cls(**values)
        except TypeError as error:
            raise HeadError(f"The head's config refers to its backbone in a way that is none ({error}).") from error

    def to_dict(self) -> dict[str, Any]:
        """The attributes, for a head's config."""
        return asdict(self)

    def __str__(self) -> str:
        ref = f":{self.ref}" if self.ref else ""
        return {
            "torchhub": f"torchhub:{self.name}{ref}:{self.entry}",
            "timm": f"timm:{self.name}",
            "factory": f"{self.name}:{self.entry}",
            "live": "a live module",
        }[self.kind]

    @property
    def is_local(self) -> bool:
        """Whether it means nothing on other machines."""
        return self.kind == "live" or (self.kind == "torchhub" and not _REPOSITORY.fullmatch(self.name))

    @property
    def runs_code(self) -> bool:
        """Whether making it runs code that is neither this package's nor timm's."""
        return self.kind in ("torchhub", "factory")

    def pinned(self) -> "BackboneReference":
        """The same at the commit where its branch stands now; says so if nobody can tell."""
        if self.kind != "torchhub" or self.is_local or COMMIT.fullmatch(self.ref or ""):
            return self
        commit = _commit_on_github(self.name, self.ref or "HEAD")
        if commit is None:
            logger.warning(
                f"{self} is not pinned: GitHub did not say at which commit it is, so another day it may give another "
                f"backbone; write the commit into the reference, torchhub:{self.name}:COMMIT:{self.entry}."
            )
            return self
        return BackboneReference(self.kind, self.name, self.entry, commit, self.arguments)

    def make(self, trust_remote_code: bool | None = False) -> nn.Module:
        """Makes the module; says what it is about to run.

        Raises:
            BackboneError: it runs code and nobody has said that it may, it cannot be made, or it is no module.
            MissingExtraError: timm is not installed.
        """
        what = self._told()
        if self.runs_code and not trust_remote_code:
            raise BackboneError(
                f"To make the backbone {self}, {what} would run: read that code, then pass trust_remote_code=True "
                "(--trust-remote-code), or make the module yourself and pass it as backbone=…."
            )
        if self.runs_code:
            logger.warning(f"Running {what}, to make the backbone {self}.")
        try:
            module = self._made()
        except (BackboneError, MissingExtraError):
            raise
        except Exception as error:  # whatever a stranger's code raises
            raise BackboneError(
                f"The backbone {self} cannot be made ({first_sentence(error)}); {self._way_out()}"
            ) from error
        if not isinstance(module, nn.Module):
            raise BackboneError(
                f"{self} gives a {type(module).__name__}, not a torch module; choose another entry point."
            )
        return module.eval()

    def _told(self) -> str:
        called = f"{self.entry}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"
        if self.kind == "factory":
            return f"{called} of the module {self.name}"
        if self.is_local:
            return f"{called} of {os.path.join(self.name, 'hubconf.py')}"
        commit = COMMIT.fullmatch(self.ref or "")
        # GitHub serves the commits of forks under the name of the original, too
        at = f"commit {self.ref}" if commit else self.ref or "its default branch"
        return f"{called} of hubconf.py in https://github.com/{self.name} at {at}"

    def _made(self) -> Any:
        if self.kind == "timm":
            return _timm().create_model(self.name, **{"pretrained": True, **self.arguments})
        if self.kind == "factory":
            target: Any = importlib.import_module(self.name)
            for part in self.entry.split("."):
                target = getattr(target, part)
            return target(**self.arguments)
        if self.kind == "live":
            raise BackboneError("A live module cannot be made again; pass it as backbone=….")
        if self.is_local:
            return torch.hub.load(self.name, self.entry, source="local", trust_repo=True, **self.arguments)
        where = self.name if self.ref is None else f"{self.name}:{self.ref}"
        # a commit that no branch stands at any more is none that torch.hub would find
        skip = COMMIT.fullmatch(self.ref or "") is not None
        how: dict[str, Any] = {"trust_repo": True, "skip_validation": skip, "verbose": False}
        return torch.hub.load(where, self.entry, **how, **self.arguments)

    def _way_out(self) -> str:
        if self.kind == "factory":
            return "install what it needs, or make the module yourself and pass it as backbone=…."
        if self.kind == "timm":
            return "check the name and the connection."
        return "check name, entry point and connection, or make the module yourself and pass it as backbone=…."


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise MissingExtraError(
            f'A backbone of timm needs timm and torchvision ({first_sentence(error)}): pip install "soap-hf[timm]".'
        ) from error
    except RuntimeError as error:  # torchvision does not fit torch
        raise MissingExtraError(
            f"timm cannot be imported ({first_sentence(error)}); install a torchvision that fits."
        ) from error


def _commit_on_github(repository: str, ref: str) -> str | None:
    """The commit of a branch or tag; `None` if it cannot be asked."""
    address = f"https://api.github.com/repos/{repository}/commits/{ref}"
    try:
        with urlopen(Request(address, headers={"Accept": "application/vnd.github.sha"}), timeout=SECONDS) as reply:
            text = reply.read(64).decode("ascii", "replace").strip()
    except (URLError, OSError, ValueError):
        return None
    return text if COMMIT.fullmatch(text) else None
