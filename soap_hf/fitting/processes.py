"""What the processes of a fit add up together: the moments and the counts of all of them."""

import torch
from accelerate import PartialState

from ..processes import sum_over_processes
from ..statistics.token_statistics import ResponseCounts, TokenMoments


def merged_moments(moments: TokenMoments) -> TokenMoments:
    """The moments of all processes, by Chan's merge, alike in each. Collective."""
    if PartialState().num_processes == 1:
        return moments
    count = int(sum_over_processes(torch.tensor(moments.count)))
    mean = sum_over_processes(moments.mean * moments.count) / max(1, count)
    delta = moments.mean - mean
    scatter = sum_over_processes(moments.scatter + moments.count * torch.outer(delta, delta))
    total = TokenMoments(len(mean), mean.device, moments.products)
    return total.load({"count": torch.tensor(count), "mean": mean, "scatter": scatter})


def merged_counts(counts: ResponseCounts) -> ResponseCounts:
    """The counts of all processes, which share their principal components. Collective."""
    total = ResponseCounts(counts.principal, counts.grid, counts.products)
    return total.load({name: sum_over_processes(tensor) for name, tensor in counts.tensors().items()})
