"""A fitted head in words: the table of its components and where it came from."""

from typing import Any

from rich.console import Console
from rich.table import Table

from ..statistics.semantic_invariance import NEGLIGIBLE_WEIGHT
from .config import SOAPConfig

FEW_LAYERS = 3
"""Up to this many layers get a table each, more share one."""


def print_report(config: SOAPConfig, console: Console | None = None) -> None:
    """Prints the highest-scoring components of each layer and the provenance of a head."""
    console = console or Console()
    if len(config.layers) > FEW_LAYERS:
        console.print(depth_table(config))
    else:
        for layer, components in zip(config.layers, config.components, strict=False):
            console.print(component_table(components, f"layer {layer}" if len(config.layers) > 1 else None))
    for line in summary(config):
        console.print(_printable(line), markup=False, highlight=False)


def _printable(text: str) -> str:
    """Without control characters, which a foreign head could send to the terminal."""
    return "".join(character for character in text if character.isprintable())


def depth_table(config: SOAPConfig) -> Table:
    """One row per layer: its highest-scoring component, and how many are removed."""
    table = Table(title="scores against depth")
    for name in ("layer", "top score", "std. error", "component", "variance", "removed"):
        table.add_column(name, justify="right")
    for layer, rank, components in zip(config.layers, config.ranks, config.components, strict=True):
        top = components[0]
        table.add_row(
            "last_hidden_state" if layer == -1 else str(layer),
            f"{top['score']:.4f}",
            f"{top['standard_error']:.4f}",
            str(top["component"]),
            f"{top['variance_share']:.2%}",
            str(rank),
        )
    return table


def component_table(components: list[dict[str, Any]], title: str | None = None) -> Table:
    """The components as a table: rank, number, score and its standard error, share of variance, weight."""
    table = Table(title=title)
    for name in ("rank", "component", "score", "std. error", "variance", "weight", ""):
        table.add_column(name, justify="right")
    for row in components:
        table.add_row(
            str(row["rank"]),
            str(row["component"]),
            f"{row['score']:.4f}",
            f"{row['standard_error']:.4f}",
            f"{row['variance_share']:.2%}",
            f"{row['weight']:.4f}",
            "removed" if row["weight"] > NEGLIGIBLE_WEIGHT else "",
        )
    return table


def summary(config: SOAPConfig) -> list[str]:
    """What the head removes and how it was fitted, one sentence per line."""
    several = 1 < len(config.layers) <= FEW_LAYERS
    removed = ", ".join(
        f"{rank} of {size}" + (f" in layer {layer}" if several else "")
        for layer, size, rank in zip(config.layers, config.hidden_sizes, config.ranks, strict=True)
    )
    revision = f" at {config.backbone_revision[:12]}" if config.backbone_revision else ""
    lines = [
        f"Directions removed: {removed} (mu={config.mu}, tau={config.tau}, threshold={config.threshold}).",
        f"Backbone: {config.backbone_name_or_path or 'a model in memory'}{revision}, {config.backbone_dtype}.",
    ]
    if config.fit:
        fit = config.fit
        height, width = fit["image_size"]
        lines.append(
            f"Fitted on {fit['num_images']} images of {fit['dataset']} and {fit['num_synthetic']} synthetic ones at "
            f"{height} x {width} pixels, seed {fit['seed']}, soap-hf {fit['versions']['soap_hf']}."
        )
        if tolerance := fit.get("tolerance"):
            after = fit["converged_after"]
            settled = f"converged after {after} images" if after else "not yet converged"
            lines.append(f"What is removed: {settled} (moving by less than {tolerance:g} in three checks running).")
    return lines
