"""A head at work on images that one clicks: what the page of `soap-hf explore` shows, and the page.

Everything but `page` works without gradio. The door is `session`.

Example:
    >>> from PIL import Image
    >>> from transformers import ViTConfig, ViTModel
    >>> from soap_hf import SOAPModelWrapper
    >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
    ...                          image_size=32, patch_size=8))
    >>> explorer = Explorer(SOAPModelWrapper.from_backbone(vit, None), "tiny ViT")
    >>> session = Session().with_photo(0, Photo("grey", Image.new("RGB", (48, 32), "gray")))
    >>> view = similarity_view(session.at(explorer, Choice(layer=-1)))
    >>> [panel.caption for panel in view.rows[0]]
    ['first image', 'raw tokens', 'clean tokens, 0 directions removed']
"""

from .explorer import Choice, Explorer
from .photos import Photo, read_photo
from .session import Moment, Session
from .views import colour_view, object_view, response_view, similarity_view

__all__ = [
    "Choice",
    "Explorer",
    "Moment",
    "Photo",
    "Session",
    "colour_view",
    "object_view",
    "read_photo",
    "response_view",
    "similarity_view",
]
