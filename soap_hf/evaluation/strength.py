"""The strength of a head that matching between views supports; none where nothing is gained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..data.preprocessing import ImagePreprocessor
from ..heads.model import SOAPModelWrapper
from ..heads.running import head_preprocessor
from ..notebooks import html_of
from ..runtime.errors import DataError, SOAPError
from ..runtime.projection import SOAPProjection
from ..statistics.soap_statistics import SOAPStatistics
from .arguments import ViewRule
from .comparison import Comparison
from .matching import HEADLINE, as_examples, match_views, warn_if_few
from .methods import RAW, head_layer, layer_statistics
from .results import Interval, column, paired_difference

STRENGTHS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
"""Numbers of components that are tried."""


@dataclass(frozen=True)
class TriedStrength:
    """What matching says of one strength.

    Attributes:
        mu (`float`): the strength.
        removed (`int`): directions that it removes.
        right, stuck (`float`): share of patches matched within one patch, and share of the moved ones that are stuck.
        gain ([`Interval`]): of `right` over raw tokens, with its bootstrap 95 % interval over photographs.
        standard_error (`float`): of the gain.
    """

    mu: float
    removed: int
    right: float
    stuck: float
    gain: Interval
    standard_error: float


@dataclass(frozen=True)
class StrengthChoice:
    """The strength that matching supports, and the curve behind it.

    Attributes:
        mu (`float`): the strength; 0, the identity, where nothing is gained.
        curve (`list[TriedStrength]`): all that were tried, by increasing strength; the first one is 0.
        num_images (`int`): photographs that gave two views.
        layer (`int`): the layer that was measured.
    """

    mu: float
    curve: list[TriedStrength]
    num_images: int
    layer: int

    @property
    def chosen(self) -> TriedStrength:
        """What matching says of the chosen strength."""
        return next(tried for tried in self.curve if tried.mu == self.mu)

    @property
    def reason(self) -> str:
        """What was decided and why, in one sentence."""
        best = max(self.curve, key=lambda tried: tried.right)
        if self.mu == 0:
            nearly = nearly_best(self.curve)
            tried = f"mu={nearly.mu:g}, {_with_interval(nearly.gain)}" if nearly.mu else "none raises it at all"
            where = f"on {self.num_images} photographs"
            return f"mu=0, the identity: {where} the smallest good strength gains nothing beyond chance ({tried})."
        near = f"the smallest within one standard error of the best ({best.mu:g})"
        which = "the best" if best.mu == self.mu else near
        return (
            f"mu={self.mu:g}, {which}: on {self.num_images} photographs matching rises from {self.curve[0].right:.2f} "
            f"to {self.chosen.right:.2f} ({_with_interval(self.chosen.gain)})."
        )

    def _repr_html_(self) -> str:
        return html_of(self.reason, self.table())

    def table(self) -> Table:
        """One row per strength."""
        table = Table(title=f"matching within one patch, {self.num_images} photographs")
        for name in ("mu", "removed", "right", "gain", "95 % interval", "stuck", ""):
            table.add_column(name, justify="right")
        for tried in self.curve:
            mean, low, high = tried.gain
            gain = (f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}") if tried.mu else ("", "")
            mark = "chosen" if tried.mu == self.mu else ""
            table.add_row(f"{tried.mu:g}", str(tried.removed), f"{tried.right:.3f}", *gain, f"{tried.stuck:.3f}", mark)
        return table


def choose_mu(
    model: SOAPModelWrapper,
    images: Any,
    *,
    layer: int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    rule: ViewRule | None = None,
    image_size: int | tuple[int, int] | None = None,
    preprocess: ImagePreprocessor | None = None,
    batch_size: int = 32,
    seed: int = 0,
    share: bool = False,
    progress: bool = True,
) -> StrengthChoice:
    """The strength that matching between views supports: how much should be removed, on this model and these images?

    All strengths are measured on one forward pass over the views. Taken is the smallest one within one standard error
    of the best; but 0, the identity, unless the 95 % interval of its gain lies above zero. The model stays as it is:
    `model.reweight(choice.mu)` gives it the strength.

    Args:
        model ([`SOAPModelWrapper`]): a head with statistics, and its backbone.
        images ([`Examples`], or what `open_dataset` opens): photographs that the head was not fitted on.
        layer (`int`, *optional*): the layer that is measured; default: the head's last one. A head of several layers
            has one strength for all of them.
        strengths (sequence of `float`): numbers of components, as far as the statistics hold their vectors.
        rule, batch_size, seed, progress: as in `evaluate_matching`.
        image_size, preprocess, share: as in `Comparison.of`.

    Raises:
        HeadError: the head was saved without statistics.
        SOAPError: fewer than 2 photographs, or a strength that is none.
        DataError: no photograph gives two views.

    Example:
        >>> from datasets import Dataset
        >>> from PIL import Image
        >>> from transformers import ViTConfig, ViTModel
        >>> from soap_hf import fit_soap
        >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        ...                          image_size=32, patch_size=8))
        >>> images = Dataset.from_dict({"image": [Image.new("RGB", (64, 64), (9 * i, 0, 0)) for i in range(24)]})
        >>> model = fit_soap(vit, images, progress=False)
        >>> choose_mu(model, images, progress=False).mu in STRENGTHS
        True
    """
    layer = head_layer(model, layer)
    methods = _projections(model, layer, strengths)
    comparison = Comparison(model, layer, preprocess or head_preprocessor(model, image_size), methods, share)
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}
    (rows,), _ = match_views([comparison], as_examples(images), rule=rule or ViewRule(), **options)
    if len(rows) < 2:
        raise DataError(f"{len(rows)} photograph gives two views, but a choice needs 2; give more.")
    curve = curve_of(rows, methods)
    choice = StrengthChoice(choose(curve), curve, len(rows), layer)
    warn_if_few(len(rows), {f"mu={choice.mu:g}": choice.chosen.gain})
    return choice


def curve_of(rows: Sequence[dict[str, Any]], methods: Mapping[str, SOAPProjection]) -> list[TriedStrength]:
    """What matching says of each strength, from the rows of the photographs; methods are named by their strength."""
    raw = column(rows, f"{RAW}_{HEADLINE}")
    curve = []
    for name, projection in methods.items():
        values = column(rows, f"{name}_{HEADLINE}")
        curve.append(
            TriedStrength(
                mu=0.0 if name == RAW else float(name),
                removed=projection.rank,
                right=float(values.mean()),
                stuck=float(column(rows, f"{name}_stuck").nanmean()),
                gain=paired_difference(raw, values),
                standard_error=float((values - raw).std() / len(rows) ** 0.5),
            )
        )
    return curve


def choose(curve: Sequence[TriedStrength]) -> float:
    """The smallest strength within one standard error of the best; 0 unless its gain's interval lies above zero."""
    smallest = nearly_best(curve)
    return smallest.mu if smallest.gain.low > 0 else 0.0


def nearly_best(curve: Sequence[TriedStrength]) -> TriedStrength:
    """The smallest strength within one standard error of the best."""
    best = max(curve, key=lambda tried: tried.right)
    near = [tried for tried in curve if tried.gain.mean >= best.gain.mean - best.standard_error]
    return min(near, key=lambda tried: tried.mu)


def _projections(model: SOAPModelWrapper, layer: int, strengths: Sequence[float]) -> dict[str, SOAPProjection]:
    """The identity, and the projection of every strength for which the statistics hold enough vectors."""
    if not all(0 <= mu < float("inf") for mu in strengths):
        raise SOAPError(f"Strengths are numbers of components from 0 upwards, not {list(strengths)}.")
    statistics: SOAPStatistics = layer_statistics(model, layer)
    config, reach = model.config, statistics.reach(model.config.tau)
    methods = {RAW: SOAPProjection.identity(len(statistics.mean))}
    for mu in sorted(set(strengths) - {0}):
        if mu <= reach:
            methods[f"{mu:g}"] = statistics.projection(mu, config.tau, config.threshold).to(model.device)
    return methods


def _with_interval(gain: Interval) -> str:
    return f"{gain.mean:+.3f}, 95 % {gain.low:+.3f} to {gain.high:+.3f}"
