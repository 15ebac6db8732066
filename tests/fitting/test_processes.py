"""Several processes, started for real, fit what one would, and stop together."""

import os
import subprocess
import sys

import pytest
import torch

from soap_hf import SOAPConfig, SOAPStatistics
from soap_hf.fitting.processes import merged_counts, merged_moments
from soap_hf.processes import join_processes, sum_unless_one_failed
from soap_hf.statistics.token_statistics import ResponseCounts, TokenMoments
from tests.conftest import ROOT
from tests.fitting import distributed_fits


@pytest.fixture(scope="module", params=[2, 3])
def run(request, tmp_path_factory):
    """The folder in which so many processes have left their results, and their number."""
    folder = tmp_path_factory.mktemp(f"processes{request.param}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    done = subprocess.run(
        [*launcher, "-m", "tests.fitting.distributed_fits", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, request.param, done.stderr


@pytest.fixture(scope="module")
def alone():
    """What one process finds, without a launcher."""
    return {name: single() for name, single in distributed_fits.FITS.items()}


@pytest.mark.parametrize("name", distributed_fits.FITS)
def test_any_number_of_processes_fits_the_same(run, alone, name):
    ours = SOAPStatistics.load(run[0] / f"{name}.safetensors")
    model = alone[name]
    theirs = model.statistics if len(model.config.layers) == 1 else model.statistics[-1]
    assert (ours.num_real, ours.num_synthetic) == (theirs.num_real, theirs.num_synthetic)
    # a stream is dealt out image by image: other batches, which round otherwise
    rtol = 1e-5 if "stream" in name else 1e-9
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=rtol, atol=rtol)
    torch.testing.assert_close(ours.eigenvalues, theirs.eigenvalues, rtol=rtol, atol=rtol)
    torch.testing.assert_close(ours.scores[:8], theirs.scores[:8], rtol=0, atol=1e-4)
    ours, theirs = (statistics.projection(mu=4).matrix() for statistics in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_all_resume_what_the_failure_of_one_left(run, alone):
    folder, number, _ = run
    told = [(folder / f"dropped.{rank}").read_text() for rank in range(number)]
    assert all("the server has gone" in text and text.startswith(f"Process 0 of {number}: ") for text in told)
    ours, theirs = SOAPStatistics.load(folder / "interrupted.safetensors"), alone["rows"].statistics
    torch.testing.assert_close(ours.eigenvalues, theirs.eigenvalues, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.scores[:8], theirs.scores[:8], rtol=0, atol=1e-4)


def test_nan_in_one_process_stops_all_and_names_process_and_batch(run):
    folder, number, _ = run
    told = [(folder / f"poisoned.{rank}").read_text() for rank in range(number)]
    start = f"Process {number - 1} of {number}: The patch tokens of batch 2 of the components hold NaN"
    assert all(text.startswith(start) for text in told)


def test_warnings_come_once_and_idle_processes_are_named(run):
    _, number, err = run
    assert err.count("The data set has 7 images, fewer than the 1000 asked for") == 1
    assert ("Processes [2] read no image" in err) == (number == 3)


def test_the_command_line_writes_one_head(vit, processor, images, tmp_path):
    vit.save_pretrained(tmp_path / "vit")
    processor.save_pretrained(tmp_path / "vit")
    images.save_to_disk(tmp_path / "data")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [
            *launcher,
            "-m",
            "soap_hf",
            "fit",
            "vit",
            "data",
            "--output",
            "head",
            "--mu",
            "1",
            "--device",
            "cpu",
            "--num-images",
            "50",
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Head written to head") == done.stdout.count("Directions removed") == 1
    assert SOAPStatistics.load(tmp_path / "head" / "statistics.safetensors").num_real == 50
    assert SOAPConfig.from_pretrained(tmp_path / "head").checks[0]["images"] == 30


def test_one_process_alone_merges_with_nobody():
    join_processes()
    moments = TokenMoments(4).update(torch.randn(20, 4))
    assert torch.equal(merged_moments(moments).scatter, moments.scatter)
    counts = ResponseCounts(moments.principal_components(), (5,)).update(torch.randn(3, 5, 4))
    assert torch.equal(merged_counts(counts).positive, counts.positive)
    assert sum_unless_one_failed(None, [1, True]) == [1, True]
    with pytest.raises(KeyError):
        sum_unless_one_failed(KeyError("gone"), [1])
