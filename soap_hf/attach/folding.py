"""A head folded into the weights that read the clean tokens, where these are linear in them; and out again."""

import copy
import os
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from ..files import write_tensors
from ..heads.model import SOAPModelWrapper
from ..layout.detection import PatchLayout
from ..runtime.errors import HeadError
from ..runtime.head_files import read_tensors
from ..runtime.projection import SOAPProjection
from .consumers import find_readers, reads_width
from .hosts import Inputs
from .sites import GivenHead, Site, find_sites

Reader = TypeVar("Reader", nn.Linear, nn.Conv2d)

PARTS = ("left", "right", "weights")
"""Tensors of a delta, in memory and in a file."""


def fold_into_linear(linear: Reader, projection: SOAPProjection) -> Reader:
    r"""A copy of a linear map that does to raw tokens what the map does to clean ones: $W' = W P$, the bias as it was.

    Args:
        linear (`nn.Linear` or 1 x 1 `nn.Conv2d`): a map of `D` features; it is left as it was.
        projection ([`SOAPProjection`]): of width `D`.

    Returns:
        A module of the same class, shapes and dtype.

    Raises:
        HeadError: the map does not take `D` features, or is not linear in them.

    Example:
        >>> import torch
        >>> linear, projection = nn.Linear(4, 2), SOAPProjection(torch.eye(4)[:, :1], torch.ones(1))
        >>> tokens = torch.randn(3, 4)
        >>> torch.allclose(fold_into_linear(linear, projection)(tokens), linear(projection(tokens)), atol=1e-6)
        True
    """
    if not reads_width(linear, projection.dim):
        raise HeadError(
            f"A head of width {projection.dim} folds into a Linear or a 1 x 1 Conv2d of so many features, not into "
            f"{linear}."
        )
    folded = copy.deepcopy(linear)
    Delta.of(linear.weight, projection).add_to(folded.weight, -1)
    return folded


