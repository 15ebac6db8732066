"""What `tests/evaluation/test_sharing.py` starts in several processes, to be compared with one process."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets import Image as ImageFeature
from transformers import ViTImageProcessorPil

from soap_hf import Comparison, Examples, SOAPModelWrapper, choose_mu, evaluate_matching, fit_soap
from soap_hf.evaluation.knn import evaluate_knn
from soap_hf.evaluation.position import evaluate_position
from soap_hf.evaluation.saliency import evaluate_saliency
from soap_hf.evaluation.segmentation import evaluate_segmentation
from soap_hf.evaluation.sharing import measure_items
from soap_hf.processes import join_processes
from soap_hf.runtime.errors import SOAPError
from tests.conftest import noise_image
from tests.evaluation.test_saliency import scenes
from tests.evaluation.test_segmentation import CHECKED, HALVES
from tests.fitting.distributed_fits import backbone

BAD = 5, 7
"""Rows that cannot be read."""


def photographs(number: int = 21) -> Dataset:
    """Images of noise, two of them broken, with labels."""
    pictures = Dataset.from_dict({"image": [noise_image(seed, (80, 64)) for seed in range(number)]})
    files = [file["bytes"] for file in pictures.cast_column("image", ImageFeature(decode=False))["image"]]
    files = [b"broken" if row in BAD else file for row, file in enumerate(files)]
    return Dataset.from_dict({"image": files, "label": [row % 2 for row in range(number)]})


def head(share: bool) -> tuple[SOAPModelWrapper, Comparison]:
    """A head on a tiny ViT, the same each time, and its comparison."""
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    options = {"image_processor": processor, "check": 0, "mu": 2, "progress": False, "max_bad_fraction": 0.3}
    model = fit_soap(backbone(), photographs(), **options).eval()
    return model, Comparison.of(model, ["soap", "top-pc"], rank=2, share=share)


def evaluations(share: bool) -> dict[str, Any]:
    """Rows and counts of each evaluation, and a choice of strength."""
    model, comparison = head(share)
    some: dict[str, Any] = {"batch_size": 4, "progress": False}
    bad: dict[str, Any] = {"max_bad_fraction": 0.3}
    labelled: dict[str, Any] = {"label_column": "label", **bad}
    found = {
        "matching": evaluate_matching(comparison, Examples(photographs(), **bad), **some),
        "position": evaluate_position(comparison, Examples(photographs(), **bad), **some),
        "knn": evaluate_knn(
            comparison, *(Examples(photographs(number), **labelled) for number in (21, 9)), neighbours=[3], **some
        ),
        "segmentation": evaluate_segmentation(
            comparison, *(Examples(pictures, mask_column="mask") for pictures in (HALVES, CHECKED)), **some
        ),
        "saliency": evaluate_saliency(comparison, Examples(scenes(), mask_column="mask"), progress=False),
    }
    results = {name: [one.rows, one.summary["counts"], one.summary["means"]] for name, one in found.items()}
    choice = choose_mu(model, Examples(photographs(), **bad), strengths=[0, 1, 2], share=share, **some)
    return {**results, "choice": [choice.mu, [tried.right for tried in choice.curve]]}


def refusal(evaluate: Callable[[], Any]) -> str:
    """What an evaluation says that cannot be made."""
    try:
        evaluate()
    except SOAPError as error:
        return str(error)
    return ""


def failing(item: int) -> int:
    """Fails at the last item."""
    if item == 8:
        raise ValueError("no such thing")
    return item


if __name__ == "__main__":
    state = join_processes("cpu")
    _, comparison = head(share=True)
    told = {
        "evaluations": evaluations(share=True),
        "too many bad": refusal(lambda: evaluate_matching(comparison, Examples(photographs()), progress=False)),
        "a failure": refusal(lambda: measure_items(range(9), failing, share=True)),
        "items": measure_items(range(8), str, share=True),
    }
    Path(sys.argv[1], f"{state.process_index}.json").write_text(json.dumps(told), encoding="utf-8")
