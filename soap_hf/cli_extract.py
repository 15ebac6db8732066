"""`soap-hf extract`: clean features of a data set, in a file."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .cli_options import DatasetName, Head, Revision, Token, parse_image_size
from .errors import OutputError


def extract(
    head: Head,
    dataset: DatasetName,
    output: Annotated[Path, typer.Option(help="File to write: features.parquet or features.safetensors.")],
    pooling: Annotated[
        str, typer.Option(metavar="mean|cls|cls+mean|none", help="One vector an image; none keeps the patch tokens.")
    ] = "mean",
    image_column: Annotated[str, typer.Option(help="Column that holds the images.")] = "image",
    split: Annotated[Optional[str], typer.Option(help="Split; default: the only one, else train.")] = None,
    config_name: Annotated[Optional[str], typer.Option(help="Configuration of a hub data set.")] = None,
    image_size: Annotated[
        Any,
        typer.Option(parser=parse_image_size, metavar="SIZE|HxW", help="Input size; default: the image processor's."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 32,
    num_workers: Annotated[Optional[int], typer.Option(min=0, help="Processes that decode images.")] = None,
    max_bad_images: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unreadable images that are left out.")
    ] = 0.01,
    dtype: Annotated[Optional[str], typer.Option(help="Dtype of the backbone; default: that of the fit.")] = None,
    device: Annotated[Optional[str], typer.Option(help="Default: the accelerator if there is one.")] = None,
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the backbone.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No bar.")] = False,
) -> None:
    """Write the clean features of every image of a data set to a file."""
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists; choose another file or pass --overwrite.")
    from .extraction import extract_features

    count = extract_features(
        head,
        dataset,
        output,
        pooling=None if pooling == "none" else pooling,  # type: ignore[arg-type]
        image_column=image_column,
        split=split,
        config_name=config_name,
        image_size=image_size,
        batch_size=batch_size,
        num_workers=num_workers,
        max_bad_images=max_bad_images,
        dtype=dtype,
        device=device,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        progress=not quiet,
    )
    if not quiet:
        typer.echo(f"Features of {count} images written to {output}")
