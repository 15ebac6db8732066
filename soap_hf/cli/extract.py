"""`soap-hf extract`: clean features of a data set, in a file or a folder of shards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..data.arguments import HUB
from ..extract.arguments import ExtractArguments
from ..heads.printing import show
from ..runtime.errors import OutputError
from .options import Command, DatasetName, Head, Private, hide_progress_bars, options_of, values_of

ExtractOptions: Any = options_of(ExtractArguments)


@dataclass(kw_only=True)
class Extract(Command, ExtractOptions):
    """Write the clean features of every image of a data set: into a folder of parquet shards, or one file."""

    head: Head
    dataset: DatasetName
    output: Annotated[Path, typer.Option(help="A folder, or a file: features.parquet, features.safetensors.")]
    push_to_hub: Annotated[
        Optional[str],
        typer.Option(
            metavar="REPO", help="Then push the folder as a data set, e.g. to me/features.", rich_help_panel=HUB
        ),
    ] = None
    private: Private = None

    def plan(self) -> str:
        """What is written where."""
        return f"Writing clean features of {self.dataset}, by {self.head}, to {self.output}"

    def run(self) -> None:
        """Extracts, and pushes."""
        from ..extract.extraction import WAIT, extract_features
        from ..extract.publishing import push_features
        from ..heads.hub_requests import check_repository
        from ..processes import join_processes

        if self.output.is_file() and not self.overwrite:
            raise OutputError(f"{self.output} exists; choose another file or pass --overwrite.")
        if self.push_to_hub is not None:
            if self.output.suffix:
                raise OutputError(f"A folder of features is pushed, not a file; name one instead of {self.output}.")
            check_repository(self.push_to_hub)
        is_main = join_processes(self.device, timeout=WAIT).is_main_process
        if not self.progress or not is_main:
            hide_progress_bars()
        count = extract_features(self.head, self.dataset, self.output, **values_of(self, ExtractArguments))
        if not is_main:
            return
        if self.progress:
            show(f"Features of {count} images written to {self.output}")
        if self.push_to_hub is not None:
            address = push_features(self.output, self.push_to_hub, private=self.private, token=self.token)
            show(f"Features pushed to {address}")
