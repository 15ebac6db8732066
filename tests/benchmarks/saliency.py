"""The two costs of a saliency evaluation beside the backbone's forward pass, against plain code for the same."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.linalg import eigh
from transformers import AutoModel

from soap_hf import SOAPModelWrapper
from soap_hf.evaluation.bilateral_solver import BilateralGrid
from soap_hf.evaluation.tokencut import EPSILON, links, second_eigenvector
from tests.benchmarks.timing import Comparison, medians
from tests.evaluation.plain_bilateral_solver import solve

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGES, SIZE, GRID = 8, (300, 400), (21, 29)
"""As many patches as an image of that size has at 14 pixels each."""


def find_eigenvectors() -> Comparison:
    """The second eigenvector of TokenCut's graph: Lanczos iterations against LAPACK on the generalised problem."""
    graphs = [links(tokens) for tokens in demo_tokens()]
    candidates = {
        "Lanczos": lambda: [second_eigenvector(linked) for linked in graphs],
        "dense eigh": lambda: [dense_eigenvector(linked) for linked in graphs],
    }
    seconds = medians(candidates, repeats=10, warm_up=1, units=dict.fromkeys(candidates, IMAGES))
    return Comparison(
        title=f"Second eigenvector of {GRID[0]} x {GRID[1]} patches, per image",
        seconds=seconds,
        ratios={"dense eigh / Lanczos": seconds["dense eigh"] / seconds["Lanczos"]},
        targets={"dense eigh / Lanczos": "≥ 3"},
    )


def refine_masks() -> Comparison:
    """The bilateral solver on the masks of two methods: one grid for both against a plain solver for each."""
    images = [np.array(image.resize(SIZE[::-1])) for image in photographs()]
    targets = np.zeros((2, *SIZE))
    targets[0, 80:200, 120:300] = targets[1, 100:220, 90:310] = 1

    def refine_both(image: np.ndarray) -> None:
        grid = BilateralGrid(image)
        for target in targets:
            grid.refine(target)

    candidates = {
        "BilateralGrid": lambda: [refine_both(image) for image in images],
        "plain solver": lambda: [solve(image, target) for image in images for target in targets],
    }
    seconds = medians(candidates, repeats=5, warm_up=1, units=dict.fromkeys(candidates, IMAGES))
    return Comparison(
        title=f"Refinement of two masks of {SIZE[1]} x {SIZE[0]} pixels, per image",
        seconds=seconds,
        ratios={"plain solver / BilateralGrid": seconds["plain solver"] / seconds["BilateralGrid"]},
        targets={"plain solver / BilateralGrid": "≥ 3"},
    )


def photographs() -> list[Image.Image]:
    """The first of the embedded ones."""
    return [Image.open(path).convert("RGB") for path in sorted((EXAMPLES / "photos/fit").glob("*.jpg"))[:IMAGES]]


@torch.inference_mode()
def demo_tokens() -> torch.Tensor:
    """Patch tokens of photographs, `(IMAGES, *GRID, D)`, of the demo backbone, less their mean over each image.

    They have one direction in common that would link every patch to every other.
    """
    model = SOAPModelWrapper.from_backbone(AutoModel.from_pretrained(EXAMPLES / "vit-mae-tiny"), None).eval()
    size = GRID[0] * 8, GRID[1] * 8
    pixels = torch.stack([torch.tensor(np.array(image.resize(size[::-1]))) for image in photographs()])
    tokens = model.patch_tokens((pixels.permute(0, 3, 1, 2) / 127.5 - 1).to(model.dtype))
    return tokens - tokens.mean(dim=(1, 2), keepdim=True)


def dense_eigenvector(linked: np.ndarray) -> np.ndarray:
    """As TokenCut is usually written."""
    weights = np.where(linked, 1.0, EPSILON)
    degrees = np.diag(weights.sum(axis=1))
    return eigh(degrees - weights, degrees, subset_by_index=[1, 1])[1][:, 0]
