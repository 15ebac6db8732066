"""A fit is settled when what it removes has stopped moving, and not before."""

import math

import pytest
import torch

from soap_hf import SOAPProjection, fit_soap, suppression_weights
from soap_hf.fitting.convergence import CHECK_EVERY, STEADY_CHECKS, Convergence, Removal, projector_distance
from soap_hf.heads.report import IMAGES_TO_SETTLE, summary
from soap_hf.runtime.errors import DataError
from tests.conftest import noise_image, random_projection


def removal(scores: list[float], turn: float = 0.0) -> Removal:
    """Of components along the axes, the first two of them turned in their plane."""
    components = torch.eye(4, dtype=torch.float64)
    components[:2, :2] = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return Removal.of(torch.tensor(scores, dtype=torch.float64), components, suppression_weights)


@pytest.mark.parametrize("ranks", [(0, 0), (0, 2), (3, 2), (3, 3)])
def test_the_distance_is_the_spectral_norm_of_the_difference(ranks):
    one, other = (random_projection(16, 3) if rank == 3 else random_projection(16, rank) for rank in ranks)
    dense = torch.linalg.matrix_norm((one.matrix() - other.matrix()).double(), ord=2)
    assert projector_distance(one, other) == pytest.approx(float(dense), abs=1e-6)


def test_equal_weights_give_the_sine_of_the_angle():
    whole = torch.ones(1)
    turned = torch.tensor([[math.cos(0.2)], [math.sin(0.2)]])
    distance = projector_distance(SOAPProjection(torch.eye(2)[:, :1], whole), SOAPProjection(turned, whole))
    assert distance == pytest.approx(math.sin(0.2), abs=1e-6)


@pytest.mark.parametrize(
    ("before", "after", "least"),
    [
        (removal([0.9, 0.7, 0.7, 0.7]), removal([0.9, 0.7, 0.7, 0.7], turn=0.3), 0.25),
        (removal([0.9, 0.7, 0.7, 0.7]), removal([0.8, 0.7, 0.7, 0.7]), 0.1),
        (removal([0.9, 0.7, 0.7, 0.7]), removal([0.9, 0.8, 0.7, 0.7]), 0.7),
        (removal([0.74, 0.7, 0.7, 0.7]), removal([0.72, 0.7, 0.7, 0.7]), 0.02),
    ],
    ids=["a turned subspace", "another weight", "another rank", "nothing removed, another score"],
)
def test_what_moves_is_noticed(before, after, least):
    assert before.movement(before) == pytest.approx(0, abs=1e-6)
    assert before.movement(after) >= least - 1e-6


def test_it_takes_three_steady_checks_running():
    still, moved = removal([0.9, 0.7, 0.7, 0.7]), removal([0.9, 0.7, 0.7, 0.7], turn=0.5)
    convergence, seen = Convergence(0.05), 0
    for now in (still, still, still, moved, moved, moved, moved):
        assert convergence.converged_after is None
        seen += CHECK_EVERY
        assert not convergence.due(seen - 1)
        assert convergence.due(seen)
        convergence.check(seen, {-1: now})
    assert convergence.converged_after == seen
    assert not convergence.due(10 * seen), "no more checks once settled"


def test_one_layer_that_moves_keeps_all_waiting():
    still = removal([0.9, 0.7, 0.7, 0.7])
    convergence = Convergence(0.05)
    for check in range(STEADY_CHECKS + 3):
        moved = removal([0.9, 0.7, 0.7, 0.7], turn=0.5 * check)
        convergence.check(CHECK_EVERY * (check + 1), {0: still, 1: moved})
    assert convergence.converged_after is None


@pytest.fixture
def many(images):
    """A stream of a thousand images, too many to look at all of them."""
    from datasets import IterableDataset

    return IterableDataset.from_generator(lambda: ({"image": noise_image(seed, (16, 16))} for seed in range(1000)))


def test_a_fit_with_a_tolerance_stops_and_one_without_tells(vit, many, processor):
    options = {"image_processor": processor, "progress": False, "mu": 1}
    stopped = fit_soap(vit, many, num_images=1000, tolerance=0.3, **options).config.fit
    assert stopped["num_images"] == stopped["num_synthetic"] == stopped["converged_after"]
    assert CHECK_EVERY * (STEADY_CHECKS + 1) <= stopped["num_images"] < 1000
    unmoved = fit_soap(vit, many, num_images=640, tolerance=1e-9, **options).config.fit
    assert (unmoved["num_images"], unmoved["converged_after"]) == (640, None)


def test_checks_change_nothing_of_the_fit(vit, many, processor, monkeypatch):
    options = {"image_processor": processor, "progress": False, "num_images": 200}
    checked = fit_soap(vit, many, **options).statistics
    monkeypatch.setattr(Convergence, "due", lambda self, num_images: False)
    unchecked = fit_soap(vit, many, **options).statistics
    torch.testing.assert_close(checked.scores, unchecked.scores, rtol=0, atol=1e-6)
    assert torch.equal(checked.eigenvalues, unchecked.eigenvalues)


@pytest.mark.parametrize("tolerance", [0, -0.1, 1, float("nan")])
def test_a_tolerance_that_is_none_is_refused(vit, images, tolerance):
    with pytest.raises(DataError, match="tolerance must lie between 0 and 1"):
        fit_soap(vit, images, tolerance=tolerance)


def test_so_many_images_can_settle_and_fewer_cannot():
    still = removal([0.9, 0.7, 0.7, 0.7])
    convergence = Convergence(0.05)
    for seen in range(1, IMAGES_TO_SETTLE + 1):
        assert convergence.converged_after is None
        if convergence.due(seen):
            convergence.check(seen, {-1: still})
    assert convergence.converged_after == IMAGES_TO_SETTLE


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            (600, 512),
            "What is removed had settled after 512 images: in three checks running it moved by less than 0.05.",
        ),
        (
            (511, None),
            "What is removed may move with more images: 511 are too few images to judge that, which takes 512.",
        ),
        ((700, None), "What is removed had not settled: at one of its last three checks it moved by 0.05 or more;"),
    ],
)
def test_the_report_says_plainly_whether_it_settled(vit, images, processor, told, words):
    model = fit_soap(vit, images, image_processor=processor, num_images=16, check=0, progress=False)
    model.config.fit |= dict(zip(("num_images", "converged_after"), told, strict=True))
    assert words in summary(model.config)[-1]
