"""The command `soap-hf`, which answers before torch and transformers are imported.

`import soap_hf` imports both, to register with transformers. Here the package stands in `sys.modules` with its
`__init__` not yet run, so that its command line can be read; `soap_hf.cli` runs that when there is work to do.
"""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> None:
    """Entry point of `soap-hf`."""
    spec = find_spec("soap_hf")
    assert spec is not None
    sys.modules["soap_hf"] = module_from_spec(spec)
    from soap_hf.cli import main as run

    run()
