"""The command `soap-hf`, which answers before torch and transformers are imported.

`import soap_hf` imports both, to register with transformers. Here the package stands in `sys.modules` with its
`__init__` not yet run, so that its command line can be read; `soap_hf.cli` runs that when there is work to do.
"""

import os
import signal
import sys
from importlib.util import find_spec, module_from_spec


def main() -> None:
    """Entry point of `soap-hf`."""
    spec = find_spec("soap_hf")
    assert spec is not None
    assert spec.loader is not None
    package, execute = module_from_spec(spec), spec.loader.exec_module
    sys.modules["soap_hf"] = package
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as in the background, or somebody else's
        signal.signal(signal.SIGINT, _leave)

    def complete() -> None:
        execute(package)
        signal.signal(signal.SIGINT, before)

    vars(package)["_complete"] = complete
    from soap_hf.cli import main as run

    run()


def _leave(*_: object) -> None:
    """Ends the process before its work: an import may swallow or bury a KeyboardInterrupt."""
    if os.environ.get("RANK", "0") == "0":  # once for all processes of a launcher
        os.write(2, b"Interrupted.\n")
    os._exit(130)
