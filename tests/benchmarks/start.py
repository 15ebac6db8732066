"""CPU seconds until the command line answers, in fresh processes."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.timing import Comparison

HEAD = Path(__file__).parents[2] / "examples" / "soap-vit-mae-tiny"
COMMANDS = {"--help": 0.7, "--version": 0.7, "fit --nonsense": 0.7, "info HEAD": 1.5}
"""What is typed after `soap-hf`, and within how many CPU seconds it is to be answered."""

START = "import sys, soap_hf_cli; sys.argv[0] = 'soap-hf'; soap_hf_cli.main()"


def start_command_line(repeats: int = 5) -> Comparison:
    """User and system time of each process, with warm caches."""
    seconds = {words: statistics.median(_cpu(words) for _ in range(repeats + 1)) for words in COMMANDS}
    ratios = {f"soap-hf {words}, of {most} s": seconds[words] / most for words, most in COMMANDS.items()}
    return Comparison(
        title="CPU time until the command line answers",
        seconds={f"soap-hf {words}": taken for words, taken in seconds.items()},
        ratios=ratios,
        targets=dict.fromkeys(ratios, "< 1"),
    )


def _cpu(words: str) -> float:
    before = os.times()
    subprocess.run([sys.executable, "-c", START, *words.replace("HEAD", str(HEAD)).split()], capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system
