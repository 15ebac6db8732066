"""The version of this package, in one place, the oldest it runs with of others, and those its numbers depend on."""

from importlib.metadata import version

from .runtime.errors import refuse_older

__version__ = "0.2.0"

NEEDED = {
    "transformers": "5.10",
    "torch": "2.9",
    "huggingface-hub": "1.31",
    "accelerate": "1.3",
    "numpy": "2.0",
    "Pillow": "11.0",
    "safetensors": "0.8",
}
"""As in pyproject.toml, which pip can be talked past; of others an older version costs one feature, not the import."""

for package, needed in NEEDED.items():
    refuse_older(package, needed)


def package_versions() -> dict[str, str]:
    """Versions to note beside measured numbers."""
    return {"soap_hf": __version__} | {name: version(name) for name in ("transformers", "torch", "datasets")}
