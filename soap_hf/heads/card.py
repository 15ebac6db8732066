"""The model card of a head: made from a template, and made again without losing what a person wrote."""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..layout.references import BackboneReference
from ..runtime.errors import OutputError, first_sentence
from ..runtime.head_files import PROCESSOR_FILE, HeadSource
from ..runtime.vision_backbone import native_image_size
from ..statistics import NEGLIGIBLE_WEIGHT
from .card_command import base_of, fit_command, is_hub_id, is_on_hub, what_to_fill_in
from .config import SOAPConfig
from .opening import BACKBONE_FOLDER, EVALUATIONS_FOLDER, FIGURES_FOLDER, INCLUDED_BACKBONE
from .provenance import METHODS, SOAP
from .report import checks, module_in_words, what_is_removed

CARD_FILE = "README.md"
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

MATCHING, HEADLINE = ("matching", "right_1"), ("evaluation", "metric", "method")
"""What says in a number whether a head helps."""

BLOCK = re.compile(r"<!-- soap_hf:(\w+) -->\n.*?<!-- /soap_hf:\1 -->", flags=re.DOTALL)
"""What this module writes, and may write again; everything outside belongs to whoever wrote it."""


_ORDERS = (
    ("What is removed", "How to use it", "How it was fitted", "Limits", "Citation"),
    ("What is removed", "How to use it", "What was measured", "How it was fitted", "Limits", "Citation"),
)
EARLIER_SKELETONS = [" ".join(f"## {section}" for section in order).split() for order in _ORDERS]
"""What earlier templates had outside their blocks."""

CAPTIONS = {
    "matching": "Two views of each photograph, matched patch by patch, by raw tokens above and by clean ones below: "
    "solid lines that end in a disc are right, dotted ones that end in a cross are wrong.",
    "patch_tokens": "Patch tokens as colours, by three principal components: raw, clean, and what is taken away, in "
    "which grey is nothing.",
    "response_maps": "Where components respond positively, on photographs (left of each pair) and on images that show "
    "nothing (right). Rank counts the scores downwards from 0, the component's number counts the variances.",
    "score_curve": "Scores of the components, the highest first; those that are removed are filled.",
    "score_by_layer": "The highest score of each layer, and how many directions are removed from it.",
    "responses": "Responses of the highest-scoring components, laid over photographs.",
    "similarity": "What the patch in the frame resembles, in its own and in another photograph; a ring marks the best "
    "match.",
    "saliency": "The salient object, as TokenCut finds it in raw and in clean tokens.",
}
"""Figures of a head, what says most to a stranger first, and what they show."""


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
    return _skeleton(card) not in (_skeleton(_template()), *EARLIER_SKELETONS)


def _skeleton(card: str) -> list[str]:
    """The words of a card outside its metadata and its blocks."""
    return BLOCK.sub("", card.partition("\n---\n")[2]).split()


def _template() -> str:
    return files("soap_hf.heads").joinpath("templates/model_card.md").read_text(encoding="utf-8")


def _metadata(config: SOAPConfig, name: str, license: str | None, results: list[dict[str, Any]]) -> ModelCardData:
    backbone, fit = base_of(config)[0], config.fit or {}
    data_set = fit["dataset"] if is_on_hub(fit) and is_hub_id(fit["dataset"]) else None
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        base_model=backbone,
        base_model_relation="adapter" if backbone else None,
        datasets=[data_set] if data_set else None,
        license=license,
        model_name=name if results else None,
        eval_results=[
            EvalResult(
                task_type=TASKS.get(row["evaluation"], "image-feature-extraction"),
                dataset_type=row["dataset"],
                dataset_name=row["dataset"],
                metric_type=row["metric"],
                metric_name=f"{METRICS.get(row['metric'], row['metric'])} ({row['evaluation']})",
                metric_value=round(row["clean"], 6),
            )
            for row in results
            if row["method"] == config.method
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
    found = {match[1] for match in BLOCK.finditer(old.text)}
    if BLOCK.sub("", old.text).split() in EARLIER_SKELETONS and found >= set(blocks) - {"results"}:
        pass  # nobody has changed it: it takes the order of today
    elif found:
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
    order, command = list(CAPTIONS), fit_command(config) if config.fit else None
    pictures = sorted((folder / FIGURES_FOLDER).glob("*.png"), key=lambda path: (path.stem not in CAPTIONS, path.name))
    pictures = sorted(pictures, key=lambda path: order.index(path.stem) if path.stem in CAPTIONS else len(order))
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
        "matched": next((row for row in results if tuple(map(row.get, HEADLINE)) == (*MATCHING, config.method)), None),
        "figures": [
            {"file": path.name, "title": path.stem.replace("_", " "), "caption": CAPTIONS.get(path.stem)}
            for path in pictures
        ],
        "settings": what_is_removed(config),
        "baseline": None if config.method == SOAP else METHODS[config.method],
        "again": f"soap-hf reweight my-head --method {config.method} --rank {config.ranks[-1]} --output baseline",
        "results": results,
        "metrics": METRICS,
        "fit": config.fit,
        "command": command,
        "placeholders": what_to_fill_in(command) if command else None,
        **_usage(config, folder),
    }


