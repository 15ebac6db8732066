"""A head at a glance: what its files say, read in a moment, without torch and transformers.

Only what is in perfect order is read here. Everything else is left to [`HeadRecord`], whose errors say what is wrong.
"""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors import safe_open

from ..runtime.errors import HeadError
from .provenance import SOAP, check_provenance, has_large_number, wrong_kinds

DEFAULTS: dict[str, Any] = {
    **{"backbone_name_or_path": None, "backbone_revision": None, "backbone_dtype": None, "plain_backbone": None},
    **{"base_model": None, "base_model_revision": None},
    **{
        "method": SOAP,
        "mu": "auto",
        "tau": 0.05,
        "threshold": 0.75,
        "layers": [-1],
        "checks": [],
        "components": [],
        "fit": None,
        "head_format": 1,
    },
}
"""What a config need not say, as in `SOAPConfig`."""

KNOWN = {
    *("architectures", "auto_map", "backbone", "backbone_digests", "dtype", "hidden_sizes", "layouts", "model_type"),
    *("out_features", "out_indices", "ranks", "transformers_version", *DEFAULTS),
}
LARGEST = {"config.json": 1 << 21, "model.safetensors": 1 << 24}
"""Bytes that are read here."""


def glance(name_or_path: str, *, revision: str | None = None, token: Any = None) -> SimpleNamespace | None:
    """The config of a head by folder or hub id, with what reports show of it; `None` if anything is unusual.

    Example:
        >>> glance("no-such-head") is None
        True
    """
    try:
        config_file, weights_file = _files(name_or_path, revision, token)
        values = json.loads(config_file.read_text(encoding="utf-8"))
        if values["model_type"] != "soap" or not set(values) <= KNOWN or not _is_usual(values):
            return None
        config = SimpleNamespace(**{**DEFAULTS, **values})
        if wrong_kinds(config) or not _is_sound(config):
            return None
        check_provenance(config)
        return config if _hold(weights_file, config) else None
    except Exception:  # whatever it is, the long way says it better
        return None


def _files(name: str, revision: str | None, token: Any) -> list[Path]:
    """Local paths of config and weights, of one commit."""
    if os.path.isdir(name):
        paths = [Path(name, file) for file in LARGEST]
    else:
        from huggingface_hub import hf_hub_download

        paths = []
        for file in LARGEST:
            paths.append(Path(hf_hub_download(name, file, revision=revision, token=token)))
            revision = paths[0].parent.name  # the commit, as the cache has it
    for path, most in zip(paths, LARGEST.values(), strict=True):
        if path.stat().st_size > most:
            raise HeadError(f"{path} is large.")
    return paths


def _is_usual(values: dict[str, Any]) -> bool:
    """Whether the config says nothing that makes loading refuse it, beside what is checked of its own values."""
    backbone, code = values.get("backbone") or {}, values.get("auto_map", {})
    named = all(isinstance(name, str) for name in code.values())
    return named and not any(name.startswith("_") for name in backbone) and not has_large_number(backbone)


def _is_sound(config: SimpleNamespace) -> bool:
    """Whether the lists of a config run in parallel and its numbers are numbers."""
    layers, numbers = config.layers, (config.tau, config.threshold, 0.0 if config.mu == "auto" else config.mu)
    lists = [config.hidden_sizes, config.ranks, config.layouts, *([config.components] if config.components else [])]
    return (
        config.head_format == 1
        and len(set(layers)) == len(layers) > 0
        and min(layers) >= -1
        and all(len(one) == len(layers) for one in lists)
        and all(0 <= rank <= size for rank, size in zip(config.ranks, config.hidden_sizes, strict=True))
        and all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
    )


def _hold(path: Path, config: SimpleNamespace) -> bool:
    """Whether the weights are those that the config promises."""
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    pairs = [(f"projections.{layer}.basis", f"projections.{layer}.weights") for layer in config.layers]
    if set(tensors) != {name for pair in pairs for name in pair}:
        return False
    for (basis_name, weights_name), size, rank in zip(pairs, config.hidden_sizes, config.ranks, strict=True):
        basis, weights = tensors[basis_name], tensors[weights_name]
        right = basis.shape == (size, rank) and weights.shape == (rank,)
        if not right or {basis.dtype.kind, weights.dtype.kind} != {"f"}:
            return False
        basis = basis.astype(np.float64)
        if not np.allclose(basis.T @ basis, np.eye(rank), atol=1e-3) or not ((weights >= 0) & (weights <= 1)).all():
            return False  # NaN fails both
    return True
