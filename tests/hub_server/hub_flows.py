"""What huggingface_hub does with the Hub, run by `python -m tests.hub_server` in a process of its own."""

from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from .plugin import WEIGHTS, put, statuses
from .server import HubServer


def test_account(api: HfApi, hub: HubServer) -> None:
    assert api.whoami()["name"] == "tester"
    assert HfApi(token=hub.read_token).whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()


def test_create_and_delete_repo(api: HfApi, hub: HubServer) -> None:
    assert api.create_repo("created").repo_id == "tester/created"
    assert api.create_repo("tester/created", exist_ok=True).repo_id == "tester/created"
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("tester/created")
    assert api.create_repo("test-org/data", repo_type="dataset").repo_type == "dataset"
    with pytest.raises(HfHubHTTPError, match="namespace"):
        api.create_repo("somebody/else")
    assert api.list_repo_files("tester/created") == [".gitattributes"]
    api.delete_repo("tester/created")
    api.delete_repo("tester/created", missing_ok=True)
    assert not api.repo_exists("tester/created")
    with pytest.raises(RepositoryNotFoundError):
        put(api, "tester/created")


def test_upload_folder(api: HfApi, hub: HubServer, tmp_path: Path) -> None:
    api.create_repo("folder")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/model.safetensors").write_bytes(WEIGHTS[:9000])
    (tmp_path / "sub/empty.bin").touch()
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [vision]\n---\n# Card")
    before = len(hub.store["tester/folder"].commits)
    done = api.upload_folder(repo_id="tester/folder", folder_path=tmp_path, commit_message="all")
    repo = hub.store["tester/folder"]
    assert (len(repo.commits) - before, repo.branches["main"]) == (1, done.oid)
    assert repo["sub/model.safetensors"] == WEIGHTS[:9000]
    tree = {item.path: item for item in api.list_repo_tree("tester/folder", recursive=True, expand=True)}
    assert list(tree) == [".gitattributes", "README.md", "sub", "sub/empty.bin", "sub/model.safetensors"]
    assert (tree["sub/model.safetensors"].lfs.size, tree["README.md"].lfs) == (9000, None)
    assert tree["README.md"].last_commit.title == "all"
    assert [item.path for item in api.list_repo_tree("tester/folder")] == [".gitattributes", "README.md", "sub"]
    assert [i.path for i in api.get_paths_info("tester/folder", ["README.md", "sub", "no"])] == ["README.md", "sub"]
    info = api.model_info("tester/folder", files_metadata=True)
    assert (info.sha, info.card_data.license, info.tags) == (done.oid, "mit", ["vision", "license:mit"])
    assert api.upload_folder(repo_id="tester/folder", folder_path=tmp_path).oid == done.oid  # nothing new
    assert len(statuses(hub, "PUT", "/lfs/")) == 1
    assert [commit.title for commit in api.list_repo_commits("tester/folder")] == ["all", "initial commit"]


def test_pages_of_a_tree(api: HfApi, hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "page_size", 2)
    assert len(list(api.list_repo_tree(repo, recursive=True))) == 4
    assert statuses(hub, "GET", "/tree/") == [200, 200]


def test_pull_request(api: HfApi, hub: HubServer, repo: str) -> None:
    done = put(api, repo, data=b"proposed", create_pr=True)
    assert (done.pr_num, done.pr_revision) == (1, "refs/pr/1")
    assert "new.txt" not in api.list_repo_files(repo)
    assert "new.txt" in api.list_repo_files(repo, revision="refs/pr/1")
    put(api, repo, "more.txt", revision="refs/pr/1")
    assert Path(hf_hub_download(repo, "more.txt", revision="refs/pr/1")).read_bytes() == b"new"
    assert [pull.ref for pull in api.list_repo_refs(repo, include_pull_requests=True).pull_requests] == ["refs/pr/1"]
    assert len(api.get_discussion_details(repo, 1).events) == 2
    api.merge_pull_request(repo, 1)
    assert [pull.status for pull in api.get_repo_discussions(repo)] == ["merged"]
    assert {"new.txt", "more.txt"} <= set(api.list_repo_files(repo))


def test_branches_and_tags(api: HfApi, hub: HubServer, repo: str) -> None:
    first = api.model_info(repo).sha
    api.create_tag(repo, tag="v1")
    api.create_branch(repo, branch="try/this", revision="v1")
    put(api, repo, revision="try/this")
    assert "new.txt" in api.list_repo_files(repo, revision="try/this")
    for revision in ("v1", first, "main"):
        assert "new.txt" not in api.list_repo_files(repo, revision=revision)
    found = api.list_repo_refs(repo)
    assert ([b.name for b in found.branches], [t.name for t in found.tags]) == (["main", "try/this"], ["v1"])
    for again in (lambda: api.create_tag(repo, tag="v1"), lambda: api.create_branch(repo, branch="try/this")):
        with pytest.raises(HfHubHTTPError) as refused:
            again()
        assert refused.value.response.status_code == 409
    api.create_tag(repo, tag="v1", exist_ok=True)
    api.create_branch(repo, branch="try/this", exist_ok=True)
    api.delete_branch(repo, branch="try/this")
    api.delete_tag(repo, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="v1")
    with pytest.raises(RevisionNotFoundError):
        put(api, repo, revision="try/this")


