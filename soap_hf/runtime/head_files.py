"""The files of a head: finding, reading and checking them, in a folder or on the Hub, all of one commit."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import is_peft_available
from transformers.utils.hub import cached_file, extract_commit_hash

from .configuration_soap import SOAPConfig
from .errors import HeadError, first_sentence
from .projection import SOAPProjection

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PROCESSOR_FILE = "preprocessor_config.json"
ADAPTER_FILE = "adapter_config.json"

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

DTYPES = {"F16", "BF16", "F32", "F64", "I64"}
"""What the tensors of a head may be, by the names of safetensors."""

MAX_JSON, MAX_HEADER, MAX_FILE = 1 << 21, 1 << 20, 1 << 27
"""Bytes of the largest JSON file, header and safetensors file that are read: ten times what a large head has."""


@dataclass(frozen=True)
class HeadSource:
    """Where a head lives: a folder or a hub repository, and how to reach it. `HeadSource.open` makes one."""

    name_or_path: str
    hub_kwargs: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, name_or_path: str | os.PathLike, **hub_kwargs: Any) -> "HeadSource":
        """All files of one commit, also those that are fetched later, when the branch may have moved on."""
        name, given = os.fspath(name_or_path), {key: value for key, value in hub_kwargs.items() if value is not None}
        revision = commit_of(name, **given)
        return cls(name, {**given, "revision": revision} if revision else given)

    def fetch(self, filename: str) -> Path:
        """Local path of one of the head's files, downloaded if need be.

        Raises:
            HeadError: the head cannot be reached or has no such file.
        """
        path = self.fetch_if_there(filename)
        if path is None:
            raise self._unreachable(filename, OSError("it is not there"))
        return path

    def fetch_if_there(self, filename: str) -> Path | None:
        """As `fetch`, but `None` if the head has no such file; an error if nobody can know."""
        quiet = {"_raise_exceptions_for_missing_entries": False}
        try:
            path = cached_file(self.name_or_path, filename, **quiet, **self.hub_kwargs)
        except (OSError, ValueError) as error:
            raise self._unreachable(filename, error) from error
        if path is None and not os.path.isdir(self.name_or_path) and not self._is_known_to_lack(filename):
            raise self._unreachable(filename, OSError("it was never fetched, and the Hub is out of reach"))
        return None if path is None else Path(path)

    def _is_known_to_lack(self, filename: str) -> bool:
        path = os.path.join(self.hub_kwargs.get("subfolder", ""), filename)
        cache_dir, commit = self.hub_kwargs.get("cache_dir"), self.hub_kwargs.get("revision")
        return try_to_load_from_cache(self.name_or_path, path, cache_dir, commit) is _CACHED_NO_EXIST

    def _unreachable(self, filename: str, error: Exception) -> HeadError:
        return HeadError(
            f"{filename} of the head {self.name_or_path!r} cannot be read ({first_sentence(error)}); check the "
            "name of the head and the connection."
        )

    def base_of_adapter(self) -> "HeadSource | None":
        """The head that an adapter was trained on, which may lie in the same folder; `None` if this is no adapter."""
        path = None
        if is_peft_available():
            with suppress(HeadError):  # the Hub is out of reach, and nobody has asked before
                path = self.fetch_if_there(ADAPTER_FILE)
        if path is None or self.fetch_if_there(CONFIG_FILE):
            return None if path is None else self
        base = read_json(path, f"adapter {self.name_or_path!r}").get("base_model_name_or_path")
        if not isinstance(base, str):
            raise HeadError(f"The adapter {self.name_or_path!r} names no head; load the head, then load_adapter.")
        pinned = ("revision", "subfolder")
        return HeadSource.open(base, **{key: value for key, value in self.hub_kwargs.items() if key not in pinned})

    def without_token(self) -> "HeadSource":
        """The same, without what only its owner may know."""
        return replace(self, hub_kwargs={key: value for key, value in self.hub_kwargs.items() if key != "token"})

    def config(self, config_class: type[SOAPConfig] = SOAPConfig) -> Any:
        """The head's configuration; a `HeadError` if it is missing or malformed, or belongs to something else."""
        values = read_json(self.fetch(CONFIG_FILE), f"config of the head {self.name_or_path!r}")
        if not is_head_config(values):
            raise HeadError(f"{self.name_or_path!r} is not a SOAP head: its config has another model_type.")
        return config_class.from_dict(values)

    def projections(self, config: SOAPConfig) -> dict[int, SOAPProjection]:
        """The head's projections by layer; a `HeadError` if they are missing, or not what the config promises."""
        path = self.fetch(WEIGHTS_FILE)
        if not config.hidden_sizes:
            raise HeadError(f"The config of {self.name_or_path!r} has no hidden_sizes; fit or fetch it again.")
        names = {layer: (f"projections.{layer}.basis", f"projections.{layer}.weights") for layer in config.layers}
        tensors, _ = read_tensors(path, {name for pair in names.values() for name in pair}, what="head")
        projections = {}
        for (layer, pair), dim, rank in zip(names.items(), config.hidden_sizes, config.ranks, strict=True):
            for name, shape in zip(pair, ((dim, rank), (rank,)), strict=True):
                if tuple(tensors[name].shape) != shape or not tensors[name].is_floating_point():
                    raise HeadError(
                        f"Tensor {name!r} of the head should be floating-point of shape {shape}, but is "
                        f"{tensors[name].dtype} of shape {tuple(tensors[name].shape)}; fit or fetch it again."
                    )
            projections[layer] = SOAPProjection(*(tensors[name] for name in pair))
        return projections

    def backbone_reference(self, config: SOAPConfig) -> tuple[str, dict[str, Any]]:
        """The backbone's hub id or folder, and the keyword arguments that pin it.

        One that starts with `./` or `../` is relative to the head: beside or inside its folder, or in its repository.
        """
        name, reference = self.name_or_path, config.backbone_name_or_path
        if not reference or getattr(config, "plain_backbone", None):
            way = "load it with from_pretrained(…, backbone=…), or with soap-hf, if it is a plain module's"
            raise HeadError(f"The head {name!r} names no backbone of transformers; {way}.")
        if not reference.startswith(("./", "../")):
            return reference, {"revision": config.backbone_revision} if config.backbone_revision else {}
        if os.path.isdir(name):
            # what comes with a head was written by this package, as safetensors
            only_safe = {"use_safetensors": True} if reference.startswith("./") else {}
            return os.path.abspath(os.path.join(name, reference)), only_safe
        inside = os.path.normpath(os.path.join(self.hub_kwargs.get("subfolder", ""), reference))
        if inside.startswith(".."):
            raise HeadError(f"The head {name!r} points to a backbone outside its repository: {reference!r}.")
        revision = self.hub_kwargs.get("revision")
        return name, {"subfolder": inside, "revision": revision, "use_safetensors": True}


