"""Search: features in an index of FAISS, asked for the photographs most like others, raw and clean side by side.

    python examples/search.py [PHOTO …] [--features features] [--approximate HNSW32] [--figure neighbours.png]

One pass over the photographs writes their raw and their clean features into a folder of shards. `datasets` loads it,
and `Dataset.add_faiss_index` builds an exact and an approximate index over each. Needs `pip install faiss-cpu`.
docs/search.md says more.
"""

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from PIL import Image, ImageOps
from torch.nn.functional import normalize
from transformers import AutoModel
from transformers.utils import logging

from soap_hf import SOAPModelWrapper, extract_features

HERE = Path(__file__).parent

COLUMNS = {"raw": "raw_features", "clean": "features"}
"""Where the shards have them."""

Found = list[tuple[str, float]]
"""File names with their similarities, the most similar first."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    query = HERE / "photos" / "heldout" / "04c1bde5affb7b5b.jpg"
    arguments.add_argument("photos", type=Path, nargs="*", default=[query], help="what to search for")
    arguments.add_argument("--head", default=str(HERE / "soap-vit-mae-tiny"), help="folder or hub id")
    arguments.add_argument("--images", type=Path, default=HERE / "photos" / "fit", help="folder to search in")
    arguments.add_argument("--features", type=Path, help="folder for its features, kept; default: a temporary one")
    arguments.add_argument("--approximate", default="HNSW32", help="kind of index, in the words of FAISS's factory")
    arguments.add_argument("--neighbours", type=int, default=5, help="how many to find")
    arguments.add_argument(
        "--figure", type=Path, help="PNG or JPEG file for a picture of the first photograph and its neighbours"
    )
    chosen = arguments.parse_args()
    if find_spec("faiss") is None:
        raise SystemExit("Searching needs FAISS, which is not installed: run pip install faiss-cpu.")
    logging.disable_progress_bar()
    disable_progress_bars()
    photos = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in chosen.photos]

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        shards = chosen.features or Path(scratch, "features")
        there = (shards / "manifest.json").exists()  # of this head and these images, or it is refused
        options = {"with_raw": True, "normalize": True, "resume": there, "progress": False}
        extract_features(chosen.head, chosen.images, shards, **options)
        gallery = load_dataset("parquet", data_dir=str(shards / "shards"), split="train", cache_dir=scratch)
        add_indices(gallery, chosen.approximate)
        model, answers, agreements = AutoModel.from_pretrained(chosen.head), [], []
        for photo in photos:
            vectors = embed(model, photo)
            exact, approximate = (
                {name: nearest(gallery, f"{name} {kind}", vectors[name], chosen.neighbours) for name in COLUMNS}
                for kind in ("exact", "approximate")
            )
            answers.append(exact)
            agreements.append({name: share_found(approximate[name], exact[name]) for name in COLUMNS})

    print(f"{len(gallery)} photographs in the index, ranked by cosine similarity.")
    for path, found in zip(chosen.photos, answers, strict=True):
        print(f"\nMost like {path.name}:")
        print_side_by_side(found)
    shared = fmean(share_found(found["raw"], found["clean"]) for found in answers)
    raw, clean = (fmean(agreement[name] for agreement in agreements) for name in COLUMNS)
    print(f"\nOf the clean neighbours {shared:.0%} are raw ones, too.")
    print(f"{chosen.approximate} finds {raw:.0%} of the raw neighbours and {clean:.0%} of the clean ones.")
    if chosen.figure:
        draw(chosen.figure, chosen.photos[0], chosen.images, answers[0])


def add_indices(gallery: Dataset, approximate: str) -> None:
    """An exact and an approximate index over the raw and the clean features, under names such as `clean exact`."""
    import faiss

    # the cosine of two vectors of length 1 is their inner product
    how = {"metric_type": faiss.METRIC_INNER_PRODUCT, "train_size": len(gallery)}
    for name, column in COLUMNS.items():
        gallery.add_faiss_index(column, index_name=f"{name} exact", string_factory="Flat", **how)
        gallery.add_faiss_index(column, index_name=f"{name} approximate", string_factory=approximate, **how)


@torch.no_grad()
def embed(model: SOAPModelWrapper, photo: Image.Image) -> dict[str, np.ndarray]:
    """The raw and the clean features of a photograph, made as those of the shards are."""
    pixels = model.image_processor(photo, return_tensors="pt")["pixel_values"]
    clean = model(pixels, pooling="mean").image_embeds
    with model.disabled():
        raw = model(pixels, pooling="mean").image_embeds
    return {"raw": normalize(raw, dim=-1)[0].numpy(), "clean": normalize(clean, dim=-1)[0].numpy()}


def nearest(gallery: Dataset, index: str, vector: np.ndarray, count: int) -> Found:
    """The nearest images of one index."""
    scores, rows = gallery.get_nearest_examples(index, vector, k=min(count, len(gallery)))
    return [(name, float(score)) for name, score in zip(rows["file_name"], scores, strict=False)]


def share_found(some: Found, wanted: Found) -> float:
    """Share of the wanted images that are among some."""
    files = {name for name, _ in some}
    return sum(name in files for name, _ in wanted) / len(wanted)


def print_side_by_side(found: dict[str, Found]) -> None:
    """One line for each rank."""
    width = max(len(name) for lists in found.values() for name, _ in lists)
    print("   " + "".join(f"  {name:{width}}       " for name in found).rstrip())
    for rank, row in enumerate(zip(*found.values(), strict=True), 1):
        print(f"{rank:3}" + "".join(f"  {name:{width}} {score:6.3f}" for name, score in row))


def draw(path: Path, photo: Path, folder: Path, found: dict[str, Found]) -> None:
    """The photograph, and its raw (above) and clean neighbours."""
    from matplotlib.figure import Figure

    columns = 1 + max(map(len, found.values()))
    figure = Figure(figsize=(1.1 * columns, 2.6), layout="constrained")
    places = figure.subplots(len(found), columns, squeeze=False)
    for row, (name, neighbours) in zip(places, found.items(), strict=True):
        pictures = [(photo, f"query, {name}"), *((folder / file, f"{score:.3f}") for file, score in neighbours)]
        for place, (file, title) in zip(row, pictures, strict=False):
            place.imshow(Image.open(file).convert("RGB").resize((128, 128)))
            place.set_title(title, fontsize=8)
        for place in row:
            place.axis("off")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
