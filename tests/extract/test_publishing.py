"""Features on the Hub: what is pushed comes back, and other things there stay."""

import json

import pytest
from datasets import Dataset
from huggingface_hub import HfApi, snapshot_download
from typer.testing import CliRunner

from soap_hf import SOAPModelWrapper
from soap_hf.cli.app import app
from soap_hf.extract.extraction import extract_features
from soap_hf.extract.publishing import push_features
from soap_hf.runtime.errors import HubError, OutputError
from tests.conftest import noise_image
from tests.hub_server import client

REPO = "tester/features"


hub, _client = client.hub, client.client


@pytest.fixture
def extract(model, tmp_path):
    """Extracts into a folder of so many rows a shard."""
    rows = Dataset.from_dict({"image": [noise_image(seed) for seed in range(10)], "name": list("abcdefghij")})

    def into(name, size):
        extract_features(model, rows, tmp_path / name, shard_size=size, progress=False)
        return tmp_path / name

    return into


def files_of(folder):
    names = ["README.md", "manifest.json", *(f"shards/{path.name}" for path in (folder / "shards").iterdir())]
    return {name: (folder / name).read_bytes() for name in names}


def test_a_folder_comes_back_as_it_was(extract, tmp_path):
    folder = extract("features", 4)
    assert push_features(folder, REPO).endswith(f"/datasets/{REPO}")
    snapshot_download(REPO, repo_type="dataset", local_dir=tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(folder)
    card = HfApi().dataset_info(REPO).card_data
    assert card["configs"][0]["data_files"][0]["path"] == "shards/*.parquet"


def test_shards_of_an_earlier_push_go(extract):
    push_features(extract("small shards", 2), REPO)
    push_features(extract("large shards", 5), REPO)
    shards = [name for name in HfApi().list_repo_files(REPO, repo_type="dataset") if name.endswith(".parquet")]
    assert sorted(shards) == ["shards/part-00000-of-00002.parquet", "shards/part-00001-of-00002.parquet"]


def test_a_push_is_tried_again_and_says_why_it_cannot_be(hub, extract):
    folder = extract("features", 4)
    hub.faults.add(status=503, path="/commit/", times=2)
    push_features(folder, REPO)
    hub.faults.add(status=403, path="/commit/", times=99)
    with pytest.raises(HubError, match="no right to do this"):
        push_features(folder, "tester/others")
    hub.faults.clear()


def test_something_else_stays_and_unfinished_features_are_not_pushed(hub, extract):
    folder = extract("features", 4)
    api = HfApi()
    api.create_repo(REPO, repo_type="dataset")
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="data/train.csv", repo_id=REPO, repo_type="dataset")
    with pytest.raises(HubError, match="holds something else than features"):
        push_features(folder, REPO)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(OutputError, match="are not complete"):
        push_features(folder, "tester/others")
    with pytest.raises(HubError, match="no name of a repository"):
        push_features(folder, "a/b/c")


def test_the_command_pushes(mae_folder, photos, tmp_path):
    SOAPModelWrapper.from_backbone(str(mae_folder), None).save_pretrained(tmp_path / "head")
    arguments = ["extract", str(tmp_path / "head"), str(photos), "--output", str(tmp_path / "features")]
    result = CliRunner().invoke(app, [*arguments, "--push-to-hub", REPO])
    assert result.exit_code == 0, result.output
    assert f"datasets/{REPO}" in result.output.replace("\n", "")
    assert "manifest.json" in HfApi().list_repo_files(REPO, repo_type="dataset")
    for output, repo, sentence in (("features.parquet", REPO, "not a file"), ("other", "a/b/c", "no name")):
        arguments[-1] = str(tmp_path / output)
        result = CliRunner().invoke(app, [*arguments, "--push-to-hub", repo])
        assert sentence in str(result.exception)
