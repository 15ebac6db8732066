"""Pictures of a head and of what it does to images, for papers and model cards; they need matplotlib and no display.

Functions return a matplotlib `Figure`, which `save_figure` writes. The door is `scores`.

Example:
    >>> from datasets import Dataset
    >>> from PIL import Image
    >>> from soap_hf import fit_soap
    >>> from transformers import ViTConfig, ViTModel
    >>> images = [Image.new("RGB", (48, 32), (40 * i, 0, 0)) for i in range(6)]
    >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
    ...                          image_size=32, patch_size=8))
    >>> model = fit_soap(vit, Dataset.from_dict({"image": images}), progress=False)
    >>> curve, maps = score_curve({"tiny ViT": model}), response_maps(model)
    >>> pictures = look_at(model, images[:2])
    >>> responses, tokens = response_overlay(pictures, model), token_colours(pictures)
    >>> save_figure(tokens, "patch_tokens.png")  # doctest: +SKIP
"""

from ..heads.opening import HeadRecord
from ..runtime.errors import MissingExtraError

try:
    from .matching import match_fields, matching_views
    from .neighbours import patch_neighbours
    from .pictures import Picture, look_at, response_overlay, token_colours
    from .records import backbone_label
    from .responses import head_figures, response_maps
    from .saliency import saliency_masks
    from .scores import matching_curve, score_by_layer, score_curve
    from .similarity import similarity_maps
    from .style import rendered, save_figure, to_png
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "matplotlib":
        raise
    raise MissingExtraError('Figures need matplotlib; run pip install "soap-hf[figures]".') from error

__all__ = [
    "HeadRecord",
    "Picture",
    "backbone_label",
    "head_figures",
    "look_at",
    "match_fields",
    "matching_curve",
    "matching_views",
    "patch_neighbours",
    "rendered",
    "response_maps",
    "response_overlay",
    "saliency_masks",
    "save_figure",
    "score_by_layer",
    "score_curve",
    "similarity_maps",
    "to_png",
    "token_colours",
]
