"""Measures of what a head does to a backbone's patch tokens. The door is `comparison`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..compat import need

if TYPE_CHECKING:
    from .arguments import ViewRule
    from .comparison import Comparison
    from .examples import Examples, open_pairs
    from .homographies import evaluate_homographies
    from .keypoints import evaluate_keypoints
    from .knn import evaluate_knn
    from .matching import evaluate_matching
    from .methods import as_baseline, method_projections
    from .position import evaluate_position, position_variance_share
    from .saliency import evaluate_saliency
    from .segmentation import evaluate_segmentation
    from .strength import choose_mu

need("datasets", "An evaluation", "fit")

__all__ = [
    "Comparison",
    "Examples",
    "ViewRule",
    "as_baseline",
    "choose_mu",
    "evaluate_homographies",
    "evaluate_keypoints",
    "evaluate_knn",
    "evaluate_matching",
    "evaluate_position",
    "evaluate_saliency",
    "evaluate_segmentation",
    "method_projections",
    "open_pairs",
    "position_variance_share",
]

_LAZY = {  # a command line reads the arguments alone, and saliency needs an extra that the others do not
    "Comparison": "comparison",
    "Examples": "examples",
    "ViewRule": "arguments",
    "as_baseline": "methods",
    "choose_mu": "strength",
    "evaluate_homographies": "homographies",
    "evaluate_keypoints": "keypoints",
    "evaluate_knn": "knn",
    "evaluate_matching": "matching",
    "evaluate_position": "position",
    "evaluate_saliency": "saliency",
    "evaluate_segmentation": "segmentation",
    "method_projections": "methods",
    "open_pairs": "examples",
    "position_variance_share": "position",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
