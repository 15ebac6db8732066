"""A head as its files tell it, without its backbone: opened at one commit, checked, statistics on demand."""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..files import missing_path
from ..runtime.errors import HeadError
from ..runtime.head_files import ADAPTER_FILE, CONFIG_FILE, PROCESSOR_FILE, HeadSource
from ..runtime.projection import SOAPProjection
from ..statistics.soap_statistics import SOAPStatistics
from .config import SOAPConfig
from .provenance import check_provenance

FIGURES_FOLDER = "figures"
EVALUATIONS_FOLDER = "evaluation"
STATISTICS_FILES = "statistics*.safetensors"
OPTIONAL_FILES = (STATISTICS_FILES, PROCESSOR_FILE, f"{FIGURES_FOLDER}/*.png", f"{EVALUATIONS_FOLDER}/*/*.*")
"""Files that a head may have: those of an earlier head in the same place must not be taken for a later one's."""

BACKBONE_FOLDER = "backbone"
INCLUDED_BACKBONE = f"./{BACKBONE_FOLDER}"
"""How a head refers to a backbone that is saved with it."""


@dataclass(frozen=True)
class HeadRecord:
    """The files of a head, read and checked: its config, and its projections by layer. `HeadRecord.open` makes one."""

    source: HeadSource
    config: SOAPConfig
    projections: dict[int, SOAPProjection]

    @classmethod
    def open(cls, name_or_path: str | os.PathLike, **hub_kwargs: Any) -> "HeadRecord":
        """Opens a head by folder or hub id; `revision`, `token` and the like reach the Hub."""
        refuse_missing_head(name_or_path, hub_kwargs.get("subfolder"))
        source = HeadSource.open(name_or_path, **hub_kwargs)
        config = source.config(SOAPConfig)
        check_provenance(config)
        return cls(source, config, source.projections(config))

    @cached_property
    def statistics_by_layer(self) -> dict[int, SOAPStatistics]:
        """What the fit learned, fetched when first asked for; empty if the head was saved without."""
        return read_statistics(self.source, self.config)


def refuse_missing_head(name_or_path: str | os.PathLike, subfolder: str | None = None) -> None:
    """Refuses, with a `HeadError`, a folder of a head that is not there, or holds none."""
    if problem := missing_path(name_or_path, word_is_path=True):
        raise HeadError(problem)
    name = os.fspath(name_or_path) if subfolder is None else os.path.join(name_or_path, subfolder)
    if os.path.isdir(name) and not any(
        os.path.exists(os.path.join(name, file)) for file in (CONFIG_FILE, ADAPTER_FILE)
    ):
        raise HeadError(
            f"Folder {name} holds no head, since it has no {CONFIG_FILE}; give one that a fit has written."
        )


def statistics_file(config: SOAPConfig, layer: int) -> str:
    """Name of the file with the statistics of a layer."""
    return "statistics.safetensors" if len(config.layers) == 1 else f"statistics.{layer}.safetensors"


def read_statistics(source: HeadSource, config: SOAPConfig) -> dict[int, SOAPStatistics]:
    """Reads the statistics of a head, by layer; empty if it was saved without."""
    paths = {layer: source.fetch_if_there(statistics_file(config, layer)) for layer in config.layers}
    if any(path is None for path in paths.values()):
        return {}
    loaded = {layer: SOAPStatistics.load(path) for layer, path in paths.items() if path}
    widths = [len(statistics.mean) for statistics in loaded.values()]
    if widths != config.hidden_sizes:
        sizes = f"tokens of width {widths}, but the head is for width {config.hidden_sizes}"
        raise HeadError(f"The statistics are of {sizes}; fetch or fit it again.")
    return loaded
