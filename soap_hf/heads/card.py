"""The model card of a head: made from a template, and made again without losing what a person wrote."""

import json
import re
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..layout.references import BackboneReference
from ..runtime.errors import OutputError, first_sentence
from ..runtime.head_files import HeadSource
from ..statistics import NEGLIGIBLE_WEIGHT
from .config import SOAPConfig
from .opening import BACKBONE_FOLDER, EVALUATIONS_FOLDER, FIGURES_FOLDER, INCLUDED_BACKBONE
from .report import checks, module_in_words

CARD_FILE = "README.md"
SHOWN = (("means", "raw"), ("means", "soap"), ("differences", "soap"))
TASKS = {"knn": "image-classification", "saliency": "image-segmentation", "segmentation": "image-segmentation"}
"""The Hub's names of what the evaluations measure."""

RESULTS = "model-index"
"""Where a card's metadata holds what was measured; of an earlier head it must not be taken for this one's."""
METRICS = {
    "right_0.5": "patches matched within half a patch",
    "right_1": "patches matched within one patch",
    "right_2": "patches matched within two patches",
    "stuck": "moved patches matched to their old place",
    "share": "variance explained by position",
    "row_r2": "R² of a linear probe for a patch's row",
    "column_r2": "R² of a linear probe for a patch's column",
}
"""What metrics are called for people who do not know this package."""

BLOCK = re.compile(r"<!-- soap_hf:(\w+) -->\n.*?<!-- /soap_hf:\1 -->", flags=re.DOTALL)
"""What this module writes, and may write again; everything outside belongs to whoever wrote it."""


def write_card(
    config: SOAPConfig,
    folder: Path,
    *,
    name: str,
    license: str | None = None,
    fallback_license: str | None = None,
    old: str | None = None,
) -> None:
    """Writes `README.md` into a head's folder, whose `figures` it shows.

    `name` is the hub id or folder under which the head is loaded. Of the `old` card the text outside the generated
    blocks is kept, and metadata that the package does not make; an `OutputError` if it is not YAML. The licence is
    `license`, else the old card's, else `fallback_license`.
    """
    results = _results(config, folder)
    card = ModelCard.from_template(
        _metadata(config, name, license, results), template_str=_template(), **_words(config, folder, name, results)
    )
    if old is not None:
        try:
            _keep_what_was_written(ModelCard(old, ignore_metadata_errors=True), card)
        except (yaml.YAMLError, ValueError) as error:
            raise OutputError(
                f"The metadata at the top of {CARD_FILE} of {name} is not YAML ({first_sentence(error)}); mend it or "
                "remove the file."
            ) from error
    card.data.license = card.data.license or fallback_license
    card.save(folder / CARD_FILE)


def refresh_card(folder: Path, *, earlier: Path | None = None) -> None:
    """Writes the card of a head's folder again: of a new head, or after figures or evaluations were added to it.

    It continues the `earlier` card, in the folder after which the head is named; default: the one in `folder`.
    """
    card = earlier or folder / CARD_FILE
    old = card.read_text(encoding="utf-8") if card.exists() else None
    write_card(HeadSource.open(folder).config(SOAPConfig), folder, name=card.parent.resolve().name, old=old)


def is_edited(card: str) -> bool:
    """Whether a card's text says more or less than what the package writes."""
    body = card.partition("\n---\n")[2]
    return BLOCK.sub("", body).split() != BLOCK.sub("", _template().partition("\n---\n")[2]).split()


def is_hub_id(name: str | None) -> bool:
    """Whether a reference can be a repository on the Hub rather than a path."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name or "") is not None


def _template() -> str:
    return files("soap_hf.heads").joinpath("templates/model_card.md").read_text(encoding="utf-8")


def _metadata(config: SOAPConfig, name: str, license: str | None, results: list[dict[str, Any]]) -> ModelCardData:
    backbone, data_set = config.backbone_name_or_path, (config.fit or {}).get("dataset")
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        base_model=backbone if is_hub_id(backbone) else None,
        base_model_relation="adapter" if is_hub_id(backbone) else None,
        datasets=[data_set] if data_set and "/" in data_set and is_hub_id(data_set) else None,
        license=license,
        model_name=name if results else None,
        eval_results=[
            EvalResult(
                task_type=TASKS.get(row["evaluation"], "image-feature-extraction"),
                dataset_type=row["dataset"],
                dataset_name=row["dataset"],
                metric_type=row["metric"],
                metric_name=f"{METRICS.get(row['metric'], row['metric'])} ({row['evaluation']})",
                metric_value=round(row["soap"], 6),
            )
            for row in results
        ]
        or None,
        tags=["soap", "soap-hf", "feature-extraction", "vision"],
    )


def _keep_what_was_written(old: ModelCard, new: ModelCard) -> None:
    """Brings into the new card what a person wrote into the old one.

    A block that the old card lacks, since a person deleted it, stays deleted. A card without any block was written by
    hand from end to end: it comes first, what is generated after it.
    """
    blocks = {match[1]: match[0] for match in BLOCK.finditer(new.text)}
    if BLOCK.search(old.text):
        new.text = BLOCK.sub(lambda match: blocks.get(match[1], match[0]), old.text)
    elif old.text.strip():
        new.text = f"{old.text.rstrip()}\n{new.text}"
    kept = {name: value for name, value in old.data.to_dict().items() if name != RESULTS}
    merged = {**kept, **new.data.to_dict()}
    merged["tags"] = list(dict.fromkeys([*(old.data.get("tags") or []), *(new.data.get("tags") or [])]))
    new.data = ModelCardData(**merged, ignore_metadata_errors=True)


def _words(config: SOAPConfig, folder: Path, name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the template says of this head."""
    components = config.components or [[]] * len(config.layers)  # a head made by hand knows none
    parallel = config.layers, config.hidden_sizes, config.ranks, components
    pictures = sorted(path.name for path in (folder / FIGURES_FOLDER).glob("*.png"))
    return {
        "name": name,
        "backbone": _backbone(config),
        "with_code": "--" not in (getattr(config, "auto_map", None) or {"AutoModel": "--"})["AutoModel"],
        "layers": [
            {
                "name": "last_hidden_state" if layer == -1 else f"hidden_states[{layer}]",
                "width": width,
                "rank": rank,
                "rows": [{**row, "removed": row["weight"] > NEGLIGIBLE_WEIGHT} for row in rows],
            }
            for layer, width, rank, rows in zip(*parallel, strict=True)
        ],
        "checks": checks(config),
        "settings": f"mu={config.mu}, tau={config.tau}, threshold={config.threshold}",
        "figures": [{"file": file, "title": file.removesuffix(".png").replace("_", " ")} for file in pictures],
        "results": results,
        "metrics": METRICS,
        "fit": config.fit,
        "command": _command(config, config.fit) if config.fit else None,
    }


