"""How help reads: commands in the order of a job, options in groups, flags without a type."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer.core import TyperCommand, TyperGroup

ORDER = (
    *("fit", "score", "evaluate", "tune", "reweight"),
    *("info", "figures", "explore", "extract", "push", "convert"),
)
"""Commands as a job goes through them."""

MAKE, DECIDE, USE = "Make a head", "Does it help?", "Look at it, use it, share it"
"""The groups of commands."""


class _Quiet:
    """Help that shows a flag by its name alone, and of two the one that changes something."""

    def get_params(self: Any, ctx: Any) -> Any:
        """The parameters, `--help` among them; a flag has no type worth showing."""
        parameters = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return parameters

    def format_help(self: Any, ctx: Any, formatter: Any) -> None:
        """Writes the help."""
        with _switched_on(self.params):
            super().format_help(ctx, formatter)  # type: ignore[misc]


class QuietCommand(_Quiet, TyperCommand):
    """A command whose help is quiet about flags."""


class JobGroup(_Quiet, TyperGroup):
    """Commands in the order of a job."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands; of a group that no job knows, in the order in which they were added."""
        return sorted(super().list_commands(ctx), key=lambda name: ORDER.index(name) if name in ORDER else 0)


@contextmanager
def _switched_on(parameters: list[Any]) -> Iterator[None]:
    """Within the block a flag that is on by default is shown by the name that switches it off."""
    before = [(one, one.opts, one.secondary_opts, one.show_default) for one in parameters if one.secondary_opts]
    for one, _, off, _ in before:
        if one.default is True:
            one.opts, one.secondary_opts, one.show_default = off, [], False
    try:
        yield
    finally:
        for one, on, off, shown in before:
            one.opts, one.secondary_opts, one.show_default = on, off, shown
