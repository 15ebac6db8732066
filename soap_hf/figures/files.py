"""The figures that are saved beside a head."""

from .records import FittedHead, backbone_label
from .responses import response_maps
from .scores import score_curve
from .style import to_png


def head_figures(head: FittedHead) -> dict[str, bytes]:
    """PNG files by name, for `save_pretrained(…, figures=…)`: score curve and response maps.

    Args:
        head ([`SOAPModelWrapper`] or [`HeadRecord`]): a head with statistics.

    Raises:
        HeadError: the head was saved without statistics, or made without a fit.
    """
    return {
        "score_curve.png": to_png(score_curve({backbone_label(head.config): head})),
        "response_maps.png": to_png(response_maps(head)),
    }
