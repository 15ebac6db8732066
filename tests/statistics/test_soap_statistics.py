"""A planted positional direction is found and removed, content survives, and statistics files are read with care."""

import dataclasses
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from soap_hf import SOAPStatistics
from soap_hf.runtime.errors import HeadError, OutputError, SOAPError
from soap_hf.statistics.soap_statistics import LEADING_COMPONENTS, STORED_COMPONENTS
from soap_hf.statistics.token_statistics import PrincipalComponents, ResponseCounts, TokenMoments

GRID, DIM = (4, 4), 80
POSITION, CONTENT = 7, 11
"""Axes along which the planted tokens say where they are, and what their image shows."""


def planted_tokens(images: int, *, content: bool) -> Tensor:
    """Noise that tells rows apart along one axis and, if there is content, images along another."""
    tokens = torch.randn(images, *GRID, DIM)
    tokens[..., POSITION] += torch.tensor([-4.0, -4.0, 4.0, 4.0])
    if content:
        tokens[..., CONTENT] += 6 * torch.randn(images, 1, 1)
    return tokens


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    """Real and synthetic tokens, 120 and 80 images."""
    return planted_tokens(120, content=True), planted_tokens(80, content=False)


@pytest.fixture
def statistics(tokens) -> SOAPStatistics:
    return SOAPStatistics.from_tokens(*tokens)


def test_planted_direction_is_found_and_ranked_first(statistics):
    best = int(statistics.scores.argmax())
    assert abs(statistics.components[POSITION, best]) > 0.99
    assert statistics.scores[best] > 0.95
    assert statistics.scores.sort().values[-2] < 0.75
    projection = statistics.projection()
    assert projection.rank == 1
    torch.testing.assert_close(projection.basis[:, 0], statistics.components[:, best].float())


def test_projection_leaves_one_minus_the_score_of_the_positional_amplitude(statistics, tokens):
    raw, clean = tokens[0], statistics.projection()(tokens[0])
    score, best = statistics.scores.max(dim=0)
    direction = statistics.components[:, best].float()
    torch.testing.assert_close(clean @ direction, (1 - score.float()) * (raw @ direction), rtol=1e-3, atol=1e-3)


def test_projection_leaves_the_content(statistics, tokens):
    raw, clean = tokens[0], statistics.projection()(tokens[0])
    by_image = torch.stack((raw[..., CONTENT], clean[..., CONTENT])).mean(dim=(2, 3))
    assert torch.corrcoef(by_image)[0, 1] > 0.999
    assert float(by_image[1].std()) == pytest.approx(float(by_image[0].std()), rel=0.01)


def test_projection_holds_all_weighty_components_by_decreasing_score(statistics):
    options = {"mu": 3, "tau": 0.3}
    weights, projection = statistics.weights(**options), statistics.projection(**options)
    order = [number for number in statistics.scores.argsort(descending=True).tolist() if weights[number] > 1e-4]
    assert 3 < projection.rank == len(order) < DIM
    assert torch.equal(projection.weights, weights[order].float())
    assert torch.equal(projection.basis, statistics.components[:, order].float())


def test_streaming_gives_the_same_statistics(statistics, tokens):
    moments = TokenMoments(DIM)
    for batch in tokens[0].split(13):
        moments.update(batch)
    principal = moments.principal_components()
    counts = [ResponseCounts(principal, GRID), ResponseCounts(principal, GRID)]
    for accumulator, images in zip(counts, tokens, strict=True):
        for batch in images.split(7):
            accumulator.update(batch)
    streamed = SOAPStatistics.from_counts(*counts)
    for field in dataclasses.fields(SOAPStatistics):
        ours, theirs = getattr(streamed, field.name), getattr(statistics, field.name)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_each_kind_has_its_own_number_of_images(statistics, tokens):
    assert (statistics.num_real, statistics.num_synthetic) == (120, 80)
    torch.testing.assert_close(statistics.real_response * 120, (statistics.real_response * 120).round())
    torch.testing.assert_close(statistics.synthetic_response * 80, (statistics.synthetic_response * 80).round())


def test_components_are_those_of_the_real_images(statistics, tokens):
    rows = tokens[0].double().flatten(0, -2)
    torch.testing.assert_close(statistics.eigenvalues.sum(), torch.cov(rows.T).trace())
    torch.testing.assert_close(statistics.mean, rows.mean(dim=0))


