"""`pipeline("salient-object-segmentation", model=head)`: the salient object of an image, without training."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline
from transformers.utils import logging

from .data.preprocessing import to_rgb
from .heads.model import SOAPModelWrapper
from .runtime.errors import HeadError
from .runtime.patch_layout import as_size

logger = logging.get_logger(__name__)

TASK = "salient-object-segmentation"


class SalientObjectSegmentationPipeline(Pipeline):
    """Finds the salient object of images by TokenCut on clean patch tokens, refined by the fast bilateral solver.

    A pipeline of transformers, registered by `import soap_hf`; it needs `pip install "soap-hf[eval]"`. Images go in
    one at a time, each in its own size, whatever `batch_size` says.

    Example:

    ```python
    from transformers import pipeline
    import soap_hf

    segment = pipeline("salient-object-segmentation", model="my-head")
    found = segment("photo.jpg")
    found["mask"].save("mask.png")
    ```
    """

    _load_processor = False
    _load_image_processor = None  # a head without one has the backbone's, or the documented default
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, SOAPModelWrapper):
            raise HeadError(
                f"{type(self.model).__name__} is no head; fit one with fit_soap, or wrap the backbone as it is with "
                "SOAPModelWrapper.from_backbone(model, None)."
            )
        from .evaluation.comparison import Comparison  # import soap_hf stays light
        from .evaluation.salient_object import patch_stride
        from .heads.running import head_preprocessor

        preprocess = head_preprocessor(self.model, processor=self.image_processor)
        self._comparison = Comparison.of(self.model, preprocess=preprocess)
        self._stride = patch_stride(self._comparison)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Finds the salient object of one image or of several.

        Args:
            inputs (`str`, `PIL.Image.Image`, or a list, generator or data set of them): path, URL or image.
            apply_soap (`bool`, defaults to `True`): `False` takes the raw patch tokens.
            refine (`bool`, defaults to `True`): `False` leaves out the bilateral solver; edges are those of patches.
            image_size (`int` or `(height, width)`, *optional*): for a backbone that takes one size only; by default
                the image's own, to the nearest whole patch.
            timeout (`float`, *optional*): seconds to wait for a URL.

        Returns:
            `dict`, or a list or iterator of them, with **mask** (`PIL.Image.Image` of mode `"L"`, 0 or 255),
            **score_map** (`torch.Tensor` of shape `(height, width)`, in [0, 1]; the mask is what exceeds 0.5), both of
            the image's size, and **box** (`dict` with `xmin`, `ymin`, `xmax`, `ymax`, in pixels, the last two
            exclusive), which is `None` if the mask is empty, as on an image of one colour.
        """
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        apply_soap: bool | None = None,
        refine: bool | None = None,
        image_size: int | tuple[int, int] | None = None,
        timeout: float | None = None,
        local_files_only: bool | None = None,  # which `pipeline` leaves among them
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        given = {"image_size": as_size(image_size), "timeout": timeout}, {"apply_soap": apply_soap}, {"refine": refine}
        before, forward, after = ({name: one for name, one in part.items() if one is not None} for part in given)
        return before, forward, after

    def preprocess(
        self, image: Any, image_size: tuple[int, int] | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """The image in RGB, and as the backbone sees it."""
        from .evaluation.salient_object import in_whole_patches, resized

        if isinstance(image, (str, os.PathLike)) and os.path.isfile(image):
            image = Image.open(image)
        image = load_image(to_rgb(image) if isinstance(image, Image.Image) else image, timeout)
        size = image_size or in_whole_patches((image.height, image.width), self._stride)
        return {"image": image, "rgb": resized(image, size)}

    def _forward(self, model_inputs: dict[str, Any], apply_soap: bool = True) -> dict[str, Any]:
        from .evaluation.salient_object import raw_grid

        raw, clean = self._comparison.methods.values()
        projection = clean if apply_soap else raw
        return {"image": model_inputs["image"], "tokens": projection(raw_grid(self._comparison, model_inputs["rgb"]))}

    def postprocess(self, model_outputs: dict[str, Any], refine: bool = True) -> dict[str, Any]:
        """Mask, score map and box."""
        from .evaluation.bilateral_solver import BilateralGrid
        from .evaluation.salient_object import coarse_mask, nothing_to_cut

        pixels = np.array(model_outputs["image"])
        found = coarse_mask(model_outputs["tokens"], pixels.shape[:2])
        if found is None:
            logger.warning(f"No object is found in this image: {nothing_to_cut(centred=True)}.")
            found = np.zeros(pixels.shape[:2], bool)
        scores = BilateralGrid(pixels).refine(found).clip(0, 1) if refine else found.astype(np.float64)
        mask = Image.fromarray(np.where(scores > 0.5, 255, 0).astype(np.uint8))
        box = mask.getbbox()
        return {
            "mask": mask,
            "score_map": torch.from_numpy(scores).to(torch.float32),
            "box": box and dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)),
        }

    def get_iterator(self, inputs: Any, num_workers: int, batch_size: int, *parameters: Any) -> Any:
        """As in transformers, one image at a time: they differ in size."""
        return super().get_iterator(inputs, num_workers, 1, *parameters)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes the head alone: the task comes with `import soap_hf`, not with code beside the head."""
        self.model.save_pretrained(save_directory, **kwargs)


def register() -> None:
    """Makes the task known to `pipeline`."""
    PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=SalientObjectSegmentationPipeline, pt_model=AutoModel, type="image"
    )
