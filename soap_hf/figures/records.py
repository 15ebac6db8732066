"""What the figures need of a head: its config and the statistics beside it, but no backbone."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..heads.config import SOAPConfig
from ..runtime.errors import HeadError
from ..statistics import NEGLIGIBLE_WEIGHT
from ..statistics.soap_statistics import SOAPStatistics


class FittedHead(Protocol):
    """A [`SOAPModelWrapper`], or a [`~soap_hf.heads.opening.HeadRecord`]."""

    @property
    def config(self) -> SOAPConfig:
        """The head's configuration."""

    @property
    def statistics_by_layer(self) -> dict[int, SOAPStatistics]:
        """What the fit learned; empty if the head was saved without."""


@dataclass(frozen=True)
class ScoredLayer:
    """One layer of a head.

    Attributes:
        name (`str`): of the tensor in the backbone's output.
        components (`list[dict]`): rows as in `SOAPStatistics.table`, by decreasing score: all of them, or the leading
            ones if there are no statistics.
        statistics ([`SOAPStatistics`], *optional*): of the layer.
    """

    name: str
    components: list[dict[str, Any]]
    statistics: SOAPStatistics | None


def scored_layers(head: FittedHead) -> list[ScoredLayer]:
    """The layers of a head, in its order.

    Raises:
        HeadError: the head knows no scores: it was made without a fit.
    """
    config: Any = head.config
    statistics, layers = head.statistics_by_layer, []
    for layer, components in zip(config.layers, config.components or [[] for _ in config.layers], strict=True):
        if (single := statistics.get(layer)) is not None:
            components = single.table(config.mu, config.tau, config.threshold, rows=len(single.scores))
        if not components:
            raise HeadError("This head knows no scores, since it was made without a fit; fit one to see its figures.")
        name = "last_hidden_state" if layer == -1 else f"hidden_states[{layer}]"
        layers.append(ScoredLayer(name, components, single))
    return layers


@dataclass(frozen=True)
class StoredComponent:
    """One component of a layer, as the statistics keep it.

    Attributes:
        row (`dict`): of the table of components.
        mean (`(D,)`), direction (`(D,)`), deviation (`float`): of the patch tokens, of the component, and the standard
            deviation along it.
        real_response, synthetic_response (`(*grid)`): share of images with a positive response.
    """

    row: dict[str, Any]
    mean: Tensor
    direction: Tensor
    deviation: float
    real_response: Tensor
    synthetic_response: Tensor

    @property
    def caption(self) -> str:
        """Two lines: which component it is, and what becomes of it."""
        fate = ", removed" if is_removed(self.row) else ""
        return f"rank {self.row['rank']}, component {self.row['component']}\nscore {self.row['score']:.3f}{fate}"

    def response(self, tokens: Tensor) -> Tensor:
        """`(z - m)·v` of tokens `(..., D)`, in standard deviations."""
        return (tokens.to(torch.float64) - self.mean) @ self.direction / self.deviation


def stored_components(layer: ScoredLayer, count: int) -> list[StoredComponent]:
    """The `count` highest-scoring components among those whose vectors and maps were saved.

    Raises:
        HeadError: the head was saved without statistics.
    """
    found = layer.statistics
    if found is None:
        raise HeadError("Responses need a head's statistics, but this one was saved without; fit it again.")
    saved = set(found.component_indices.tolist())
    rows = [row for row in layer.components if row["component"] in saved][:count]
    columns = found.columns([row["component"] for row in rows])
    return [
        StoredComponent(
            row=row,
            mean=found.mean,
            direction=found.components[:, column].to(torch.float64),
            deviation=float(found.eigenvalues[row["component"]].sqrt()),
            real_response=found.real_response[..., column],
            synthetic_response=found.synthetic_response[..., column],
        )
        for row, column in zip(rows, columns, strict=True)
    ]


def is_removed(row: dict[str, Any]) -> bool:
    """Whether the head removes the component of a row."""
    return row["weight"] > NEGLIGIBLE_WEIGHT


def backbone_label(config: SOAPConfig) -> str:
    """What to call a head's backbone in a figure: its hub id, or the last part of its path."""
    reference = config.backbone_name_or_path or ""
    if config.plain_backbone and not reference:
        return str(config.plain_backbone["architecture"]).rpartition(".")[2]
    is_path = os.path.isabs(reference) or reference.startswith(".")
    return (Path(reference).name if is_path else reference) or getattr(config.backbone, "model_type", "backbone")