def commit_of(name_or_path: str, revision: str | None = None, **hub_kwargs: Any) -> str | None:
    """The commit that a branch or tag on the Hub stands at now; `revision` itself of a folder, or without the Hub."""
    if os.path.isdir(name_or_path):
        return revision
    try:
        path = cached_file(name_or_path, CONFIG_FILE, revision=revision, **hub_kwargs)
    except (OSError, ValueError):
        return revision
    return extract_commit_hash(path, None) or revision


def is_head_config(values: Any) -> bool:
    """Whether a `config.json` holds the config of a head."""
    return isinstance(values, dict) and values.get("model_type") == SOAPConfig.model_type


def read_json(path: Path, what: str) -> Any:
    """What a JSON file of a head holds; a `HeadError` says which (`what`) is not JSON or larger than any head's."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise OSError(f"it has more than {MAX_JSON} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HeadError(f"The {what} cannot be read ({first_sentence(error)}); fetch or fit it again.") from error


def read_tensors(
    path: str | os.PathLike, names: set[str] | None, *, what: str, trusted: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, of real numbers, all of them finite, and its metadata.

    It must hold the tensors `names`, no more and no fewer; `None` reads what there is. A `trusted` file is the user's
    own, of any size and any dtypes.

    Raises:
        HeadError: the file (`what` says which) is missing, not safetensors, too large, or its tensors are not as told.
    """
    try:
        if not trusted:
            _refuse_large(Path(path))
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            if names is not None and found != names:
                missing, extra = sorted(names - found), sorted(found - names)
                raise HeadError(
                    f"The {what} {path} does not hold the tensors its config promises (missing: {missing or 'none'}, "
                    f"unexpected: {extra or 'none'}); fetch or fit it again."
                )
            for name in sorted(found):
                if (dtype := file.get_slice(name).get_dtype()) not in DTYPES and not trusted:
                    raise HeadError(f"Tensor {name!r} of the {what} {path} is {dtype}; fetch or fit it again.")
            tensors = {name: file.get_tensor(name) for name in sorted(found)}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise HeadError(f"The {what} {path} cannot be read as safetensors ({error}); fetch it again.") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise HeadError(f"Tensor {name!r} of the {what} {path} holds NaN or Inf; fetch or fit it again.")
    return tensors, metadata


def _refuse_large(path: Path) -> None:
    """Refuses a file by what it claims, before any of it is read."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER or path.stat().st_size > MAX_FILE:
        raise OSError(f"it has {path.stat().st_size} bytes, and by what it says {header} of them are its header")


def check_same_architecture(stored: PretrainedConfig | None, actual: PretrainedConfig) -> None:
    """Refuses a backbone of another architecture or width than the head's, and names the first difference."""
    sizes = ("hidden_size", "hidden_sizes", "embed_dim", "num_hidden_layers", "depths", "patch_size")
    for name in ("model_type", *sizes) if stored is not None else ():
        here, there = (getattr(config, name, None) for config in (stored, actual))
        here, there = (list(value) if isinstance(value, tuple) else value for value in (here, there))
        if here != there:
            raise HeadError(
                f"The head was fitted on a backbone with {name}={here}, but this one has {name}={there}; load the "
                "head with the backbone it was fitted on, or fit a new head."
            )
