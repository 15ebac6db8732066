"""The command line: `soap-hf fit | score | tune | evaluate | figures | explore | info | extract | push | convert`."""

import sys
from collections.abc import Callable
from typing import Annotated

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
from .heads import Info, PushHead
from .options import Command
from .tune import Tune

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="Takes position out of the patch tokens of a frozen vision backbone (SOAP, arXiv 2604.00172).",
    epilog="Add --debug to any command for the full traceback of an error.",
)
evaluate = typer.Typer(help="Measure what a head does: raw, clean and baselines side by side.", no_args_is_help=True)

app.command("fit")(Fit)
app.command("score")(Score)
app.command("tune")(Tune)
app.command("extract")(Extract)
app.command("figures")(Figures)
app.command("info")(Info)
app.command("explore")(Explore)
app.command("push")(PushHead)
app.command("convert")(Convert)
app.add_typer(evaluate, name="evaluate")
for evaluation in (Matching, Position, Knn, Segmentation, Saliency):
    evaluate.command(evaluation.__name__.lower())(evaluation)


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
    try:
        command = app(arguments, standalone_mode=False)
        if not isinstance(command, Command):  # help, the version or a completion was asked for
            return command
        command.announce()
        if prepare is not None and command.needs_package:
            prepare()
        command.run()
        return 0
    except KeyboardInterrupt:
        show("Interrupted.", to_stderr=True)
        return 130  # as shells count it
    except Exception as error:
        if debug:
            raise
        message, status = str(error), 1
        if isinstance(error, argument_error()):  # about the arguments
            message, status = error.format_message(), error.exit_code
        elif not isinstance(error, SOAPError):
            message = f"{type(error).__name__}: {first_sentence(error)} (run again with --debug for the traceback)"
        show(f"Error: {message}", to_stderr=True)
        return status
