"""Pairs with known truth, in folders of HPatches' and SPair-71k's form made of photographs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from soap_hf import Comparison, SOAPModelWrapper
from soap_hf.evaluation import evaluate_homographies, evaluate_keypoints
from soap_hf.evaluation.homographies import read_scenes
from soap_hf.evaluation.keypoints import at_points, read_pairs
from soap_hf.runtime.errors import DataError
from tests.conftest import EXAMPLES, random_projection

PHOTOS = sorted((EXAMPLES / "photos" / "fit").glob("*.jpg"))


@pytest.fixture
def comparison() -> Comparison:
    backbone = AutoModel.from_pretrained(EXAMPLES / "vit-mae-tiny", dtype="float32")
    return Comparison.of(SOAPModelWrapper.from_backbone(backbone, random_projection(192)))


def write_scene(folder: Path, photograph: Path, homographies: dict[int, np.ndarray], sizes=None) -> None:
    """Image 1 is the photograph, image k what the homography from 1 to k makes of it."""
    folder.mkdir(parents=True)
    image = Image.open(photograph).convert("RGB")
    image.save(folder / "1.ppm")
    for number, matrix in homographies.items():
        back = np.linalg.inv(matrix)
        size = (sizes or {}).get(number, image.size)
        warped = image.transform(size, Image.Transform.PERSPECTIVE, (back / back[2, 2]).ravel()[:8])
        warped.save(folder / f"{number}.ppm")
        np.savetxt(folder / f"H_1_{number}", matrix)


SHIFT = np.array([[1.0, 0, -64], [0, 1, -32], [0, 0, 1]])
TILT = np.array([[1.1, 0.1, -70], [0.05, 0.9, 4], [2e-4, 1e-4, 1]])


@pytest.fixture
def hpatches(tmp_path) -> Path:
    folder = tmp_path / "hpatches"
    write_scene(folder / "v_one", PHOTOS[0], {2: SHIFT, 3: TILT})
    write_scene(folder / "v_two", PHOTOS[1], {2: SHIFT}, sizes={2: (192, 224)})
    write_scene(folder / "i_dark", PHOTOS[2], {2: np.eye(3), 4: np.eye(3)})
    (folder / "README.txt").write_text("not a scene", encoding="utf-8")
    return folder


def test_scenes_are_matched_and_kinds_told_apart(comparison, hpatches):
    found = evaluate_homographies(comparison, hpatches, progress=False)
    assert found.summary["counts"] == {"images": 5, "scenes": 3, "skipped_images": 0}
    groups = found.summary["groups"]
    assert {name: group["counts"]["images"] for name, group in groups.items()} == {"illumination": 2, "viewpoint": 3}
    assert groups["illumination"]["means"]["raw"]["right_0.5"] == 1, "the same image, nothing moved"
    assert "stuck" in groups["viewpoint"]["means"]["raw"]
    assert "stuck" not in groups["illumination"]["means"]["raw"]


def test_a_homography_in_pixels_says_where_things_are(comparison, hpatches, monkeypatch):
    """Tokens made of the true place are all right, in images of other sizes too."""
    from soap_hf.evaluation import homographies

    asked = []
    real = homographies.matching_row
    monkeypatch.setattr(homographies, "matching_row", lambda *given: asked.append(given[1]) or real(*given))
    evaluate_homographies(comparison, hpatches, progress=False)
    width, height = Image.open(hpatches / "v_two" / "1.ppm").size
    between = asked[-1]  # v_two: 64 pixels left and 32 up, into 192 x 224 pixels
    point = torch.tensor([100.5 / width, 90.5 / height, 1], dtype=torch.float64)
    moved = between @ point
    torch.testing.assert_close(moved[:2] / moved[2], torch.tensor([36.5 / 192, 58.5 / 224], dtype=torch.float64))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda scene: (scene / "H_1_2").unlink(), "H_1_2 is no homography"),
        (lambda scene: (scene / "H_1_2").write_text("1 0 0\n2 0 0\n0 0 1\n"), "no invertible 3 x 3 matrix"),
        (lambda scene: (scene / "H_1_2").write_text("1 0\n0 1\n"), "no invertible 3 x 3 matrix"),
        (lambda scene: (scene / "1.ppm").unlink(), "has no image 1"),
        (lambda scene: (scene / "2.ppm").write_text("no image"), "cannot be read"),
    ],
)
def test_a_broken_scene_is_named(comparison, hpatches, break_it, message):
    break_it(hpatches / "v_one")
    with pytest.raises(DataError, match=message):
        evaluate_homographies(comparison, hpatches, progress=False)


def test_a_pair_in_which_nothing_moves_is_left_out_of_stuck_alone(comparison, hpatches):
    (hpatches / "v_one" / "H_1_2").write_text("1 0 0\n0 1 0\n0 0 1\n", encoding="utf-8")
    viewpoint = evaluate_homographies(comparison, hpatches, progress=False).summary["groups"]["viewpoint"]
    assert viewpoint["counts"] == {"images": 3, "images_with_stuck": 2}
    assert set(viewpoint["means"]["raw"]) == {"right_0.5", "right_1", "right_2", "stuck"}
    assert "stuck" in viewpoint["differences"]["soap"]


def test_options_that_draw_views_are_refused_with_pairs(refused, hpatches):
    head = EXAMPLES / "soap-vit-mae-tiny"
    assert "leave out the options that draw views" in refused(
        "evaluate", "matching", head, "--hpatches", hpatches, "--flip"
    )


def test_a_folder_without_scenes_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no scene"):
        read_scenes(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        read_scenes(tmp_path / "nowhere")


@pytest.fixture
def spair(tmp_path) -> Path:
    """Pairs of a photograph and itself, so that every key point's truth is its own place."""
    folder = tmp_path / "spair"
    (folder / "PairAnnotation" / "test").mkdir(parents=True)
    for number in range(4):
        category = ("cat", "dog")[number % 2]
        images = folder / "JPEGImages" / category
        images.mkdir(parents=True, exist_ok=True)
        Image.open(PHOTOS[number]).convert("RGB").save(images / f"{number}.jpg")
        points = [[20, 30], [100, 120], [200, 40]][: 2 + number % 2]
        annotation = {
            "src_imname": f"{number}.jpg",
            "trg_imname": f"{number}.jpg",
            "src_kps": points,
            "trg_kps": points,
            "src_bndbox": [0, 0, 255, 255],
            "trg_bndbox": [0, 0, 255, 200],
            "category": category,
        }
        (folder / "PairAnnotation" / "test" / f"{number}.json").write_text(json.dumps(annotation), encoding="utf-8")
    return folder