def _results(config: SOAPConfig, folder: Path) -> list[dict[str, Any]]:
    """What `soap-hf evaluate … --output HEAD/evaluation/NAME` has written beside a head: one row per metric.

    Those of another strength are not the head's. The check of the fit comes first.
    """
    unseen = all(check["unseen"] for check in config.checks)
    seen = "not seen by the fit" if unseen else "by which its strength was chosen"
    data = f"{(config.fit or {}).get('dataset') or 'photographs'}, {seen}"
    rows: list[dict[str, Any]] = [
        {
            "evaluation": "matching" if len(config.layers) == 1 else f"matching, layer {layer}",
            "dataset": data,
            "metric": "right_1",
            "raw": check["raw"],
            "soap": check["clean"],
            **{name: check[name] for name in ("mean", "low", "high")},
        }
        for layer, check in zip(config.layers, config.checks, strict=False)
    ]
    for path in sorted((folder / EVALUATIONS_FOLDER).glob("*/summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary["settings"].get("mu", config.mu) != config.mu:
            continue
        raw, clean, differences = (summary[key].get(method, {}) for key, method in SHOWN)
        what = {name: summary[name] for name in ("evaluation", "dataset")}
        rows += [
            {**what, "metric": metric, "raw": raw[metric], "soap": value, **differences[metric]}
            for metric, value in clean.items()
        ]
    return rows


def _backbone(config: SOAPConfig) -> str:
    reference, kind = config.backbone_name_or_path, getattr(config.backbone, "model_type", "backbone")
    if config.plain_backbone is not None:
        made = BackboneReference.from_dict(config.plain_backbone["reference"])
        return f"`{made}`" if not made.is_local else str(module_in_words(config)).replace("a live", "a")
    if reference == INCLUDED_BACKBONE:
        return f"the `{kind}` in the folder `{BACKBONE_FOLDER}`"
    if reference is None or not is_hub_id(reference):
        return f"a local `{kind}`"
    at = f" at revision `{config.backbone_revision}`" if config.backbone_revision else ""
    return f"[{reference}](https://huggingface.co/{reference}){at}"


def _command(config: SOAPConfig, fit: dict[str, Any]) -> str:
    """The command that fits this head again."""
    backbone = config.backbone_name_or_path
    height, width = fit["image_size"]
    options: dict[str, Any] = {"output": "my-head", "revision": config.backbone_revision}
    names = ("config_name", "split", "image_column", "num_images", "num_synthetic")
    options |= {name: fit.get(name) for name in names}
    options |= {"image_size": height if height == width else f"{height}x{width}"}
    options |= {"mu": fit.get("mu", config.mu), "tau": config.tau, "threshold": config.threshold}
    options |= {"seed": fit["seed"], "dtype": config.backbone_dtype}
    given = [(name, value) for name, value in options.items() if value is not None]
    given += [("layer", layer) for layer in config.layers if config.layers != [-1]]
    if plain := config.plain_backbone:
        arguments = plain["reference"].get("arguments")
        given += [("tokens", plain["tokens"])] * bool(plain["tokens"])
        given += [("backbone-arguments", json.dumps(arguments))] * bool(arguments)
        made = BackboneReference.from_dict(plain["reference"])
        backbone = None if made.is_local else backbone
    words = ["soap-hf", "fit", "BACKBONE" if backbone in (None, INCLUDED_BACKBONE) else backbone, str(fit["dataset"])]
    words += [word for name, value in given for word in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join(words + ["--isotropic"] * bool(fit.get("isotropic")))
