"""Extraction on an accelerator: a ViT-B/16 in bfloat16 on photographs, beside a bare loop; a command of its own."""

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import ViTConfig, ViTModel

from soap_hf import SOAPModelWrapper, SOAPProjection
from soap_hf.data.data_sets import open_dataset
from soap_hf.data.preprocessing import ImagePreprocessor, load_image_processor
from soap_hf.extract.extraction import extract_features

PHOTOS = Path(__file__).parents[2] / "examples" / "photos" / "fit"


class Photographs(TorchDataset):
    """Photographs as the backbone's pixels, without more."""

    def __init__(self, paths: list[str], preprocess: ImagePreprocessor):
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.preprocess(Image.open(self.paths[number]).convert("RGB"))


def main(
    images: Annotated[int, typer.Option(help="How many; the photographs are repeated.")] = 16_384,
    batch_size: Annotated[int, typer.Option(help="Images in a forward pass.")] = 256,
    workers: Annotated[int, typer.Option(help="Processes that decode.")] = max(1, (os.cpu_count() or 2) - 2),
) -> None:
    """Images a second of the backbone alone, of a bare loop with a DataLoader, and of `extract_features`."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    vit = ViTModel(ViTConfig(), add_pooling_layer=False).eval().to(device, torch.bfloat16)
    head = SOAPProjection(torch.linalg.qr(torch.randn(768, 2)).Q, torch.full((2,), 0.9))
    processor = load_image_processor(None, (224, 224))
    model = SOAPModelWrapper.from_backbone(vit, head, image_processor=processor)
    rows = open_dataset(PHOTOS)
    rows = rows.select([number % len(rows) for number in range(images)])
    paths = sorted(map(str, PHOTOS.glob("*.jpg")))
    photographs = Photographs([paths[number % len(paths)] for number in range(images)], ImagePreprocessor(processor))

    @torch.no_grad()
    def alone() -> None:
        pixels = torch.randn(batch_size, 3, 224, 224, device=device, dtype=torch.bfloat16)
        for _ in range(images // batch_size):
            vit(pixels).last_hidden_state.mean(1)
        if device.type != "cpu":
            torch.accelerator.synchronize()

    @torch.no_grad()
    def bare_loop() -> None:
        loader = DataLoader(photographs, batch_size, num_workers=workers, pin_memory=True)
        found = [
            vit(pixels.to(device, torch.bfloat16, non_blocking=True)).last_hidden_state.mean(1) for pixels in loader
        ]
        torch.cat(found).float().cpu()

    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"batch_size": batch_size, "num_workers": workers, "overwrite": True}

        def extract(**kept: Any) -> None:
            extract_features(model, rows, Path(folder, "features"), progress=False, **options, **kept)

        alone(), extract()  # warm up
        seconds = {}
        for name, run in (
            ("backbone alone", alone),
            ("bare loop", bare_loop),
            ("extract, mean", extract),
            ("extract, patches in float16", lambda: extract(patches=True)),
            ("bare loop again", bare_loop),
        ):
            start = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - start
    for name, taken in seconds.items():
        busy = seconds["backbone alone"] / taken
        print(f"{name}: {images / taken:,.0f} images a second; the backbone works {min(1, busy):.0%} of the time")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else str(device)
    print(f"{images:,} photographs, ViT-B/16 in bfloat16, batch {batch_size}, {workers} decoding processes, {name}")


if __name__ == "__main__":
    typer.run(main)
