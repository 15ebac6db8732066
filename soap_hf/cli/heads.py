"""`soap-hf info`, `soap-hf reweight` and `soap-hf push`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..data.arguments import parse_mu
from ..heads.glance import glance
from ..heads.printing import show
from ..heads.provenance import SOAP
from ..heads.report import print_report, summary
from ..runtime.errors import DataError
from .options import (
    BackboneId,
    Command,
    Device,
    DrawFigures,
    Head,
    IncludeBackbone,
    Overwrite,
    Private,
    Progress,
    Revision,
    Token,
    TrustRemoteCode,
    hide_progress_bars,
    told,
    values_of,
)


@dataclass(kw_only=True)
class Info(Command):
    """Show what a head removes and how it was fitted."""

    head: Head
    revision: Revision = None
    token: Token = None

    needs_package = False

    def run(self) -> None:
        """Prints what the head's files say."""
        config = glance(self.head, revision=self.revision, token=self.token)
        if config is None:  # the long way says in which way the head is not in order
            from ..heads.opening import HeadRecord

            config = HeadRecord.open(self.head, revision=self.revision, token=self.token).config
        print_report(config)


@dataclass(kw_only=True)
class Reweight(Command):
    """Make a head of another strength, or one that removes what a baseline does, from a head; without a new fit."""

    head: Head
    output: Annotated[Path, typer.Option(help="Folder for the new head.")]
    mu: Annotated[
        Any, typer.Option(parser=told(parse_mu), metavar="NUMBER|auto", help="Its strength: components to remove.")
    ] = None
    method: Annotated[
        Optional[str], typer.Option(help="What it removes: soap, or a baseline, zero-image or top-pc.")
    ] = None
    rank: Annotated[Optional[int], typer.Option(min=1, help="Directions of a baseline; default: the head's.")] = None
    overwrite: Overwrite = False
    figures: DrawFigures = True
    revision: Revision = None
    token: Token = None
    trust_remote_code: TrustRemoteCode = False
    device: Device = None
    progress: Progress = True

    def plan(self) -> str:
        """What is made of what, for which folder."""
        return f"Making another head of {self.head}, to be written to {self.output}"

    def run(self) -> None:
        """Makes it, and says what it removes."""
        from ..evaluation.methods import METHODS, as_baseline
        from ..files import check_output_folder
        from ..heads.saving import refuse_other_model
        from .evaluate import load_head
        from .fit import can_draw, figures_of

        method = self.method or SOAP
        if method not in METHODS:
            raise DataError(f"There is no method {method!r}; choose from {', '.join(METHODS)}.")
        if method == SOAP and (self.mu is None or self.rank is not None):
            raise DataError("Say what the new head removes: --mu 2, or a baseline, such as --method top-pc --rank 4.")
        if method != SOAP and self.mu is not None:
            raise DataError(f"{method} removes as many directions as --rank says; leave out --mu.")
        check_output_folder(self.output, self.overwrite)
        refuse_other_model(self.output)
        draws = self.figures and can_draw()
        if not self.progress:
            hide_progress_bars()
        hub = {"revision": self.revision, "token": self.token, "trust_remote_code": self.trust_remote_code or None}
        model = load_head(self.head, self.device, **hub)
        if method == SOAP:
            model.reweight(self.mu, model.config.tau, model.config.threshold)
        else:
            as_baseline(model, method, rank=self.rank)
        model.save_pretrained(self.output, figures=figures_of(model) if draws else None)
        if self.progress:
            show(summary(model.config)[0])
            show(f"Head written to {self.output}; `soap-hf evaluate matching {self.output} DATASET` says if it helps.")


@dataclass(kw_only=True)
class PushHead(Command):
    """Push a head to the Hub, with its card and the code that loads it."""

    head: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the head.")]
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="e.g. me/soap-vit-mae-base; made if need be.")]
    backbone_id: BackboneId = None
    include_backbone: IncludeBackbone = False
    statistics: Annotated[
        bool, typer.Option("--statistics/--no-statistics", help="Leave the statistics out, so that none can reweight.")
    ] = True
    private: Private = None
    revision: Annotated[Optional[str], typer.Option(help="Branch, made if need be; default: main.")] = None
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False
    commit_message: Annotated[Optional[str], typer.Option(help="Default: what was fitted.")] = None
    license: Annotated[Optional[str], typer.Option(help="Default: the card's, else the backbone's.")] = None
    force: Annotated[bool, typer.Option("--force", help="Write over a repository of something else.")] = False
    token: Token = None

    def plan(self) -> str:
        """What goes where."""
        return f"Pushing the head in {self.head} to {self.repo_id}"

    def run(self) -> None:
        """Pushes."""
        from ..heads.hub import Push, push_head

        show(f"Head pushed to {push_head(self.head, Push(**values_of(self, Push)))}")
