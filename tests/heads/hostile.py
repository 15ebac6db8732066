"""A process that loads heads from strangers, with a limit of memory and an eye on what it runs.

`Loader` speaks to it; run as a module, this is the process itself.
"""

import json
import os
import resource
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

MEMORY = 500 << 20
"""Bytes that loading a head may take on top of what the process has already."""

PATIENCE = 20.0
"""Seconds after which loading a head counts as hanging; it takes some 20 ms."""

RUNNING = {
    "os.exec", "os.fork", "os.posix_spawn", "os.system", "pickle.find_class", "socket.connect", "subprocess.Popen",
}  # fmt: skip
"""What the interpreter's audit calls running something else, and reaching for the network."""


@dataclass(frozen=True)
class Outcome:
    """What became of a head: `loaded`, `refused` by an error of the package, or a `fault`."""

    kind: str
    reason: str = ""


class Loader:
    """A process that loads one head after another; started again if one of them kills it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._process: subprocess.Popen | None = None
        self.peak = 0

    def load(self, entry: str, head: Path) -> Outcome:
        """Loads a head in the process by one of `ENTRIES`."""
        process = self._process or self._start()
        process.stdin.write(json.dumps([entry, str(head)]).encode() + b"\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], PATIENCE)[0]:
            self.close()
            return Outcome("fault", f"nothing after {PATIENCE:g} seconds")
        answer = process.stdout.readline()
        if not answer:
            self.close()
            return Outcome("fault", f"the process ended with status {process.returncode}")
        kind, reason, self.peak = json.loads(answer)
        return Outcome(kind, reason)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _start(self) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.heads.hostile", str(self._folder / "head")]
        self._process = subprocess.Popen(
            command, cwd=self._folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        ready = self._process.stdout.readline()
        assert ready == b"ready\n", ready
        return self._process


def serve(sound_head: str) -> None:
    """Loads the heads that standard input names, after a sound one that brings every module into memory."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is printed must not be taken for an answer
    for entry in ENTRIES:
        outcome = examine(entry, sound_head)
        if outcome != Outcome("loaded"):
            sys.exit(answers.write(f"{entry}: {outcome}\n"))
    baseline = _virtual_memory("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (baseline + MEMORY, baseline + MEMORY))
    answers.write("ready\n")
    for line in sys.stdin:
        outcome = examine(*json.loads(line))
        answers.write(json.dumps([outcome.kind, outcome.reason, _virtual_memory("VmPeak") - baseline]) + "\n")


def _virtual_memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def examine(entry: str, head: str) -> Outcome:
    """Loads a head and uses it; every error that is not the package's own is a fault, and so is code that runs."""
    from soap_hf import SOAPError

    with watched() as ran:
        try:
            outcome = Outcome("loaded", ENTRIES[entry](head) or "")
        except SOAPError as error:
            outcome = Outcome("fault" if _is_out_of_memory(error) else "refused", _words(error))
        except BaseException as error:
            outcome = Outcome("fault", _words(error))
    return Outcome("fault", f"ran {ran[0]}") if ran else outcome


def _words(error: BaseException) -> str:
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:500]} ({Path(frame.filename).name}:{frame.lineno})"


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error stems from the limit: a refusal must not come from trying."""
    if error is None:
        return False
    return isinstance(error, MemoryError) or "allocate" in str(error) or _is_out_of_memory(error.__context__)


_watching: list[str] | None = None
_INSTALLED = (sys.prefix, sys.base_prefix, str(ROOT), "<")


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's audit hook: takes down what runs code that is not installed here."""
    if _watching is None:
        return
    if event in RUNNING or (event == "exec" and not getattr(arguments[0], "co_filename", "").startswith(_INSTALLED)):
        _watching.append(f"{event} {arguments[:2]}"[:500])


@contextmanager
def watched() -> Iterator[list[str]]:
    """What runs code, or reaches for the network, within the block."""
    global _watching
    _watching = []
    try:
        yield _watching
    finally:
        _watching = None


def _use(model: Any) -> str:
    """A forward pass as loaded, one after reweighting, the image processor; what the package refused of it."""
    from soap_hf import SOAPError

    refused = ""
    for prepare in (lambda: model, lambda: model.reweight(mu=1), lambda: model.image_processor):
        try:
            prepare()
            _check_tokens(model)
        except SOAPError as error:
            if _is_out_of_memory(error):
                raise
            refused = _words(error)
    return refused


def _check_tokens(model: Any) -> None:
    import torch

    with torch.no_grad():
        outputs = model(torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16))
    if "feature_maps" in outputs:
        assert all(stage.ndim == 4 and stage.shape[1] == 8 and stage.isfinite().all() for stage in outputs[0])
    else:
        assert outputs[0].shape == (1, 5, 8)
        assert outputs[0].isfinite().all()


def _load_wrapper(head: str) -> str:
    from soap_hf import SOAPModelWrapper

    return _use(SOAPModelWrapper.from_pretrained(head))


def _load_backbone(head: str) -> str:
    from soap_hf import SOAPBackbone

    return _use(SOAPBackbone.from_pretrained(head))


def _load_auto_model(head: str) -> str:
    from transformers import AutoModel

    return _use(AutoModel.from_pretrained(head))


def _load_auto_config(head: str) -> None:
    from transformers import AutoConfig

    from soap_hf import SOAPConfig

    assert isinstance(AutoConfig.from_pretrained(head), SOAPConfig)


def _show(head: str) -> None:
    from soap_hf.cli.app import app

    app(["info", head], standalone_mode=False)


ENTRIES: dict[str, Callable[[str], str | None]] = {
    "SOAPModelWrapper": _load_wrapper,
    "SOAPBackbone": _load_backbone,
    "AutoModel": _load_auto_model,
    "AutoConfig": _load_auto_config,
    "info": _show,
}
"""The ways in which a head is loaded; two of them let transformers read the config first."""

if __name__ == "__main__":
    sys.addaudithook(_note)
    serve(sys.argv[1])
