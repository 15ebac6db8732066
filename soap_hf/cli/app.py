"""The command line: `soap-hf fit | score | tune | evaluate | figures | explore | info | extract | push | convert`."""

import sys
from typing import Annotated, Any

import typer

from ..compat import argument_error
from ..heads.printing import failure, patient_streams, show
from ..runtime.errors import SOAPError, first_sentence
from ..version import __version__
from .convert import Convert
from .evaluate import Knn, Matching, Position, Saliency, Segmentation
from .explore import Explore
from .extract import Extract
from .figures import Figures
from .fit import Fit, Score
from .heads import Info, PushHead, Reweight
from .help import DECIDE, MAKE, USE, JobGroup, QuietCommand
from .options import Command, is_first_process
from .spelling import options_of_command, spelled
from .tune import Tune


def _start(command: Any, **_: Any) -> Any:
    """Starts what was asked for; help, the version and completions have been given already."""
    try:
        return command.start() if isinstance(command, Command) else command
    except SOAPError as error:
        vars(error)["message"] = spelled(str(error), options_of_command(command))
        raise
    except BaseException as error:
        if not _was_interrupted(error):
            raise
        if is_first_process():
            show("Interrupted.", to_stderr=True)
        raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=JobGroup,
    result_callback=_start,
    pretty_exceptions_enable=False,
    help="Takes position out of the patch tokens of a frozen vision backbone (SOAP, arXiv 2604.00172).",
    epilog="Add --debug to any command for the full traceback of an error.",
)
evaluate = typer.Typer(
    cls=JobGroup, help="Measure what a head does: raw, clean and baselines side by side.", no_args_is_help=True
)

COMMANDS: dict[str, dict[str, type[Command]]] = {
    MAKE: {"fit": Fit, "score": Score, "convert": Convert},
    DECIDE: {"tune": Tune, "reweight": Reweight},
    USE: {"info": Info, "figures": Figures, "explore": Explore, "extract": Extract, "push": PushHead},
}
"""The commands by name, in groups."""

for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, cls=QuietCommand, rich_help_panel=panel)(command)
app.add_typer(evaluate, name="evaluate", rich_help_panel=DECIDE)
for evaluation in (Matching, Position, Knn, Segmentation, Saliency):
    evaluate.command(evaluation.__name__.lower(), cls=QuietCommand)(evaluation)

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells count it."""


def _print_version(wanted: bool) -> None:
    if wanted:
        show(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `soap-hf` itself."""


def main() -> None:
    """Entry point: one sentence and a non-zero exit for an error, the traceback with `--debug`."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    with patient_streams():
        status = _status_of(arguments or ["--help"], debug)
    problem = failure()
    if problem is not None and not isinstance(problem, BrokenPipeError):
        show(f"Error: not everything could be printed ({first_sentence(problem)}).", to_stderr=True)
        failure()
    sys.exit(status or int(problem is not None))


def _status_of(arguments: list[str], debug: bool) -> int | None:
    """Runs a command line, and tells what went wrong; the exit status, if there is one."""
    try:
        return app(arguments, standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        message, status = str(error), 1
        if isinstance(error, argument_error()):  # about the arguments
            message, status = error.format_message(), error.exit_code
        elif isinstance(error, SOAPError):
            message, status = vars(error).get("message", message), vars(error).get("exit_status", 1)
        else:
            message = f"{type(error).__name__}: {first_sentence(error)} (run again with --debug for the traceback)"
        told_once = "exit_status" in vars(error) and not is_first_process()  # a signal is told once
        if message and not told_once:  # none comes with the help that stands for a missing command
            show(f"Error: {message}", to_stderr=True)
        return status


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error, such as one of an import, comes of a KeyboardInterrupt."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
