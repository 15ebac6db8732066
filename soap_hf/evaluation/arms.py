"""The arms of one comparison: raw tokens, the head's own projection, and rivals behind the same switch."""

from collections.abc import Callable, Iterable

import torch
from torch.nn.functional import normalize

from ..call_convention import evaluation_mode, native_image_size
from ..errors import HeadError, SOAPError
from ..modeling_soap import SOAPModelWrapper
from ..patch_layout import as_size
from ..preprocessing import ImagePreprocessor, load_image_processor
from ..probing import probe_size
from ..projection import SOAPProjection
from ..soap_statistics import SOAPStatistics

RAW = "raw"
"""Name of the arm that removes nothing, against which the others are measured."""


def arm_projections(
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
            `"zero-image"`, the directions along which the patch tokens of one black image differ from each other (the
            debiasing of INSID3, https://github.com/visinf/INSID3); `"top-pc"`, the principal components of largest
            variance in the head's statistics. The last two are removed entirely.
        preprocess ([`ImagePreprocessor`], *optional*): gives the black image its size and colours; default: the
            head's.
        rank (`int`, *optional*): number of directions of `"zero-image"` and `"top-pc"`; default: the head's.
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
    rivals = [name for name in names if name != "soap"]
    rank = own.rank if rank is None else rank
    if rivals and rank < 1:
        raise HeadError(f"At rank {rank} {' and '.join(rivals)} would remove nothing; pass a rank of at least 1.")
    preprocess = preprocess or head_preprocessor(model)
    arms = {name: METHODS[name](model, layer, rank, preprocess) for name in names}
    return {RAW: SOAPProjection.identity(own.dim), **arms}


def head_layer(model: SOAPModelWrapper, layer: int | None = None) -> int:
    """A layer of the head, by default the last one listed.

    Raises:
        HeadError: the head does not clean that layer.
    """
    layers = model.config.layers
    if layer is not None and layer not in layers:
        raise HeadError(f"This head has no layer {layer}; choose from {', '.join(map(str, layers))}.")
    return layers[-1] if layer is None else layer


def head_preprocessor(model: SOAPModelWrapper, image_size: int | tuple[int, int] | None = None) -> ImagePreprocessor:
    """What makes pixels for a head: its image processor, else its backbone's, else the documented default.

    Args:
        model ([`SOAPModelWrapper`]): the head and its backbone.
        image_size (`int` or `(height, width)`, *optional*): the model's input size; default: the processor's.

    Raises:
        DataError: the processor cannot be read, or does not make images of that size.
    """
    size, native = as_size(image_size), native_image_size(model.backbone.config)
    config = model.config
    pin = {"revision": config.backbone_revision} if config.backbone_revision else {}
    processor = model.image_processor or load_image_processor(
        config.backbone_name_or_path, size or probe_size(model.backbone), **pin
    )
    return ImagePreprocessor(processor, size, native)


def own_projection(model: SOAPModelWrapper, layer: int) -> SOAPProjection:
    """The head's projection of one layer."""
    return model.get_submodule(f"projections.{layer}")


def _soap(model: SOAPModelWrapper, layer: int, rank: int, preprocess: ImagePreprocessor) -> SOAPProjection:
    return own_projection(model, layer)


@torch.no_grad()
def _zero_image(model: SOAPModelWrapper, layer: int, rank: int, preprocess: ImagePreprocessor) -> SOAPProjection:
    pixels = preprocess.normalize(torch.zeros(1, 3, *preprocess.size)).to(model.device, model.dtype)
    with evaluation_mode(model):
        tokens = model.patch_tokens(pixels, layer, raw=True)
    tokens = normalize(tokens.flatten(0, -2).cpu().to(torch.float64), dim=-1)
    _, strengths, directions = torch.linalg.svd(tokens - tokens.mean(dim=0), full_matrices=False)
    round_off = 10 * torch.finfo(model.dtype).eps * len(tokens) ** 0.5  # of unit tokens
    found = int((strengths > round_off).sum())
    if found < rank:
        raise SOAPError(
            f"The patch tokens of an empty image differ along {found} directions only; pass a rank ≤ that."
        )
    return SOAPProjection(directions[:rank].T, torch.ones(rank)).to(model.device)


def layer_statistics(model: SOAPModelWrapper, layer: int) -> SOAPStatistics:
    """What the fit learned of one layer.

    Raises:
        HeadError: the head was saved without statistics.
    """
    statistics = model.statistics
    return statistics if isinstance(statistics, SOAPStatistics) else statistics[layer]


def _top_pc(model: SOAPModelWrapper, layer: int, rank: int, preprocess: ImagePreprocessor) -> SOAPProjection:
    single = layer_statistics(model, layer)
    columns = {number: column for column, number in enumerate(single.component_indices.tolist())}
    absent = [number for number in range(rank) if number not in columns]
    if absent:
        raise HeadError(
            f"The head's statistics do not hold the vector of component {absent[0]}, which top-pc removes; fit the "
            "head again, or pass a smaller rank."
        )
    basis = single.components[:, [columns[number] for number in range(rank)]]
    return SOAPProjection(basis, torch.ones(rank)).to(model.device)


METHODS: dict[str, Callable[[SOAPModelWrapper, int, int, ImagePreprocessor], SOAPProjection]] = {
    "soap": _soap,
    "zero-image": _zero_image,
    "top-pc": _top_pc,
}
"""What may be compared with the raw tokens."""
