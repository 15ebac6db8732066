"""`soap-hf fit` and `soap-hf score`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..data.arguments import HUB
from ..fitting.arguments import FitArguments
from ..heads.printing import show
from ..heads.report import print_report
from ..runtime.errors import MissingExtraError, first_sentence
from .options import (
    Backbone,
    BackboneId,
    Command,
    DatasetName,
    DrawFigures,
    IncludeBackbone,
    Overwrite,
    Private,
    Recipe,
    hide_progress_bars,
    options_of,
    values_of,
)

FitOptions: Any = options_of(FitArguments)


@dataclass(kw_only=True)
class Fit(Command, FitOptions):
    """Fit a head on your own images and write it to a folder."""

    backbone: Backbone
    dataset: DatasetName
    output: Annotated[Path, typer.Option(help="Folder for the head.")]
    overwrite: Overwrite = False
    include_backbone: IncludeBackbone = False
    push_to_hub: Annotated[
        Optional[str],
        typer.Option(metavar="REPO", help="Then push it, e.g. to me/soap-vit-mae-base.", rich_help_panel=HUB),
    ] = None
    backbone_id: BackboneId = None
    private: Private = None
    figures: DrawFigures = True
    recipe: Recipe = None

    def plan(self) -> str:
        """What is fitted, on what, for which folder."""
        return f"Fitting a head on {self.backbone} and images of {self.dataset}, to be written to {self.output}"

    def run(self) -> None:
        """Fits, saves and pushes."""
        from ..files import check_output_folder
        from ..fitting.checkpoint import remove_checkpoint
        from ..heads.hub import Push, check_push, push_head
        from ..heads.saving import refuse_other_model
        from ..processes import join_processes

        push = None
        if self.push_to_hub is not None:
            target: dict[str, Any] = {"backbone_id": self.backbone_id, "include_backbone": self.include_backbone}
            push = Push(self.push_to_hub, private=self.private or None, token=self.token, **target)
        is_main = join_processes(self.device).is_main_process
        if is_main:
            check_output_folder(self.output, self.overwrite)
            refuse_other_model(self.output)
            if push is not None:
                check_push(push, self.backbone)
            self.figures = self.figures and can_draw()
        checkpoint = self.checkpoint or self.output.with_name(f"{self.output.name}.checkpoint")
        model = _fit(self, is_main, checkpoint=checkpoint)
        if not is_main:
            return
        figures = figures_of(model) if self.figures else None
        model.save_pretrained(self.output, include_backbone=self.include_backbone, figures=figures)
        remove_checkpoint(checkpoint)
        if self.progress:
            show(f"Head written to {self.output}")
        if push is not None:
            show(f"Head pushed to {push_head(self.output, push)}")


@dataclass(kw_only=True)
class Score(Command, FitOptions):
    """Score a backbone's components without writing a head: is there anything to remove?"""

    backbone: Backbone
    dataset: DatasetName
    check: Annotated[int, typer.Option(min=0, help="Images on which matching says whether the head would help.")] = 0
    all_layers: Annotated[bool, typer.Option("--all-layers", help="Every layer, in one pass over the data.")] = False

    def plan(self) -> str:
        """What is scored, on what."""
        return f"Scoring the components of {self.backbone} on images of {self.dataset}"

    def run(self) -> None:
        """Fits, and prints what a head would remove."""
        from ..processes import join_processes

        is_main = join_processes(self.device).is_main_process
        model = _fit(self, is_main, **({"layer": "all"} if self.all_layers else {}))
        if not self.progress and is_main:  # without its table it would say nothing
            print_report(model.config)


def _fit(command: Any, is_main: bool, **others: Any) -> Any:
    """The fitted head; bars and table are the main process's alone."""
    from ..fitting.fit import fit_soap

    others["progress"] = command.progress and is_main
    if not others["progress"]:
        hide_progress_bars()
    return fit_soap(command.backbone, command.dataset, **{**values_of(command, FitArguments), **others})


def can_draw() -> bool:
    """Whether figures can be drawn; says before the work if the extra for them is missing."""
    try:
        from .. import figures  # noqa: F401  # matplotlib comes with an extra
    except MissingExtraError as error:
        show(f"No figures: {error}", to_stderr=True)
        return False
    return True


def figures_of(model: Any) -> dict[str, bytes]:
    """The figures to save beside a head; none, and that is said, if they cannot be drawn: they must not cost a fit."""
    try:
        from ..figures import head_figures  # matplotlib comes with an extra

        return head_figures(model)
    except Exception as error:
        show(f"No figures: {first_sentence(error)}.", to_stderr=True)
        return {}