def test_directions_of_mere_round_off_score_zero():
    flat = [torch.randn(30, *GRID, 3) @ torch.eye(3, 8) for _ in range(2)]
    statistics = SOAPStatistics.from_tokens(*flat)
    assert (statistics.scores > 0).tolist() == [True] * 3 + [False] * 5
    assert not statistics.standard_errors[3:].any()


@pytest.mark.parametrize(
    "shapes", [((4, 2, 2, 8), (4, 2, 3, 8)), ((4, 2, 2, 8), (4, 2, 2, 6)), ((4, 8), (4, 8)), ((0, 2, 8), (4, 2, 8))]
)
def test_tokens_that_do_not_fit_are_refused(shapes):
    with pytest.raises(SOAPError, match="shape"):
        SOAPStatistics.from_tokens(*(torch.randn(shape) for shape in shapes))


def test_standard_errors_tell_how_scores_scatter_over_repeated_samples():
    dim, images, repeats = 3, 100, 150
    principal = PrincipalComponents(
        torch.zeros(dim).double(), torch.ones(dim).double(), torch.eye(dim).double(), torch.ones(dim).bool()
    )

    def sample() -> SOAPStatistics:
        shift = torch.tensor([0.3, 0.8, 1.5])
        # positions of one image answer alike: they are no independent draws
        draws = [(torch.randn(n, 1, dim) + 0.3 * torch.randn(n, 4, dim)) + shift for n in (images, 2 * images)]
        return SOAPStatistics.from_counts(*(ResponseCounts(principal, (4,)).update(draw) for draw in draws))

    samples = [sample() for _ in range(repeats)]
    scatter = torch.stack([one.scores for one in samples]).std(dim=0)
    estimated = torch.stack([one.standard_errors for one in samples]).mean(dim=0)
    assert (estimated < 1.5 * scatter).all()
    assert (scatter < 1.5 * estimated).all()


def test_table_lists_the_highest_scores(statistics):
    rows = statistics.table(rows=4)
    order = statistics.scores.argsort(descending=True)[:4].tolist()
    assert [row["rank"] for row in rows] == [0, 1, 2, 3]
    assert [row["component"] for row in rows] == order
    assert [row["score"] for row in rows] == statistics.scores[order].tolist()
    assert [row["standard_error"] for row in rows] == statistics.standard_errors[order].tolist()
    assert [row["weight"] for row in rows] == statistics.weights()[order].tolist()
    shares = statistics.eigenvalues / statistics.eigenvalues.sum()
    assert [row["variance_share"] for row in rows] == pytest.approx(shares[order].tolist())
    everything = statistics.table(rows=DIM + 1)
    assert len(everything) == DIM
    assert sum(row["variance_share"] for row in everything) == pytest.approx(1)


def test_table_holds_at_least_all_removed_components(statistics):
    assert len(statistics.table(mu=6, rows=2)) == 6


def test_saved_statistics_come_back(statistics, tmp_path):
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = SOAPStatistics.load(tmp_path / "statistics.safetensors")
    for name in ("mean", "eigenvalues", "scores", "standard_errors", "num_real", "num_synthetic"):
        torch.testing.assert_close(getattr(loaded, name), getattr(statistics, name), rtol=0, atol=0)
    best = statistics.scores.argsort(descending=True, stable=True)[:STORED_COMPONENTS]
    leading = [number for number in range(LEADING_COMPONENTS) if number not in best]
    assert loaded.component_indices[:STORED_COMPONENTS].equal(best)
    assert sorted(loaded.component_indices[STORED_COMPONENTS:].tolist()) == leading
    assert leading, "or the test shows nothing"
    for name in ("components", "real_response", "synthetic_response"):
        assert torch.equal(getattr(loaded, name), getattr(statistics, name)[..., loaded.component_indices].float())
    for options in ({}, {"mu": 3, "tau": 0.2}, {"mu": STORED_COMPONENTS}):
        ours, theirs = loaded.projection(**options), statistics.projection(**options)
        assert torch.equal(ours.basis, theirs.basis)
        assert torch.equal(ours.weights, theirs.weights)


