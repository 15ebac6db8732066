"""`soap-hf explore`: a page in the browser to look at what a head does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..heads.printing import show
from .evaluate import load_head
from .options import Command, Device, Head, OwnSize, Progress, Revision, Token, TrustRemoteCode, hide_progress_bars


@dataclass(kw_only=True)
class Explore(Command):
    """Look at what a head does in the browser: click a patch, change the strength; on this computer alone."""

    head: Head
    images: Annotated[
        Optional[list[Path]],
        typer.Argument(metavar="IMAGE", help="Images to choose from; default: four that come with the command."),
    ] = None
    port: Annotated[Optional[int], typer.Option(min=1, max=65535, help="Default: a free one.")] = None
    share: Annotated[bool, typer.Option("--share", help="Also at a public address, through servers of gradio.")] = (
        False
    )
    image_size: OwnSize = None
    device: Device = None
    revision: Revision = None
    token: Token = None
    trust_remote_code: TrustRemoteCode = False
    progress: Progress = True

    def plan(self) -> str:
        """What is explored."""
        return f"Opening the explorer of {self.head}"

    def run(self) -> None:
        """Serves the page until it is interrupted."""
        from ..explore.explorer import Explorer
        from ..explore.serving import free_port, serve

        free_port(self.port)
        if not self.progress:
            hide_progress_bars()
        hub = {"revision": self.revision, "token": self.token, "trust_remote_code": self.trust_remote_code or None}
        model = load_head(self.head, self.device, **hub)
        name = Path(self.head).resolve().name if Path(self.head).is_dir() else self.head
        explorer = Explorer(model, name, image_size=self.image_size)
        serve(explorer, self.images or (), port=self.port, share=self.share, started=self._tell)

    def _tell(self, address: str) -> None:
        if self.progress:
            show(f"The explorer is at {address} (Ctrl+C ends it)")
