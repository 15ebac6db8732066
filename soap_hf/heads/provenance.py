"""What a head says of itself, checked value by value: it comes from anybody, and reports and cards repeat it."""

import math
from typing import Any

from ..runtime.errors import HeadError

SOAP = "soap"
METHODS = {
    SOAP: "the directions that respond to position",
    "zero-image": "the directions along which the patch tokens of one black image differ",
    "top-pc": "the principal components of largest variance",
}
"""What a head may remove: SOAP, or what its evaluations call a baseline."""

COMPONENT_KEYS = {"rank", "component", "score", "standard_error", "variance_share", "weight"}
CHECK_KEYS = {"images", "raw", "clean", "mean", "low", "high", "unseen"}
FIT_KEYS = {"dataset", "image_size", "num_bad_images", "num_images", "num_synthetic", "seed", "versions"}
"""What is said of a component (by `SOAPStatistics.table`), of a check (by `check_head`), and of a fit."""

NAMES = dict.fromkeys(("backbone_name_or_path", "backbone_revision", "base_model", "base_model_revision"), str | None)
KINDS: dict[str, Any] = {"fit": dict | None, "head_format": int, **NAMES}
LISTS = {"layers": int, "hidden_sizes": int, "ranks": int, "layouts": dict, "checks": dict, "components": list}
DTYPES = (None, "float16", "bfloat16", "float32", "float64")
"""What the values of a config are, and of what those are lists that run in parallel."""


MAX_COUNT, MAX_DEPTH, MAX_VALUES = 1 << 18, 32, 1 << 17
"""Largest number in a backbone's config, as long as which transformers makes lists; levels of it; and values."""


def wrong_kinds(config: Any) -> list[str]:
    """The names of a config's values that are of another kind than theirs; that of the backbone is not looked at."""
    right = {name: isinstance(getattr(config, name), kind) for name, kind in KINDS.items()}
    right |= {name: _is_list_of(kind, getattr(config, name)) for name, kind in LISTS.items()}
    right["backbone_dtype"] = config.backbone_dtype in DTYPES
    right["method"] = isinstance(config.method, str) and config.method in METHODS
    right["plain_backbone"] = config.plain_backbone is None or _is_plain(config.plain_backbone)
    return [name for name, holds in right.items() if not holds]


def all_values(tree: Any) -> list[Any]:
    """Every value in nested lists and dicts, these themselves too; a `HeadError` if more or deeper than any head's."""
    found, level = [], [tree]
    for _ in range(MAX_DEPTH):
        found += level
        nested = (value for value in level if isinstance(value, (dict, list, tuple)))
        level = [part for value in nested for part in (value.values() if isinstance(value, dict) else value)]
        if not level:
            return found
        if len(found) + len(level) > MAX_VALUES:
            break
    raise HeadError(f"The head has over {MAX_VALUES} settings or {MAX_DEPTH} levels of them; fetch or fit it again.")


def has_large_number(tree: Any) -> bool:
    """Whether a number in nested lists and dicts is beyond any count in a backbone's config."""
    return any(isinstance(value, int) and abs(value) > MAX_COUNT for value in all_values(tree))


def check_provenance(config: Any) -> None:
    """Refuses a config whose account of components and fit, which reports and cards repeat, is none."""
    components, found, fit = config.components, config.checks, config.fit
    are_checks = all(_holds_numbers(check, CHECK_KEYS) and isinstance(check["images"], int) for check in found)
    right = {
        "components": all(rows and all(_holds_numbers(row, COMPONENT_KEYS) for row in rows) for rows in components),
        "checks": are_checks and len(found) in (0, len(config.layers)),
        "fit": fit is None or _is_fit(fit),
    }
    for name, holds in right.items():
        if not holds:
            raise HeadError(f"The head's config holds {name} of the wrong kind; fetch or fit it again.")


def _is_fit(fit: Any) -> bool:
    return (
        isinstance(fit, dict)
        and set(fit) >= FIT_KEYS
        and isinstance(fit["image_size"], list)
        and [type(side) for side in fit["image_size"]] == [int, int]
        and isinstance(fit["dataset"], str)
        and isinstance(fit["versions"], dict)
        and "soap_hf" in fit["versions"]
    )


def _holds_numbers(values: Any, keys: set[str]) -> bool:
    return (
        isinstance(values, dict)
        and set(values) >= keys
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values.values())
    )


def _is_plain(values: Any) -> bool:
    """Whether this says of a module what a head keeps of one."""
    kinds: dict[str, Any] = {"architecture": str, "num_parameters": int, "tokens": str | None, "reference": dict}
    kinds |= dict.fromkeys(("num_hidden_layers", "patch_size", "num_channels"), int | None)
    if not isinstance(values, dict) or not all(isinstance(values.get(name), kind) for name, kind in kinds.items()):
        return False
    sides = values.get("image_size") or [1, 1]
    return isinstance(sides, list) and [type(side) for side in sides] == [int, int] and 0 < max(sides) <= MAX_COUNT


def _is_list_of(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
