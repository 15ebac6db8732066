"""A fitted head in words: the table of its components and where it came from."""

from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..notebooks import printable
from ..statistics.components import component_table, measured, table_of
from .printing import show
from .provenance import METHODS, SOAP

if TYPE_CHECKING:
    from .config import SOAPConfig

IMAGES_TO_SETTLE = 512
"""The least number of images after which a fit can have settled: four of its checks."""

FEW_LAYERS = 3
"""Up to this many layers get a table each, more share one."""


def print_report(config: Any) -> None:
    """Prints the highest-scoring components of each layer and the provenance of a head."""
    for part in report(config):
        show(part)


def report(config: Any) -> list[Table | str]:
    """The tables of a head and the sentences below them."""
    if len(config.layers) > FEW_LAYERS and config.components:  # a head made by hand knows none
        tables = [_depth_table(config)]
    else:
        titles = [f"layer {layer}" if len(config.layers) > 1 else None for layer in config.layers]
        parts = zip(config.components, titles, strict=False)
        tables = [component_table(components, title) for components, title in parts]
    # without control characters, which a foreign head could send to the terminal
    return [*tables, *map(printable, summary(config))]


def _depth_table(config: "SOAPConfig") -> Table:
    """One row per layer: its highest-scoring component, and how many are removed."""
    rows = []
    gains = [f"{check['mean']:+.2f} ± {(check['high'] - check['low']) / 2:.2f}" for check in config.checks]
    parallel = (config.layers, config.ranks, config.components, gains or [""] * len(config.layers))
    for layer, rank, (top, *_), gain in zip(*parallel, strict=True):
        score, error, variance = measured(top)
        name = "last_hidden_state" if layer == -1 else layer
        rows.append((name, score, error, top["component"], variance, rank, gain))
    columns = ("layer", "top score", "std. error", "component", "variance", "removed", "matching")
    return table_of("scores against depth", columns, rows)


def checks(config: "SOAPConfig") -> list[str]:
    """What matching says of the head: a sentence for each layer, of many layers for the last one alone."""
    if not config.checks:
        return []
    several, known = len(config.layers) > 1, list(zip(config.layers, config.ranks, config.checks, strict=True))
    shown = known if len(known) <= FEW_LAYERS else known[-1:]
    return [check_sentence(check, rank, f"layer {layer}: " if several else "") for layer, rank, check in shown]


def check_sentence(check: dict[str, Any], rank: int, prefix: str = "") -> str:
    """What a check says, in one sentence.

    Example:
        >>> check = {"images": 64, "raw": 0.21, "clean": 0.33, "mean": 0.12, "low": 0.09, "high": 0.14, "unseen": True}
        >>> check_sentence(check, rank=8).partition(", ")[2]
        'matching rises from 0.21 to 0.33 (+0.12, 95 % +0.09 to +0.14): this head helps.'
    """
    which = "that the fit did not see" if check["unseen"] else "by which the strength was chosen"
    start = f"{prefix}On {check['images']} photographs {which}, matching "
    shares = f"from {check['raw']:.2f} to {check['clean']:.2f}"
    interval = f"({check['mean']:+.2f}, 95 % {check['low']:+.2f} to {check['high']:+.2f})"
    way_out = "`soap-hf tune` looks for a strength that helps, and mu=0 removes nothing"
    if rank == 0:
        return f"{start}is {check['raw']:.2f}; this head removes nothing."
    if check["low"] > 0:
        return f"{start}rises {shares} {interval}: this head helps."
    if check["high"] < 0:
        return f"{start}falls {shares} {interval}: this head does harm here; {way_out}."
    return f"{start}does not change, {shares} {interval}: this head does no good here; {way_out}."


def module_in_words(config: "SOAPConfig") -> str | None:
    """What a module that is no transformers model is, and where its tokens are; `None` of one that is."""
    plain = config.plain_backbone
    if plain is None:
        return None
    tokens = "given by a function" if plain["tokens"] is None else f"at {plain['tokens']!r}"
    where = f", tokens {tokens}" if plain["tokens"] != "" else ""
    return f"a live module, {plain['architecture']} of {plain['num_parameters']} parameters{where}"


def what_is_removed(config: "SOAPConfig") -> str:
    """How it was decided what a head removes: the arguments of SOAP's weights, or the baseline."""
    if config.method != SOAP:
        return f"{config.method}: {METHODS[config.method]}, entirely"
    return f"mu={config.mu}, tau={config.tau}, threshold={config.threshold}"


def summary(config: "SOAPConfig") -> list[str]:
    """What the head removes and how it was fitted, one sentence per line."""
    several = 1 < len(config.layers) <= FEW_LAYERS
    removed = ", ".join(
        f"{rank} of {size}" + (f" in layer {layer}" if several else "")
        for layer, size, rank in zip(config.layers, config.hidden_sizes, config.ranks, strict=True)
    )
    revision = f" at {config.backbone_revision[:12]}" if config.backbone_revision else ""
    backbone = config.backbone_name_or_path or module_in_words(config) or "a model in memory"
    lines = [
        *checks(config),
        f"Directions removed: {removed} ({what_is_removed(config)}).",
        f"Backbone: {backbone}{revision}, {config.backbone_dtype}.",
    ]
    if config.fit:
        fit = config.fit
        height, width = fit["image_size"]
        lines.append(
            f"Fitted on {fit['num_images']} images of {fit['dataset']} and {fit['num_synthetic']} synthetic ones at "
            f"{height} x {width} pixels, seed {fit['seed']}, soap-hf {fit['versions']['soap_hf']}."
        )
        if tolerance := fit.get("tolerance"):
            lines.append(f"What is removed {_settled(fit, tolerance)}.")
    return lines


def _settled(fit: dict[str, Any], tolerance: float) -> str:
    """Whether what is removed still moved as images were added, in words that go on from it."""
    if after := fit["converged_after"]:
        return f"had settled after {after} images: in three checks running it moved by less than {tolerance:g}"
    if fit["num_images"] < IMAGES_TO_SETTLE:
        few = f"{fit['num_images']} are too few images to judge that, which takes {IMAGES_TO_SETTLE}"
        return f"may move with more images: {few}"
    return f"had not settled: at one of its last three checks it moved by {tolerance:g} or more; fit on more images"