def test_delete_copy_and_stale_parent(api: HfApi, hub: HubServer, repo: str) -> None:
    copy = CommitOperationCopy("sub/model.safetensors", "sub/copy.safetensors")
    api.create_commit(repo, [copy, CommitOperationAdd("a/b.txt", b"b")], commit_message="copy")
    assert hub.store[repo]["sub/copy.safetensors"] == WEIGHTS
    api.delete_file("config.json", repo)
    api.delete_folder("sub", repo)
    assert api.list_repo_files(repo) == [".gitattributes", "a/b.txt"]
    with pytest.raises(EntryNotFoundError):
        api.delete_file("config.json", repo)
    old = api.list_repo_commits(repo)[1].commit_id
    with pytest.raises(HfHubHTTPError) as stale:
        put(api, repo, parent_commit=old)
    assert stale.value.response.status_code == 412
    put(api, repo, parent_commit=api.model_info(repo).sha)


def test_cards(api: HfApi, hub: HubServer, repo: str) -> None:
    # not by its own push_to_hub, which before huggingface_hub 2 asks another Hub than this one about the metadata
    put(api, repo, "README.md", str(ModelCard("---\nlicense: mit\n---\n# Text")).encode())
    assert ModelCard.load(repo).data.license == "mit"
    with pytest.raises(ValueError, match="license"):
        put(api, repo, "README.md", b"---\nlicense: my-own\n---\n")
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        put(api, repo, "README.md", b"# No metadata")


def test_cache_by_etag(hub: HubServer, repo: str, cache: Path) -> None:
    path = hf_hub_download(repo, "config.json", cache_dir=cache)
    hub.requests.clear()
    assert hf_hub_download(repo, "config.json", cache_dir=cache) == path
    assert [(request.method, request.status) for request in hub.requests] == [("HEAD", 200)]
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo, "preprocessor_config.json", cache_dir=cache)
    assert not HfApi().file_exists(repo, "preprocessor_config.json")
    assert list(cache.glob("*/.no_exist/*/preprocessor_config.json"))


def test_snapshot(api: HfApi, hub: HubServer, repo: str, cache: Path) -> None:
    folder = Path(snapshot_download(repo, cache_dir=cache))
    assert (folder / "sub/model.safetensors").read_bytes() == WEIGHTS
    hub.requests.clear()
    put(api, repo)
    assert (Path(snapshot_download(repo, cache_dir=cache)) / "new.txt").exists()
    assert hub.fetched() == [f"{repo}/new.txt"]  # the others are the same blobs
    only = Path(snapshot_download(repo, cache_dir=cache / "2", allow_patterns="*.json"))
    assert [path.name for path in only.rglob("*.*")] == ["config.json"]


def test_range(hub: HubServer, repo: str) -> None:
    address = f"{hub.endpoint}/{repo}/resolve/main/sub/model.safetensors"
    with urlopen(Request(address, headers={"Range": "bytes=10-19"})) as reply:
        assert (reply.status, reply.read()) == (206, WEIGHTS[10:20])
    with urlopen(Request(address, headers={"Range": "bytes=-7"})) as reply:
        assert reply.read() == WEIGHTS[-7:]


def test_private_repo(hub: HubServer, api: HfApi, cache: Path) -> None:
    api.create_repo("secret", private=True)
    put(api, "tester/secret")
    with pytest.raises(RepositoryNotFoundError) as refused:
        hf_hub_download("tester/secret", "new.txt", cache_dir=cache, token=False)
    assert refused.value.response.status_code == 401
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("tester/secret", cache_dir=cache, token=False)
    assert hf_hub_download("tester/secret", "new.txt", cache_dir=cache, token=hub.read_token)
    api.update_repo_settings("tester/secret", private=False)
    assert hf_hub_download("tester/secret", "new.txt", cache_dir=cache, token=False)
    with pytest.raises(HfHubHTTPError) as refused:
        hf_hub_download("tester/secret", "new.txt", cache_dir=cache / "2", token="hf_wrong")
    assert not isinstance(refused.value, RepositoryNotFoundError)


def test_rights_to_write(hub: HubServer, repo: str) -> None:
    for token, status in ((hub.read_token, 403), (False, 401)):
        for write in (lambda api: put(api, repo), lambda api: api.create_tag(repo, tag="v9")):
            with pytest.raises(HfHubHTTPError) as refused:
                write(HfApi(token=token))
            assert refused.value.response.status_code == status
    assert HfApi(token=hub.read_token).create_repo(repo, exist_ok=True).repo_id == repo  # a read answers it
    assert not any(token in str((hub.requests, hub.errors)) for token in (hub.token, hub.read_token))
