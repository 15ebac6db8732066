"""What `import soap_hf` adds to the import of transformers that every user of a backbone has anyway."""

import json
import statistics
import subprocess
import sys

IMPORTS = """
import json, time
start = time.perf_counter()
from transformers import AutoModel, PreTrainedModel
without = time.perf_counter()
import soap_hf
print(json.dumps([without - start, time.perf_counter() - start]))
"""


def measure(repeats: int = 7) -> dict[str, float]:
    """Median seconds in fresh processes of the import of transformers, of both, and of the `"extra"` for soap_hf."""
    command = [sys.executable, "-c", IMPORTS]
    runs = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(repeats + 1)]
    warm = runs[1:]  # the first one fills the disk cache
    return {
        "transformers": statistics.median(without for without, _ in warm),
        "transformers and soap_hf": statistics.median(both for _, both in warm),
        "extra": statistics.median(both - without for without, both in warm),
    }
