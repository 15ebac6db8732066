"""Checkpoints of a fit: one safetensors file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers.utils import logging

from ..data.image_sample import ImageSample
from ..data.preprocessing import ImagePreprocessor
from ..files import write_tensors, writing
from ..heads.model import SOAPModelWrapper
from ..layout.plain import name_of
from ..processes import from_main_alone, on_main
from ..runtime.errors import CheckpointError, HeadError, first_sentence
from ..runtime.head_files import read_tensors
from ..version import package_versions
from .state import FitState

logger = logging.get_logger(__name__)


SAMPLE_SIZE = "the number of images in the sample"
DIGESTS = {
    "the digest of the backbone's weights": "the backbone has other weights",
    "the digest of the first image": "the first image is another one",
}
"""What is known by its digest, and what is said where that differs."""


def fit_identity(
    model: SOAPModelWrapper, sample: ImageSample, preprocess: ImagePreprocessor, **arguments: Any
) -> dict[str, str]:
    """What names a fit, in words, so that a checkpoint of another one is refused; `arguments` are more of it."""
    config = model.config
    names = {
        "the backbone": config.backbone_name_or_path or name_of(model.backbone),
        "where its tokens are": (config.plain_backbone or {}).get("tokens"),
        "the backbone's revision": config.backbone_revision,
        "the digest of the backbone's weights": model.weights_when_wrapped,
        "the dtype": config.backbone_dtype,
        "layer": config.layers,
        SAMPLE_SIZE: sample.available,
        "the digest of the first image": _digest_of_first_image(sample, preprocess),
        "the image size": preprocess.size,
        "the number of processes that share the stream": PartialState().num_processes if sample.in_parts else None,
        **{name.replace("_", " "): value for name, value in arguments.items()},
        **{f"the version of {package}": version for package, version in package_versions().items()},
    }
    return {name: json.dumps(value) for name, value in names.items()}


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:12]


def _digest_of_first_image(sample: ImageSample, preprocess: ImagePreprocessor) -> str | None:
    if sample.streamed:  # which would fill its shuffle buffer for it
        return None
    (batch,) = sample.batches(preprocess.of_example, 1, 0, stop=1)
    return _digest(batch.values) if batch.positions else None


@dataclass
class Checkpoint:
    """Where a fit keeps what it has added up; a `CheckpointError` if the folder does not exist."""

    path: Path  # with several machines on a disk that all of them see
    identity: Mapping[str, str]  # what names the fit (backbone, data set, seed, …); another one is refused
    every: int | None = None  # images between two savings; without it only an interruption saves
    _unsaved: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if PartialState().is_main_process and not self.path.absolute().parent.is_dir():
            raise CheckpointError(f"The folder of the checkpoint {self.path} does not exist; create it first.")
        with writing(self.path):  # its name can be written
            pass

    def due(self, num_images: int) -> bool:
        """Counts images that were worked off; whether it is time to save."""
        self._unsaved += num_images
        return self.every is not None and self._unsaved >= self.every

    def save(self, state: FitState) -> None:
        """Writes the file, in the main process; if that fails, the one before stays. Collective."""
        tensors, values = state.merged()
        metadata = {"identity": json.dumps(dict(self.identity)), "progress": json.dumps(values)}
        from_main_alone(write_tensors, self.path, tensors, metadata)
        self._unsaved = 0

    def refuse_to_overwrite(self) -> None:
        """Raises if there is a checkpoint that a fit from the beginning would lose."""
        if self.path.exists():
            raise CheckpointError(
                f"There is a checkpoint at {self.path}; resume from it, or remove it to start again."
            )

    def restore(self, state: FitState) -> None:
        """Brings a state to where the file says; warns and leaves it as it is if there is none. Collective.

        Raises:
            CheckpointError: the file cannot be read, or belongs to another fit; names the differences.
        """
        if not from_main_alone(self.path.exists):
            on_main(logger.warning, f"There is no checkpoint at {self.path}: the fit starts from the beginning.")
            return
        try:
            tensors, metadata = read_tensors(self.path, None, what="checkpoint", trusted=True)
            identity, values = (json.loads(metadata[name]) for name in ("identity", "progress"))
        except (HeadError, KeyError, ValueError) as error:
            why = first_sentence(error.__cause__ or error)
            raise CheckpointError(
                f"The checkpoint {self.path} cannot be read ({why}); remove it to start again."
            ) from error
        if told := differences(identity, self.identity):
            raise CheckpointError(
                f"The checkpoint {self.path} belongs to another fit ({'; '.join(told)}); choose another file, or "
                "remove it to start again."
            )
        state.restore(tensors, values, with_sums=PartialState().is_main_process)


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What differs between the fit of a checkpoint and this one; arguments by their names.

    Example:
        >>> counts = "the number of images in the sample"
        >>> differences({counts: "300", "num images": "300"}, {counts: "100", "num images": "100"})
        ['num_images: 300 there, 100 here']
    """
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    if "num images" in names:  # one word for what was asked for and what came of it
        names = [name for name in names if name != SAMPLE_SIZE]
    told = {
        name: name if name.startswith(("the ", "where ")) else name.replace(" ", "_")
        for name in names
        if name not in DIGESTS
    }
    values = {name: (there.get(name, "not known"), here.get(name, "not known")) for name in told}
    differ = [f"{told[name]}: {one} there, {other} here" for name, (one, other) in values.items()]
    return differ + [said for name, said in DIGESTS.items() if name in names]


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, and what a killed process left half-written beside it."""
    for file in (path, *path.parent.glob(f".{path.name}.*")):
        file.unlink(missing_ok=True)
