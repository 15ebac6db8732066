"""The projection removes its directions and nothing else, in float32 at least, whatever happens around it."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from soap_hf import SOAPProjection
from soap_hf.runtime.errors import HeadError
from tests.conftest import random_projection

DIM = 32


@pytest.mark.parametrize("rank", [0, 1, 3, DIM])
@pytest.mark.parametrize("shape", [(DIM,), (7, DIM), (2, 3, DIM), (2, 3, 4, DIM), (0, 3, DIM)])
def test_equals_the_dense_product(rank, shape):
    projection, tokens = random_projection(DIM, rank), torch.randn(shape)
    torch.testing.assert_close(projection(tokens), tokens @ projection.matrix().T)


def test_matrix_shrinks_each_direction_by_its_weight(projection):
    matrix = projection.matrix()
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix @ projection.basis, projection.basis * (1 - projection.weights))
    assert float(torch.trace(matrix)) == pytest.approx(DIM - float(projection.weights.sum()))


def test_weight_one_removes_a_direction_and_leaves_the_others():
    directions = torch.linalg.qr(torch.randn(DIM, 5)).Q
    removed, others = directions[:, :2], directions[:, 2:]
    tokens = torch.randn(4, 9, DIM)
    clean = SOAPProjection(removed, torch.ones(2))(tokens)
    torch.testing.assert_close(clean @ removed, torch.zeros(4, 9, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(clean @ others, tokens @ others, rtol=1e-5, atol=1e-5)


def test_removing_twice_is_removing_once_at_weight_one():
    projection = SOAPProjection(torch.linalg.qr(torch.randn(DIM, 3)).Q, torch.ones(3))
    once = projection(torch.randn(4, DIM))
    torch.testing.assert_close(projection(once), once)


def test_tokens_stay_as_they_were(projection):
    tokens = torch.randn(4, DIM)
    before = tokens.clone()
    projection(tokens)
    assert torch.equal(tokens, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rank_zero_is_the_identity(dtype):
    tokens = torch.randn(2, DIM, dtype=dtype)
    identity = SOAPProjection.identity(DIM)
    assert identity(tokens) is tokens
    assert (identity.dim, identity.rank) == (DIM, 0)


def test_tokens_need_not_be_contiguous(projection):
    tokens = torch.randn(DIM, 5, 4).permute(2, 1, 0)
    torch.testing.assert_close(projection(tokens), projection(tokens.contiguous()))
    strided = torch.randn(4, 6, 2 * DIM)[:, ::2, ::2]
    torch.testing.assert_close(projection(strided), projection(strided.contiguous()))


CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "double": lambda module: module.double(),
    "device and dtype": lambda module: module.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("inside_a_model", [False, True])
def test_buffers_stay_exact_through_casts(projection, cast, inside_a_model):
    before = {name: buffer.clone() for name, buffer in projection.state_dict().items()}
    CASTS[cast](nn.Sequential(nn.Linear(DIM, DIM), projection) if inside_a_model else projection)
    for name, buffer in projection.state_dict().items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_are_cleaned_in_float32(projection, dtype):
    tokens = (100 * torch.randn(2, 9, DIM)).to(dtype)
    assert torch.equal(projection(tokens), projection(tokens.float()).to(dtype))


def test_float64_tokens_are_cleaned_in_float64(projection):
    tokens = torch.randn(2, 9, DIM, dtype=torch.float64)
    basis, weights = projection.basis.double(), projection.weights.double()
    torch.testing.assert_close(
        projection(tokens), tokens - (tokens @ basis * weights) @ basis.T, rtol=1e-12, atol=1e-12
    )


def test_double_precision_directions_are_stored_in_float32():
    basis = torch.linalg.qr(torch.randn(DIM, 2, dtype=torch.float64)).Q
    projection = SOAPProjection(basis, torch.ones(2, dtype=torch.float64))
    assert torch.equal(projection.basis, basis.float())
    assert projection.weights.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_change_the_result(projection, dtype):
    tokens = torch.randn(2, 9, DIM).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        clean = projection(tokens)
    assert clean.dtype == dtype
    assert torch.equal(clean, projection(tokens))


def test_gradients_flow_through_the_tokens_alone(projection):
    tokens, gradient = torch.randn(2, 9, DIM, requires_grad=True), torch.randn(2, 9, DIM)
    projection(tokens).backward(gradient)
    torch.testing.assert_close(tokens.grad, gradient @ projection.matrix())
    assert not list(projection.parameters())
    assert not projection.basis.requires_grad


def test_gradients_are_exact():
    projection = random_projection(6)
    tokens = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(projection, tokens)


@pytest.mark.parametrize("rank", [0, 2])
def test_compiles_in_one_graph(rank):
    projection, tokens = random_projection(DIM, rank), torch.randn(2, 9, DIM)
    compiled = torch.compile(projection, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens), projection(tokens))


class LargestResult(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_dense_matrix_is_made():
    projection, tokens = random_projection(512, 3), torch.randn(4, 10, 512)
    with LargestResult() as largest:
        projection(tokens)
    assert largest.elements == tokens.numel()


def test_state_goes_through_a_meta_device(projection):
    with torch.device("meta"):
        copy = SOAPProjection(torch.zeros(DIM, 2), torch.zeros(2))
    assert copy.basis.is_meta
    copy.to_empty(device="cpu").load_state_dict(projection.state_dict())
    assert torch.equal(copy.matrix(), projection.matrix())


BASIS = torch.eye(6)[:, :2]
NOT_FINITE_BASIS = BASIS.clone().index_fill_(0, torch.tensor([5]), math.nan)
BROKEN = {
    "not orthogonal": (torch.tensor([[1.0, 0.6], [0.0, 0.8], [0.0, 0.0]]), torch.ones(2), "not orthonormal"),
    "not of unit length": (1.01 * BASIS, torch.ones(2), "not orthonormal"),
    "twice the same": (BASIS[:, [0, 0]], torch.ones(2), "not orthonormal"),
    "weight above one": (BASIS, torch.tensor([0.5, 1.01]), r"in \[0, 1\]"),
    "negative weight": (BASIS, torch.tensor([-0.01, 0.5]), r"in \[0, 1\]"),
    "weight not finite": (BASIS, torch.tensor([0.5, math.nan]), "NaN or Inf"),
    "basis not finite": (NOT_FINITE_BASIS, torch.ones(2), "NaN or Inf"),
    "one weight too few": (BASIS, torch.ones(1), "shape"),
    "one weight for all": (BASIS, torch.tensor(1.0), "shape"),
    "basis with one axis": (BASIS[:, 0], torch.ones(6), "shape"),
    "more directions than axes": (BASIS.T, torch.ones(6), "shape"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_projections_are_refused(case):
    basis, weights, reason = BROKEN[case]
    with pytest.raises(HeadError, match=reason):
        SOAPProjection(basis, weights)


def test_rounding_of_a_stored_basis_is_accepted():
    projection = random_projection(DIM, 8)
    rounded = projection.basis.half().float()
    assert SOAPProjection(rounded, projection.weights).rank == 8


@pytest.mark.parametrize("rank", [0, 2])
def test_tokens_of_another_width_are_refused(rank):
    with pytest.raises(HeadError, match="width 32, but got tokens of width 16"):
        random_projection(DIM, rank)(torch.randn(2, DIM // 2))


def test_a_plain_linear_does_the_same_and_is_not_trained():
    projection = random_projection(16)
    linear, tokens = projection.to_linear(), torch.randn(2, 5, 16)
    assert type(linear) is torch.nn.Linear
    torch.testing.assert_close(linear(tokens), projection(tokens))
    assert not linear.weight.requires_grad
