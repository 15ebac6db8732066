"""What an evaluation found: means, paired differences with their intervals, a table, and two files."""

import csv
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from ..files import staging_folder
from ..notebooks import html_of
from ..runtime.errors import SOAPError
from ..version import package_versions
from .methods import RAW

DRAWS_AT_ONCE = 1 << 22
"""Random numbers drawn at a time, so that the memory of a bootstrap stays bounded."""

FEW_IMAGES = 8
"""With fewer an interval says little."""

POSITION = {"share", "row_r2", "column_r2"}
"""Metrics of how much of a token its position explains."""

LOWER_IS_BETTER = {"stuck", *POSITION}

POWER = ((1.96 + 0.84) / 1.96) ** 2
"""Images for a difference to be told from none four times in five, by those with which its interval just reaches 0."""

MOST_IMAGES = 1_000_000
"""A larger number is not worth telling."""


class Interval(NamedTuple):
    """A mean and the two ends of its 95 % interval."""

    mean: float
    low: float
    high: float


class Verdict(NamedTuple):
    """What a difference from raw tokens says.

    Attributes:
        effect (`str`): `"helps"`, `"hurts"`, `"no measurable difference"`, `"no difference"` or `"too few images"`; of
            measures of position, which say what was removed and not whether that helps, `"less position"` or
            `"more position"`.
        images_to_tell (`int`, *optional*): about how many images would tell a difference as large as the one seen from
            none, four times in five; where none was seen.
    """

    effect: str
    images_to_tell: int | None = None

    def __str__(self) -> str:
        number = self.images_to_tell
        if number is None:
            return self.effect
        shown = "over a million" if number > MOST_IMAGES else f"about {number:,}"
        return f"{self.effect}; {shown} images would tell"


class Results(NamedTuple):
    """What an evaluation gives: its name, one row per image (as `<name>.csv`), and a summary (as `summary.json`)."""

    name: str
    rows: list[dict[str, Any]]
    summary: dict[str, Any]

    def __repr__(self) -> str:
        return f"Results({self.name}, {len(self.rows)} images: {', '.join(self.summary['means'])})"

    def _repr_html_(self) -> str:
        return html_of(repr(self), results_table(self.summary, self.name))


def paired_difference(
    before: Sequence[float] | Tensor, after: Sequence[float] | Tensor, *, repeats: int = 10_000, seed: int = 0
) -> Interval:
    """Mean over images of `after - before`, with its bootstrap 95 % interval (percentiles over resampled images).

    Args:
        before, after (sequence of `float`, or `torch.Tensor` of shape `(N,)`): one value per image, in one order.
        repeats (`int`, defaults to 10,000): resamples.
        seed (`int`, defaults to 0): of the resamples.

    Raises:
        SOAPError: fewer than 2 images, other lengths, or values that are not finite.

    Example:
        >>> paired_difference([0.25, 0.5, 0.75], [0.5, 0.75, 1.0])
        Interval(mean=0.25, low=0.25, high=0.25)
    """
    first, second = (torch.as_tensor(values, dtype=torch.float64) for values in (before, after))
    if first.shape != second.shape or first.ndim != 1 or not torch.isfinite(first + second).all():
        raise SOAPError(
            f"A paired difference needs a finite value per image on both sides, not {tuple(first.shape)} and "
            f"{tuple(second.shape)} values."
        )
    differences = second - first
    means = [counts @ differences / len(differences) for counts in resamples(len(differences), repeats, seed)]
    return interval(float(differences.mean()), torch.cat(means))


def verdict(difference: Interval, metric: str, images: int) -> Verdict:
    """What a method's difference from raw tokens on so many images says.

    Example:
        >>> print(verdict(Interval(0.12, 0.09, 0.14), "right_1", images=64))
        helps
        >>> print(verdict(Interval(0.01, -0.01, 0.03), "right_1", images=64))
        no measurable difference; about 520 images would tell
    """
    mean, low, high = difference
    if mean == low == high == 0:
        return Verdict("no difference")
    if images < FEW_IMAGES:
        return Verdict("too few images")
    if low <= 0 <= high:
        if mean == 0:
            return Verdict("no measurable difference")
        needed = images * POWER * min((high - low) / 2 / abs(mean), MOST_IMAGES) ** 2
        within = min(max(needed, images + 1), 2 * MOST_IMAGES)
        return Verdict("no measurable difference", int(float(f"{within:.2g}")))
    lower = high < 0
    if metric in POSITION:
        return Verdict("less position" if lower else "more position")
    return Verdict("helps" if lower == (metric in LOWER_IS_BETTER) else "hurts")


def column(rows: Sequence[dict[str, Any]], name: str) -> Tensor:
    """One value of each row, `(N,)` float64."""
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


