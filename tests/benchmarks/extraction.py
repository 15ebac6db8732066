"""Extracting features of a folder of photographs, beside a loop that decodes them and runs the backbone."""

import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from soap_hf import SOAPModelWrapper, SOAPProjection
from soap_hf.data.preprocessing import load_image_processor
from soap_hf.extract.extraction import extract_features
from tests.benchmarks.timing import Comparison, medians

PHOTOS = Path(__file__).parents[2] / "examples" / "photos" / "fit"
BATCH = 16


def extract_from_photographs(repeats: int = 5) -> Comparison:
    """A random ViT-S/16 at 224 pixels on the 64 photographs of the demo, decoded in the same process."""
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    vit = ViTModel(config, add_pooling_layer=False).eval()
    head = SOAPProjection(torch.linalg.qr(torch.randn(384, 2)).Q, torch.full((2,), 0.9))
    processor = load_image_processor(None, (224, 224))
    model = SOAPModelWrapper.from_backbone(vit, head, image_processor=processor)
    paths = sorted(PHOTOS.glob("*.jpg"))

    @torch.no_grad()
    def bare_loop() -> torch.Tensor:
        features = []
        for start in range(0, len(paths), BATCH):
            images = [Image.open(path).convert("RGB") for path in paths[start : start + BATCH]]
            features.append(vit(processor(images, return_tensors="pt")["pixel_values"]).last_hidden_state.mean(1))
        return torch.cat(features)

    with tempfile.TemporaryDirectory() as folder:

        def extract() -> None:
            target = Path(folder, "features.parquet")
            extract_features(model, PHOTOS, target, batch_size=BATCH, num_workers=0, progress=False)

        seconds = medians({"bare loop": bare_loop, "extract_features": extract}, repeats=repeats, warm_up=1)
    return Comparison(
        title=f"{len(paths)} photographs, ViT-S/16, batch {BATCH}",
        seconds=seconds,
        ratios={"throughput of extract_features / bare loop": seconds["bare loop"] / seconds["extract_features"]},
        targets={"throughput of extract_features / bare loop": "> 0.9"},
    )
