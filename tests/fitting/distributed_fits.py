"""What `tests/fitting/test_processes.py` starts in several processes: fits, to be compared with one process."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from datasets.distributed import split_dataset_by_node
from transformers import AutoModel, ViTConfig, ViTImageProcessorPil

from soap_hf import SOAPModelWrapper, fit_soap
from soap_hf.data.image_sample import ImageSample
from soap_hf.processes import join_processes
from soap_hf.runtime.errors import SOAPError
from tests.conftest import noise_image

NUM_IMAGES = 45
BAD = 7
"""Row that cannot be read."""


def backbone():
    """A tiny ViT, the same each time."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    return AutoModel.from_config(config).eval()


def images(number: int = NUM_IMAGES) -> Dataset:
    """Images of noise as files, one of them broken."""
    pictures = Dataset.from_dict({"image": [noise_image(seed) for seed in range(number)]})
    files = [file["bytes"] for file in pictures.cast_column("image", ImageFeature(decode=False))["image"]]
    return Dataset.from_dict({"image": [b"broken" if row == BAD else file for row, file in enumerate(files)]})


def stream(files: int) -> IterableDataset:
    """The same images from so many files."""
    return images().to_iterable_dataset(num_shards=files)


def fit(data, **options) -> SOAPModelWrapper:
    """A small fit."""
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    common = {"image_processor": processor, "batch_size": 8, "progress": False, "num_workers": 0}
    return fit_soap(backbone(), data, **{**common, "max_bad_fraction": 0.1, **options})


FITS: dict[str, Callable[[], SOAPModelWrapper]] = {
    "rows": lambda: fit(images()),
    "a small cache": lambda: fit(images(), token_cache="60kB", batch_size=2),
    "exact": lambda: fit(images(), exact=True, layer=[1, -1]),
    "a sample of a stream": lambda: fit(stream(1), num_images=30),
    "a stream of six files": lambda: fit(stream(6), num_images=None),
    "fewer images than processes": lambda: fit(images(7), batch_size=4, num_synthetic=9),
}
"""Each is to give the same in any number of processes."""
if "strategy" not in inspect.signature(split_dataset_by_node).parameters:
    del FITS["a sample of a stream"]  # before datasets 5.1 it is refused in several processes


def poisoned() -> None:
    """NaN in the last process, at its second batch."""
    model = backbone()

    calls: list[int] = []

    def poison(module, inputs, tokens):
        calls.append(len(tokens))
        last = PartialState().process_index == PartialState().num_processes - 1
        # the calls before the second batch: the probe of the layout, one image for the shapes, the first batch
        return tokens * torch.nan if last and len(calls) == 4 else tokens

    model.layernorm.register_forward_hook(poison)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    fit_soap(model, images(), image_processor=processor, batch_size=8, progress=False, max_bad_fraction=0.1, check=0)


def interrupted(folder: Path) -> SOAPModelWrapper:
    """Stopped by a data set that drops out in one process, then resumed by all."""
    data = images()
    path = folder / f"{PartialState().num_processes}.checkpoint"
    first = PartialState().is_main_process
    options = {"checkpoint": path, "checkpoint_every": 16, "batch_size": 4}
    whole = ImageSample.batches

    def drops_out(*arguments, **share):
        for number, batch in enumerate(whole(*arguments, **share)):
            if number == 2 and first:
                raise ConnectionError("the server has gone")
            yield batch

    with mock.patch.object(ImageSample, "batches", drops_out):
        try:
            fit(data, **options)
        except SOAPError as error:
            (folder / f"dropped.{PartialState().process_index}").write_text(str(error))
    return fit(data, resume=True, **options)


def main(folder: Path) -> None:
    """Writes the statistics of each fit, and of each process what stopped the poisoned one."""
    join_processes("cpu")
    for name, run in {**FITS, "interrupted": lambda: interrupted(folder)}.items():
        model = run()
        statistics = model.statistics if len(model.config.layers) == 1 else model.statistics[-1]
        if PartialState().process_index == PartialState().num_processes - 1:  # all have the same
            statistics.save(folder / f"{name}.safetensors", num_components=32)
    try:
        poisoned()
    except SOAPError as error:
        (folder / f"poisoned.{PartialState().process_index}").write_text(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
