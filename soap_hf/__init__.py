"""SOAP for Hugging Face Transformers: clean patch tokens from any frozen vision backbone.

Importing this package registers `SOAPConfig`, `SOAPModelWrapper` and a pipeline with transformers, so that
`AutoModel.from_pretrained(head)`, `pipeline("image-feature-extraction", model=head)` and
`pipeline("salient-object-segmentation", model=head)` work.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__  # first, since it refuses what is too old for the rest

# isort: split
from transformers import AutoBackbone, AutoConfig, AutoModel

from .heads.config import SOAPConfig
from .heads.model import SOAPBackbone, SOAPModelWrapper
from .layout.detection import PatchLayout
from .pipelines import register as register_pipelines
from .runtime.errors import SOAPError
from .runtime.projection import SOAPProjection
from .statistics.semantic_invariance import semantic_invariance, suppression_weights
from .statistics.soap_statistics import SOAPStatistics
from .statistics.synthetic import synthesize_images

if TYPE_CHECKING:
    from .attach.attachment import attach_soap
    from .attach.export import export_onnx
    from .attach.folding import fold, fold_into_linear, unfold
    from .evaluation.comparison import Comparison
    from .evaluation.examples import Examples
    from .evaluation.matching import evaluate_matching
    from .evaluation.strength import choose_mu
    from .extract.extraction import extract_features
    from .fitting.fit import fit_soap


__all__ = [
    "Comparison",
    "Examples",
    "PatchLayout",
    "SOAPBackbone",
    "SOAPConfig",
    "SOAPError",
    "SOAPModelWrapper",
    "SOAPProjection",
    "SOAPStatistics",
    "attach_soap",
    "choose_mu",
    "evaluate_matching",
    "export_onnx",
    "extract_features",
    "fit_soap",
    "fold",
    "fold_into_linear",
    "semantic_invariance",
    "suppression_weights",
    "synthesize_images",
    "unfold",
]

_LAZY = {  # they need more than loading and using a head does
    "Comparison": "evaluation.comparison",
    "Examples": "evaluation.examples",
    "attach_soap": "attach.attachment",
    "choose_mu": "evaluation.strength",
    "evaluate_matching": "evaluation.matching",
    "export_onnx": "attach.export",
    "extract_features": "extract.extraction",
    "fit_soap": "fitting.fit",
    "fold": "attach.folding",
    "fold_into_linear": "attach.folding",
    "unfold": "attach.folding",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


AutoConfig.register(SOAPConfig.model_type, SOAPConfig, exist_ok=True)
AutoModel.register(SOAPConfig, SOAPModelWrapper, exist_ok=True)
AutoBackbone.register(SOAPConfig, SOAPBackbone, exist_ok=True)
register_pipelines()
