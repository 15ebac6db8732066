"""Commands made of dataclasses: each field is an option, each command a dataclass that knows how to run."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..data.arguments import HUB, RUNNING, parse_image_size
from ..heads.printing import show
from ..runtime.errors import SOAPError, first_sentence
from .spelling import patience_in_a_word, spelling_of

Backbone = Annotated[
    str,
    typer.Argument(
        metavar="BACKBONE", help="Hub id or folder of the backbone, torchhub:…, timm:… or package.module:function."
    ),
]
DatasetName = Annotated[str, typer.Argument(metavar="DATASET", help="Hub id, folder of images, or parquet file.")]
Head = Annotated[str, typer.Argument(metavar="HEAD", help="Folder or hub id of a head.")]
IncludeBackbone = Annotated[
    bool, typer.Option("--include-backbone", help="Put the backbone beside the head.", rich_help_panel=HUB)
]
BackboneId = Annotated[
    Optional[str], typer.Option(help="Hub id of the same backbone, if yours is in a folder.", rich_help_panel=HUB)
]
Private = Annotated[
    Optional[bool], typer.Option("--private", help="Make a new repository private.", rich_help_panel=HUB)
]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel=HUB)]
OwnSize = Annotated[
    Any,
    typer.Option(
        parser=parse_image_size,
        metavar="SIZE|HxW",
        help="Resize images to this, for a backbone that takes no other; default: their own shape.",
    ),
]
Device = Annotated[
    Optional[str], typer.Option(help="Default: the accelerator if there is one.", rich_help_panel=RUNNING)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")]
Progress = Annotated[
    bool,
    typer.Option("--progress/--quiet", help="Show no bars, and say nothing but results.", rich_help_panel=RUNNING),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the backbone.", rich_help_panel=HUB)
]
DrawFigures = Annotated[bool, typer.Option("--figures/--no-figures", help="Draw no figures for the head.")]
Token = Annotated[
    Optional[str],
    typer.Option(envvar="HF_TOKEN", show_envvar=False, help="Hub token; default: HF_TOKEN.", rich_help_panel=HUB),
]


class Command:
    """What stands behind `soap-hf NAME`: a dataclass of options that says what it will do, and does it.

    Modules of commands import what works inside `run` alone, so that help and errors need neither torch nor datasets.
    """

    needs_package = True
    """Whether the package must be whole, and registered with transformers, before the work."""

    def plan(self) -> str:
        """What `run` will do, in a few words; empty for nothing that takes time."""
        return ""

    def run(self) -> None:
        """Does it."""
        raise NotImplementedError

    def start(self) -> None:
        """Says what is about to be done, completes the package if `soap_hf_cli` put that off, and does it."""
        self.announce()
        complete = vars(sys.modules["soap_hf"]).pop("_complete", None)
        if complete is not None and self.needs_package:
            complete()
        with spelling_of(self), patience_in_a_word():
            self.run()

    def announce(self) -> None:
        """Says what is about to be done, before the imports that take seconds; of many processes, the first does."""
        if self.plan() and getattr(self, "progress", True) and is_first_process():
            show(f"{self.plan()} …", to_stderr=True)


def is_first_process() -> bool:
    """Whether this is the first of the processes of a launcher, known before any import."""
    return os.environ.get("RANK", "0") == "0"


def options_of(arguments: type, *, without: tuple[str, ...] = ()) -> type:
    """A dataclass with the fields of an arguments class, annotated as typer wants them.

    Args:
        arguments (`type`): a dataclass whose fields were made by [`~soap_hf.data.arguments.argument`].
        without (`tuple[str, ...]`): fields that the command line does not offer.
    """
    offered = [single for single in dataclasses.fields(arguments) if single.name not in without]
    made = [(single.name, _annotation(single), dataclasses.field(default=_default(single))) for single in offered]
    return dataclasses.make_dataclass(f"{arguments.__name__}Options", made, kw_only=True)


def values_of(command: Any, arguments: type) -> dict[str, Any]:
    """The values of a command for the fields of an arguments class, without those that were left at nothing."""
    names = [single.name for single in dataclasses.fields(arguments) if hasattr(command, single.name)]
    values = {name: getattr(command, name) for name in names}
    return {name: value for name, value in values.items() if value is not None and value != []}


def _annotation(single: dataclasses.Field) -> Any:
    how = dict(single.metadata)
    declaration = [how["flag"]] if "flag" in how else []
    names = {"help": "help", "metavar": "metavar", "hidden": "hidden", "least": "min", "most": "max"}
    names["panel"] = "rich_help_panel"
    options: dict[str, Any] = {new: how[old] for old, new in names.items() if old in how}
    if "envvar" in how:
        options |= {"envvar": how["envvar"], "show_envvar": False}
    kind = how.get("kind", single.type)
    if "parser" in how:
        kind, options["parser"] = Any, told(how["parser"])
    if "repeated" in how:
        one: Any = how["repeated"]
        kind, options["help"] = list[one] | None, f"{how['help']} May be repeated."
    return Annotated[kind, typer.Option(*declaration, **options)]


def _default(single: dataclasses.Field) -> Any:
    """A default as the command line has it: of what may be repeated nothing, of what is parsed a text."""
    if "repeated" in single.metadata or single.default is None:
        return None
    return str(single.default) if "parser" in single.metadata else single.default


def told(parser: Any) -> Any:
    """A parser whose refusals are told as errors about an option."""

    def parse(text: str) -> Any:
        try:
            return parser(text)
        except SOAPError as error:
            raise typer.BadParameter(str(error)) from error

    return parse


def _take_recipe(context: typer.Context, path: Path | None) -> None:
    """Takes from a recipe the arguments that the command line does not give."""
    if path is None:
        return
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise typer.BadParameter(f"there is no file {path}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read as YAML ({first_sentence(error)}).") from error
    if not isinstance(recipe, dict):
        raise typer.BadParameter(f"{path} is no list of arguments, such as num_images: 1000.")
    if "quiet" in recipe:  # as the command line calls it
        recipe["progress"] = not recipe.pop("quiet")
    known = {parameter.name for parameter in context.command.params}
    if unknown := sorted(str(name) for name in recipe if name not in known):
        raise typer.BadParameter(f"{path} names what this command does not know: {', '.join(unknown)}.")
    context.default_map = {name: _as_typed(value) for name, value in recipe.items()}


def _as_typed(value: Any) -> Any:
    """A value of a recipe as if it had been typed."""
    if isinstance(value, list):
        return [_as_typed(single) for single in value]
    return value if isinstance(value, bool) else str(value)


Recipe = Annotated[
    Optional[Path],
    typer.Option(
        metavar="FILE",
        callback=_take_recipe,
        is_eager=True,
        help="YAML file of arguments, such as num_images: 1000; what the command line gives goes first.",
    ),
]


def hide_progress_bars() -> None:
    """No bars from transformers or datasets."""
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    disable_progress_bars()
