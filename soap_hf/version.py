"""The version of this package, in one place, and those of the packages whose numbers it depends on."""

from importlib.metadata import version

__version__ = "0.1.0"


def package_versions() -> dict[str, str]:
    """Versions to note beside measured numbers."""
    return {"soap_hf": __version__} | {name: version(name) for name in ("transformers", "torch", "datasets")}
