"""Hand-made cases, the measures as their papers write them, and what the library of the field says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from soap_hf.evaluation.saliency_metrics import accuracy, e_measure, f_measures, iou, s_measure
from tests.conftest import DATA

properties = settings(max_examples=60, deadline=None, derandomize=True)
SHAPES = st.tuples(st.integers(2, 12), st.integers(2, 12))
HALF = np.arange(8 * 6).reshape(8, 6) >= 24
QUARTER = HALF & (np.arange(6) < 3)


@st.composite
def maps(draw):
    """A saliency map in 256 levels and a truth that is neither empty nor full."""
    shape = draw(SHAPES)
    saliency = draw(hnp.arrays(np.uint8, shape)) / 255
    truth = draw(hnp.arrays(bool, shape).filter(lambda truth: truth.any() and not truth.all()))
    return saliency, truth


def all_measures(mask, truth):
    saliency = mask.astype(float)
    return (
        iou(mask, truth),
        accuracy(mask, truth),
        f_measures(saliency, truth)[1:].max(),
        e_measure(mask, truth),
        s_measure(saliency, truth),
    )


@properties
@given(maps())
def test_a_perfect_mask_scores_one(drawn):
    _, truth = drawn
    assert all_measures(truth, truth) == pytest.approx((1, 1, 1, 1, 1))


@properties
@given(maps())
def test_an_inverted_mask_scores_nothing(drawn):
    _, truth = drawn
    assert all_measures(~truth, truth)[:4] == pytest.approx((0, 0, 0, 0), abs=1e-12)


def test_the_structure_of_an_inverted_mask_is_not_below_zero():
    stripes = np.arange(6) % 2 * np.ones((8, 1)) > 0
    assert s_measure(1.0 - stripes, stripes) == 0


def test_an_empty_mask_is_right_where_there_is_no_object():
    empty = np.zeros_like(HALF)
    assert all_measures(empty, HALF)[:4] == pytest.approx((0, 0.5, 0, 0.25))


def test_half_of_the_object():
    # precision 1, recall 1/2; deviations of mask and truth are (3/4, 1/2) or (-1/4, ±1/2)
    overlap, outside, missed = (1 + 12 / 13) ** 2 / 4, (1 + 4 / 5) ** 2 / 4, (1 - 4 / 5) ** 2 / 4
    expected = (0.5, 0.75, 1.3 * 0.5 / (0.3 + 0.5), 0.25 * overlap + 0.5 * outside + 0.25 * missed)
    assert all_measures(QUARTER, HALF)[:4] == pytest.approx(expected)


@pytest.mark.parametrize("measure", [iou, accuracy, e_measure])
def test_without_an_object_the_empty_mask_is_right_and_the_full_one_wrong(measure):
    empty, full = np.zeros((4, 5), bool), np.ones((4, 5), bool)
    assert (measure(empty, empty), measure(full, empty)) == (1, 0)
    assert measure(full, full) == 1


def test_without_an_object_or_a_background_the_structure_measure_is_a_mean():
    saliency = np.full((4, 5), 0.3)
    assert s_measure(saliency, np.zeros((4, 5), bool)) == pytest.approx(0.7)
    assert s_measure(saliency, np.ones((4, 5), bool)) == pytest.approx(0.3)
    assert not f_measures(saliency, np.zeros((4, 5), bool)).any()


@properties
@given(maps())
def test_f_measures_are_those_of_each_threshold(drawn):
    saliency, truth = drawn
    curve = f_measures(saliency, truth)
    assert curve.shape == (256,)
    for level in (0, 1, 100, 254, 255):
        mask = np.round(saliency * 255) >= level
        right = (mask & truth).sum()
        precision, recall = right / max(mask.sum(), 1), right / truth.sum()
        expected = 1.3 * precision * recall / (0.3 * precision + recall) if right else 0
        assert curve[level] == pytest.approx(expected)


@properties
@given(maps())
def test_e_measure_is_that_of_the_alignment_matrix(drawn):
    saliency, truth = drawn
    mask = saliency > 0.5
    found, true = mask - mask.mean(), truth - truth.mean()
    alignment = 2 * found * true / (found**2 + true**2)
    assert e_measure(mask, truth) == pytest.approx(((alignment + 1) ** 2 / 4).mean())


@properties
@given(maps())
def test_s_measure_is_that_of_its_equations(drawn):
    saliency, truth = drawn
    assert s_measure(saliency, truth) == pytest.approx(structure_measure(saliency, truth))


def structure_measure(saliency, truth):
    """Equations 1 to 8 of arXiv 1708.00786, on lists of numbers."""

    def similarity_to_object(values):
        spread = np.std(values, ddof=1) if len(values) > 1 else 0
        return 2 * np.mean(values) / (np.mean(values) ** 2 + 1 + spread)

    def similarity_of_region(x, y):
        means, spreads = (np.mean(x), np.mean(y)), (np.std(x), np.std(y))
        luminance = (2 * means[0] * means[1], means[0] ** 2 + means[1] ** 2)
        contrast = (2 * spreads[0] * spreads[1], spreads[0] ** 2 + spreads[1] ** 2)
        structure = np.mean((x - means[0]) * (y - means[1]))
        if luminance[0] * structure == 0:
            return float(luminance[1] * contrast[1] == 0)
        correlation = structure / (spreads[0] * spreads[1])
        return luminance[0] / luminance[1] * contrast[0] / contrast[1] * correlation

    share = truth.mean()
    of_object = share * similarity_to_object(saliency[truth])
    of_object += (1 - share) * similarity_to_object(1 - saliency[~truth])
    rows, columns = np.nonzero(truth)
    row, column = round(rows.mean()) + 1, round(columns.mean()) + 1
    of_regions = 0
    for top in (0, 1):
        for left in (0, 1):
            inside = (np.arange(len(truth)) >= row) == top
            inside = inside[:, None] & ((np.arange(truth.shape[1]) >= column) == left)
            if inside.any():
                of_regions += inside.mean() * similarity_of_region(saliency[inside], truth[inside].astype(float))
    return max(0, 0.5 * of_object + 0.5 * of_regions)


LIBRARY = DATA / "saliency_measures.safetensors"
"""What PySODMetrics 1.6.2 says of 40 random maps: `pip install pysodmetrics`, and run this file as a module."""


@pytest.mark.parametrize("number", range(40))
def test_all_agree_with_the_library_of_the_field(number):
    with safe_open(LIBRARY, framework="np") as file:
        names = ("saliency", "truth", "f", "s", "e")
        levels, truth, f, s, e = (file.get_tensor(f"{number}.{name}") for name in names)
    saliency = levels / 255
    assert f_measures(saliency, truth) == pytest.approx(f)
    assert np.isnan(s) or s_measure(saliency, truth) == pytest.approx(float(s))
    assert e_measure(saliency > 0.5, truth) == pytest.approx(float(e))


def record() -> None:
    """Writes the file that the test above reads."""
    import py_sod_metrics as library
    from safetensors.numpy import save_file

    generator, found = np.random.default_rng(0), {}
    for number in range(40):
        shape = generator.integers(2, 13, size=2)
        levels, truth = generator.integers(0, 256, size=shape, dtype=np.uint8), generator.random(shape) < 0.4
        truth[0, 0], truth[-1, -1] = True, False  # neither empty nor full
        saliency = levels / 255
        f, s, e = library.Fmeasure(beta=0.3), library.Smeasure(), library.Emeasure()
        f.step(saliency, truth, normalize=False)
        e.gt_fg_numel, e.gt_size = truth.sum(), truth.size
        of_library = e.cal_em_with_threshold((saliency > 0.5).astype(float), truth, threshold=0.5)
        with np.errstate(all="ignore"):
            structure = s.cal_sm(saliency, truth)  # NaN if the object's centre leaves a region empty
        measures = {
            "saliency": levels,
            "truth": truth,
            "f": f.changeable_fms[0][::-1].copy(),
            "s": np.array(structure),
            "e": np.array(of_library * (truth.size - 1) / truth.size),  # it divides by one pixel fewer
        }
        found |= {f"{number}.{name}": value for name, value in measures.items()}
    save_file(found, LIBRARY)


if __name__ == "__main__":
    record()
