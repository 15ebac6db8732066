"""Peak memory of a fit on ten times as many images: only the token cache may grow, up to its budget. Linux only."""

import re
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.timing import Comparison

BACKBONE = Path(__file__).parents[2] / "examples/vit-mae-tiny"
FEW, MANY, CACHE = 1_000, 10_000, "64MB"


def bound_memory() -> Comparison:
    """The demo backbone on an endless stream of drawn images, each fit in a process of its own."""
    peaks = {number: _peak_of_process(number) for number in (FEW, MANY)}
    return Comparison(
        title=f"Peak memory of a fit on the demo backbone with a token cache of {CACHE}",
        seconds={},
        megabytes={f"{number:,} images": peak for number, peak in peaks.items()},
        ratios={f"{MANY:,} / {FEW:,} images": peaks[MANY] / peaks[FEW]},
        targets={f"{MANY:,} / {FEW:,} images": "< 1.05"},
    )


def _peak_of_process(num_images: int) -> float:
    command = [sys.executable, "-m", __spec__.name, str(num_images)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def _fit_stream(num_images: int) -> None:
    from datasets import Features, Image, IterableDataset

    from soap_hf import fit_soap

    features = Features({"image": Image()})
    stream = IterableDataset.from_generator(_images, features=features, gen_kwargs={"number": 2 * num_images})
    fit_soap(BACKBONE, stream, num_images=num_images, token_cache=CACHE, num_workers=0, progress=False)


def _images(number: int):
    import numpy as np
    from PIL import Image

    for seed in range(number):
        coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        yield {"image": Image.fromarray(coarse).resize((64, 64))}


if __name__ == "__main__":
    _fit_stream(int(sys.argv[1]))
    # of this process alone; what getrusage tells begins with the memory of the one that started it
    print(float(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6)