def resamples(images: int, repeats: int = 10_000, seed: int = 0) -> Iterator[Tensor]:
    """How often each image is drawn in each resample of a bootstrap, in blocks of shape `(repeats, images)` float64.

    Raises:
        SOAPError: fewer than 2 images.
    """
    if images < 2:
        raise SOAPError(f"A 95 % interval needs at least 2 images, not {images}; evaluate on more.")
    generator = torch.Generator().manual_seed(seed)
    block = max(1, DRAWS_AT_ONCE // images)
    for start in range(0, repeats, block):
        drawn = torch.randint(images, (min(block, repeats - start), images), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones_like(counts))


def interval(mean: float, resampled: Tensor) -> Interval:
    """The 95 % interval of a value from its resampled values, `(repeats,)`."""
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return Interval(mean, low, high)


def summary(
    rows: Sequence[dict[str, Any]],
    methods: Iterable[str],
    metrics: Iterable[str],
    *,
    counts: dict[str, int],
    settings: dict[str, Any],
    command: str | None = None,
) -> dict[str, Any]:
    """What `summary.json` holds, from the rows of the images.

    A row has a value `f"{method}_{metric}"` for each metric and each of the methods, `"raw"` and those measured
    against it; a metric that a method's rows do not have is left out for that method. `counts` are of images, classes
    and the like, `settings` what the numbers depend on, `command` the command line that makes them again.

    Returns:
        `means[method][metric]` and, for every method but `"raw"`, `differences[method][metric]`, an [`Interval`] of
        the method minus raw; `verdicts`, in the same shape, a [`Verdict`] on each; `counts`, `settings`, `command` and
        `versions`.
    """
    metrics, known = list(metrics), rows[0] if rows else {}
    values, means, differences = {}, {}, {}
    for method in methods:
        own = [metric for metric in metrics if f"{method}_{metric}" in known]
        values[method] = {metric: column(rows, f"{method}_{metric}") for metric in own}
        means[method] = {metric: float(one.mean()) for metric, one in values[method].items()}
        if method != RAW:
            differences[method] = {
                metric: paired_difference(values[RAW][metric], one) for metric, one in values[method].items()
            }
    return {
        "means": means,
        "differences": differences,
        "verdicts": {
            method: {metric: verdict(one, metric, len(rows)) for metric, one in own.items()}
            for method, own in differences.items()
        },
        "counts": counts,
        "settings": settings,
        "command": command,
        "versions": package_versions(),
    }


def grouped(results: Results, key: str, metrics: Iterable[str], optional: Iterable[str] = ()) -> Results:
    """The results with a summary of each group of rows, in `summary["groups"]`; a group of one row has none.

    Rows are grouped by the column `key`. A group has all of `metrics`, and of `optional` those that two of its rows or
    more have; they are over these rows, whose number is in its `counts`.
    """
    groups = {}
    for name in sorted({row[key] for row in results.rows}):
        rows = [row for row in results.rows if row[key] == name]
        if len(rows) > 1:
            groups[name] = _group(rows, results.summary["means"], metrics, {"images": len(rows)})
            for metric in optional:
                known = [row for row in rows if row[f"{RAW}_{metric}"] is not None]
                if len(known) > 1:
                    some = _group(known, results.summary["means"], [metric], {f"images_with_{metric}": len(known)})
                    for part, values in some.items():
                        for method, value in values.items():
                            own = groups[name][part]
                            own[method] = {**own[method], **value} if isinstance(value, dict) else value
    results.summary["groups"] = groups
    return results


def _group(
    rows: Sequence[dict[str, Any]], methods: Iterable[str], metrics: Iterable[str], counts: dict[str, int]
) -> dict[str, Any]:
    found = summary(rows, methods, metrics, counts=counts, settings={})
    return {part: found[part] for part in ("means", "differences", "verdicts", "counts")}


def results_table(found: dict[str, Any], title: str) -> Table:
    """A row for each metric and method: value, difference from raw with its bootstrap 95 % interval, and a verdict."""
    table = Table(title=title, box=SIMPLE_HEAD)
    for name in ("", "method", "value", "difference (95 % interval)"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for metric in dict.fromkeys(metric for own in found["means"].values() for metric in own):
        methods = [method for method, own in found["means"].items() if metric in own]
        for method in methods:
            row = [metric if method == methods[0] else "", method, f"{found['means'][method][metric]:.3f}"]
            if method != RAW:
                mean, low, high = found["differences"][method][metric]
                row += [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})", str(found["verdicts"][method][metric])]
            table.add_row(*row, end_section=method == methods[-1])
    return table


def write_results(output: Path, name: str, rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> None:
    """Writes `<name>.csv`, one row per image, and `summary.json`, both or neither.

    Rows all have the same keys; `found` is what `summary` gives.

    Raises:
        OutputError: the folder cannot be written.
    """
    with staging_folder(output) as staging:
        with open(staging / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        text = json.dumps(_with_names(found), indent=2, ensure_ascii=False)
        (staging / "summary.json").write_text(text + "\n", encoding="utf-8")


def _with_names(found: Any) -> Any:
    """The same with every [`Interval`] and [`Verdict`] as a dict, which JSON would make a list."""
    if isinstance(found, (Interval, Verdict)):
        return found._asdict()
    return {name: _with_names(one) for name, one in found.items()} if isinstance(found, dict) else found


def command_line(arguments: Sequence[str]) -> str:
    """The command that was given, to be given again; a token is left out.

    Example:
        >>> command_line(["evaluate", "knn", "my-head", "my photos", "--token", "hf_secret"])
        "soap-hf evaluate knn my-head 'my photos' --token …"
    """
    shown = ["…" if before == "--token" else one for before, one in zip(["", *arguments], arguments, strict=False)]
    return "soap-hf " + " ".join(
        "--token=…" if one.startswith("--token=") else one if one == "…" else shlex.quote(one) for one in shown
    )
