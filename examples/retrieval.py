"""Retrieval with clean tokens: of whole photographs, and of single patches.

    python examples/retrieval.py

Photographs: each is asked for by its left or right half, among the other halves of all. Patches: each asks for the one
most like it in the other photographs; how often does the answer lie at the very same place, whatever it shows?
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
    found, same_place = photographs_found(model, photos), answers_at_the_same_place(model, photos)
    with model.disabled():
        raw_found, raw_same_place = photographs_found(model, photos), answers_at_the_same_place(model, photos)
    print(f"{len(photos)} photographs                               raw   clean  by chance")
    print(f"photograph among the first 5 answers      {raw_found:5.0%} {found:7.0%} {5 / len(photos):10.0%}")
    print(f"answer to a patch lies at the same place  {raw_same_place:5.0%} {same_place:7.0%} {1 / 64:10.0%}")


def photographs_found(model: SOAPModelWrapper, photos: list[Image.Image]) -> float:
    """Share of photographs of which one half is among the first five answers to the other."""
    queries = embed(model, [half(photo, left=number % 2 == 0) for number, photo in enumerate(photos)])
    gallery = embed(model, [half(photo, left=number % 2 == 1) for number, photo in enumerate(photos)])
    first = (queries @ gallery.T).topk(5).indices
    return (first == torch.arange(len(photos))[:, None]).any(1).float().mean().item()


def answers_at_the_same_place(model: SOAPModelWrapper, photos: list[Image.Image]) -> float:
    """Share of patches whose nearest patch in another photograph lies where they lie."""
    tokens = model.encode(photos, pooling=None, normalize=True, as_tensor=True, progress=False).flatten(1, 2)
    likeness = torch.einsum("ipd,jqd->ipjq", tokens, tokens)
    likeness[range(len(photos)), :, range(len(photos))] = -1  # not in the same photograph
    places = likeness.flatten(2).argmax(-1) % tokens.shape[1]
    return (places == torch.arange(tokens.shape[1])).float().mean().item()


def half(photo: Image.Image, left: bool) -> Image.Image:
    """The left or the right half of a photograph."""
    middle = photo.width // 2
    return photo.crop((0, 0, middle, photo.height) if left else (middle, 0, photo.width, photo.height))


def embed(model: SOAPModelWrapper, images: list[Image.Image]) -> torch.Tensor:
    """One vector of length 1 for each image: the mean of its patch tokens."""
    return model.encode(images, normalize=True, as_tensor=True, progress=False)


if __name__ == "__main__":
    main()