def _usage(config: SOAPConfig, folder: Path) -> dict[str, Any]:
    """How the snippets load the head, make something to look at, and read the last of its layers."""
    layer, loading = config.layers[-1], ""
    if config.plain_backbone is not None:
        made = BackboneReference.from_dict(config.plain_backbone["reference"])
        loading = ", backbone=module" if made.is_local else ", trust_remote_code=True" if made.runs_code else ""
    has_processor = (folder / PROCESSOR_FILE).exists()
    height, width = (config.fit or {}).get("image_size") or native_image_size(config.backbone) or (224, 224)
    image = 'image = Image.new("RGB", (640, 480))  # your photograph: Image.open("photo.jpg")'
    made_of_it = f'{image}\ninputs = model.image_processor(image, return_tensors="pt")'
    pixels = f'inputs = {{"pixel_values": torch.rand(1, 3, {height}, {width})}}  # made as the backbone expects them'
    return {
        "loading": loading,
        "inputs": made_of_it if has_processor else pixels,
        "has_processor": has_processor,
        "asked": "" if layer == -1 else ", output_hidden_states=True",
        "tensor": "last_hidden_state" if layer == -1 else f"hidden_states[{layer}]",
    }


def _results(config: SOAPConfig, folder: Path) -> list[dict[str, Any]]:
    """What `soap-hf evaluate … --output HEAD/evaluation/NAME` has written beside a head: one row per metric.

    Those of another strength or method are not the head's. The check of the fit comes first.
    """
    unseen = all(check["unseen"] for check in config.checks)
    seen = "not seen by the fit" if unseen else "by which its strength was chosen"
    data = f"{(config.fit or {}).get('dataset') or 'photographs'}, {seen}"
    rows: list[dict[str, Any]] = [
        {
            "evaluation": "matching" if len(config.layers) == 1 else f"matching, layer {layer}",
            "dataset": data,
            "metric": "right_1",
            "method": config.method,
            "raw": check["raw"],
            "clean": check["clean"],
            **{name: check[name] for name in ("mean", "low", "high")},
        }
        for layer, check in zip(config.layers, config.checks, strict=False)
    ]
    for path in sorted((folder / EVALUATIONS_FOLDER).glob("*/summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not _is_of_head(config, summary["settings"]):
            continue
        what, means = {name: summary[name] for name in ("evaluation", "dataset")}, summary["means"]
        measured = [(metric, method) for method, own in means.items() if method != "raw" for metric in own]
        rows += [
            {
                **{**what, "metric": metric, "method": method, "raw": means["raw"][metric]},
                **{"clean": means[method][metric], **summary["differences"][method][metric]},
            }
            for metric, method in sorted(measured, key=lambda pair: list(means[pair[1]]).index(pair[0]))
        ]
    return rows


def _is_of_head(config: SOAPConfig, settings: dict[str, Any]) -> bool:
    """Whether an evaluation with these settings measured what the head does now."""
    same = all(settings.get(name, getattr(config, name)) == getattr(config, name) for name in ("method", "mu"))
    layer, ranks = settings.get("layer", config.layers[-1]), settings.get("ranks", {})
    rank = config.ranks[config.layers.index(layer)] if layer in config.layers else None
    return same and ranks.get(config.method, rank) == rank


def _backbone(config: SOAPConfig) -> str:
    reference, kind = config.backbone_name_or_path, getattr(config.backbone, "model_type", "backbone")
    if config.plain_backbone is not None:
        made = BackboneReference.from_dict(config.plain_backbone["reference"])
        return f"`{made}`" if not made.is_local else str(module_in_words(config)).replace("a live", "a")
    base, revision = base_of(config)
    at = f" at revision `{revision}`" if revision else ""
    linked = f"[{base}](https://huggingface.co/{base}){at}" if base else f"a local `{kind}`"
    if reference == INCLUDED_BACKBONE:
        return f"{linked}, which lies in the folder `{BACKBONE_FOLDER}`"
    return linked
