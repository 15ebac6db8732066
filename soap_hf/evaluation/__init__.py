"""Measures of what a head does to a backbone's patch tokens. The door is `comparison`."""

from typing import TYPE_CHECKING, Any

from ..compat import need

need("datasets", "An evaluation", "fit")

from .comparison import Comparison
from .examples import Examples, open_pairs
from .homographies import evaluate_homographies
from .keypoints import evaluate_keypoints
from .knn import evaluate_knn
from .matching import evaluate_matching
from .methods import method_projections
from .position import evaluate_position, position_variance_share
from .segmentation import evaluate_segmentation
from .strength import choose_mu
from .views import ViewRule

if TYPE_CHECKING:
    from .saliency import evaluate_saliency

__all__ = [
    "Comparison",
    "Examples",
    "ViewRule",
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


def __getattr__(name: str) -> Any:
    if name != "evaluate_saliency":  # which needs an extra that the others do not
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .saliency import evaluate_saliency

    return evaluate_saliency
