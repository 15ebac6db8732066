"""Lists of images and data sets of torch are data sets: for a fit, for evaluations, for extraction."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import IterableDataset as TorchIterableDataset

from soap_hf import Comparison, Examples, choose_mu, evaluate_matching, extract_features, fit_soap
from soap_hf.data.data_sets import open_dataset
from soap_hf.runtime.errors import DataError
from tests.conftest import noise_image
from tests.heads.test_encoding import Items

QUIET = {"check": 0, "progress": False}


@pytest.fixture(scope="module")
def pictures():
    return [noise_image(seed) for seed in range(40)]


@pytest.fixture
def paths(pictures, tmp_path):
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number:02}.png")
    return sorted(tmp_path.glob("*.png"))


class Stream(TorchIterableDataset):
    """A stream of torch."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __iter__(self):
        return iter(self.pictures)


def test_a_fit_sees_the_same_images_however_they_are_given(vit, pictures, paths, tmp_path):
    whole = fit_soap(vit, str(tmp_path), **QUIET)
    for images in (pictures, paths, tuple(map(str, paths)), [np.asarray(picture) for picture in pictures]):
        found = fit_soap(vit, images, **QUIET)
        torch.testing.assert_close(found.statistics.scores, whole.statistics.scores)
    for items in (Items([(picture, 0) for picture in pictures]), Stream(pictures)):
        found = fit_soap(vit, items, **QUIET)
        assert found.config.fit["num_images"] == 40
        assert found.config.fit["dataset"] == type(items).__name__
        torch.testing.assert_close(found.statistics.mean, whole.statistics.mean)


def test_a_sorted_data_set_of_torch_is_drawn_from_at_random_and_no_more_is_read_than_asked_for(vit, pictures):
    items = Items([{"photo": picture} for picture in pictures * 50])
    fit_soap(vit, items, num_images=8, image_column="photo", num_workers=0, **QUIET)
    assert max(items.asked) > 1000
    assert len(set(items.asked)) < 1100  # the buffer of the stream


def test_evaluations_take_lists_and_data_sets_of_torch(vit, photos):
    paths = sorted(photos.glob("*.jpg"))[:12]
    model = fit_soap(vit, paths, **QUIET)
    comparison = Comparison.of(model)
    of_paths = evaluate_matching(comparison, paths, progress=False)
    items = Items([(Image.open(path).convert("RGB"), 0) for path in paths])
    of_torch = evaluate_matching(comparison, items, progress=False)
    assert of_torch.summary["means"] == of_paths.summary["means"]
    assert choose_mu(model, paths, progress=False).num_images == choose_mu(model, items, progress=False).num_images
    some = Examples(items, num_images=5, seed=1)
    assert len(some) == 5
    assert len(set(items.asked)) == 12


def test_features_of_a_data_set_of_torch_stand_in_its_order(vit, pictures, tmp_path):
    model = fit_soap(vit, pictures, **QUIET)
    file = tmp_path / "features.safetensors"
    assert extract_features(model, Items(pictures), file, progress=False) == len(pictures)
    found = load_file(file)["features"]
    np.testing.assert_allclose(found, model.encode(pictures, progress=False), atol=1e-5)


def test_what_is_not_there_is_named_before_any_work(vit, tmp_path):
    with pytest.raises(DataError, match=r"There is no image .*none.png; check its path"):
        open_dataset([tmp_path / "none.png"])
    with pytest.raises(DataError, match="item 1 is NoneType, which holds no image"):
        open_dataset([noise_image(0), None])
    with pytest.raises(DataError, match="a list of images, or a data set of datasets or torch, not int"):
        fit_soap(vit, 3, **QUIET)
