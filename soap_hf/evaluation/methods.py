"""What a comparison compares: raw tokens, the head's own projection, and baselines behind the same switch."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..data.arguments import refuse_negative_mu
from ..data.preprocessing import ImagePreprocessor
from ..heads.model import SOAPModelWrapper
from ..heads.provenance import SOAP
from ..heads.running import head_preprocessor
from ..layout.probing import evaluation_mode
from ..runtime.errors import HeadError, SOAPError
from ..runtime.projection import SOAPProjection
from ..statistics.semantic_invariance import Mu
from ..statistics.soap_statistics import SOAPStatistics

RAW = "raw"
"""Name of the method that removes nothing, against which the others are measured."""


def method_projections(
    model: SOAPModelWrapper,
    methods: Iterable[str] | None = None,
    *,
    mu: Iterable[Mu] = (),
    preprocess: ImagePreprocessor | None = None,
    rank: int | None = None,
    layer: int | None = None,
) -> dict[str, SOAPProjection]:
    """The projections of one comparison by name, `"raw"` (the identity) first; all are for the raw patch tokens.

    Args:
        model ([`SOAPModelWrapper`]): the head and its backbone.
        methods (iterable of `str`, *optional*): in the order wanted: `"soap"`, at the head's own strength; and the
            baselines `"zero-image"`, the directions along which the patch tokens of one black image differ from each
            other (the debiasing of INSID3, https://github.com/visinf/INSID3), and `"top-pc"`, the principal components
            of largest variance in the head's statistics. Baselines remove their directions entirely. Default: what
            the head does itself.
        mu (iterable of `float` or `"auto"`, *optional*): further strengths, from the head's statistics, by names such
            as `"soap mu=2"`; the head's own is `"soap"`.
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
    names = [own_method(model)] if methods is None else list(dict.fromkeys(methods))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise SOAPError(f"There is no method {unknown[0]!r}; choose from {', '.join(METHODS)}.")
    baselines = [name for name in names if name != SOAP]
    rank = own.rank if rank is None else rank
    if baselines and rank < 1:
        raise HeadError(f"At rank {rank} {' and '.join(baselines)} would remove nothing; pass a rank of at least 1.")
    preprocess = preprocess or head_preprocessor(model)
    projections = {name: _projection(model, name, layer, rank, preprocess) for name in names}
    for strength in dict.fromkeys(mu):
        if strength == model.config.mu:
            projections.setdefault(SOAP, _projection(model, SOAP, layer, rank, preprocess))
        else:
            shown = strength if isinstance(strength, str) else f"{strength:g}"
            projections[f"{SOAP} mu={shown}"] = _of_strength(model, layer, strength)
    return {RAW: SOAPProjection.identity(own.dim), **projections}


def as_baseline(
    model: SOAPModelWrapper, method: str, *, rank: int | None = None, preprocess: ImagePreprocessor | None = None
) -> SOAPModelWrapper:
    """Has a head remove what a baseline removes, in each of its layers; returns the head, to be saved or pushed.

    `model.reweight(mu)` gives SOAP back, if the head has statistics.

    Args:
        model ([`SOAPModelWrapper`]): the head and its backbone.
        method (`str`): `"zero-image"` or `"top-pc"`, as in `method_projections`.
        rank (`int`, *optional*): number of directions; default: as many as the head removes.
        preprocess ([`ImagePreprocessor`], *optional*): of `"zero-image"`; default: the head's.

    Raises:
        SOAPError: no such method, or fewer directions than `rank`.
        HeadError: rank 0, or a head without the statistics that `"top-pc"` needs.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        ...                          image_size=32, patch_size=8))
        >>> model = as_baseline(SOAPModelWrapper.from_backbone(vit, None), "zero-image", rank=2)
        >>> model.config.method, model.config.ranks
        ('zero-image', [2])
    """
    if method == SOAP or method not in METHODS:
        known = ", ".join(name for name in METHODS if name != SOAP)
        raise SOAPError(f"{method!r} is no baseline; choose from {known}.")
    preprocess = preprocess or head_preprocessor(model)
    removed = {
        layer: method_projections(model, [method], preprocess=preprocess, rank=rank, layer=layer)[method]
        for layer in model.config.layers
    }
    return model.set_projections(removed, method=method)


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


def own_method(model: SOAPModelWrapper) -> str:
    """What the head itself does: SOAP, or a baseline that it was given."""
    return getattr(model.config, "method", SOAP)  # the config of the runtime alone has none


def _projection(
    model: SOAPModelWrapper, name: str, layer: int, rank: int, preprocess: ImagePreprocessor
) -> SOAPProjection:
    own = own_projection(model, layer)
    is_own = name == own_method(model) and (name == SOAP or rank == own.rank)
    return own if is_own else METHODS[name](model, layer, rank, preprocess)


def _of_strength(model: SOAPModelWrapper, layer: int, mu: Mu) -> SOAPProjection:
    """SOAP at a strength, with the softness and the threshold of the head."""
    refuse_negative_mu(mu)
    config = model.config
    return layer_statistics(model, layer).projection(mu, config.tau, config.threshold).to(model.device)


METHODS: dict[str, Callable[[SOAPModelWrapper, int, int, ImagePreprocessor], SOAPProjection]] = {
    SOAP: lambda model, layer, rank, preprocess: _of_strength(model, layer, model.config.mu),
    "zero-image": _zero_image,
    "top-pc": _top_pc,
}
"""What may be compared with the raw tokens."""
