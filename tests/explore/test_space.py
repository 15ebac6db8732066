"""The Space of the examples is uploaded by the lines of its README, says what it needs, and runs where it arrives."""

import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest
from huggingface_hub import HfApi, RepoCard
from packaging.requirements import Requirement

from tests.conftest import EXAMPLES, ROOT
from tests.hub_server import client
from tests.test_versions import PROJECT

hub, _client = client.hub, client.client

SPACE = EXAMPLES / "space"
NAME = "tester/soap-explorer"


@pytest.fixture
def uploaded(hub, monkeypatch, tmp_path):
    """What is in the Space after the lines of the README."""
    (code,) = re.findall(r"```python\n(.+?)```", (SPACE / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(code.replace("me/soap-explorer", NAME), {})
    folder = tmp_path / "space"
    for name in HfApi().list_repo_files(NAME, repo_type="space"):
        HfApi().hf_hub_download(NAME, name, repo_type="space", local_dir=folder)
    return folder


def test_the_lines_of_the_readme_upload_all_that_runs(uploaded):
    assert {path.name for path in uploaded.iterdir()} >= {
        *("app.py", "requirements.txt", "README.md"),
        *("soap-vit-mae-tiny", "vit-mae-tiny"),
    }
    for path in SPACE.iterdir():
        if path.is_file():
            assert (uploaded / path.name).read_bytes() == path.read_bytes()


def test_the_metadata_fit_the_extra():
    card = RepoCard.load(SPACE / "README.md").data.to_dict()
    (gradio,) = [one for one in map(Requirement, PROJECT["optional-dependencies"]["explore"]) if one.name == "gradio"]
    assert gradio.specifier.contains(card["sdk_version"])
    assert (card["sdk"], card["app_file"]) == ("gradio", "app.py")
    assert len(card["short_description"]) <= 60
    assert "soap-hf[explore]" in (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "end"), [(None, signal.SIGINT), (str(EXAMPLES / "soap-vit-mae-tiny"), signal.SIGTERM)]
)
def test_it_runs_where_it_arrives_and_leaves_nothing(uploaded, head, end, tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio: `make test-explore`")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"SOAP_HEAD": head or "", "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    running = subprocess.Popen(
        [sys.executable, "app.py"], cwd=uploaded, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        address = re.fullmatch(r"The explorer is at (http://127\.0\.0\.1:\d+/)\n", running.stdout.readline())[1]
        page = urllib.request.urlopen(address, timeout=30).read().decode()
        assert "soap-hf: soap-vit-mae-tiny" in page
    finally:
        running.send_signal(end)
        status = running.wait(timeout=60)
    assert status == 0
    assert [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()] == []
