"""Does a head help? Matching between views for some backbones, with the baselines at equal rank, seed by seed.

    python examples/does_it_help.py examples/vit-mae-tiny other-backbone/ --images photos/ --output measured

For each seed the images are divided at random: a third to fit on, a sixth to choose a strength by, and the rest to
measure on. Measured are the head with `mu="auto"`, `zero-image` and `top-pc` that remove as many directions, and the
head with the strength that `choose_mu` chose, with views as they are and with half of the second ones mirrored.
Prints a table in Markdown for each: the share of patches matched within one patch, and in brackets the bootstrap 95 %
interval of its difference from raw, the share in bold where that leaves zero out. The output folder gets a picture of
the curves and all numbers.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from soap_hf import Comparison, Examples, choose_mu, evaluate_matching, fit_soap
from soap_hf.data.data_sets import open_dataset
from soap_hf.evaluation import ViewRule
from soap_hf.evaluation.matching import HEADLINE
from soap_hf.evaluation.strength import StrengthChoice
from soap_hf.figures import matching_curve, save_figure

BASELINES = ("zero-image", "top-pc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="+", help="folders or hub ids")
    parser.add_argument("--images", required=True, help="folder of photographs, or a data set")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    arguments.output.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    curves: dict[str, StrengthChoice] = {}
    for backbone in arguments.backbones:
        for seed in arguments.seeds:
            rows, choice = measure(backbone, arguments.images, seed)
            found += rows
            curves.setdefault(Path(backbone).name, choice)
            print(f"{backbone}, seed {seed}: {choice.reason}", flush=True)
    save_figure(matching_curve(curves), arguments.output / "matching_curve.png")
    text = json.dumps(found, indent=1)
    (arguments.output / "matching.json").write_text(text + "\n", encoding="utf-8")
    for flip in (False, True):
        print("\nHalf of the second views mirrored:" if flip else "\nViews as they are:")
        print(*table([row for row in found if row["flip"] == flip]), sep="\n")


def measure(backbone: str, images: str, seed: int) -> tuple[list[dict[str, Any]], StrengthChoice]:
    """What is found with one seed: a row without and a row with mirrored views, and the choice of a strength."""
    photographs = open_dataset(images)
    order = torch.randperm(len(photographs), generator=torch.Generator().manual_seed(seed)).tolist()
    third, half = len(order) // 3, len(order) // 2
    fitted, tuned, tested = (photographs.select(part) for part in (order[:third], order[third:half], order[half:]))
    model = fit_soap(backbone, fitted, num_images=None, check=0, seed=seed, progress=False)
    auto = model.config.ranks[-1]
    choice = choose_mu(model, Examples(tuned), seed=seed, progress=False)
    shown: dict[str, Any] = {"seed": seed, "progress": False}
    rows = []
    for flip in (False, True):
        rule = ViewRule(flip=flip)
        model.reweight("auto", model.config.tau, model.config.threshold)
        compared = Comparison.of(model, ["soap", *(BASELINES if auto else ())])
        summary = evaluate_matching(compared, Examples(tested), rule=rule, **shown).summary
        model.reweight(choice.mu, model.config.tau, model.config.threshold)
        chosen = evaluate_matching(Comparison.of(model), Examples(tested), rule=rule, **shown).summary
        row = {"backbone": Path(backbone).name, "seed": seed, "flip": flip, "removed": auto, "mu": choice.mu}
        row |= {name: of_method(summary, name) for name in summary["means"]}
        rows.append(row | {"chosen": of_method(chosen, "soap")})
    return rows, choice


def of_method(summary: dict[str, Any], name: str) -> dict[str, Any]:
    """Share right, share stuck, and the interval of the difference from raw, if it is not raw."""
    difference = summary["differences"].get(name, {}).get(HEADLINE)
    own = {"right": summary["means"][name][HEADLINE], "stuck": summary["means"][name]["stuck"]}
    return own | ({} if difference is None else difference._asdict())


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: one row per backbone and seed."""
    lines = ["| backbone | seed | removed | raw | soap, auto | zero-image | top-pc | chosen mu | soap, chosen |"]
    lines.append("|---|---:|---:|---:|---|---|---|---:|---|")
    for row in rows:
        cells = [cell(row[name]) if name in row else "" for name in ("soap", *BASELINES)]
        start = f"| {row['backbone']} | {row['seed']} | {row['removed']} | {decimals(row['raw']['right'])} "
        lines.append(f"{start}| {' | '.join(cells)} | {row['mu']:g} | {cell(row['chosen'])} |")
    return lines


def cell(found: dict[str, Any]) -> str:
    """A share, bold if its interval leaves zero out, and the interval."""
    share, low, high = decimals(found["right"]), found["low"], found["high"]
    share = f"**{share}**" if low > 0 or high < 0 else share
    return f"{share} [{signed(low)}, {signed(high)}]"


def decimals(value: float) -> str:
    """Three of them, without a zero in front."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.3f}")


def signed(value: float) -> str:
    """As `decimals`, with a sign."""
    return f"{'−' if value < 0 else '+'}{decimals(abs(value))}"


if __name__ == "__main__":
    main()
