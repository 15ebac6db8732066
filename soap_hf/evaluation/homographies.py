"""Matching between images whose geometry is known from a homography: HPatches, and folders of its form."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.folders import PICTURES
from ..runtime.errors import DataError
from .arguments import ViewRule
from .comparison import Comparison
from .examples import open_image
from .matching import RADII, matching_row, right, tokens_of
from .results import Results, grouped
from .sharing import measure_items
from .views import resized_view, true_places

KINDS = {"v": "viewpoint", "i": "illumination"}
"""What changes in the scenes whose names begin so."""

OTHERS = range(2, 7)
"""Numbers of the images that are compared with the first one."""


class Scene(NamedTuple):
    """One folder: the paths of its images, the first one first, and the homographies from it to the others."""

    name: str
    kind: str
    paths: list[Path]
    homographies: list[Tensor]


def evaluate_homographies(
    comparison: Comparison, folder: Path, *, progress: bool = True, command: str | None = None
) -> Results:
    """How often a patch finds its place in another image of the same plane, as in HPatches (arXiv 1704.05939).

    Images are resized to the size of the head's. Patches of the first image whose centre lies in the other one count;
    `right_<radius>` and `stuck` are as in `evaluate_matching`.

    Args:
        comparison ([`Comparison`]): the head and its methods.
        folder (`Path`): a folder per scene, with images `1` to `6` and files `H_1_2` to `H_1_6`: the 3 x 3 homography
            in pixels. Names of scenes begin with `v_` (another viewpoint) or `i_` (another illumination).
        progress (`bool`, defaults to `True`): show a bar.
        command (`str`, *optional*): noted in the summary.

    Returns:
        [`Results`]: one row per pair of images; `summary["groups"]` tells viewpoint and illumination apart.

    Raises:
        DataError: no scene, a pair without its homography or with a singular one, or an image that cannot be read.
    """
    scenes = read_scenes(folder)
    grid = comparison.grid
    measure = partial(_scene_rows, comparison=comparison, grid=grid)
    of_scenes = measure_items(scenes, measure, share=comparison.share, phase="scenes", progress=progress)
    rows = [row for of_scene in of_scenes for row in of_scene]
    metrics = [right(radius) for radius in RADII]
    skipped = sum(len(scene.homographies) for scene in scenes) - len(rows)
    counts = {"images": len(rows), "scenes": len(scenes), "skipped_images": skipped}
    results = comparison.results("matching", rows, metrics, counts=counts, command=command)
    return grouped(results, "kind", metrics, ["stuck"])


def _scene_rows(scene: Scene, comparison: Comparison, grid: tuple[int, int]) -> list[dict[str, Any]]:
    """One row per pair of images that show something in common."""
    images = [open_image(path, "mend it or remove its scene") for path in scene.paths]
    views = torch.stack([resized_view(image, comparison.preprocess.size) for image in images])
    patches = tokens_of(comparison, views)[comparison.layer]
    cleaned = {name: clean(patches) for name, clean in comparison.methods.items()}
    rows = []
    for number, homography in enumerate(scene.homographies, start=1):
        between = _in_shares(homography, images[0].size, images[number].size)
        if true_places(between, grid)[1].any():
            pair = {name: (tokens[0], tokens[number]) for name, tokens in cleaned.items()}
            found = matching_row(pair, between, grid, ViewRule().least_move)
            known = {name: None if value != value else value for name, value in found.items()}  # NaN: nothing moved
            rows.append({"image": f"{scene.name}/{scene.paths[number].name}", "kind": scene.kind, **known})
    return rows


def read_scenes(folder: Path) -> list[Scene]:
    """The scenes of a folder, their homographies read and checked.

    Raises:
        DataError: no scene, or a pair without its homography or with a singular one.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give one with a folder per scene (v_…, i_…), as HPatches has.")
    scenes = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[:2] in ("v_", "i_")):
        images = {file.stem: file for file in sorted(path.iterdir()) if file.suffix.lower() in PICTURES}
        if "1" not in images:
            raise DataError(f"Scene {path} has no image 1, with which the others are compared; add it.")
        numbers = [number for number in OTHERS if str(number) in images]
        if numbers:
            homographies = [read_homography(path / f"H_1_{number}") for number in numbers]
            paths = [images["1"], *(images[str(number)] for number in numbers)]
            scenes.append(Scene(path.name, KINDS[path.name[0]], paths, homographies))
    if not scenes:
        raise DataError(f"{folder} holds no scene: folders v_… and i_… with images 1 to 6 and files H_1_2 to H_1_6.")
    return scenes


def read_homography(path: Path) -> Tensor:
    """A 3 x 3 matrix from a text file, float64.

    Raises:
        DataError: there is none, or it is singular.
    """
    try:
        matrix = np.loadtxt(path, dtype=np.float64)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no homography ({error}); it must hold 3 rows of 3 numbers.") from error
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or np.linalg.matrix_rank(matrix) < 3:
        raise DataError(f"{path} holds no invertible 3 x 3 matrix; mend it or remove its image.")
    return torch.from_numpy(matrix)


def _in_shares(homography: Tensor, first: tuple[int, int], second: tuple[int, int]) -> Tensor:
    """A homography of pixels, whose centres are whole numbers, as one of shares of both images' sides."""
    shares = [
        torch.tensor([[1 / width, 0, 0.5 / width], [0, 1 / height, 0.5 / height], [0, 0, 1]], dtype=torch.float64)
        for width, height in (first, second)
    ]
    return shares[1] @ homography @ torch.linalg.inv(shares[0])
