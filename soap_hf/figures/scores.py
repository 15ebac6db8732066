"""Curves: scores over the components of a layer and over the layers of a backbone, and matching over strengths."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..evaluation.strength import StrengthChoice
from ..runtime.errors import DataError, HeadError
from .placing import PAGE_WIDTH, add_legend
from .records import FittedHead, ScoredLayer, is_removed, scored_layers
from .style import new_figure, series_looks, styled

LEADING = 10
"""Components that have a panel of their own."""

COIN_FLIP = math.sqrt(0.5)
"""Score of a component whose responses are coin flips."""

SHOWN_SHARE = 0.95
"""Of the components of a curve, those that must lie within its panel."""

PANEL_HEIGHT = 2.4
MAX_LAYER_TICKS = 10
COUNT_TICKS = (0, *(digit * 10**power for power in range(5) for digit in (1, 2, 5)))


@styled
def score_curve(heads: Mapping[str, FittedHead]) -> Figure:
    """Scores of all components by rank, and of the first ten with their standard errors.

    A head of several layers gives one curve per layer. The threshold is that of the first head. Without statistics
    only the leading components are known, and the panel of all of them is left out. The lowest twentieth of a curve
    may run out of its panel: components without variance above round-off score 0.

    Args:
        heads (`dict[str, SOAPModelWrapper]`): what to call each head, and the head (or its [`HeadRecord`]).

    Raises:
        HeadError: no head, or one that was made without a fit and knows no scores.
    """
    threshold, curves = _threshold(heads), dict(_curves(heads))
    looks = _looks(curves)
    complete = all(layer.statistics is not None for layer in curves.values())
    figure = new_figure(PAGE_WIDTH if complete else PAGE_WIDTH * 0.6, PANEL_HEIGHT, layout="constrained")
    *whole, leading = figure.subplots(1, 1 + complete, squeeze=False)[0]
    for axes in whole:
        for label, layer in curves.items():
            axes.plot([row["score"] for row in layer.components], color=looks[label]["color"])
        axes.set(title="all components", xlabel="rank by score")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _plot_leading(leading, curves, looks)
    within = [layer.components[max(0, int(SHOWN_SHARE * len(layer.components)) - 1)] for layer in curves.values()]
    guides = _guide_scores(whole or [leading], threshold, min(last["score"] for last in within))
    if whole:
        _guide_leading(leading, threshold, [row for layer in curves.values() for row in layer.components[:LEADING]])
    only = next(iter(heads)) if len(heads) == 1 < len(curves) else None
    add_legend(figure, [*_lines(looks), *_marks("removed", "kept"), *guides], title=only)
    return figure


@styled
def score_by_layer(heads: Mapping[str, FittedHead]) -> Figure:
    """The highest score of each layer with its standard error, and the number of directions removed from it.

    `last_hidden_state`, which has gone through the final norm, comes last, on a dotted line.

    Args:
        heads (`dict[str, SOAPModelWrapper]`): what to call each head of several layers, and the head (or its
            [`HeadRecord`]).

    Raises:
        HeadError: no head, one of one layer, or one that was made without a fit.
    """
    threshold = _threshold(heads)
    for name, head in heads.items():
        if len(head.config.layers) < 2:
            raise HeadError(f"The head {name} has one layer; fit one of several to see scores against depth.")
    last = 1 + max(layer for head in heads.values() for layer in head.config.layers)
    looks = _looks(heads)
    figure = new_figure(PAGE_WIDTH, PANEL_HEIGHT, layout="constrained")
    scores, counts = figure.subplots(1, 2)
    lowest = 1.0
    for name, head in heads.items():
        depths = [last if layer == -1 else layer for layer in head.config.layers]
        tops = [layer.components[0] for layer in scored_layers(head)]
        values = [(top["score"], top["standard_error"]) for top in tops]
        _plot_by_depth(scores, last, depths, values, looks[name])
        _plot_by_depth(counts, last, depths, [(rank, 0) for rank in head.config.ranks], looks[name])
        lowest = min(lowest, *(score for score, _ in values))
    step = math.ceil(last / MAX_LAYER_TICKS)
    normed = any(-1 in head.config.layers for head in heads.values())
    ticks = {str(number): number for number in range(0, last, step) if last - number >= step or not normed}
    ticks |= {"last": last} if normed else {}
    for axes in (scores, counts):
        axes.set_xticks([*ticks.values()], [*ticks])
        axes.set_xlabel("hidden state")
    scores.set_title("highest score, with standard error")
    counts.set_title("directions removed")
    _tick_counts(counts, max(rank for head in heads.values() for rank in head.config.ranks))
    add_legend(figure, [*_lines(looks), *_guide_scores([scores], threshold, lowest)])
    return figure


@styled
def matching_curve(choices: Mapping[str, StrengthChoice]) -> Figure:
    """Matching against strength, with the 95 % interval of each gain over raw tokens; the chosen strength is filled.

    Args:
        choices (`dict[str, StrengthChoice]`): what to call each head, and what `choose_mu` found.

    Raises:
        DataError: no head.
    """
    if not choices:
        raise DataError("A figure of strengths needs at least one head.")
    figure = new_figure(PAGE_WIDTH * 0.62, 2.6, layout="constrained")
    axes = figure.subplots()
    strengths = sorted({tried.mu for choice in choices.values() for tried in choice.curve})
    place = {mu: number for number, mu in enumerate(strengths)}
    looks = _looks(choices)
    for label, choice in choices.items():
        look, raw = looks[label], choice.curve[0].right
        x, y = [place[tried.mu] for tried in choice.curve], [tried.right for tried in choice.curve]
        low, high = ([raw + tried.gain[end] for tried in choice.curve] for end in (1, 2))
        axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.plot(x, y, markerfacecolor="white", **look)
        axes.plot(place[choice.mu], choice.chosen.right, **look)
    axes.set_xticks(range(len(strengths)), [f"{mu:g}" for mu in strengths])
    axes.set(xlabel="strength mu (components removed)", ylabel="patches matched within one patch")
    axes.spines[["top", "right"]].set_visible(False)
    add_legend(figure, [*_lines(looks), *_marks("chosen", "not chosen")])
    return figure


def _threshold(heads: Mapping[str, FittedHead]) -> float:
    """The threshold of the first head."""
    if not heads:
        raise HeadError("A figure of scores needs at least one head.")
    return next(iter(heads.values())).config.threshold


def _curves(heads: Mapping[str, FittedHead]) -> Iterator[tuple[str, ScoredLayer]]:
    """The layers of all heads, each with a name of its own."""
    for name, head in heads.items():
        first, *others = scored_layers(head)
        for layer in (first, *others):
            own = layer.name if len(heads) == 1 else f"{name}, {layer.name}"
            yield (own if others else name), layer


def _looks(labels: Collection[str]) -> dict[str, dict[str, Any]]:
    return dict(zip(labels, series_looks(len(labels)), strict=True))


def _lines(looks: Mapping[str, dict[str, Any]]) -> list[tuple[str, Line2D]]:
    return [(label, Line2D([], [], **look)) for label, look in looks.items()]


def _marks(filled: str, hollow: str) -> list[tuple[str, Line2D]]:
    faces = {filled: "0.4", hollow: "white"}
    return [(label, Line2D([], [], color="0.4", marker="o", linestyle="", mfc=face)) for label, face in faces.items()]


def _plot_leading(axes: Axes, curves: Mapping[str, ScoredLayer], looks: Mapping[str, dict[str, Any]]) -> None:
    """Scores with error bars; the marks of components that are removed are filled."""
    for label, layer in curves.items():
        rows, look = layer.components[:LEADING], looks[label]
        scores, errors = ([row[key] for row in rows] for key in ("score", "standard_error"))
        axes.errorbar(range(len(rows)), scores, errors, color=look["color"])
        for row in rows:
            inside = look["color"] if is_removed(row) else "white"
            axes.plot(row["rank"], row["score"], markerfacecolor=inside, **look)
    axes.set(title="the first ten, with standard errors", xlabel="rank by score")
    axes.set(xlim=(-0.5, LEADING - 0.5), xticks=range(LEADING))


def _plot_by_depth(
    axes: Axes, last: int, depths: Iterable[int], values: Iterable[tuple[float, float]], look: dict[str, Any]
) -> None:
    """Values with their errors, in order of depth."""
    x, y, error = zip(*sorted((depth, *value) for depth, value in zip(depths, values, strict=True)), strict=True)
    axes.errorbar(x, y, error, **look, linestyle="")
    blocks = len(x) - (x[-1] == last)
    axes.plot(x[:blocks], y[:blocks], color=look["color"])
    axes.plot(x[blocks - 1 :], y[blocks - 1 :], color=look["color"], linestyle=":")


def _guide_scores(panels: Sequence[Axes], threshold: float, lowest: float) -> list[tuple[str, Line2D]]:
    """The threshold and the coin flip as lines, and limits that hold both and the lowest score."""
    panels[0].set_ylabel("semantic invariance")
    for axes in panels:
        axes.set_ylim(min(0.68, threshold - 0.02, lowest) - 0.01, 1.01)
        guides = [
            (f"threshold {threshold:g}", axes.axhline(threshold, color="0.2", linestyle="--", linewidth=0.8)),
            (f"coin flip {COIN_FLIP:.3f}", axes.axhline(COIN_FLIP, color="0.5", linestyle=":", linewidth=0.8)),
        ]
    return guides


def _guide_leading(axes: Axes, threshold: float, rows: Sequence[dict[str, Any]]) -> None:
    """Limits of its own, so that the leading scores and the threshold fill the panel, and what lines lie within."""
    low = min(threshold, *(row["score"] - row["standard_error"] for row in rows))
    high = max(threshold, *(row["score"] + row["standard_error"] for row in rows))
    room = 0.06 * (high - low) + 1e-3
    axes.set_ylim(low - room, high + room)
    axes.axhline(threshold, color="0.2", linestyle="--", linewidth=0.8)
    if low - room < COIN_FLIP < high + room:
        axes.axhline(COIN_FLIP, color="0.5", linestyle=":", linewidth=0.8)


def _tick_counts(axes: Axes, largest: int) -> None:
    """From 0, and logarithmic: the first layers may lose ten times as many directions as the others."""
    ticks = [tick for tick in COUNT_TICKS if tick < largest] or [0]
    ticks.append(COUNT_TICKS[len(ticks)])
    axes.set_yscale("symlog", linthresh=1, linscale=0.5)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(-0.3, 1.2 * ticks[-1])
