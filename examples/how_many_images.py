"""How many images does a fit need? Measures it on your backbone and your images.

    python examples/how_many_images.py facebook/vit-mae-base my-photos/

The first table fits heads on 50, 100, … images of one random order and compares each with the head fitted on the most:
the largest principal angle between the spaces of the two highest-scoring components, and of as many as `auto` removes
in the largest fit (0°: the same directions; 90°: a direction of one is missing from the other); the distance between
the projectors when `auto` decides (0: they remove the same; near 1: one removes what the other keeps); the largest
change of a removed component's score; and how many components `auto` removes. The second keeps the components of the
largest fit and lets the responses of fewer images count, as a smaller `--token-cache` does: how the standard error of
a score falls with their number. Needs scipy: `pip install "soap-hf[eval]"`.
"""

import argparse
import math

from scipy.linalg import subspace_angles
from transformers.utils import logging

from soap_hf import SOAPStatistics, fit_soap
from soap_hf.fitting.convergence import projector_distance

NUMBERS = (50, 100, 200, 500, 1000, 2000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="hub id or folder")
    parser.add_argument("dataset", help="hub id, folder of images, or parquet file")
    parser.add_argument("--most", type=int, default=4000, help="images of the fit that the others are compared with")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def fit(num_images: int, token_cache: int = 8 * 10**9) -> SOAPStatistics:
        options = {"num_images": num_images, "token_cache": token_cache, "progress": False}
        return fit_soap(arguments.backbone, arguments.dataset, **options).statistics

    reference = fit(arguments.most)
    numbers = [number for number in NUMBERS if number < reference.num_real]
    rank = reference.projection().rank
    removed = reference.scores.argsort(descending=True)[: max(1, rank)]

    print(f"Compared with {reference.num_real} images, where auto removes {rank} of {len(reference.scores)}:\n")
    leading = len(removed)
    print(
        f"| images | angle, mu=2 | angle, mu={leading} | projector distance, auto | change of scores | auto removes |"
    )
    print("|---|---|---|---|---|---|")
    for number in numbers:
        statistics = fit(number)
        angles = [largest_angle(statistics, reference, mu) for mu in (2, leading)]
        distance = projector_distance(statistics.projection(), reference.projection())
        ours, theirs = (each.scores.sort(descending=True).values[: len(removed)] for each in (statistics, reference))
        change, count = float((ours - theirs).abs().max()), statistics.projection().rank
        print(
            f"| {number} | {angles[0]:.1f}° | {angles[1]:.1f}° | {distance:.3f} | {change:.4f} | {count} |", flush=True
        )

    print("\n| images whose responses count | largest standard error | largest change of a score |\n|---|---|---|")
    per_image = 2 * reference.real_response.numel()
    for number in numbers:
        # in 16 bits; an eighth is set aside for synthetic images
        statistics = fit(reference.num_real, token_cache=number * per_image * 8 // 7)
        error = float(statistics.standard_errors[removed].max())
        change = float((statistics.scores - reference.scores)[removed].abs().max())
        print(f"| {statistics.num_real} | {error:.4f} | {change:.4f} |", flush=True)


def largest_angle(one: SOAPStatistics, other: SOAPStatistics, mu: int) -> float:
    """The largest principal angle between the spaces of the `mu` highest-scoring components, in degrees."""
    bases = (statistics.projection(mu).basis.numpy() for statistics in (one, other))
    return math.degrees(subspace_angles(*bases).max())


if __name__ == "__main__":
    main()
