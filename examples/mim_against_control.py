"""Does SOAP do what it says? A masked autoencoder and a control without masking, measured at every strength.

    python examples/mim_against_control.py mim-head control-head --position photos/ --knn classes/ \
        --saliency images/ masks/ --output measured

Runs `soap-hf evaluate position | knn | saliency` on each head for mu = auto, 1, 2, 4 and 8, with the baselines
`zero-image` and `top-pc` at equal rank beside it, and prints a table a metric: means, and in brackets the bootstrap
95 % interval of the difference from raw, the mean in bold where that leaves zero out. `--image-size` is that of the
saliency, so that its grid has enough patches to divide. Saliency needs `pip install "soap-hf[eval]"`.

The results stay in the output folder. A command is not run again if its results are there and newer than the head.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from soap_hf.cli.app import app
from soap_hf.compat import argument_error
from soap_hf.evaluation.results import command_line
from soap_hf.heads.opening import HeadRecord
from soap_hf.runtime.errors import SOAPError

STRENGTHS = ("auto", "1", "2", "4", "8")
BASELINES = ("zero-image", "top-pc")
METRICS = {
    "position": ("share", "row_r2", "column_r2"),
    "knn": ("cls_k10", "mean_k1", "mean_k10", "cls_mean_k10"),
    "saliency": ("iou", "iou_bilateral", "max_f_bilateral", "accuracy_bilateral", "s_measure_bilateral"),
}
"""Those that a table is printed of; the files hold all."""


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", nargs="+", type=Path, help="folders of heads, with their statistics")
    parser.add_argument("--position", nargs=1, default=[], metavar="IMAGES", help="data set of images")
    parser.add_argument("--knn", nargs=1, default=[], metavar="CLASSES", help="data set with train and test split")
    parser.add_argument("--saliency", nargs=2, default=[], metavar=("IMAGES", "MASKS"), help="folders")
    parser.add_argument("--image-size", help="of the saliency, e.g. 112; default: each image has its own")
    parser.add_argument("--centred", action="store_true", help="saliency of tokens less the fit's mean token")
    parser.add_argument("--strengths", nargs="+", default=STRENGTHS, metavar="MU", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    arguments = parser.parse_args(given)
    if len({head.name for head in arguments.heads}) < len(arguments.heads):
        parser.error("two heads have one name; rename a folder, since results are kept by name")
    if not any(getattr(arguments, evaluation) for evaluation in METRICS):
        parser.error("nothing to measure; give --position, --knn or --saliency")
    try:
        compare(arguments)
    except (SOAPError, argument_error()) as error:
        sys.exit(f"{Path(__file__).name}: {error}")


def compare(arguments: argparse.Namespace) -> None:
    """Measures all that was asked for, and prints the tables."""
    ranks = {(head, mu): rank(head, mu) for head in arguments.heads for mu in arguments.strengths}
    for evaluation, metrics in METRICS.items():
        data = getattr(arguments, evaluation)
        if data and evaluation == "saliency":
            size = ["--image-size", arguments.image_size] if arguments.image_size else []
            data = [*data, *size, *(["--centred"] if arguments.centred else [])]
        if data:
            found = {
                (head.name, mu): measure(evaluation, head, data, mu, removed, arguments.output)
                for (head, mu), removed in ranks.items()
            }
            for metric in metrics:
                print(f"\n{evaluation}: {metric}\n", *table(found, metric), sep="\n", flush=True)


def measure(evaluation: str, head: Path, data: list[str], mu: str, removed: int, output: Path) -> dict[str, Any]:
    """What an evaluation of a head says at a strength; baselines only where something is removed."""
    folder = output / head.name / f"{evaluation}-mu-{mu}"
    baselines = [*(f"--method={method}" for method in BASELINES), "--rank", str(removed)] if removed else []
    command = ["evaluate", evaluation, str(head), *data, "--mu", mu, *baselines]
    command += ["--output", str(folder), "--overwrite", "--quiet"]
    summary = folder / "summary.json"
    if summary.exists() and summary.stat().st_mtime > (head / "config.json").stat().st_mtime:
        found = json.loads(summary.read_text(encoding="utf-8"))
        if found["command"] == command_line(command):
            return found
    run(command)
    return json.loads(summary.read_text(encoding="utf-8"))


def rank(head: Path, mu: str) -> int:
    """How many directions a head removes at a strength."""
    record = HeadRecord.open(head)
    config, statistics = record.config, record.statistics_by_layer.get(record.config.layers[-1])
    if statistics is None:
        raise SOAPError(f"{head} has no statistics, from which strengths are made; fit it again.")
    try:
        strength = mu if mu == "auto" else float(mu)
    except ValueError:
        strength = -1.0
    if strength != "auto" and not 0 <= strength < math.inf:
        raise SOAPError(f"{mu!r} is no strength; give numbers from 0 upwards, or auto.")
    return statistics.projection(strength, config.tau, config.threshold).rank


def run(command: list[str]) -> None:
    """A command of `soap-hf`, in this process, which saves loading everything again."""
    sys.argv = ["soap-hf", *command]  # from which the evaluation notes its command
    print("$", command_line(command), file=sys.stderr, flush=True)
    app(command, standalone_mode=False)


def table(found: dict[tuple[str, str], dict[str, Any]], metric: str) -> Iterator[str]:
    """Lines of a table in Markdown: one row per head and strength, one column per method."""
    yield "| head | mu | removed | raw | soap | " + " | ".join(BASELINES) + " |"
    yield "|---|---|---:|---:|---|" + "---|" * len(BASELINES)
    for (head, mu), summary in found.items():
        cells = [
            difference(summary, method, metric) if metric in summary["means"].get(method, {}) else ""
            for method in (at_strength(summary, mu), *BASELINES)
        ]
        raw = decimals(summary["means"]["raw"].get(metric))
        yield (
            f"| {head} | {mu} | {summary['settings']['ranks'][at_strength(summary, mu)]} | {raw} | "
            + " | ".join(cells)
            + " |"
        )


def at_strength(summary: dict[str, Any], mu: str) -> str:
    """What a summary calls the head at a strength; its own is `soap`."""
    name = f"soap mu={mu if mu == 'auto' else format(float(mu), 'g')}"
    return name if name in summary["means"] else "soap"


def difference(summary: dict[str, Any], method: str, metric: str) -> str:
    """An method's mean and the interval of its difference from raw."""
    low, high = (summary["differences"][method][metric][end] for end in ("low", "high"))
    mean = decimals(summary["means"][method][metric])
    return f"{f'**{mean}**' if low > 0 or high < 0 else mean} [{low:+.3f}, {high:+.3f}]"


def decimals(value: float | None) -> str:
    """Three of them, without a zero in front."""
    return "" if value is None else re.sub(r"^(-?)0\.", r"\1.", f"{value:.3f}")


if __name__ == "__main__":
    main()
