"""The statistics of real patch tokens agree with those of the paper's released code (tests/data/README.md)."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from soap_hf import SOAPStatistics
from tests.conftest import DATA

TOLERANCE = 2e-4
COMPARABLE = 24
"""Later components are float32 noise in the reference."""

SETTINGS = {"mu2": {"mu": 2}, "mu3_tau02": {"mu": 3, "tau": 0.2}, "auto": {"threshold": 0.75}}


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    tensors = load_file(DATA / "reference.safetensors")
    return {name: tensor if "tokens" in name else tensor.double() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def statistics(reference) -> SOAPStatistics:
    return SOAPStatistics.from_tokens(reference["real_tokens"], reference["synthetic_tokens"])


def test_mean_and_eigenvalues(reference, statistics):
    largest = float(reference["eigenvalues"][0])
    torch.testing.assert_close(statistics.mean, reference["mean"], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(statistics.eigenvalues, reference["eigenvalues"], rtol=0, atol=TOLERANCE * largest)


def test_scores(reference, statistics):
    ours, theirs = statistics.scores[:COMPARABLE], reference["scores"][:COMPARABLE]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_responses(reference, statistics):
    """Up to the sign of each component, which flips P and Q together."""
    ours = torch.stack((statistics.real_response, statistics.synthetic_response))[..., :COMPARABLE]
    theirs = torch.stack((reference["real_response"], reference["synthetic_response"]))[..., :COMPARABLE]
    same = (ours - theirs).abs().amax(dim=(0, 1, 2))
    flipped = (1 - ours - theirs).abs().amax(dim=(0, 1, 2))
    assert torch.minimum(same, flipped).max() <= TOLERANCE


@pytest.mark.parametrize("name", SETTINGS)
def test_weights(reference, statistics, name):
    weights = statistics.weights(**SETTINGS[name])
    torch.testing.assert_close(weights, reference[f"weights_{name}"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SETTINGS)
def test_projectors(reference, statistics, name):
    matrix = statistics.projection(**SETTINGS[name]).matrix().double()
    torch.testing.assert_close(matrix, reference[f"projector_{name}"], rtol=0, atol=TOLERANCE)
