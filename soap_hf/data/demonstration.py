"""Where the demo lies: tiny backbones, a head and photographs, in the folder `examples` of a clone."""

import os
from pathlib import Path

from ..runtime.errors import DataError

VARIABLE = "SOAP_HF_EXAMPLES"
"""Names the folder, where it is not found by itself."""

LANDMARK = Path("vit-mae-tiny", "config.json")


def examples_folder() -> Path:
    """The folder `examples`: as `SOAP_HF_EXAMPLES` names it, at or above the working folder, or beside the package.

    Raises:
        DataError: it is nowhere there.

    Example:
        >>> (examples_folder() / "photos" / "heldout").is_dir()
        True
    """
    here = Path.cwd()
    named = [Path(os.environ[VARIABLE])] if VARIABLE in os.environ else []
    above = [folder / part for folder in (here, *here.parents) for part in ("", "examples")]
    for folder in named or [*above, Path(__file__).resolve().parents[2] / "examples"]:
        if (folder / LANDMARK).is_file():
            return folder
    where = f"not in {named[0]}" if named else f"neither above {here} nor beside the package"
    raise DataError(
        f"The demo's backbone and photographs lie in the folder examples of a clone of the repository, {where}; set "
        f"{VARIABLE} to that folder, or take a backbone and photographs of your own."
    )
