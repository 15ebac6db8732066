"""The errors of this package: bad input, said in one sentence that names the thing and the way out."""

import re
from importlib.metadata import PackageNotFoundError, version


class SOAPError(ValueError):
    """Base class of everything this package raises on purpose."""


class BackboneError(SOAPError):
    """The backbone cannot be found, loaded or run, or it has no patch tokens."""


class LayoutError(SOAPError):
    """The patch tokens do not lie where the layout says."""


class HeadError(SOAPError):
    """A head (config, projection or statistics) is malformed or does not fit its backbone."""


class DataError(SOAPError):
    """The data set cannot be found or read, or it holds no usable images."""


class OutputError(SOAPError):
    """The output folder cannot be written."""


class HubError(SOAPError):
    """A head cannot be pushed: the repository cannot be written, or what it would hold means nothing to others."""


class NonFiniteTokensError(SOAPError):
    """Patch tokens hold NaN or Inf."""


class MissingExtraError(SOAPError, ImportError):
    """A package that an extra of this one brings is not installed."""


class VersionError(SOAPError, ImportError):
    """A package is older than what this one can run with, or is not there."""


class CheckpointError(SOAPError):
    """A checkpoint belongs to another fit, or cannot be read."""


class FitInterrupted(SOAPError):
    """A signal ended a fit, whose checkpoint is written."""


class ProcessLostError(SOAPError):
    """Another process of the same run has ended."""


def first_sentence(error: BaseException) -> str:
    """The first line of an error, without its final stop, to be quoted inside one of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")


def refuse_older(package: str, needed: str, what: str = "SOAP") -> None:
    """Refuses to run with a package older than `needed` (major and minor), before an error from its depth.

    Raises:
        VersionError: names the version found and the one needed.
    """
    try:
        found = version(package)
        is_old = [*map(int, re.findall(r"\d+", found)[:2])] < [*map(int, needed.split("."))]
    except PackageNotFoundError:
        found, is_old = "not installed", True
    if is_old:
        raise VersionError(
            f"{what} needs {package} {needed} or newer, but here it is {found}; run "
            f'pip install --upgrade "{package}>={needed}".'
        )


refuse_older("transformers", "5.10")
