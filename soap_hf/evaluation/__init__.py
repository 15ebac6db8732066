"""Measures of what a head does to a backbone's patch tokens."""

from .arms import arm_projections
from .comparison import Comparison
from .examples import Examples, open_pairs
from .knn import evaluate_knn
from .position import evaluate_position, position_variance_share
from .segmentation import evaluate_segmentation

__all__ = [
    "Comparison",
    "Examples",
    "arm_projections",
    "evaluate_knn",
    "evaluate_position",
    "evaluate_segmentation",
    "open_pairs",
    "position_variance_share",
]
