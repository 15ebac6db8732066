"""What a comparison compares: raw tokens, the head's own projection, and baselines behind the same switch."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..data.preprocessing import ImagePreprocessor
from ..heads.model import SOAPModelWrapper
from ..heads.running import head_preprocessor
from ..layout.probing import evaluation_mode
from ..runtime.errors import HeadError, SOAPError
from ..runtime.projection import SOAPProjection
from ..statistics.soap_statistics import SOAPStatistics

RAW = "raw"
"""Name of the method that removes nothing, against which the others are measured."""


def method_projections(
    model: SOAPModelWrapper,
    methods: Iterable[str] = ("soap",),
    *,
    preprocess: ImagePreprocessor | None = None,
    rank: int | None = None,
    layer: int | None = None,
) -> dict[str, SOAPProjection]:
    """The projections of one comparison by name, `"raw"` (the identity) first; all are for the raw patch tokens.

    Args:
        model ([`SOAPModelWrapper`]): the head and its backbone.
        methods (iterable of `str`, defaults to `("soap",)`): in the order wanted: `"soap"`, the head's own projection;
            and the baselines `"zero-image"`, the directions along which the patch tokens of one black image differ
            from each other (the debiasing of INSID3, https://github.com/visinf/INSID3), and `"top-pc"`, the principal
            components of largest variance in the head's statistics. Baselines remove their directions entirely.
        preprocess ([`ImagePreprocessor`], *optional*): gives the black image its size and colours; default: the
            head's.
        rank (`int`, *optional*): number of directions of the baselines; default: the head's.
        layer (`int`, *optional*): one of the head's layers; default: the last one.

    Raises:
        SOAPError: no such method, or fewer directions than `rank`.
        HeadError: no such layer; a head of rank 0, or without the statistics that `"top-pc"` needs.
    """
    layer = head_layer(model, layer)
    own = own_projection(model, layer)
    names = list(dict.fromkeys(methods))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise SOAPError(f"There is no method {unknown[0]!r}; choose from {', '.join(METHODS)}.")
    baselines = [name for name in names if name != "soap"]
    rank = own.rank if rank is None else rank
    if baselines and rank < 1:
        raise HeadError(f"At rank {rank} {' and '.join(baselines)} would remove nothing; pass a rank of at least 1.")
    preprocess = preprocess or head_preprocessor(model)
    projections = {name: METHODS[name](model, layer, rank, preprocess) for name in names}
    return {RAW: SOAPProjection.identity(own.dim), **projections}


def head_layer(model: SOAPModelWrapper, layer: int | None = None) -> int:
    """A layer of the head, by default the last one listed.

    Raises:
        HeadError: the head does not clean that layer.
    """
    layers = model.config.layers
    if layer is not None and layer not in layers:
        raise HeadError(f"This head has no layer {layer}; choose from {', '.join(map(str, layers))}.")
    return layers[-1] if layer is None else layer


def own_projection(model: SOAPModelWrapper, layer: int) -> SOAPProjection:
    """The head's projection of one layer."""
    return model.get_submodule(f"projections.{layer}")


def layer_statistics(model: SOAPModelWrapper, layer: int) -> SOAPStatistics:
    """What the fit learned of one layer.

    Raises:
        HeadError: the head was saved without statistics.
    """
    statistics = model.statistics
    return statistics if isinstance(statistics, SOAPStatistics) else statistics[layer]


@torch.no_grad()
def zero_image_directions(model: SOAPModelWrapper, layer: int, preprocess: ImagePreprocessor) -> Tensor:
    """Directions along which the patch tokens of one black image differ, strongest first: `(D, found)` orthonormal.

    Those that are mere round-off are left out.
    """
    pixels = preprocess.normalize(torch.zeros(1, 3, *preprocess.size)).to(model.device, model.dtype)
    with evaluation_mode(model):
        tokens = model.patch_tokens(pixels, layer, raw=True)
    tokens = normalize(tokens.flatten(0, -2).cpu().to(torch.float64), dim=-1)
    _, strengths, directions = torch.linalg.svd(tokens - tokens.mean(dim=0), full_matrices=False)
    round_off = 10 * torch.finfo(model.dtype).eps * len(tokens) ** 0.5  # of unit tokens
    return directions[: int((strengths > round_off).sum())].T


def leading(directions: Tensor, rank: int) -> SOAPProjection:
    """Removes the first `rank` directions of [`zero_image_directions`] entirely.

    Raises:
        SOAPError: there are fewer.
    """
    found = directions.shape[1]
    if found < rank:
        raise SOAPError(
            f"The patch tokens of an empty image differ along {found} directions only; pass a rank ≤ that."
        )
    return SOAPProjection(directions[:, :rank], torch.ones(rank))


def _zero_image(model: SOAPModelWrapper, layer: int, rank: int, preprocess: ImagePreprocessor) -> SOAPProjection:
    return leading(zero_image_directions(model, layer, preprocess), rank).to(model.device)


def _top_pc(model: SOAPModelWrapper, layer: int, rank: int, preprocess: ImagePreprocessor) -> SOAPProjection:
    single = layer_statistics(model, layer)
    basis = single.components[:, single.columns(range(rank))]
    return SOAPProjection(basis, torch.ones(rank)).to(model.device)


METHODS: dict[str, Callable[[SOAPModelWrapper, int, int, ImagePreprocessor], SOAPProjection]] = {
    "soap": lambda model, layer, rank, preprocess: own_projection(model, layer),
    "zero-image": _zero_image,
    "top-pc": _top_pc,
}
"""What may be compared with the raw tokens."""
