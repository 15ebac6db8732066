"""From images to patch tokens: this process's share of them, one forward pass of the backbone for all layers."""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import find_executable_batch_size
from torch import Tensor

from ..data.image_files import BadImage
from ..data.image_sample import ImageSample
from ..data.loading import as_data_errors
from ..data.preprocessing import ImagePreprocessor
from ..heads.model import SOAPModelWrapper
from ..heads.running import read_raw_tokens
from ..processes import gather_lists
from ..statistics.synthetic import synthesize_images
from .arguments import FitArguments
from .cache import LayerTokens

LARGEST_BATCH = 256
"""Where the search for a batch size begins."""

BATCH_ON_CPU = 32
"""On CPU larger batches are no faster, and memory runs out without an error."""


class TokenBatch(NamedTuple):
    """Tokens of one batch of images (empty if none was readable), their positions, and the images that are bad."""

    tokens: LayerTokens
    positions: list[int]
    bad: list[BadImage]


class TokenReader:
    """Reads the raw patch tokens of real and synthetic images; of each, processes share the work.

    Those of the model's layers are read, and its projections not applied.
    """

    def __init__(
        self, model: SOAPModelWrapper, sample: ImageSample, preprocess: ImagePreprocessor, arguments: FitArguments
    ):
        self.model, self.sample, self.preprocess, self.arguments = model, sample, preprocess, arguments
        self._forward: Any = torch.compile(model) if arguments.compile else model
        self.rank, self.num_processes = PartialState().process_index, PartialState().num_processes
        size = arguments.batch_size
        self.batch_size = size if isinstance(size, int) else self._largest_batch_size()

    @property
    def step_size(self) -> int:
        """Images that all processes together read in one step."""
        return self.batch_size * self.num_processes

    def real(self, phase: str, start: int, stop: int = sys.maxsize) -> Iterator[TokenBatch]:
        """This process's share of the real images from position `start` up to `stop`; an error names the `phase`.

        Raises:
            DataError: the data set gives no more images before its end.
            NonFiniteTokensError: a token holds NaN or Inf; names the batch.
        """
        share: Any = {"start": start, "stop": stop, "rank": self.rank, "num_processes": self.num_processes}
        prepare, num_workers = self.preprocess.of_example, self.arguments.num_workers
        batches = self.sample.batches(prepare, self.batch_size, num_workers, **share)
        for number, batch in enumerate(as_data_errors(batches), start=1 + start // self.step_size):
            tokens = self._tokens(batch.values, f"batch {number} of the {phase}") if batch.positions else {}
            yield TokenBatch(tokens, batch.positions, batch.bad)

    def synthetic(self, phase: str, start: int, stop: int) -> Iterator[TokenBatch]:
        """This process's share of synthetic images `start … stop - 1`, drawn on the backbone's device."""
        turns = range(start + self.rank * self.batch_size, stop, self.step_size)
        for number, first in enumerate(turns, start=1 + start // self.step_size):
            positions = list(range(first, min(first + self.batch_size, stop)))
            tokens = self.synthetic_tokens(first, len(positions), f"batch {number} of the {phase}")
            yield TokenBatch(tokens, positions, [])

    def synthetic_tokens(self, first: int, number: int, where: str) -> LayerTokens:
        """Patch tokens of synthetic images `first … first + number - 1`."""
        options = {"isotropic": self.arguments.isotropic, "device": self.model.device}
        images = synthesize_images(number, self.preprocess.size, self.arguments.seed, offset=first, **options)
        return self._tokens(self.preprocess.normalize(images), where)

    def _tokens(self, pixels: Tensor, where: str) -> LayerTokens:
        found = read_raw_tokens(self.model, pixels, where, forward=self._forward)
        return {layer: tokens.patches for layer, tokens in found.items()}

    @torch.no_grad()
    def _largest_batch_size(self) -> int:
        """The largest batch that fits into the accelerators of all processes."""
        if self.model.device.type == "cpu":
            return BATCH_ON_CPU

        @find_executable_batch_size(starting_batch_size=LARGEST_BATCH)
        def attempt(batch_size: int) -> int:
            self.synthetic_tokens(0, batch_size, "synthetic images")
            return batch_size

        return min(gather_lists([attempt()]))
