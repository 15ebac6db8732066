"""The command that fits a head again, as a card gives it: with hub ids as they are, and without the fitter's paths."""

import json
import os
import re
import shlex
from pathlib import PurePath, PureWindowsPath
from typing import Any

from ..layout.references import BackboneReference
from .config import SOAPConfig
from .opening import INCLUDED_BACKBONE

PLACE = "path/to"
"""Stands for a folder that nobody else has."""

BACKBONE, IMAGES = f"{PLACE}/backbone", f"{PLACE}/images"


def is_hub_id(name: str | None) -> bool:
    """Whether a reference can be a repository on the Hub rather than a path."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name or "") is not None


def is_on_hub(fit: dict[str, Any]) -> bool:
    """Whether a fit's data set is on the Hub; heads of 0.1.0 do not say it, but only names of the Hub have a slash."""
    return fit["source"] == "hub" if "source" in fit else "/" in fit.get("dataset", "")


def base_of(config: SOAPConfig) -> tuple[str | None, str | None]:
    """Hub id and commit of the backbone that a head was fitted on, which it may have taken along; else `None`."""
    reference = config.backbone_name_or_path
    if config.plain_backbone is not None:
        return None, None
    if reference == INCLUDED_BACKBONE:
        return (config.base_model, config.base_model_revision) if is_hub_id(config.base_model) else (None, None)
    return (reference, config.backbone_revision) if is_hub_id(reference) else (None, None)


def fit_command(config: SOAPConfig) -> str:
    """The command that fits this head again."""
    fit: Any = config.fit
    backbone, revision = _backbone(config)
    height, width = fit["image_size"]
    options: dict[str, Any] = {"output": "my-head", "revision": revision}
    names = ("config_name", "split", "image_column", "num_images", "num_synthetic")
    options |= {name: fit.get(name) for name in names}
    options |= {"image_size": height if height == width else f"{height}x{width}"}
    options |= {"mu": fit.get("mu", config.mu), "tau": config.tau, "threshold": config.threshold}
    options |= {"seed": fit["seed"], "dtype": config.backbone_dtype}
    given = [(name, value) for name, value in options.items() if value is not None]
    given += [("layer", layer) for layer in config.layers if config.layers != [-1]]
    if plain := config.plain_backbone:
        arguments = _public(plain["reference"].get("arguments"))
        given += [("tokens", plain["tokens"])] * bool(plain["tokens"])
        given += [("backbone-arguments", json.dumps(arguments))] * bool(arguments)
    words = ["soap-hf", "fit", backbone, _images(fit)]
    words += [word for name, value in given for word in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join(words + ["--isotropic"] * bool(fit.get("isotropic")) + ["--exact"] * bool(fit.get("exact")))


def what_to_fill_in(command: str) -> str | None:
    """What to say of a command that names folders of the fitter's."""
    return f"Put your own in the place of what begins with `{PLACE}`." if PLACE in command else None


def _backbone(config: SOAPConfig) -> tuple[str, str | None]:
    if config.plain_backbone is not None:
        made = BackboneReference.from_dict(config.plain_backbone["reference"])
        return (BACKBONE if made.is_local else str(made)), None
    base, revision = base_of(config)
    if base is not None:
        return base, revision
    reference = config.backbone_name_or_path
    return (BACKBONE if reference in (None, INCLUDED_BACKBONE) else _place(reference)), None


def _images(fit: dict[str, Any]) -> str:
    name = str(fit["dataset"])
    if is_on_hub(fit):
        return name
    return IMAGES if fit.get("source") == "memory" or name == "a data set in memory" else _place(name)


def _place(path: Any) -> str:
    return f"{PLACE}/{PureWindowsPath(path).name or PurePath(path).name or 'backbone'}"


def _public(value: Any) -> Any:
    """Nested arguments without the folders of the fitter's disk."""
    if isinstance(value, dict):
        return {name: _public(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_public(one) for one in value]
    is_path = isinstance(value, str) and (
        os.path.isabs(value) or PureWindowsPath(value).is_absolute() or value.startswith(("~", "./", "../", "file:"))
    )
    return _place(value) if is_path else value
