"""SOAP from end to end, on the backbone and the photographs in this folder: fit, save, load, use, and check.

    python examples/quickstart.py [--output demo-head]

The backbone is a tiny ViT-MAE (examples/vit-mae-tiny/README.md). The head is fitted on examples/photos/fit, then
checked on examples/photos/heldout, which the fit did not see: how much of the variance of the patch tokens does their
position explain, and how many patches find each other in two views of a photograph, before and after? Last, the scores
of a masked autoencoder beside those of its control, the same network trained on the same images without masking
(examples/matched-pair/README.md).
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, pipeline
from transformers.utils import logging

from soap_hf import Comparison, SOAPModelWrapper, evaluate_matching, fit_soap
from soap_hf.evaluation import position_variance_share
from soap_hf.statistics import NEGLIGIBLE_WEIGHT

HERE = Path(__file__).parent


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--output", type=Path, default=Path("demo-head"), help="folder for the head")
    output = arguments.parse_args().output
    logging.disable_progress_bar()

    print("Fitting on 64 photographs and 64 synthetic images …")
    model = fit_soap(HERE / "vit-mae-tiny", HERE / "photos" / "fit", num_images=64, check=0)  # checked below
    model.save_pretrained(output)
    size = (output / "model.safetensors").stat().st_size
    print(f"\nSaved to {output}: a head of {size / 1000:.1f} kB; the backbone stays where it is.")

    loaded = AutoModel.from_pretrained(output)
    pixels = heldout_pixels(loaded)
    with torch.no_grad():
        outputs = loaded(pixels, output_raw=True)
        same = torch.equal(outputs.last_hidden_state, model(pixels).last_hidden_state)
    print(f"Loaded again with AutoModel.from_pretrained: outputs bit-identical: {'yes' if same else 'NO'}.")

    extract = pipeline("image-feature-extraction", model=str(output))
    tokens = extract(str(sorted((HERE / "photos" / "heldout").glob("*.jpg"))[0]))[0]
    print(f"In a pipeline, one photograph gives {len(tokens)} tokens (CLS and 8 x 8 patches), {len(tokens[0])} wide.")

    layout = loaded.layouts[-1]
    raw, clean = (
        layout.patches(tokens, pixels.shape[-2:])
        for tokens in (outputs.raw_last_hidden_state, outputs.last_hidden_state)
    )
    before, after = position_variance_share(raw), position_variance_share(clean, raw)
    print(
        f"\nShare of patch-token variance explained by position, on {len(pixels)} photographs the fit did not see:\n"
        f"  before {before:.1%}\n  after  {after:.1%}\n"
        f"  (tokens that know nothing of their position would give about 1/{len(pixels)} = {1 / len(pixels):.1%})"
    )

    print("\nDoes it help? Patches of one view of a photograph are matched to those of another by nearest neighbour.")
    found = evaluate_matching(Comparison.of(loaded), HERE / "photos" / "heldout", progress=False).summary
    raw, clean = (found["means"][name] for name in ("raw", "soap"))
    gain = found["differences"]["soap"]["right_1"]
    print(
        f"  matched within one patch:  before {raw['right_1']:.1%}, after {clean['right_1']:.1%} (95 % interval of "
        f"the gain: {gain.low:+.1%} to {gain.high:+.1%})\n"
        f"  stuck to the same place, though the thing has moved: before {raw['stuck']:.1%}, after {clean['stuck']:.1%}"
    )

    print("\nFitting on two networks of one shape that saw the same images, trained with and without masking …")
    logging.set_verbosity_error()  # no report of the control's pooler, which patch tokens do not use
    pair = {"masked autoencoder": "vit-mae", "control without masking": "vit-simclr"}
    options: dict[str, Any] = {"num_images": 64, "progress": False}
    print_side_by_side(
        {
            name: fit_soap(HERE / "matched-pair" / folder, HERE / "photos" / "fit", check=0, **options)
            for name, folder in pair.items()
        }
    )


def print_side_by_side(models: dict[str, SOAPModelWrapper]) -> None:
    """The leading scores of several models, and what is removed."""
    threshold = next(iter(models.values())).config.threshold
    table = Table(title=f"Semantic invariance; above {threshold:g} a component is removed")
    table.add_column("rank", justify="right")
    for name, model in models.items():
        table.add_column(f"{name}: {model.config.ranks[0]} removed", justify="right")
    for rank, rows in enumerate(zip(*(model.config.components[0] for model in models.values()), strict=False)):
        scores = [f"{row['score']:.3f}" for row in rows]
        removed = [row["weight"] > NEGLIGIBLE_WEIGHT for row in rows]
        cells = [f"removed  {score}" if gone else score for score, gone in zip(scores, removed, strict=True)]
        table.add_row(str(rank), *cells)
    Console().print(table)


def heldout_pixels(model: torch.nn.Module) -> torch.Tensor:
    """The held-out photographs as the backbone expects them, (64, 3, 64, 64)."""
    images = [Image.open(path).convert("RGB") for path in sorted((HERE / "photos" / "heldout").glob("*.jpg"))]
    return model.image_processor(images, return_tensors="pt")["pixel_values"]


if __name__ == "__main__":
    main()
