"""The solver is the plain one, keeps constants and symmetry, and moves edges to those of the image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from soap_hf.evaluation.bilateral_solver import BilateralGrid, largest_region
from soap_hf.runtime.errors import SOAPError
from tests.evaluation.plain_bilateral_solver import solve

properties = settings(max_examples=25, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.tuples(st.integers(1, 70), st.integers(1, 70))


def drawn(seed, size):
    """Smooth colours with noise, and a target of blocks."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize(size[::-1])
    image = np.array(coarse) + generator.integers(-20, 20, (*size, 3))
    target = np.kron(generator.random((7, 7)) > 0.5, np.ones((10, 10)))[: size[0], : size[1]]
    return image.clip(0, 255).astype(np.uint8), target


@properties
@given(SEEDS, SIZES)
def test_it_is_the_plain_solver(seed, size):
    image, target = drawn(seed, size)
    assert BilateralGrid(image).refine(target) == pytest.approx(solve(image, target), abs=1e-8)


def test_it_is_the_plain_solver_on_a_photograph(photos):
    image = np.array(Image.open(min(photos.glob("*.jpg"))).convert("RGB"))
    target = np.zeros(image.shape[:2])
    target[60:180, 80:200] = 1
    grid = BilateralGrid(image)
    assert grid.refine(target) == pytest.approx(solve(image, target), abs=1e-8)
    assert grid.refine(target > 0) == pytest.approx(grid.refine(target))  # a mask, and again on the same grid


@properties
@given(SEEDS, SIZES, st.floats(-2, 2))
def test_a_constant_stays_as_it_is(seed, size, value):
    image, _ = drawn(seed, size)
    assert BilateralGrid(image).refine(np.full(size, value)) == pytest.approx(np.full(size, value), abs=1e-6)


@properties
@given(SEEDS, SIZES)
def test_the_complement_is_refined_to_the_complement(seed, size):
    image, target = drawn(seed, size)
    grid = BilateralGrid(image)
    assert grid.refine(1 - target) == pytest.approx(1 - grid.refine(target), abs=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_edges_move_to_those_of_the_image(transposed, channel):
    image, target = np.full((48, 96, 3), 40, np.uint8), np.zeros((48, 96))
    image[:, 52:, channel] = 220
    target[:, 44:] = 1
    if transposed:
        image, target = image.transpose(1, 0, 2), target.T
    refined = BilateralGrid(image).refine(target) > 0.5
    assert ((refined.T if transposed else refined) == (np.arange(96) >= 52)).all()


def test_regions_of_other_colours_do_not_touch():
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = (0, 255, 0)
    target = np.zeros((40, 40))
    target[:10, :10] = 1
    refined = BilateralGrid(image).refine(target)
    assert refined[:, :20].min() > 0.01
    assert np.abs(refined[:, 20:]).max() < 1e-6


def test_nothing_given_is_changed():
    image, target = drawn(0, (30, 40))
    before = image.copy(), target.copy()
    BilateralGrid(image).refine(target)
    assert (image == before[0]).all()
    assert (target == before[1]).all()


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 4), np.uint8), ((4, 4, 3), float), ((4, 4, 4), np.uint8), ((0, 4, 3), np.uint8)]
)
def test_images_that_are_not_rgb_of_8_bit_are_refused(shape, dtype):
    with pytest.raises(SOAPError, match=r"\(H, W, 3\) in uint8"):
        BilateralGrid(np.zeros(shape, dtype))


def test_a_target_of_another_size_is_refused():
    with pytest.raises(SOAPError, match=r"\(4, 5\), but the image \(5, 4\)"):
        BilateralGrid(np.zeros((5, 4, 3), np.uint8)).refine(np.zeros((4, 5)))


def test_the_largest_region_is_kept_and_filled():
    ring = np.zeros((7, 9), bool)
    ring[:5, :5] = True
    ring[1:4, 1:4] = False
    small = np.zeros((7, 9), bool)
    small[5:7, 5:9] = True  # touches a corner of the ring alone
    full = np.zeros((7, 9), bool)
    full[:5, :5] = True
    assert (largest_region(ring | small) == full).all()
    assert (largest_region((ring | small)[::-1, ::-1]) == full[::-1, ::-1]).all()  # whichever comes first
    assert not largest_region(np.zeros((3, 4), bool)).any()
    assert largest_region(np.ones((3, 4), bool)).all()
