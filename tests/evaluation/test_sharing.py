"""Any number of processes evaluates the same, row for row, and what one raises, all raise."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import EXAMPLES, ROOT
from tests.evaluation import distributed_evaluations

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def launched(processes, *command):
    """What so many processes say on stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [*LAUNCHER, str(processes), "-m", *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module", params=[2, 3])
def shared(request, tmp_path_factory):
    """What each of so many processes has found, and what they said."""
    folder = tmp_path_factory.mktemp(f"evaluations{request.param}")
    err = launched(request.param, "tests.evaluation.distributed_evaluations", folder).stderr
    ranks = range(request.param)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in ranks], err


@pytest.fixture(scope="module")
def alone():
    return json.loads(json.dumps(distributed_evaluations.evaluations(share=False)))


@pytest.mark.parametrize("name", ["matching", "position", "knn", "segmentation", "saliency", "choice"])
def test_every_process_finds_what_one_would(shared, alone, name):
    for found in shared[0]:
        assert json.dumps(found["evaluations"][name]) == json.dumps(alone[name])  # NaN is NaN


def test_what_one_process_raises_all_raise(shared):
    found, _ = shared
    for told in found:
        assert told["too many bad"].startswith("Too many unreadable images (2 among")
        assert "ValueError: no such thing" in told["a failure"]
        assert told["items"] == list("01234567")


def test_unreadable_images_are_told_once_for_each_reading(shared):
    told = shared[1].count("2 unreadable images were skipped: row ")
    assert told == 7, "two fits, matching, position, k-NN twice, and the choice"


def test_the_command_line_writes_what_one_process_would(run, tmp_path):
    head, photos = EXAMPLES / "soap-vit-mae-tiny", EXAMPLES / "photos" / "heldout"
    words = ["evaluate", "matching", head, photos, "--num-images", 9, "--device", "cpu", "--quiet", "--output"]
    run(*words, tmp_path / "one")
    out = launched(2, "soap_hf", *words, tmp_path / "two").stdout
    assert out.count("Results written to") == 1
    one, two = ((tmp_path / name / "matching.csv").read_text(encoding="utf-8") for name in ("one", "two"))
    assert one == two
