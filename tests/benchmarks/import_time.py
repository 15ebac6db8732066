"""What `import soap_hf` adds to the import of transformers that every user of a backbone has anyway."""

import subprocess
import sys

from tests.benchmarks.timing import medians

BASELINE = "from transformers import AutoModel, PreTrainedModel"
STATEMENTS = {"transformers": BASELINE, "transformers and soap_hf": f"{BASELINE}; import soap_hf"}


def measure(repeats: int = 7) -> dict[str, float]:
    """Median seconds of a fresh process with either import, in turn, and the `"extra"` seconds of the second."""
    commands = {name: [sys.executable, "-c", statement] for name, statement in STATEMENTS.items()}
    processes = {
        name: lambda command=command: subprocess.run(command, check=True) for name, command in commands.items()
    }
    seconds = medians(processes, repeats=repeats, warm_up=1)
    return {**seconds, "extra": seconds["transformers and soap_hf"] - seconds["transformers"]}
