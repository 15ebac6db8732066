"""The files of a head: finding, reading and checking them, in a folder or on the Hub."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from torch import Tensor
from transformers.configuration_utils import PretrainedConfig
from transformers.utils.hub import cached_file, resolve_revision

from .configuration_soap import SOAPConfig, all_values
from .errors import HeadError, first_sentence
from .projection import SOAPProjection
from .soap_statistics import SOAPStatistics
from .tensor_files import read_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PROCESSOR_FILE = "preprocessor_config.json"
FIGURES_FOLDER = "figures"
EVALUATIONS_FOLDER = "evaluation"
OPTIONAL_FILES = (
    "statistics*.safetensors",
    PROCESSOR_FILE,
    f"{FIGURES_FOLDER}/*.png",
    f"{EVALUATIONS_FOLDER}/*/*.*",
)
"""Files that a head may have: those of an earlier head in the same place must not be taken for a later one's."""

BACKBONE_FOLDER = "backbone"
INCLUDED_BACKBONE = f"./{BACKBONE_FOLDER}"
"""How a head refers to a backbone that is saved with it."""

MAX_JSON = 1 << 21
"""Bytes; the config of a head of forty layers has some hundred thousand."""

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass(frozen=True)
class HeadSource:
    """Where a head lives: a folder or a hub repository, and how to reach it."""

    name_or_path: str
    hub_kwargs: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def at_one_commit(cls, name_or_path: str, hub_kwargs: dict[str, Any]) -> "HeadSource":
        """All files of one commit, also those that are fetched later, when the branch may have moved on."""
        how = {name: hub_kwargs.get(name) for name in ("token", "cache_dir")}
        revision = resolve_revision(
            name_or_path,
            hub_kwargs.get("revision"),
            local_files_only=hub_kwargs.get("local_files_only", False),
            **how,
        )
        return cls(name_or_path, {**hub_kwargs, "revision": revision} if revision else hub_kwargs)

    def fetch(self, filename: str) -> Path:
        """Local path of one of the head's files, downloaded if need be.

        Raises:
            HeadError: the head cannot be reached or has no such file.
        """
        try:
            path = cached_file(self.name_or_path, filename, **self.hub_kwargs)
            if path is None:
                raise OSError("it is not there")
            return Path(path)
        except (OSError, ValueError) as error:
            raise self._unreachable(filename, error) from error

    def fetch_if_there(self, filename: str) -> Path | None:
        """As `fetch`, but `None` if the head has no such file.

        Raises:
            HeadError: the head cannot be reached, so that nobody knows.
        """
        try:
            path = cached_file(
                self.name_or_path, filename, _raise_exceptions_for_missing_entries=False, **self.hub_kwargs
            )
        except (OSError, ValueError) as error:
            raise self._unreachable(filename, error) from error
        if path is None and not os.path.isdir(self.name_or_path) and not self._is_known_to_lack(filename):
            raise self._unreachable(filename, OSError("it was never fetched, and the Hub is out of reach"))
        return None if path is None else Path(path)

    def _is_known_to_lack(self, filename: str) -> bool:
        path = os.path.join(self.hub_kwargs.get("subfolder", ""), filename)
        revision = self.hub_kwargs.get("revision")
        commit = getattr(revision, "resolved", revision)
        cache_dir = self.hub_kwargs.get("cache_dir")
        return try_to_load_from_cache(self.name_or_path, path, cache_dir, commit) is _CACHED_NO_EXIST

    def _unreachable(self, filename: str, error: Exception) -> HeadError:
        return HeadError(
            f"{filename} of the head {self.name_or_path!r} cannot be read ({first_sentence(error)}); check the "
            "name of the head and the connection."
        )

    def backbone_reference(self, config: SOAPConfig) -> tuple[str, dict[str, Any]]:
        """The backbone's hub id or folder, and the keyword arguments that pin it.

        A reference that starts with `./` or `../` is relative to the head: beside or inside its folder, or inside its
        repository.

        Raises:
            HeadError: the config names no backbone, or one outside the repository.
        """
        reference = config.backbone_name_or_path
        if not reference:
            raise HeadError(
                f"The head {self.name_or_path!r} names no backbone; load it with from_pretrained(…, backbone=…)."
            )
        if not reference.startswith(("./", "../")):
            return reference, {"revision": config.backbone_revision} if config.backbone_revision else {}
        if os.path.isdir(self.name_or_path):
            # what comes with a head was written by this package, as safetensors
            only_safe = {"use_safetensors": True} if reference.startswith("./") else {}
            return os.path.normpath(os.path.join(self.name_or_path, reference)), only_safe
        inside = os.path.normpath(os.path.join(self.hub_kwargs.get("subfolder", ""), reference))
        if inside.startswith(".."):
            raise HeadError(
                f"The head {self.name_or_path!r} points to a backbone outside its repository: {reference!r}."
            )
        revision = self.hub_kwargs.get("revision")
        return self.name_or_path, {"subfolder": inside, "revision": revision, "use_safetensors": True}


