"""`soap-hf info` and `soap-hf push`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..heads.glance import glance
from ..heads.printing import show
from ..heads.report import print_report
from .options import BackboneId, Command, Head, IncludeBackbone, Private, Revision, Token, values_of


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
class PushHead(Command):
    """Push a head to the Hub, with its card and the code that loads it."""

    head: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the head.")]
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="e.g. me/soap-vit-mae-base; made if need be.")]
    backbone_id: BackboneId = None
    include_backbone: IncludeBackbone = False
    statistics: Annotated[bool, typer.Option(help="Push the statistics, so that others can reweight.")] = True
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