def test_key_points_are_matched_by_pair_point_and_category(comparison, spair):
    found = evaluate_keypoints(comparison, spair, progress=False)
    assert found.summary["counts"] == {"images": 4, "points": 10}
    raw = found.summary["means"]["raw"]
    assert raw["pck_0.1"] > 0.9, "the same image"
    rights = [row["raw_pck_0.05"] * row["points"] for row in found.rows]
    assert raw["point_pck_0.05"] == pytest.approx(sum(rights) / 10)
    assert set(found.summary["groups"]) == {"cat", "dog"}
    assert [row["category"] for row in found.rows] == ["cat", "cat", "dog", "dog"]


def test_a_sample_of_pairs_is_seeded(spair):
    names = [[pair.name for pair in read_pairs(spair, "test", 2, seed)] for seed in (0, 0, 1, 2, 3)]
    assert names[0] == names[1]
    assert len(names[0]) == 2
    assert len({tuple(one) for one in names}) > 1


def test_tokens_are_read_bilinearly():
    tokens = torch.arange(12.0).view(12, 1)  # 3 rows of 4 patches of 10 x 10 pixels
    assert at_points(tokens, (3, 4), torch.tensor([[14.5, 4.5]]), (40, 30)).item() == pytest.approx(1)
    assert at_points(tokens, (3, 4), torch.tensor([[19.5, 9.5]]), (40, 30)).item() == pytest.approx(3.5)
    assert at_points(tokens, (3, 4), torch.tensor([[39.0, 29.0]]), (40, 30)).item() == pytest.approx(11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"src_kps": []}, "has no key points"),
        ({"trg_kps": [[1, 2]]}, "other numbers of them"),
        ({"trg_bndbox": [5, 5, 5, 5]}, "an empty box"),
        ({"category": None}, "is no annotated pair"),
        ({"src_imname": "gone.jpg"}, "cannot be read"),
    ],
)
def test_a_broken_pair_is_named(comparison, spair, changes, message):
    path = spair / "PairAnnotation" / "test" / "2.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        evaluate_keypoints(comparison, spair, progress=False)


def test_a_folder_without_the_split_is_refused(spair):
    with pytest.raises(DataError, match=r"the splits of .* are: test"):
        read_pairs(spair, "val")


def test_the_command_takes_either_folder(run, hpatches, spair):
    head = EXAMPLES / "soap-vit-mae-tiny"
    status, out, err = run("evaluate", "matching", head, "--hpatches", hpatches, "--quiet", "--output", "h")
    assert status == 0, err
    assert "viewpoint (3)" in out
    summary = json.loads(Path("h/summary.json").read_text(encoding="utf-8"))
    assert set(summary["groups"]["viewpoint"]["differences"]["soap"]["right_1"]) == {"mean", "low", "high"}
    status, out, err = run("evaluate", "matching", head, "--spair", spair, "--quiet", "--output", "s")
    assert status == 0, err
    assert "pck_0.1" in out