def test_saving_again_loses_nothing(statistics, tmp_path):
    statistics.save(tmp_path / "once")
    SOAPStatistics.load(tmp_path / "once").save(tmp_path / "twice")
    once, twice = load_file(tmp_path / "once"), load_file(tmp_path / "twice")
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_more_components_than_were_saved_are_refused(statistics, tmp_path):
    assert statistics.projection(mu=DIM).rank == DIM
    statistics.save(tmp_path / "file", num_components=8)
    with pytest.raises(
        SOAPError, match=r"80 components are asked for, but these statistics do not hold the vectors of \d\d"
    ):
        SOAPStatistics.load(tmp_path / "file").projection(mu=DIM)


def test_a_path_that_cannot_be_written_is_refused(statistics, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        statistics.save(tmp_path / "file" / "statistics.safetensors")


DAMAGES = {
    "missing": lambda tensors: tensors.pop("scores"),
    "extra": lambda tensors: tensors.update(more=torch.ones(2)),
    "nan": lambda tensors: tensors["scores"].fill_(math.nan),
    "infinite": lambda tensors: tensors["components"][3].fill_(math.inf),
    "mean of another width": lambda tensors: tensors.update(mean=torch.ones(DIM + 1)),
    "mean with two axes": lambda tensors: tensors.update(mean=torch.ones(DIM, 1)),
    "scores of another width": lambda tensors: tensors.update(scores=torch.ones(3)),
    "whole eigenvalues": lambda tensors: tensors.update(eigenvalues=tensors["eigenvalues"].long()),
    "too few components": lambda tensors: tensors.update(components=tensors["components"][:, 1:].contiguous()),
    "components of another width": lambda tensors: tensors.update(components=tensors["components"][1:]),
    "another grid": lambda tensors: tensors.update(real_response=tensors["real_response"][1:]),
    "too few responses": lambda tensors: tensors.update(
        {name: tensors[name][..., 1:] for name in ("real_response", "synthetic_response")}
    ),
    "no grid": lambda tensors: tensors.update(dict.fromkeys(("real_response", "synthetic_response"), torch.ones(64))),
    "broken indices": lambda tensors: tensors.update(component_indices=tensors["component_indices"].double()),
    "indices with two axes": lambda tensors: tensors.update(component_indices=torch.arange(64).view(8, 8)),
    "index too large": lambda tensors: tensors["component_indices"][0].fill_(DIM),
    "negative index": lambda tensors: tensors["component_indices"][0].fill_(-1),
    "index twice": lambda tensors: tensors["component_indices"][0].copy_(tensors["component_indices"][1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_refused(statistics, tmp_path, damage):
    path = tmp_path / "statistics.safetensors"
    statistics.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    DAMAGES[damage](tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata=metadata)
    with pytest.raises(HeadError, match=r"statistics\.safetensors"):
        SOAPStatistics.load(path)


@pytest.mark.parametrize("metadata", [None, {"num_real": "3"}, {"num_real": "3", "num_synthetic": "many"}])
def test_files_without_image_counts_are_refused(statistics, tmp_path, metadata):
    statistics.save(tmp_path / "file")
    save_file(load_file(tmp_path / "file"), tmp_path / "file", metadata=metadata)
    with pytest.raises(HeadError, match="image counts"):
        SOAPStatistics.load(tmp_path / "file")


@pytest.mark.parametrize("content", [None, b"", b"no tensors here", bytes(100)])
def test_files_that_are_not_safetensors_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(HeadError, match="cannot be read as safetensors"):
        SOAPStatistics.load(tmp_path / "file")


def test_the_reach_is_the_largest_strength_whose_vectors_are_held(tmp_path):
    real, synthetic = torch.randn(2, 32, 2, 2, 24)
    statistics = SOAPStatistics.from_tokens(real, synthetic)
    assert statistics.reach() == 24
    statistics.save(tmp_path / "few.safetensors", num_components=3)
    few = SOAPStatistics.load(tmp_path / "few.safetensors")
    for tau in (0.05, 1.0):
        reach = few.reach(tau)
        few.projection(reach, tau)
        with pytest.raises(SOAPError, match="do not hold the vectors"):
            few.projection(reach + 1, tau)
    assert few.reach(1.0) < few.reach() < 24
