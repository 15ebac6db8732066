"""Messages as the command line spells its options: Python's `image_column=…` is `--image-column` here."""

import dataclasses
import logging
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import typer

PLAIN_VERBS = "must|is a|has a|keeps|needs"
"""What follows the name of an option that is a common word, where it begins a sentence about the option."""

REPHRASED = {
    r", or make the module yourself and pass it as backbone=…": "",
    r", or cast it with dataset\.cast_column\(.*?\)\)": "",
    r" with dataset\.rename_column": "",
    r"; if it moved, pass backbone=…": "; move it back, or load the head in Python with backbone=…",
    r"pass a model with those, e\.g\. as backbone=…, or fit": "give the backbone those, or fit",
    r" or None, not ": " or none, not ",
}
"""What only Python can do, and how it is said here."""

OUT_OF_REACH = (
    "The Hub cannot be reached; trying on for a while. With HF_HUB_OFFLINE=1 in the environment, what was fetched "
    "before is used at once."
)


def options_of_command(command: Any) -> dict[str, str]:
    """The options of a command by the name of their field, e.g. `{"image_column": "--image-column"}`."""
    if not dataclasses.is_dataclass(command):
        return {}
    hints = typing.get_type_hints(type(command), include_extras=True)
    options = {}
    for single in dataclasses.fields(command):
        about = getattr(hints[single.name], "__metadata__", ())
        if any(isinstance(one, type(typer.Option())) for one in about):
            options[single.name] = f"--{single.name.replace('_', '-')}"
    return options


def spelled(message: str, options: Mapping[str, str]) -> str:
    """A message of the package, with the options of a command as one types them.

    Example:
        >>> options = {name: f"--{name.replace('_', '-')}" for name in ("image_column", "patches", "pooling", "tau")}
        >>> spelled("The data set has no column 'picture'; choose one with image_column=….", options)
        "The data set has no column 'picture'; choose one with --image-column."
        >>> spelled("tau must be above 0, not 0; pass patches=True or pooling=None.", options)
        '--tau must be above 0, not 0; pass --patches or --pooling none.'
    """
    for said, here in REPHRASED.items():
        message = re.sub(said, here, message)
    message = re.sub(r"(\(--[\w-]+), \w+=(\w+|…)\)", r"\1)", message)  # said in both ways already
    message = re.sub(r"\w+=(?:\w+|…) \((--[\w-]+)\)", r"\1", message)
    for name, option in options.items():
        message = re.sub(rf"(?<![\w.'\"`-]){name}=(?:True\b|…)", option, message)
        message = re.sub(rf"(?<![\w.'\"`-]){name}=False\b", f"--no-{option.removeprefix('--')}", message)
        message = re.sub(rf"(?<![\w.'\"`-]){name}=None\b", f"{option} none", message)
        message = re.sub(rf"(?<![\w.'\"`-]){name}=", f"{option} ", message)
        whole = rf"(?<![\w.'\"`/=-]){name}(?![\w'\"`/=(-])"
        if "_" in name:
            message = re.sub(whole, option, message)
        else:
            message = re.sub(rf"^{name}(?= (?:{PLAIN_VERBS})\b)", option, message)
    return message


@contextmanager
def patience_in_a_word() -> Iterator[None]:
    """Within the block huggingface_hub says once that the Hub does not answer, not at each of its tries."""
    said = False

    def once(record: logging.LogRecord) -> bool:
        nonlocal said
        message = record.getMessage()
        if not re.match(r"Retrying in|Rate limited|.* thrown while requesting", message):
            return True
        if said:
            return False
        said = True
        if "thrown while" in message and not message.startswith("HTTP Error"):
            record.msg, record.args = OUT_OF_REACH, ()
        return True

    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(once)
    try:
        yield
    finally:
        logger.removeFilter(once)


@contextmanager
def spelling_of(command: Any) -> Iterator[Mapping[str, str]]:
    """Within the block the package's warnings are spelled for a command, too; yields its options."""
    options = options_of_command(command)

    def spell(record: logging.LogRecord) -> bool:
        if record.name.startswith("soap_hf"):
            record.msg, record.args = spelled(record.getMessage(), options), ()
        return True

    loggers = (logging.getLogger("soap_hf"), logging.getLogger("transformers"), logging.root)
    handlers = {handler for logger in loggers for handler in logger.handlers} | {
        cast(logging.Handler, logging.lastResort)
    }
    for handler in handlers:
        handler.addFilter(spell)
    try:
        yield options
    finally:
        for handler in handlers:
            handler.removeFilter(spell)
