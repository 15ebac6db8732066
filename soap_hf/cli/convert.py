"""`soap-hf convert`: checkpoints of iBOT and DINO as folders of transformers."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..heads.printing import show
from .options import Command, Overwrite


class Method(str, Enum):
    """Whose checkpoint it is; both have one shape."""

    ibot = "ibot"
    dino = "dino"


class Weights(str, Enum):
    """Which of a training's two models."""

    teacher = "teacher"
    student = "student"


@dataclass(kw_only=True)
class Convert(Command):
    """Turn a checkpoint of iBOT or DINO into a folder that `soap-hf fit` and AutoModel take."""

    method: Annotated[Method, typer.Argument(help="Whose checkpoint it is.")]
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="File of torch or safetensors.")]
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder for the backbone.")]
    weights: Annotated[Weights, typer.Option(help="Which of a training's two models.")] = Weights.teacher
    num_heads: Annotated[
        Optional[int], typer.Option(min=1, help="Heads of attention; default: one for each 64 of the width.")
    ] = None
    overwrite: Overwrite = False

    def plan(self) -> str:
        """What is converted."""
        return f"Converting {self.checkpoint}"

    def run(self) -> None:
        """Converts."""
        from ..convert import convert_vit
        from ..files import check_output_folder

        check_output_folder(self.output, self.overwrite)
        convert_vit(self.checkpoint, self.output, weights=self.weights.value, num_heads=self.num_heads)
        show(f"Backbone written to {self.output}")
