"""`soap-hf extract`: clean features of a data set, in a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..extract.extraction import ExtractArguments, extract_features
from ..heads.printing import show
from ..runtime.errors import OutputError
from .options import DatasetName, Head, hide_progress_bars, options_of, values_of

ExtractOptions: Any = options_of(ExtractArguments)


@dataclass(kw_only=True)
class Extract(ExtractOptions):
    """Write the clean features of every image of a data set to a file."""

    head: Head
    dataset: DatasetName
    output: Annotated[Path, typer.Option(help="File to write: features.parquet or features.safetensors.")]
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False

    def run(self) -> None:
        """Extracts."""
        if self.output.exists() and not self.overwrite:
            raise OutputError(f"{self.output} exists; choose another file or pass --overwrite.")
        if not self.progress:
            hide_progress_bars()
        count = extract_features(self.head, self.dataset, self.output, **values_of(self, ExtractArguments))
        if self.progress:
            show(f"Features of {count} images written to {self.output}")