def read_json(path: Path, what: str) -> Any:
    """What a JSON file of a head holds; `what` says which, for error messages.

    Raises:
        HeadError: it cannot be read, is not JSON, or is larger or nested more deeply than any head's.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise OSError(f"it has more than {MAX_JSON} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HeadError(f"The {what} cannot be read ({first_sentence(error)}); fetch or fit it anew.") from error
    all_values(values)
    return values


def read_config(source: HeadSource) -> SOAPConfig:
    """Reads the configuration of a head.

    Raises:
        HeadError: it is missing or malformed, or belongs to something else.
    """
    values = read_json(source.fetch(CONFIG_FILE), f"config of the head {source.name_or_path!r}")
    if not isinstance(values, dict) or values.get("model_type") != SOAPConfig.model_type:
        raise HeadError(f"{source.name_or_path!r} is not a SOAP head: its config has another model_type.")
    return SOAPConfig.from_dict(values)


def tensor_names(config: SOAPConfig) -> dict[int, tuple[str, str]]:
    """Names of basis and weights of each layer in the head's weights file."""
    return {layer: (f"projections.{layer}.basis", f"projections.{layer}.weights") for layer in config.layers}


def read_projections(source: HeadSource, config: SOAPConfig) -> dict[int, SOAPProjection]:
    """Reads and checks the projections of a head.

    Raises:
        HeadError: the file is missing or malformed, or does not hold what the config promises.
    """
    path = source.fetch(WEIGHTS_FILE)
    if not config.hidden_sizes:
        raise HeadError(f"The config of the head {source.name_or_path!r} has no hidden_sizes; fit or fetch it anew.")
    names = tensor_names(config)
    tensors, _ = read_tensors(path, {name for pair in names.values() for name in pair}, what="head")
    projections = {}
    for (layer, (basis, weights)), dim, rank in zip(names.items(), config.hidden_sizes, config.ranks, strict=True):
        _check_shape(basis, tensors[basis], (dim, rank))
        _check_shape(weights, tensors[weights], (rank,))
        projections[layer] = SOAPProjection(tensors[basis], tensors[weights])
    return projections


def statistics_file(config: SOAPConfig, layer: int) -> str:
    """Name of the file with the statistics of a layer."""
    return "statistics.safetensors" if len(config.layers) == 1 else f"statistics.{layer}.safetensors"


def read_statistics(source: HeadSource, config: SOAPConfig) -> dict[int, SOAPStatistics]:
    """Reads the statistics of a head, by layer; empty if it was saved without.

    Raises:
        HeadError: a file is malformed.
    """
    paths = {layer: source.fetch_if_there(statistics_file(config, layer)) for layer in config.layers}
    if any(path is None for path in paths.values()):
        return {}
    loaded = {layer: SOAPStatistics.load(path) for layer, path in paths.items() if path}
    widths = [len(statistics.mean) for statistics in loaded.values()]
    if widths != config.hidden_sizes:
        raise HeadError(
            f"The statistics are of tokens of width {widths}, but the head is for width {config.hidden_sizes}; fetch "
            "or fit it anew."
        )
    return loaded


def check_same_architecture(stored: PretrainedConfig | None, actual: PretrainedConfig) -> None:
    """Refuses a backbone that is not of the architecture and width the head was fitted on.

    Raises:
        HeadError: names the first difference.
    """
    if stored is None:
        return
    for name in (
        "model_type",
        "hidden_size",
        "hidden_sizes",
        "embed_dim",
        "num_hidden_layers",
        "depths",
        "patch_size",
    ):
        here, there = (_as_list(getattr(config, name, None)) for config in (stored, actual))
        if here != there:
            raise HeadError(
                f"The head was fitted on a backbone with {name}={here}, but this one has {name}={there}; load the "
                "head with the backbone it was fitted on, or fit a new head."
            )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def relative_reference(backbone: str, folder: str | os.PathLike) -> str:
    """How a head in `folder` refers to a backbone: relative if that lies inside or beside it, else as it is."""
    if not os.path.isdir(backbone):
        return backbone
    head, target = os.path.realpath(folder), os.path.realpath(backbone)
    relative = Path(os.path.relpath(target, head)).as_posix()
    if os.path.commonpath([os.path.dirname(head), target]) != os.path.dirname(head):
        return target
    return relative if relative.startswith("..") else f"./{relative}"


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise HeadError(
            f"Tensor {name!r} of the head should be floating-point of shape {shape}, but is {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}; fit or fetch it anew."
        )
