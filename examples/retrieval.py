"""Retrieval with clean tokens: which photograph is a crop of another from, by the mean of its patch tokens?

    python examples/retrieval.py

Every held-out photograph is asked for by a crop of its left or right half, among crops of the other half of all of
them. Tokens that say where a patch lies say nothing about which photograph it is from.
"""

from pathlib import Path

import torch
from PIL import Image
from transformers.utils import logging

from soap_hf import SOAPModelWrapper, fit_soap

HERE = Path(__file__).parent


def main() -> None:
    logging.disable_progress_bar()
    model = fit_soap(HERE / "vit-mae-tiny", HERE / "photos" / "fit", progress=False)
    photos = [Image.open(path).convert("RGB") for path in sorted((HERE / "photos" / "heldout").glob("*.jpg"))]
    queries = [half(photo, left=number % 2 == 0) for number, photo in enumerate(photos)]
    gallery = [half(photo, left=number % 2 == 1) for number, photo in enumerate(photos)]
    clean = hits(embed(model, queries), embed(model, gallery))
    with model.disabled():
        raw = hits(embed(model, queries), embed(model, gallery))
    print(f"Among {len(photos)} photographs, the right one is among the first 5 answers for")
    print(f"  raw tokens   {raw:.0%}\n  clean tokens {clean:.0%}   (by chance {5 / len(photos):.0%})")


def half(photo: Image.Image, left: bool) -> Image.Image:
    """The left or the right half of a photograph."""
    middle = photo.width // 2
    return photo.crop((0, 0, middle, photo.height) if left else (middle, 0, photo.width, photo.height))


@torch.no_grad()
def embed(model: SOAPModelWrapper, images: list[Image.Image]) -> torch.Tensor:
    """One vector of length 1 for each image: the mean of its patch tokens."""
    pixels = model.image_processor(images, return_tensors="pt")["pixel_values"]
    return torch.nn.functional.normalize(model(pixels, pooling="mean").image_embeds, dim=-1)


def hits(queries: torch.Tensor, gallery: torch.Tensor) -> float:
    """Share of queries whose own photograph is among the first five."""
    first = (queries @ gallery.T).topk(5).indices
    return (first == torch.arange(len(queries))[:, None]).any(1).float().mean().item()


if __name__ == "__main__":
    main()
