"""Images go in as people have them, vectors come out in their order, and what is no image is named."""

import re
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import Dataset as TorchDataset

from soap_hf import SOAPModelWrapper
from soap_hf.runtime.errors import DataError, HeadError, LayoutError, MissingExtraError
from tests.conftest import noise_image, random_projection


class Items(TorchDataset):
    """A data set of torch; notes what is asked of it."""

    def __init__(self, items):
        self.items, self.asked = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        self.asked.append(number)
        return self.items[number]


@pytest.fixture
def model(vit):
    """A head on a tiny ViT, in evaluation mode."""
    return SOAPModelWrapper.from_backbone(vit, random_projection(32))


@pytest.fixture
def pictures():
    return [noise_image(seed) for seed in range(5)]


@pytest.fixture
def paths(pictures, tmp_path):
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    return sorted(tmp_path.glob("*.png"))


@pytest.fixture
def expected(model, pictures):
    """Vectors, made by hand."""
    from soap_hf.heads.running import head_preprocessor

    with torch.no_grad():
        pixels = torch.stack([head_preprocessor(model)(picture) for picture in pictures])
        return model.patch_tokens(pixels).mean((1, 2)).numpy()


def test_images_of_every_kind_give_the_same_vectors(model, pictures, paths, expected, tmp_path):
    arrays = [np.asarray(picture) for picture in pictures]
    kinds = {
        "pictures": pictures,
        "paths": paths,
        "names": [str(path) for path in paths],
        "arrays": arrays,
        "one array of all": np.stack(arrays),
        "tensors": [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays],
        "bytes": [path.read_bytes() for path in paths],
        "a folder": tmp_path,
        "a data set": Dataset.from_dict({"image": pictures}),
        "a stream": Dataset.from_dict({"image": pictures}).to_iterable_dataset(),
        "a data set of torch": Items([(picture, 7) for picture in pictures]),
        "dicts": Items([{"image": picture} for picture in pictures]),
        "a generator": (picture for picture in pictures),
    }
    for name, images in kinds.items():
        found = model.encode(images, batch_size=2, progress=False)
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)


def test_one_image_gives_one_vector(model, pictures, paths, expected):
    for image in (pictures[3], paths[3], str(paths[3]), np.asarray(pictures[3])):
        np.testing.assert_allclose(model.encode(image), expected[3], atol=1e-5)


def test_what_is_given_back_can_be_chosen(model, pictures, expected):
    quiet = {"progress": False}
    tensor = model.encode(pictures, as_tensor=True, **quiet)
    assert not tensor.requires_grad
    np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-5)
    units = model.encode(pictures, normalize=True, **quiet)
    np.testing.assert_allclose(units, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    both, cls = (model.encode(pictures, pooling=pooling, **quiet) for pooling in ("cls+mean", "cls"))
    np.testing.assert_allclose(both, np.concatenate([cls, expected], axis=1), atol=1e-5)
    tokens = model.encode(pictures, pooling=None, image_size=(32, 48), **quiet)
    assert tokens.shape == (5, 4, 6, 32)
    assert model.half().encode(pictures, **quiet).dtype == np.float32


def test_files_are_seen_upright(model, tmp_path):
    picture, exif = noise_image(0, size=(48, 24)), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = picture.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_allclose(model.encode(tmp_path / "turned.png"), model.encode(upright), atol=1e-5)


def test_the_model_stays_in_its_mode_and_shows_a_bar_for_many_alone(model, pictures, capsys):
    model.train()
    model.encode(pictures[0])
    assert capsys.readouterr().err == ""
    model.encode(pictures)
    assert "5/5" in capsys.readouterr().err
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ([], "There are no images to encode"),
        (["missing.jpg"], "There is no image missing.jpg; check its path"),
        ([__file__], "cannot be read (no known image format)"),
        ([noise_image(0), 3], "item 1 is int, which holds no image"),
        ([np.zeros((4, 4, 3))], "not float64 of shape (4, 4, 3) (item 0); leave out transforms"),
        (Items([(torch.zeros(3, 8, 8), 1)]), "a tensor if it is uint8 of shape (3, H, W), not float32"),
        (3, "Images are a path, a PIL image, an array, a list of those or a data set, not int"),
    ],
)
def test_what_is_no_image_is_refused_by_name(model, images, sentence):
    with pytest.raises(DataError, match=re.escape(sentence)):
        model.encode(images, progress=False)


def test_impossible_choices_are_refused(model, pictures):
    with pytest.raises(LayoutError, match="pooling must be one of"):
        model.encode(pictures, pooling="max", progress=False)
    with pytest.raises(DataError, match="batch_size must be at least 1"):
        model.encode(pictures, batch_size=0)


def test_an_image_given_to_the_model_itself_is_told_where_to_go(model, pictures):
    for wrong, kind in ((pictures[0], "Image"), (pictures, "list"), (None, "NoneType")):
        with pytest.raises(HeadError, match=rf"must be a tensor, not {kind}; encode takes images"):
            model(wrong)


def test_without_datasets_files_and_images_are_encoded_and_the_extra_is_named(model, paths, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "soap_hf.data.data_sets", None)
    assert model.encode(paths, progress=False).shape == (5, 32)
    with pytest.raises(MissingExtraError, match=r'data sets need an extra: pip install "soap-hf\[fit\]"'):
        model.encode(tmp_path)
