"""Peak memory of fits and extractions on ten and twenty times as many images. Linux only."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.timing import Comparison

BACKBONE = Path(__file__).parents[2] / "examples/vit-mae-tiny"
FEW, MANY, CACHE = 1_000, 10_000, "64MB"


def bound_memory() -> Comparison:
    """The demo backbone on a stream of drawn images: of a fit only the token cache may grow, up to its budget."""
    return _compare(f"Peak memory of a fit on the demo backbone with a token cache of {CACHE}", "fit", FEW, MANY)


def bound_memory_of_extraction() -> Comparison:
    """The demo backbone on a stream of drawn images, into shards."""
    return _compare("Peak memory of an extraction with the demo backbone", "extract", FEW, 2 * MANY)


def _compare(title: str, what: str, few: int, many: int) -> Comparison:
    """Each in a process of its own."""
    peaks = {number: _peak_of_process(what, number) for number in (few, many)}
    return Comparison(
        title=title,
        seconds={},
        megabytes={f"{number:,} images": peak for number, peak in peaks.items()},
        ratios={f"{many:,} / {few:,} images": peaks[many] / peaks[few]},
        targets={f"{many:,} / {few:,} images": "< 1.05"},
    )


def _peak_of_process(what: str, num_images: int) -> float:
    command = [sys.executable, "-m", __spec__.name, what, str(num_images)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def _stream(number: int):
    from datasets import Features, Image, IterableDataset

    features = Features({"image": Image()})
    return IterableDataset.from_generator(_images, features=features, gen_kwargs={"number": number})


def _fit_stream(num_images: int) -> None:
    from soap_hf import fit_soap

    options = {"token_cache": CACHE, "num_workers": 0, "progress": False}
    fit_soap(BACKBONE, _stream(2 * num_images), num_images=num_images, **options)


def _extract_stream(num_images: int) -> None:
    from soap_hf import SOAPModelWrapper, extract_features

    head = SOAPModelWrapper.from_backbone(BACKBONE, None)
    with tempfile.TemporaryDirectory() as folder:
        extract_features(head, _stream(num_images), Path(folder, "features"), num_workers=0, progress=False)


def _images(number: int):
    import numpy as np
    from PIL import Image

    for seed in range(number):
        coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        yield {"image": Image.fromarray(coarse).resize((64, 64))}


if __name__ == "__main__":
    {"fit": _fit_stream, "extract": _extract_stream}[sys.argv[1]](int(sys.argv[2]))
    # of this process alone; what getrusage tells begins with the memory of the one that started it
    print(float(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6)
