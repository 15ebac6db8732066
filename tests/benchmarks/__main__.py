"""Runs every benchmark, prints a table of each and writes all of them to one JSON file."""

import dataclasses
import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from tests.benchmarks.exploring import explore_images
from tests.benchmarks.extraction import extract_from_photographs
from tests.benchmarks.fitting import fit_images
from tests.benchmarks.matching import match_by_all_methods
from tests.benchmarks.memory import bound_memory, bound_memory_of_extraction
from tests.benchmarks.projection import apply_projection
from tests.benchmarks.saliency import find_eigenvectors, refine_masks
from tests.benchmarks.start import start_command_line
from tests.benchmarks.streaming import stream_statistics
from tests.benchmarks.timing import Comparison
from tests.benchmarks.wrapper import wrap_backbone

BENCHMARKS = (
    start_command_line,
    apply_projection,
    stream_statistics,
    wrap_backbone,
    find_eigenvectors,
    refine_masks,
    match_by_all_methods,
    extract_from_photographs,
    explore_images,
    fit_images,
    bound_memory,
    bound_memory_of_extraction,
)


def main(
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("benchmarks.json"),
) -> None:
    """Measures what using SOAP costs."""
    torch.manual_seed(0)
    environment = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    console, results = Console(), {}
    for benchmark in BENCHMARKS:
        comparison = benchmark()
        console.print(as_table(comparison))
        results[benchmark.__name__] = dataclasses.asdict(comparison)
    output.write_text(json.dumps({"environment": environment, "benchmarks": results}, indent=2) + "\n")
    console.print(f"{environment['threads']} threads, torch {environment['torch']}; written to {output}")


def as_table(comparison: Comparison) -> Table:
    """Seconds first, then ratios."""
    table = Table("", "", "aim", title=comparison.title)
    for name, seconds in comparison.seconds.items():
        table.add_row(name, f"{seconds * 1e3:.3f} ms", "")
    for name, megabytes in comparison.megabytes.items():
        table.add_row(name, f"{megabytes:.0f} MB", "")
    table.add_section()
    for name, ratio in comparison.ratios.items():
        table.add_row(name, f"{ratio:.3f}", comparison.targets.get(name, ""))
    return table


if __name__ == "__main__":
    typer.run(main)
