"""What the Hub reads in a model card: its metadata, and the errors it refuses a push for."""

import re

import yaml

FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
LICENSE_NAMES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd "
    "bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 "
    "cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 "
    "cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 "
    "gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 "
    "openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license "
    "fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other "
)
LICENSES = set(LICENSE_NAMES.split())
REPO_ID = re.compile(r"([\w.-]{1,96}/)?[\w.-]{1,96}")


def metadata(readme: bytes) -> dict:
    """The YAML block at the top, empty if there is none or it cannot be read."""
    try:
        block = FRONT_MATTER.match(readme.decode())
        found = yaml.safe_load(block[1]) if block else None
    except (UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def problems(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a card, as far as the Hub's rules are public."""
    block = FRONT_MATTER.match(content)
    if not block:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"YAML metadata could not be parsed: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["YAML metadata must be a mapping"], []
    errors = [f'"license" must be one of [apache-2.0, mit, ...], not {x!r}' for x in _wrong(data, "license", LICENSES)]
    errors += [
        f'"{key}" must be the id of a repository or a list of them, not {value!r}'
        for key in ("base_model", "datasets")
        for value in many(data.get(key))
        if not (isinstance(value, str) and REPO_ID.fullmatch(value))
    ]
    errors += [f'"{key}" must be a string' for key in ("pipeline_tag", "library_name") if _not_text(data.get(key))]
    if "tags" in data and not (isinstance(data["tags"], list) and not any(map(_not_text, data["tags"]))):
        errors.append('"tags" must be an array of strings')
    return errors + _model_index_errors(data.get("model-index")), []


def tags(data: dict) -> list[str]:
    """The tags that the Hub shows for a card."""
    found = [data.get("library_name"), *many(data.get("tags")), data.get("pipeline_tag")]
    for key, prefix in (("license", "license"), ("datasets", "dataset"), ("base_model", "base_model")):
        found += [f"{prefix}:{value}" for value in many(data.get(key))]
    return list(dict.fromkeys(str(tag) for tag in found if tag))


def many(value: object) -> list:
    """A list as it is, one value as a list, None as an empty list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _wrong(data: dict, key: str, allowed: set[str]) -> list:
    return [value for value in many(data.get(key)) if not isinstance(value, str) or value not in allowed]


def _not_text(value: object) -> bool:
    return value is not None and not isinstance(value, str)


def _model_index_errors(index: object) -> list[str]:
    """Each entry needs a name and results with task.type, dataset.name and .type, and metrics with type and value."""
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, entry in enumerate(index):
        if not isinstance(entry, dict) or not entry.get("name") or not isinstance(entry.get("results"), list):
            errors.append(f'"model-index[{i}]" needs a name and an array of results')
            continue
        for j, result in enumerate(entry["results"]):
            where = f"model-index[{i}].results[{j}]"
            for path in ("task.type", "dataset.name", "dataset.type"):
                value: object = result
                for key in path.split("."):
                    value = value.get(key) if isinstance(value, dict) else None
                if not value:
                    errors.append(f'"{where}.{path}" is required')
            metrics = result.get("metrics") if isinstance(result, dict) else None
            if not isinstance(metrics, list) or not metrics:
                errors.append(f'"{where}.metrics" is required')
            elif any(not isinstance(metric, dict) or not {"type", "value"} <= set(metric) for metric in metrics):
                errors.append(f'each of "{where}.metrics" needs a type and a value')
    return errors
