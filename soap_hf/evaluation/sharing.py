"""The work of an evaluation, done by one process or shared by all of them, with the same result in each."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from accelerate import PartialState
from tqdm.auto import tqdm

from ..data.image_files import BadImage
from ..data.image_sample import ImageSample
from ..data.loading import Example, Tally
from ..processes import gather_lists, sum_unless_one_failed

Item = TypeVar("Item")
Result = TypeVar("Result")


class Part(NamedTuple):
    """Some images of a sample, their names and positions, and what was measured of them."""

    names: list[str]
    positions: list[int]
    value: Any


def measure_images(
    sample: ImageSample,
    prepare: Callable[[Example], Any],
    measure: Callable[[Any], Any],
    batch_size: int,
    *,
    max_bad_fraction: float,
    share: bool = False,
    phase: str = "images",
    progress: bool = False,
) -> tuple[list[Part], list[BadImage]]:
    """What `measure` makes of each batch of images that can be read, in the order of the sample; and the bad images.

    With `share`, the processes of a launcher take turns at the same batches that one would read, and all get the
    results of all; what one raises, all raise. Collective then, and else not.

    Args:
        sample ([`ImageSample`]): the images.
        prepare: makes of an [`Example`] what `measure` gets a batch of; runs in the processes that decode.
        measure: what it gives goes to other processes, so that tensors must lie on the CPU, and be no views.
        batch_size (`int`): images of a batch.
        max_bad_fraction (`float`): share of unreadable images that are skipped; at least one is.
        share (`bool`, defaults to `False`): whether processes share the batches.
        phase (`str`), progress (`bool`): name of the bar, and whether to show it.

    Raises:
        DataError: too many unreadable images; names them.
    """
    rank, others = _turn(share)
    tally = Tally(max_bad_fraction, sample.available or 0)
    parts: list[Part] = []
    batches = sample.batches(prepare, batch_size, rank=rank, num_processes=others)
    with tqdm(total=sample.available, desc=phase, unit=" images", disable=not progress or rank > 0) as bar:
        reading = 1
        while reading:
            batch, error = None, None
            try:
                batch = next(batches, None)
                if batch is not None and batch.positions:
                    parts.append(Part(batch.names, batch.positions, measure(batch.values)))
            except Exception as caught:  # the other processes are to hear of it
                if not share:
                    raise
                error = caught
            read = [] if batch is None else [batch._replace(values=None)]
            if share:
                (reading,) = sum_unless_one_failed(error, [len(read)])
                read = gather_lists(read)
            else:
                reading = len(read)
            for each in read:
                tally.add(each)
                bar.update(each.num_images)
    if rank == 0:
        tally.tell()
    parts = gather_lists(parts) if share else parts
    return sorted(parts, key=lambda part: part.positions[0]), tally.bad_images


def measure_items(
    items: Sequence[Item],
    measure: Callable[[Item], Result],
    *,
    share: bool = False,
    phase: str = "images",
    progress: bool = False,
) -> list[Result]:
    """What `measure` makes of each item, in their order; with `share`, processes take a stretch each, as above."""
    rank, others = _turn(share)
    mine = items[rank * len(items) // others : (rank + 1) * len(items) // others]
    found: list[Result] = []
    error = None
    try:
        for item in tqdm(mine, desc=phase, disable=not progress or rank > 0):
            found.append(measure(item))
    except Exception as caught:
        if not share:
            raise
        error = caught
    if not share:
        return found
    sum_unless_one_failed(error, [])
    return gather_lists(found)


def _turn(share: bool) -> tuple[int, int]:
    """Number of this process, and of those that share the work."""
    state = PartialState() if share else None
    return (0, 1) if state is None else (state.process_index, state.num_processes)
