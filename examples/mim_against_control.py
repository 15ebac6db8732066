"""Does SOAP do what it says? A masked autoencoder and a control without masking, measured at every strength.

    python examples/mim_against_control.py mim-head control-head --position photos/ --knn classes/ \
        --saliency images/ masks/ --output measured

Runs `soap-hf evaluate position | knn | saliency` on each head for mu = auto, 1, 2, 4 and 8, with the rivals
`zero-image` and `top-pc` at equal rank beside it, and prints a table a metric: means, and in brackets the bootstrap
95 % interval of the difference from raw, the mean in bold where that leaves zero out. An evaluation whose results are
in the output folder already is not run again. `--image-size` is that of the saliency, so that its grid has enough
patches to divide.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soap_hf.cli import app

STRENGTHS = ("auto", "1", "2", "4", "8")
RIVALS = ("zero-image", "top-pc")
METRICS = {
    "position": ("share", "row_r2", "column_r2"),
    "knn": ("cls_k10", "mean_k1", "mean_k10", "cls_mean_k10"),
    "saliency": ("iou", "iou_bilateral", "max_f_bilateral"),
}
"""Those that a table is printed of; the files hold all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", nargs="+", type=Path, help="folders of heads, with their statistics")
    parser.add_argument("--position", nargs=1, default=[], metavar="IMAGES", help="data set of images")
    parser.add_argument("--knn", nargs=1, default=[], metavar="CLASSES", help="data set with train and test split")
    parser.add_argument("--saliency", nargs=2, default=[], metavar=("IMAGES", "MASKS"), help="folders")
    parser.add_argument("--image-size", help="of the saliency, e.g. 112; default: each image has its own")
    parser.add_argument("--strengths", nargs="+", default=STRENGTHS, metavar="MU", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    arguments = parser.parse_args()
    for evaluation, metrics in METRICS.items():
        data = getattr(arguments, evaluation)
        if data:
            size = ["--image-size", arguments.image_size] if arguments.image_size and evaluation == "saliency" else []
            found = {
                (head.name, mu): measure(evaluation, head, [*data, *size], mu, arguments.output)
                for head in arguments.heads
                for mu in arguments.strengths
            }
            for metric in metrics:
                print(f"\n{evaluation}: {metric}\n", *table(found, metric), sep="\n", flush=True)


def measure(evaluation: str, head: Path, data: list[str], mu: str, output: Path) -> dict[str, Any]:
    """What an evaluation of a head says at a strength; rivals only where something is removed."""
    folder = output / head.name / f"{evaluation}-mu-{mu}"
    if not (folder / "summary.json").exists():
        options = ["--mu", mu, "--output", str(folder), "--quiet", "--method", "soap"]
        if rank(head, mu):
            options += [f"--method={rival}" for rival in RIVALS]
        soap_hf("evaluate", evaluation, str(head), *data, *options)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def rank(head: Path, mu: str) -> int:
    """How many directions a head removes at a strength."""
    from soap_hf import SOAPStatistics

    return SOAPStatistics.load(head / "statistics.safetensors").projection("auto" if mu == "auto" else float(mu)).rank


def soap_hf(*arguments: str) -> None:
    """Runs a command of `soap-hf` in this process, which saves loading everything again."""
    sys.argv = ["soap-hf", *arguments]
    print("$", *sys.argv, file=sys.stderr, flush=True)
    app(list(arguments), standalone_mode=False)


def table(found: dict[tuple[str, str], dict[str, Any]], metric: str) -> Iterator[str]:
    """Lines of a table in Markdown: a row a head and strength, a column an arm."""
    yield "| head | mu | removed | raw | soap | " + " | ".join(RIVALS) + " |"
    yield "|---|---|---:|---:|---|" + "---|" * len(RIVALS)
    for (head, mu), summary in found.items():
        cells = [
            difference(summary, arm, metric) if metric in summary["means"].get(arm, {}) else ""
            for arm in ("soap", *RIVALS)
        ]
        raw = decimals(summary["means"]["raw"].get(metric))
        yield f"| {head} | {mu} | {summary['settings']['ranks']['soap']} | {raw} | " + " | ".join(cells) + " |"


def difference(summary: dict[str, Any], arm: str, metric: str) -> str:
    """An arm's mean and the interval of its difference from raw."""
    low, high = (summary["differences"][arm][metric][end] for end in ("low", "high"))
    mean = decimals(summary["means"][arm][metric])
    return f"{f'**{mean}**' if low > 0 or high < 0 else mean} [{low:+.3f}, {high:+.3f}]"


def decimals(value: float | None) -> str:
    """Three of them, without a zero in front."""
    return "" if value is None else f"{value:.3f}".replace("0.", ".", 1)


if __name__ == "__main__":
    main()
