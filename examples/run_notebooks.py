"""Runs the notebooks from top to bottom and stores their outputs; the pictures of docs/gallery.md come with them.

    python examples/run_notebooks.py [clean_tokens gallery] [--output FOLDER] [--pictures docs]

Each runs in the folder where it is written. What a cell shows is stored as JPEG, so that the notebooks stay small, and
a cell with a tag such as `gallery-colours` gives `gallery-colours.jpg` too.
"""

import argparse
import base64
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("notebooks", nargs="*", default=["clean_tokens", "gallery"], help="names without .ipynb")
    arguments.add_argument("--output", type=Path, default=HERE, help="folder for the notebooks with their outputs")
    arguments.add_argument("--pictures", type=Path, help="folder for the pictures of tagged cells")
    chosen = arguments.parse_args()
    for name in chosen.notebooks:
        notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
        NotebookClient(notebook, resources={"metadata": {"path": str(chosen.output)}}, timeout=900).execute(
            env={**os.environ, "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        )
        strip(notebook)
        nbformat.write(notebook, chosen.output / f"{name}.ipynb")
        print(f"{name}: {(chosen.output / f'{name}.ipynb').stat().st_size / 1024:.0f} KiB")
        if chosen.pictures is not None:
            write_pictures(notebook, chosen.pictures)


def strip(notebook: nbformat.NotebookNode) -> None:
    """Takes away what differs from run to run, and bars."""
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/jpeg" in output.get("data", {}):
                    output.data.pop("text/plain", None)  # it names an object's address


def write_pictures(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """The pictures of cells that have a tag, under that name."""
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            (picture,) = (one.data["image/jpeg"] for one in cell.outputs if "image/jpeg" in one.get("data", {}))
            (folder / f"{tag}.jpg").write_bytes(base64.b64decode(picture))
            print(folder / f"{tag}.jpg")


if __name__ == "__main__":
    main()
