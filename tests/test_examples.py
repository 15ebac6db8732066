"""The examples run from top to bottom, and print what they promise."""

import os
import subprocess
import sys

import pytest

from tests.conftest import EXAMPLES


def run_example(name, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dense_head_trains_on_clean_maps():
    assert "After 2 steps:" in run_example("dense_head.py", "--steps", "2")


def test_retrieval_compares_raw_and_clean_tokens():
    last = run_example("retrieval.py").splitlines()[-1].split()
    raw, clean = (float(share.rstrip("%")) for share in last[-3:-1])
    assert clean < raw / 2


def test_a_tower_is_attached_folded_and_unfolded():
    attached, folded, unfolded = run_example("vision_language.py").splitlines()
    assert float(attached.split()[-1].rstrip("%.")) > 10
    assert float(folded.split()[-1].rstrip(".")) < 1e-5
    assert float(unfolded.split()[-1].rstrip(".")) < 1e-5


def test_the_notebook_runs():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "clean_tokens.ipynb", as_version=4)
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(EXAMPLES)}}, timeout=600)
    client.execute(env=environment)
    printed = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("before, " in text for text in printed)
