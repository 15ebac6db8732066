"""The cut is that of the dense generalised problem, the object is the seed's, and degenerate graphs are told apart."""

import importlib
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackNoConvergence

from soap_hf.evaluation import tokencut
from soap_hf.evaluation.tokencut import links, object_of, second_eigenvector, token_cut
from soap_hf.runtime.errors import MissingExtraError, SOAPError

properties = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)
GRIDS = st.tuples(st.integers(3, 9), st.integers(3, 9))


def random_tokens(seed, grid, kinds=4):
    """Tokens of a few kinds, with noise."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(kinds, 8, generator=generator)
    kind = torch.randint(kinds, grid, generator=generator)
    return centres[kind] + 0.5 * torch.randn(*grid, 8, generator=generator)


def planted(grid, *rectangles):
    """Background tokens, and others on rectangles (top, bottom, left, right)."""
    tokens = torch.tensor([1.0, 0.0]).repeat(*grid, 1)
    for top, bottom, left, right in rectangles:
        tokens[top:bottom, left:right] = torch.tensor([0.0, 1.0])
    return tokens


@properties
@given(SEEDS, GRIDS)
def test_eigenvector_is_the_second_of_the_dense_problem(seed, grid):
    linked = links(random_tokens(seed, grid))
    vector = second_eigenvector(linked)
    if vector is None:
        assert linked.all()
        return
    weights = np.where(linked, 1, 1e-5)
    degrees = np.diag(weights.sum(axis=1))
    second = eigh(degrees - weights, degrees, eigvals_only=True, subset_by_index=[1, 1])[0]
    residual = (degrees - weights) @ vector - second * degrees @ vector
    assert np.abs(residual).max() < 1e-6 * np.abs(degrees @ vector).max()
    assert np.abs(degrees.sum(axis=1) @ vector) < 1e-6 * (degrees.sum(axis=1) @ np.abs(vector))  # none of the first


@properties
@given(SEEDS, st.integers(20, 60))
def test_graphs_that_nearly_fall_apart_are_solved_too(seed, count):
    generator = np.random.default_rng(seed)
    linked = np.triu(generator.random((count, count)) < 1 / count)
    linked |= linked.T | np.eye(count, dtype=bool)
    linked[0, 1] = linked[1, 0] = True
    vector = second_eigenvector(linked)
    weights = np.where(linked, 1, 1e-5)
    degrees = weights.sum(axis=1)
    value = vector @ (degrees * vector - weights @ vector) / (vector @ (degrees * vector))
    smallest = np.linalg.eigvalsh(np.eye(count) - weights / np.sqrt(np.outer(degrees, degrees)))[1]
    assert value == pytest.approx(smallest, rel=1e-6)


@properties
@given(SEEDS, GRIDS)
def test_object_depends_on_directions_alone(seed, grid):
    tokens = random_tokens(seed, grid)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    lengths = 0.1 + torch.rand(*grid, 1)
    before, after = links(tokens), links(lengths * tokens @ rotation)
    assert (before == after).mean() > 0.99
    if (before == after).all():  # but for a similarity within round-off of tau
        found = token_cut(tokens)
        again = token_cut(lengths * tokens @ rotation)
        assert (found is None and again is None) or (found == again).all()


@properties
@given(SEEDS, GRIDS)
def test_object_is_one_region_and_not_all(seed, grid):
    found = token_cut(random_tokens(seed, grid))
    if found is not None:
        _, regions = tokencut.label(found)
        assert regions == 1
        assert not found.all()


@properties
@given(SEEDS, GRIDS)
def test_half_precision_tokens_are_compared_in_single_precision(seed, grid):
    tokens = random_tokens(seed, grid).to(torch.bfloat16)
    assert (links(tokens) == links(tokens.float())).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_planted_object_is_found(dtype):
    found = token_cut(planted((8, 10), (2, 5, 3, 9)).to(dtype))
    expected = np.zeros((8, 10), bool)
    expected[2:5, 3:9] = True
    assert (found == expected).all()


def test_of_two_alike_the_first_in_raster_order_is_kept():
    found = token_cut(planted((8, 10), (5, 7, 0, 3), (1, 3, 6, 9)))
    assert found[1:3, 6:9].all()
    assert found.sum() == 6


def test_touching_corners_do_not_connect():
    found = token_cut(planted((6, 6), (1, 3, 1, 3), (3, 5, 3, 5)))
    assert found.sum() == 4
    assert found[1:3, 1:3].all()


@properties
@given(SEEDS, GRIDS)
def test_the_sign_of_an_eigenvector_does_not_matter(seed, grid):
    vector = np.random.default_rng(seed).standard_normal(grid)
    assert (object_of(vector) == object_of(-vector)).all()
    seed_place = np.unravel_index(np.abs(vector).argmax(), grid)
    assert object_of(vector)[seed_place]


def test_the_sides_part_at_the_mean():
    assert object_of(np.array([[3.0, 1, 1, 2.5]])).tolist() == [[True, False, False, False]]
    assert object_of(np.array([[-3.0, 1, 1, 1]])).tolist() == [[True, False, False, False]]
    assert object_of(np.array([[9.0, 4.5, 5, 5]])).tolist() == [[True, False, False, False]]


def test_round_off_does_not_choose_the_seed():
    vector = np.full((3, 5), -0.1)
    vector[0, 0], vector[2, 4] = 1, 1 + 1e-12
    assert object_of(vector)[0, 0]
    assert not object_of(vector)[2, 4]


@pytest.mark.parametrize(
    "tokens",
    [
        torch.ones(4, 5, 3),  # an image of one colour
        torch.zeros(4, 5, 3),
        torch.eye(20).view(4, 5, 20),  # no two alike
        torch.ones(1, 1, 3),  # an image smaller than a patch
        torch.eye(2).view(1, 2, 2),
    ],
)
def test_where_there_is_nothing_to_divide_there_is_no_object(tokens):
    assert token_cut(tokens) is None


def test_an_eigenvector_that_is_not_found_is_no_error(monkeypatch):
    def fail(*args, **kwargs):
        raise ArpackNoConvergence("no convergence", [], [])

    monkeypatch.setattr(tokencut, "eigsh", fail)
    assert token_cut(planted((4, 4), (1, 2, 1, 2))) is None


def test_the_answer_does_not_depend_on_the_global_seed():
    tokens = random_tokens(3, (9, 9))
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        found.append(second_eigenvector(links(tokens)))
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize(("shape", "epsilon"), [((4, 8), 1e-5), ((1, 4, 4, 8), 1e-5), ((4, 4, 8), 0), ((4, 4, 8), 1)])
def test_other_shapes_and_weights_are_refused(shape, epsilon):
    with pytest.raises(SOAPError, match=r"\(rows, columns, D\) and epsilon"):
        token_cut(torch.randn(shape), epsilon=epsilon)


@pytest.mark.parametrize("module", ["tokencut", "bilateral_solver"])
def test_without_scipy_one_sentence_names_the_extra(module, monkeypatch):
    for name in ("scipy", *(name for name in sys.modules if name.startswith("scipy."))):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"soap_hf.evaluation.{module}", raising=False)
    with pytest.raises(MissingExtraError, match=r'pip install "soap-hf\[eval\]"'):
        importlib.import_module(f"soap_hf.evaluation.{module}")
