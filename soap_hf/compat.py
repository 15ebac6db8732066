"""What differs between the versions of other packages, in one place, each with the version at which it may go.

A branch may go once that version is the oldest in pyproject.toml. What travels with heads imports nothing of the
package, and has one of its own: `SubConfigSpec` in `runtime/configuration_soap.py` (transformers 5.20).
"""

import inspect
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .runtime.errors import MissingExtraError, refuse_older

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers.models.auto.image_processing_auto import AutoImageProcessor as AutoImageProcessor

    TransportError: type[Exception]


def __getattr__(name: str) -> Any:
    """Names that stand in different places, looked up when asked for: a command line does without them."""
    if name == "AutoImageProcessor":  # transformers 5.18: up to 5.17, its own export of it asks for torchvision
        return import_module("transformers.models.auto.image_processing_auto").AutoImageProcessor
    if (
        name == "TransportError"
    ):  # huggingface_hub 2.0: before, its errors were httpx's; it exports no name for this one
        return import_module(import_module("huggingface_hub.errors").HTTPError.__module__).TransportError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def argument_error() -> Any:
    """What typer raises about the arguments of a command. typer 0.28: before, it was an error of click."""
    import typer

    return typer.TyperException if hasattr(typer, "TyperException") else import_module("click").ClickException


def split_stream(stream: "IterableDataset", rank: int, num_processes: int, strategy: str) -> "IterableDataset":
    """The share of one process of a stream. datasets 5.1: before, how to share was not for us to say.

    Raises:
        VersionError: it would have to be dealt out image by image, and this version of datasets would not.
    """
    from datasets.distributed import split_dataset_by_node

    if "strategy" in inspect.signature(split_dataset_by_node).parameters:
        return split_dataset_by_node(stream, rank, num_processes, strategy=strategy)
    if num_processes > 1 and strategy == "examples":
        refuse_older("datasets", "5.1", f"A stream in {num_processes} processes")
    return split_dataset_by_node(stream, rank, num_processes)


def need(package: str, what: str, extra: str) -> None:
    """Refuses to go on without a package that an extra brings.

    Raises:
        MissingExtraError: says which.
    """
    if find_spec(package) is None:
        raise MissingExtraError(f'{what} needs {package}; run pip install "soap-hf[{extra}]".')
