"""Docstrings refer to names as transformers does, [`~soap_hf.Name`]; the site links those that it has."""

import re
from typing import Any

import griffe

SAID_TYPE = re.compile(r"^( +[\w*, ]+ \()(.+?)(\):)", flags=re.MULTILINE)
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?!\()")


class References(griffe.Extension):
    """Makes references of docstrings those of mkdocs-autorefs."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Shows the default of an argument, not how it is declared: see `soap_hf.data.arguments.argument`."""
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) == "argument":
            attr.value = attr.value.arguments[0]

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of an object."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)  # as griffe calls it
            text = SAID_TYPE.sub(lambda match: match[1] + _plain(match[2]) + match[3], text)
            obj.docstring.value = REFERENCE.sub(_linked, text)


def _plain(said: str) -> str:
    """The type of an argument without marks, since the site shows it as code, with the default of the signature."""
    said = re.sub(r"[,;]? *(\*optional\*|defaults to [^,)]*)", "", said)
    return re.sub(r"\[?`~?(?:soap_hf\.[\w.]*\.)?([^`]*)`\]?", r"\1", said)


def _linked(match: re.Match[str]) -> str:
    name = match[2]
    shown = name.rpartition(".")[2] if match[1] else name
    target = PUBLIC.get(name.rpartition(".")[2])
    return f"[`{shown}`][{target}]" if target else f"`{shown}`"


def _public() -> dict[str, str]:
    """Where the site describes a name."""
    found = {}
    for package in ("soap_hf.figures", "soap_hf.evaluation", "soap_hf"):
        path = griffe.load(package, search_paths=["."], resolve_aliases=False)
        found |= {str(name): f"{package}.{name}" for name in path.exports or []}
    return found


PUBLIC = _public()
