"""Whatever becomes of what is printed, the work is done, and its exit status says what was lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from soap_hf.heads import printing
from tests.conftest import EXAMPLES, noise_image

FULL = Path("/dev/full")
COMMAND = [sys.executable, "-m", "soap_hf"]


def run(*arguments, stdout, stderr=subprocess.PIPE, encoding="utf-8"):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "0"}
    return subprocess.run([*COMMAND, *map(str, arguments)], stdout=stdout, stderr=stderr, env=environment)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "写真"
    folder.mkdir()
    for seed in range(16):
        noise_image(seed).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def nobody_reads():
    """A pipe whose other end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def fit(photos, output, **kwargs):
    options = ("--num-images", 16, "--check", 0, "--no-figures", "--device", "cpu")
    return run("fit", EXAMPLES / "vit-mae-tiny", photos, "--output", output, *options, **kwargs)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_that_knows_few_characters_costs_no_head(encoding, photos, tmp_path):
    done = fit(photos, tmp_path / "head", stdout=subprocess.PIPE, encoding=encoding)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "head" / "model.safetensors").is_file()
    assert b"??" in done.stdout


def test_a_pipe_that_nobody_reads_costs_no_head(photos, tmp_path, nobody_reads):
    done = fit(photos, tmp_path / "head", stdout=nobody_reads)
    assert done.returncode == 1
    assert b"Broken" not in done.stderr
    assert b"Traceback" not in done.stderr
    assert (tmp_path / "head" / "model.safetensors").is_file()


@pytest.mark.parametrize("where", ["stderr alone", "both"])
def test_errors_and_bars_that_nobody_reads_cost_no_head(where, photos, tmp_path, nobody_reads):
    stdout = nobody_reads if where == "both" else subprocess.PIPE
    done = fit(photos, tmp_path / "head", stdout=stdout, stderr=nobody_reads)
    assert done.returncode == 1
    assert (tmp_path / "head" / "model.safetensors").is_file()
    if where != "both":
        assert b"Head written to" in done.stdout


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize("command", ["evaluate", "extract"])
def test_a_full_disk_behind_the_bars_costs_no_results(command, tmp_path):
    head, photos, output = EXAMPLES / "soap-vit-mae-tiny", EXAMPLES / "photos" / "heldout", tmp_path / "found"
    what = {"evaluate": ["evaluate", "position"], "extract": ["extract"]}[command]
    with FULL.open("w") as full:
        options = ("--num-images", 8, "--output", output, "--device", "cpu")
        done = run(*what, head, photos, *options, stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == 1
    assert b" written to " in done.stdout
    assert (output / {"evaluate": "summary.json", "extract": "manifest.json"}[command]).is_file()


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
def test_a_full_disk_behind_the_output_costs_no_results(tmp_path):
    with FULL.open("w") as full:
        options = ("--num-images", 8, "--output", tmp_path / "found", "--device", "cpu")
        head, photos = EXAMPLES / "soap-vit-mae-tiny", EXAMPLES / "photos"
        done = run("evaluate", "position", head, photos, *options, stdout=full)
    assert done.returncode == 1
    assert b"Error: not everything could be printed (" in done.stderr
    assert b"Traceback" not in done.stderr
    assert (tmp_path / "found" / "summary.json").is_file()


def test_a_closed_output_is_no_error_of_ours(tmp_path):
    done = subprocess.run(
        f'"{sys.executable}" -m soap_hf info {EXAMPLES / "soap-vit-mae-tiny"} >&-', shell=True, capture_output=True
    )
    assert b"Traceback" not in done.stderr


def test_texts_are_printed_as_they_are(capsys):
    printing.show("[bold]a[/bold] " + "b" * 300)
    table = Table("x")
    table.add_row("1")
    printing.show(table)
    printed = capsys.readouterr().out
    assert "[bold]a[/bold] " + "b" * 300 in printed
    assert printed.count("\n") > 3
    assert printing.failure() is None
