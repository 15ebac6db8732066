"""A head with statistics on the tiny ViT, of one layer and of two, as the explorer shows them."""

import copy

import pytest

from soap_hf import fit_soap
from soap_hf.explore import Explorer, Photo, Session
from tests.conftest import noise_image


@pytest.fixture
def head(vit, images, processor):
    """A head that removes two directions of `last_hidden_state`."""
    return fit_soap(vit, images, image_processor=processor, mu=2, num_images=64, check=0, progress=False)


@pytest.fixture
def deep(vit, images, processor):
    """A head of two layers."""
    options = {"mu": 2, "num_images": 64, "check": 0, "progress": False}
    return fit_soap(vit, images, image_processor=processor, layer=[1, -1], **options)


@pytest.fixture
def bare(head):
    """The same head, saved without statistics."""
    without = copy.copy(head)
    without._statistics, without._source = {}, None
    return without


@pytest.fixture
def explorer(head):
    return Explorer(head, "tiny")


@pytest.fixture
def session():
    """Two images of different shape."""
    session = Session()
    for number, size in enumerate([(64, 48), (40, 40)]):
        session = session.with_photo(number, Photo(f"noise {number}", noise_image(number, size)))
    return session
