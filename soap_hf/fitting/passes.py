"""One pass over real images and one over synthetic ones, in step with other processes, into the accumulators."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.arguments import parse_bytes
from ..data.image_files import stop_if_too_many_bad
from ..data.image_sample import SHUFFLE_BUFFER
from ..layout.probing import evaluation_mode
from ..processes import (
    ended_by,
    from_main,
    gather_lists,
    note_signals,
    on_main,
    sum_over_processes,
    sum_unless_one_failed,
)
from ..runtime.errors import DataError, FitInterrupted, ProcessLostError
from ..statistics.semantic_invariance import semantic_invariance, suppression_weights
from ..statistics.soap_statistics import SOAPStatistics
from ..statistics.token_statistics import PrincipalComponents, ResponseCounts, TokenMoments
from .arguments import FitArguments
from .cache import PROBE_IMAGES, LayerTokens, TokenCache, plan_cache
from .checkpoint import Checkpoint
from .convergence import REPORTED_TOLERANCE, Convergence, Removal
from .processes import merged_counts, merged_moments
from .reader import TokenBatch, TokenReader
from .state import FitState

logger = logging.get_logger(__name__)

NO_BATCH = TokenBatch({}, [], [])


class Step(NamedTuple):
    """What all processes together did at a time: how many were active, images read, bad ones among them, signals."""

    active: int
    read: int
    bad: int
    signals: int


class TokenPasses:
    """Reads real and synthetic images once each, and adds up in `state` what their tokens say.

    A `DataError` refuses a token cache that is too small for one batch.
    """

    def __init__(self, reader: TokenReader, arguments: FitArguments, checkpoint: Checkpoint | None = None):
        self.reader, self.arguments, self.checkpoint = reader, arguments, checkpoint
        with torch.no_grad(), evaluation_mode(reader.model):
            shapes = reader.synthetic_tokens(0, 1, "a synthetic image")
        if arguments.exact:  # the second pass needs no tokens, only the checks on the way do
            self.cache, num_probes = TokenCache(PROBE_IMAGES), PROBE_IMAGES
        else:
            self.cache, num_probes = plan_cache(shapes, parse_bytes(arguments.token_cache), reader.step_size)
            self.cache.halve_if_more_than_whole(reader.sample.available or 0)  # now, rather than a cache full of them
        self.probe, self._probed = TokenCache(num_probes), False
        device = next(iter(shapes.values())).device
        products = torch.float64 if device.type == "cpu" else torch.float32  # few accelerators are fast in float64
        self.grids = {layer: tuple(patches.shape[1:-1]) for layer, patches in shapes.items()}
        self.state = FitState(
            moments={layer: TokenMoments(patches.shape[-1], device, products) for layer, patches in shapes.items()},
            convergence=Convergence(REPORTED_TOLERANCE if arguments.tolerance is None else arguments.tolerance),
        )
        self._signals: list[str] = []

    @torch.no_grad()
    def statistics(self) -> dict[int, SOAPStatistics]:
        """Components of the real images, then responses on real and synthetic ones, for each layer. Collective."""
        state = self.state
        with evaluation_mode(self.reader.model), note_signals(self._signals, self.checkpoint is not None):
            if state.phase == "components":
                self._add_up_components()
            if state.phase == "real responses":
                again = self.reader.real(state.phase, state.position, state.end)
                self._answer(state.real, again, state.num_readable)
                state.phase, state.position = "synthetic responses", 0
            self._answer_synthetic()
        bad = gather_lists(state.bad_images)
        if bad:
            on_main(logger.warning, f"{len(bad)} unreadable images were skipped: {', '.join(map(str, bad))}.")
        return {
            layer: SOAPStatistics.from_counts(merged_counts(real), merged_counts(state.synthetic[layer]))
            for layer, real in state.real.items()
        }

    def _add_up_components(self) -> None:
        state = self.state
        kept = min(state.position, self.cache.num_images)
        for batch, _ in self._in_step(self.reader.real("tokens kept", 0, kept)):  # again after a resume
            self.cache.add(batch.tokens, batch.positions)
        with self._bar("components", self.reader.sample.available, state.num_read) as bar:
            steps = self._in_step(self.reader.real("components", state.position))
            while not self._settled() and (now := next(steps, None)):
                batch, step = now
                for layer, patches in batch.tokens.items():
                    state.moments[layer].update(patches, checked=True)
                self.cache.add(batch.tokens, batch.positions)
                state.bad_images += batch.bad
                state.num_read, state.num_bad = state.num_read + step.read, state.num_bad + step.bad
                if step.bad:
                    self._stop_if_too_many_bad(self.reader.sample.available or max(state.num_read, SHUFFLE_BUFFER))
                self._advance(step, bar)
        self._stop_if_too_many_bad(state.num_read)  # a stream may hold fewer images than were asked for
        if state.num_readable < 2:
            raise DataError(f"A fit needs at least 2 readable images, but found {state.num_readable}.")
        idle = gather_lists([] if next(iter(state.moments.values())).count else [self.reader.rank])
        if idle:
            on_main(logger.warning, f"Processes {idle} read no image: there are too few for so many.")
        self.cache.halve_if_more_than_whole(state.num_read)
        state.real = self._answers(self._principal(), () if self.arguments.exact else self.cache.batches())
        self.cache.clear()
        state.end, state.position = state.position, 0
        state.phase = "real responses" if self.arguments.exact else "synthetic responses"

    def _answer_synthetic(self) -> None:
        state = self.state
        number = self.arguments.num_synthetic or self._num_answers(state.real)
        if not state.synthetic:
            principal = {layer: counts.principal for layer, counts in state.real.items()}
            state.synthetic = self._answers(principal, self.probe.batches(number))
            state.position = min(number, self.probe.num_images) if self._probed else 0
            self.probe.clear()
        self._answer(state.synthetic, self.reader.synthetic(state.phase, state.position, number), number)

    def _answer(self, counts: dict[int, ResponseCounts], batches: Iterator[TokenBatch], total: int) -> None:
        with self._bar(self.state.phase, total, self._num_answers(counts)) as bar:
            for batch, step in self._in_step(batches):
                _add_answers(counts, batch.tokens)
                self._advance(step, bar)

    def _answers(
        self, principal: dict[int, PrincipalComponents], batches: Iterable[LayerTokens]
    ) -> dict[int, ResponseCounts]:
        counts = {
            layer: ResponseCounts(each, self.grids[layer], self.state.moments[layer].products)
            for layer, each in principal.items()
        }
        for tokens in batches:
            _add_answers(counts, tokens)
        return counts

    def _principal(self) -> dict[int, PrincipalComponents]:
        """Those of the main process, since another machine may turn components of equal variance."""
        found = {layer: merged_moments(each).principal_components() for layer, each in self.state.moments.items()}
        return {layer: PrincipalComponents(*map(from_main, each)) for layer, each in found.items()}

    @staticmethod
    def _num_answers(counts: dict[int, ResponseCounts]) -> int:
        return int(sum_over_processes(next(iter(counts.values())).images).sum())

    def _in_step(self, batches: Iterable[TokenBatch]) -> Iterator[tuple[TokenBatch, Step]]:
        """A batch of this process (an empty one once it has no more) while any process has one.

        If reading one fails anywhere, the checkpoint is written and every process raises.
        """
        source = iter(batches)
        while True:
            batch, error = None, None
            try:
                batch = next(source, None)
            except Exception as failure:
                error = failure
            mine = batch or NO_BATCH
            numbers = (batch is not None, len(mine.positions) + len(mine.bad), len(mine.bad), bool(self._signals))
            try:
                step = Step(*sum_unless_one_failed(error, numbers))
            except ProcessLostError:
                raise
            except Exception:
                self._save()
                raise
            if not step.active:
                return
            yield mine, step

    def _advance(self, step: Step, bar: tqdm) -> None:
        """Notes that all processes have worked off a step; saves if it is time, or a signal has come."""
        state = self.state
        state.position += self.reader.step_size
        bar.update(step.read)
        if state.phase == "components" and state.convergence.due(state.num_readable):
            state.convergence.check(state.num_readable, self._removals())
        if self.checkpoint is None:
            return
        if step.signals:
            self._save()
            error = FitInterrupted(
                f"{(self._signals or ['A signal to another process'])[-1]} came during the {state.phase}, after "
                f"{state.position} images; the checkpoint {self.checkpoint.path} is written, from which the same "
                "command goes on with --resume."
            )
            raise ended_by(self._signals, error)
        if self.checkpoint.due(step.read):
            self._save()

    def _save(self) -> None:
        if self.checkpoint is not None and (self.state.position or self.state.phase != "components"):
            self.checkpoint.save(self.state)

    def _settled(self) -> bool:
        return self.arguments.tolerance is not None and self.state.convergence.converged_after is not None

    def _removals(self) -> dict[int, Removal]:
        """What the fit would remove if it ended now, judged by the first images alone."""
        if not self._probed:
            for batch, _ in self._in_step(self.reader.synthetic("synthetic responses", 0, self.probe.num_images)):
                self.probe.add(batch.tokens, batch.positions)
            self._probed = True
        principal, weigh = self._principal(), partial(suppression_weights, **self.arguments.strength)
        real = self._answers(principal, self.cache.batches(PROBE_IMAGES))
        synthetic = self._answers(principal, self.probe.batches())
        removals = {}
        for layer, each in principal.items():
            p, q = (merged_counts(counts[layer]).response() for counts in (real, synthetic))
            scores = semantic_invariance(p, q).masked_fill(~each.resolved, 0)
            removals[layer] = Removal.of(scores, each.components, weigh)
        return removals

    def _stop_if_too_many_bad(self, expected: int) -> None:
        bad = gather_lists(self.state.bad_images)
        stop_if_too_many_bad(bad, self.arguments.max_bad_fraction, self.state.num_read, expected)

    def _bar(self, phase: str, total: int | None, done: int) -> tqdm:
        hidden = not (self.arguments.progress and PartialState().is_main_process)
        return tqdm(total=total, initial=done, desc=phase, unit=" images", disable=hidden)


def _add_answers(counts: dict[int, ResponseCounts], tokens: LayerTokens) -> None:
    for layer, patches in tokens.items():
        counts[layer].update(patches.to(counts[layer].positive.device), checked=True)
