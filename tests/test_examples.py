"""The examples run from top to bottom, and print what they promise."""

import base64
import json
import os
import re
import subprocess
import sys

import pytest

from soap_hf import fit_soap
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


@pytest.mark.skipif(sys.platform != "linux", reason="FAISS and torch from pip bring an OpenMP each, which may clash")
def test_an_index_finds_raw_and_clean_neighbours(tmp_path):
    photo, features, figure = (
        EXAMPLES / "photos/fit/00312c7e7196baf4.jpg",
        tmp_path / "features",
        tmp_path / "found.png",
    )
    arguments = ["search.py", str(photo), "--features", str(features)]
    printed = run_example(*arguments, "--figure", str(figure))
    first = next(line.split() for line in printed.splitlines() if line.startswith("  1"))
    assert first == ["1", photo.name, "1.000", photo.name, "1.000"]
    assert printed.endswith("HNSW32 finds 100% of the raw neighbours and 100% of the clean ones.\n")
    assert figure.stat().st_size > 10_000
    written = {shard: shard.stat().st_mtime_ns for shard in features.glob("shards/*.parquet")}
    assert run_example(*arguments) == printed
    assert {shard: shard.stat().st_mtime_ns for shard in features.glob("shards/*.parquet")} == written != {}


def test_search_without_faiss_says_what_to_install(tmp_path):
    script = str(EXAMPLES / "search.py")
    code = f"import runpy, sys; sys.modules['faiss'] = None; runpy.run_path({script!r}, run_name='__main__')"
    arguments = [sys.executable, "-c", code, "--features", str(tmp_path / "features")]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("Searching needs FAISS, which is not installed: run pip install faiss-cpu.\n")
    assert not (tmp_path / "features").exists()


def test_a_tower_is_attached_folded_and_unfolded():
    attached, folded, unfolded = run_example("vision_language.py").splitlines()
    assert float(attached.split()[-1].rstrip("%.")) > 10
    assert float(folded.split()[-1].rstrip(".")) < 1e-5
    assert float(unfolded.split()[-1].rstrip(".")) < 1e-5


def test_masking_leaves_components_that_answer_to_position():
    tops = {}
    for folder in ("vit-mae", "vit-simclr"):
        images = EXAMPLES / "photos/fit"
        fitted = fit_soap(
            EXAMPLES / "matched-pair" / folder, images, num_images=64, check=0, progress=False
        ).statistics
        top = int(fitted.scores.argmax())
        tops[folder] = float(fitted.scores[top]), float(fitted.standard_errors[top])
    (mim, mim_error), (control, control_error) = tops.values()
    assert mim - 3 * mim_error > 0.75
    assert mim - control > 3 * (mim_error + control_error)


def test_heads_are_compared_at_every_strength(tmp_path):
    head = str(EXAMPLES / "soap-vit-mae-tiny")
    arguments = ["mim_against_control.py", head, "--strengths", "2", "auto", "--output", str(tmp_path)]
    arguments += ["--position", str(EXAMPLES / "photos/heldout")]
    first = run_example(*arguments).splitlines()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(written) == 2
    second = run_example(*arguments)  # nothing is measured again …
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == written
    tables = [line for line in first if line.startswith("|")]
    assert tables == [line for line in second.splitlines() if line.startswith("|")]
    share = [line.split("|")[2:6] for line in tables[2:4]]
    (mu, removed, raw, soap), (_, more, same, less) = ([cell.strip() for cell in row] for row in share)
    assert (mu, removed) == ("2", "2")
    assert int(more) > 2
    assert raw == same
    assert float(less.split("**")[1]) < float(soap.split("**")[1]) < float(raw)
    run_example(*arguments[:-2], "--position", str(EXAMPLES / "photos/fit"))  # … but of other images, it is
    assert all(path.stat().st_mtime_ns > then for path, then in written.items())


NOTEBOOKS = {"clean_tokens": 5, "gallery": 4}
"""Notebooks, and the pictures in each."""


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_with_pictures_and_small(name):
    path = EXAMPLES / f"{name}.ipynb"
    assert path.stat().st_size < 2**20
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == NOTEBOOKS[name]
    assert all(output["output_type"] != "error" for output in outputs)
    assert str(EXAMPLES.parent) not in path.read_text(encoding="utf-8")


def test_the_pictures_of_the_gallery_page_are_those_of_its_notebook():
    cells = json.loads((EXAMPLES / "gallery.ipynb").read_text(encoding="utf-8"))["cells"]
    tagged = {tag: cell["outputs"] for cell in cells for tag in cell["metadata"].get("tags", [])}
    page = (EXAMPLES.parent / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\((.*)\.jpg\)", page)) == sorted(tagged)
    for tag, outputs in tagged.items():
        (picture,) = (output["data"]["image/jpeg"] for output in outputs if "image/jpeg" in output.get("data", {}))
        stored = base64.b64decode("".join(picture))
        assert (EXAMPLES.parent / "docs" / f"{tag}.jpg").read_bytes() == stored, "run examples/run_notebooks.py again"


@pytest.mark.parametrize("name", [pytest.param("clean_tokens", marks=pytest.mark.slow), "gallery"])
def test_a_notebook_runs_from_top_to_bottom_outside_the_examples(name, tmp_path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    printed = run_example("run_notebooks.py", name, "--output", str(tmp_path))
    assert printed.startswith(f"{name}: ")
    cells = json.loads((tmp_path / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == NOTEBOOKS[name]
    if name == "clean_tokens":
        assert any("before, " in "".join(output.get("text", "")) for output in outputs)
