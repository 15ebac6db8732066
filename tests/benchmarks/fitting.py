"""A whole fit, against the bare forward passes that it cannot do without and against three float32 passes."""

import io
import time
from collections.abc import Callable
from statistics import median

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel, ViTImageProcessorPil

from soap_hf import fit_soap, synthesize_images
from soap_hf.data.image_sample import ImageSample
from soap_hf.data.preprocessing import ImagePreprocessor
from tests.benchmarks.timing import Comparison

SIZE, BATCH, REPEATS = 224, 32, 3


def fit_images(num_images: int = 512, device: str = "cpu") -> Comparison:
    """A ViT-S/14 of random weights on JPEG files in memory; decoding and drawing count on our side."""
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=SIZE, patch_size=14)
    backbone = Dinov2Model(config).eval().to(device)
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    images = _jpegs(num_images)
    pixels = torch.randn(BATCH, 3, SIZE, SIZE, device=device)
    candidates: dict[str, Callable[[], object]] = {
        "fit": lambda: fit_soap(
            backbone, images, image_processor=processor, num_images=None, batch_size=BATCH, mu=2, progress=False
        ),
        "bare forward of as many images": lambda: _forward(backbone, pixels, 2 * num_images),
        "three float32 passes": lambda: _three_passes(backbone, images, ImagePreprocessor(processor)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(REPEATS):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: median(taken) for name, taken in seconds.items()}
    return Comparison(
        title=f"A fit on {num_images} real and {num_images} synthetic images, ViT-S/14 on {device}",
        seconds=medians,
        ratios={
            "fit / bare forward": medians["fit"] / medians["bare forward of as many images"],
            "fit / three passes": medians["fit"] / medians["three float32 passes"],
        },
        targets={"fit / bare forward": "≤ 1.15", "fit / three passes": "≤ 0.75"},
    )


def _jpegs(number: int) -> Dataset:
    def encode(seed: int) -> bytes:
        coarse = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse.numpy()).resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        return buffer.getvalue()

    return Dataset.from_dict({"image": [encode(seed) for seed in range(number)]})


@torch.inference_mode()
def _forward(backbone: PreTrainedModel, pixels: Tensor, number: int) -> None:
    for _ in range(number // len(pixels)):
        backbone(pixels)


@torch.inference_mode()
def _three_passes(backbone: PreTrainedModel, images: Dataset, preprocess: ImagePreprocessor) -> Tensor:
    """Real images for mean and covariance, real ones again and synthetic ones for the responses; dense and float32."""
    sample = ImageSample(images, "image", None, 0)

    def real():
        for batch in sample.batches(preprocess, BATCH, 1):
            yield backbone(batch.pixels.to(backbone.device)).last_hidden_state[:, 1:]

    def synthetic():
        for first in range(0, len(images), BATCH):
            drawn = preprocess.normalize(synthesize_images(BATCH, SIZE, offset=first, device=backbone.device))
            yield backbone(drawn).last_hidden_state[:, 1:]

    count, total, products = 0, 0.0, 0.0
    for tokens in real():
        rows = tokens.flatten(0, 1)
        count, total, products = count + len(rows), total + rows.sum(dim=0), products + rows.T @ rows
    mean = total / count
    components = torch.linalg.eigh(products / count - torch.outer(mean, mean)).eigenvectors
    shares = []
    for source in (real, synthetic):
        positive = [((tokens - mean) @ components > 0).float().sum(dim=0) for tokens in source()]
        shares.append(sum(positive) / len(images))
    return torch.stack(shares)
