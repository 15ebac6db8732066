"""SOAP from end to end, on the backbone and the photographs in this folder: fit, save, load, use, and check.

    python examples/quickstart.py [--output demo-head]

The backbone is a tiny ViT-MAE (examples/vit-mae-tiny/README.md). The head is fitted on examples/photos/fit, then
checked on examples/photos/heldout, which the fit did not see: how much of the variance of the patch tokens does their
position explain, before and after?
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModel, pipeline
from transformers.utils import logging

from soap_hf import fit_soap
from soap_hf.evaluation import position_variance_share

HERE = Path(__file__).parent


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--output", type=Path, default=Path("demo-head"), help="folder for the head")
    output = arguments.parse_args().output
    logging.disable_progress_bar()

    print("Fitting on 64 photographs and 64 synthetic images …")
    model = fit_soap(HERE / "vit-mae-tiny", HERE / "photos" / "fit")
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


def heldout_pixels(model: torch.nn.Module) -> torch.Tensor:
    """The held-out photographs as the backbone expects them, (64, 3, 64, 64)."""
    images = [Image.open(path).convert("RGB") for path in sorted((HERE / "photos" / "heldout").glob("*.jpg"))]
    return model.image_processor(images, return_tensors="pt")["pixel_values"]


if __name__ == "__main__":
    main()
