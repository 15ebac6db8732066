"""The command line: `soap-hf fit | score | tune | evaluate | figures | explore | info | extract | push | convert`."""

import sys
from collections.abc import Callable
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
from .spelling import options_of_command, patience_in_a_word, spelled, spelling_of
from .tune import Tune

app = typer.Typer(
    cls=JobGroup,
    pretty_exceptions_enable=False,
    help="Clean patch tokens from any frozen vision backbone (SOAP, arXiv 2604.00172).",
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


def main(prepare: Callable[[], object] | None = None) -> None:
    """Entry point: one sentence and a non-zero exit for an error, the traceback with `--debug`.

    `prepare` is called before a command works, once the command line is understood.
    """
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    with patient_streams():
        status = _status_of(arguments or ["--help"], debug, prepare)
    problem = failure()
    if problem is not None and not isinstance(problem, BrokenPipeError):
        show(f"Error: not everything could be printed ({first_sentence(problem)}).", to_stderr=True)
        failure()
    sys.exit(status or int(problem is not None))


def _status_of(arguments: list[str], debug: bool, prepare: Callable[[], object] | None) -> int | None:
    """Runs a command line, and tells what went wrong; the exit status, if there is one."""
    command: Any = None
    try:
        command = app(arguments, standalone_mode=False)
        if not isinstance(command, Command):  # help, the version or a completion was asked for
            return command
        command.announce()
        if prepare is not None and command.needs_package:
            prepare()
        with spelling_of(command), patience_in_a_word():
            command.run()
        return 0
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if debug:
            raise
        if _was_interrupted(error):
            return _interrupted()
        message, status = str(error), 1
        if isinstance(error, argument_error()):  # about the arguments
            message, status = error.format_message(), error.exit_code
        elif isinstance(error, SOAPError):
            message = spelled(message, options_of_command(command))
            status = vars(error).get("exit_status", 1)
        else:
            message = f"{type(error).__name__}: {first_sentence(error)} (run again with --debug for the traceback)"
        if not message:  # the help that was asked for is shown
            return status
        if "exit_status" not in vars(error) or is_first_process():  # a signal is told once
            show(f"Error: {message}", to_stderr=True)
        return status


def _interrupted() -> int:
    if is_first_process():
        show("Interrupted.", to_stderr=True)
    return INTERRUPTED


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error, such as one of an import, comes of a KeyboardInterrupt."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
