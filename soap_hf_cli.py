"""The command `soap-hf`, which answers before torch and transformers are imported.

`import soap_hf` imports both, to register with transformers. Here the package stands in `sys.modules` with its
`__init__` not yet run, so that its command line can be read; that runs when there is work to do.
"""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> None:
    """Entry point of `soap-hf`."""
    spec = find_spec("soap_hf")
    assert spec is not None
    assert spec.loader is not None
    package, execute = module_from_spec(spec), spec.loader.exec_module
    sys.modules["soap_hf"] = package
    from soap_hf.cli import main as run

    run(lambda: execute(package))