def fold(
    model: nn.Module,
    head: str | os.PathLike | SOAPModelWrapper | SOAPProjection,
    module: str = "auto",
    *,
    layer: int | None = None,
    layout: PatchLayout | None = None,
    inputs: Inputs | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> "SOAPFolding":
    """Folds a head into the weights of a live model that read its patch tokens, in place.

    The model gives what it gives with the head attached, at its own speed: no hook, module or parameter is added. This
    needs patch tokens that reach a Linear or a 1 x 1 convolution as they are, or reshaped, selected, averaged or
    resized: a classifier on their mean, a decoder's first projection, a projector of a model of images and text. It is
    checked that nothing else in the model depends on them; tokens that the model merely hands on stay raw.

    Args:
        model (`nn.Module`): its weights are changed; `unfold` takes the head out again.
        head, module, layer, layout, inputs, revision, token: as in [`attach_soap`].

    Returns:
        [`SOAPFolding`]: what `unfold` needs.

    Raises:
        HeadError: the head cannot be folded, and why; the model is left as it was.
        BackboneError, LayoutError: as [`attach_soap`].
    """
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    if any(isinstance(hook, Site) for part in bare.modules() for hook in part._forward_hooks.values()):
        raise HeadError(f"A head is attached to {type(bare).__name__}; detach it before folding one in.")
    chosen = GivenHead.read(head, layer, layout, revision, token)
    _, sites, host = find_sites(bare, module, chosen, inputs)
    if missing := set(chosen.projections) - {site.layer for site in sites}:
        raise HeadError(f"{type(bare).__name__} does not hand on layer {min(missing)}; fold the others with layer=….")
    deltas: dict[str, Delta] = {}
    for site in sites:
        for path in find_readers(host, site):
            deltas[path] = Delta.of(bare.get_submodule(path).weight, site.projection)
    for path, delta in deltas.items():
        delta.add_to(bare.get_submodule(path).weight, -1)
    return SOAPFolding(deltas)


def unfold(model: nn.Module, folding: "SOAPFolding | str | os.PathLike") -> None:
    """Takes a folded head out of a model, in place; weights come back up to the rounding of their dtype.

    Args:
        model (`nn.Module`): a model with the head folded in, trained further or not.
        folding ([`SOAPFolding`] or path): what `fold` returned, or the file it was saved to.

    Raises:
        HeadError: the model lacks the folded weights, or the head is not folded in.
    """
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    deltas = (folding if isinstance(folding, SOAPFolding) else SOAPFolding.load(folding)).deltas
    parameters = dict(bare.named_parameters())
    for path, delta in deltas.items():
        if f"{path}.weight" not in parameters or not delta.fits(parameters[f"{path}.weight"]):
            raise HeadError(f"{type(bare).__name__} has no weights at {path} that this head was folded into.")
        if not delta.is_in(parameters[f"{path}.weight"]):
            raise HeadError(f"The head is not folded into {path} of {type(bare).__name__}: nothing to take out.")
    for path, delta in deltas.items():
        delta.add_to(parameters[f"{path}.weight"], 1)


@dataclass(frozen=True)
class Delta:
    """What folding took out of one weight: `left @ right.T`, of the rank of the head.

    Attributes:
        left (`torch.Tensor` of shape `(out, k)`): what the weight made of the directions, times `weights`.
        right (`torch.Tensor` of shape `(D, k)`), weights (`torch.Tensor` of shape `(k,)`): the head's.
    """

    left: Tensor
    right: Tensor
    weights: Tensor

    @classmethod
    def of(cls, weight: Tensor, projection: SOAPProjection) -> "Delta":
        """What folding a projection takes out of a weight `(out, D)` or `(out, D, 1, 1)`."""
        basis, weights = (part.to(weight.device) for part in (projection.basis, projection.weights))
        return cls((weight.detach().flatten(1).float() @ basis) * weights, basis, weights)

    def fits(self, weight: Tensor) -> bool:
        """Whether a weight has the shape of the one that was folded."""
        return weight.flatten(1).shape == (len(self.left), len(self.right))

    def is_in(self, weight: Tensor) -> bool:
        """Whether a weight makes of the directions what it does folded, rather than what it does without."""
        made = (weight.detach().flatten(1).float() @ self.right.to(weight.device)).cpu() * self.weights.cpu()
        left = self.left.cpu()
        return bool((made - left * (1 - self.weights.cpu())).norm() < (made - left).norm())

    @torch.no_grad()
    def add_to(self, weight: Tensor, sign: int) -> None:
        """Adds the delta to a weight, or takes it out."""
        delta = (self.left @ self.right.T).view(weight.shape).to(weight.device)
        weight.copy_(weight.float() + sign * delta)


@dataclass(frozen=True)
class SOAPFolding:
    """What is needed to take a folded head out again: for each weight a delta of the head's rank. Made by [`fold`].

    Attributes:
        deltas (`dict[str, Delta]`): by the path of the module.
    """

    deltas: dict[str, Delta] = field(repr=False)

    def __repr__(self) -> str:
        return f"SOAPFolding({', '.join(self.deltas)})"

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file.

        Raises:
            OutputError: it cannot be written.
        """
        write_tensors(
            path, {f"{name}.{part}": getattr(delta, part) for name, delta in self.deltas.items() for part in PARTS}, {}
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SOAPFolding":
        """Reads what `save` wrote.

        Raises:
            HeadError: the file is missing or malformed.
        """
        tensors, _ = read_tensors(path, None, what="folding")
        names = {name.rpartition(".")[0] for name in tensors}
        if set(tensors) != {f"{name}.{part}" for name in names for part in PARTS}:
            raise HeadError(f"{path} is not what folding a head has saved; fold the head again.")
        return cls({name: Delta(*(tensors[f"{name}.{part}"] for part in PARTS)) for name in sorted(names)})
