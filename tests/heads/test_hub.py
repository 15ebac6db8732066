"""Heads on the Hub: what is pushed, what comes back in other processes, and what happens when the Hub fails."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModel, ViTConfig, ViTImageProcessorPil, ViTModel
from typer.testing import CliRunner

from soap_hf import SOAPModelWrapper, fit_soap
from soap_hf.cli.app import app
from soap_hf.heads.hub import Push, code_files, push_head
from soap_hf.runtime.errors import HeadError, HubError
from tests.conftest import EXAMPLES, noise_image
from tests.hub_server import client
from tests.hub_server.cards import problems
from tests.hub_server.in_process import attach

BACKBONE = "tester/tiny-vit"
REPO = "tester/soap-tiny-vit"
CODE = {f"code/{path.name}" for path in code_files()}
FILES = {
    ".gitattributes",
    "README.md",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "statistics.safetensors",
    *CODE,
}

CLIENT = """
import sys
how, repo, revision, folder = sys.argv[1:]
if how.startswith("code"):
    sys.modules["soap_hf"] = None  # importing it fails, as where it is not installed
else:
    import soap_hf
import torch
from transformers import AutoBackbone, AutoModel, pipeline
from PIL import Image
code = {"trust_remote_code": True} if how.startswith("code") else {}
torch.set_num_threads(1)
if how.endswith("pipeline"):
    extract = pipeline("image-feature-extraction", repo, revision=revision, **code)
    tokens = torch.tensor(extract(Image.open(f"{folder}/image.png")))
else:
    model = AutoModel.from_pretrained(repo, revision=revision, **code)
    assert type(model).__module__.startswith("soap_hf" if how == "package" else "transformers_modules")
    with torch.no_grad():
        tokens = model(torch.load(f"{folder}/pixels.pt")).last_hidden_state
torch.save(tokens, f"{folder}/tokens.pt")
"""


hub, _client = client.hub, client.client


@pytest.fixture(scope="module")
def made(hub, tmp_path_factory):
    """A backbone with a licence, and a head that was fitted on it from the Hub, in two folders."""
    folder = tmp_path_factory.mktemp("made")
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(folder / "vit")
    (folder / "vit/README.md").write_text("---\nlicense: mit\n---\n")
    publish(hub, folder / "vit")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    images = Dataset.from_dict({"image": [noise_image(seed) for seed in range(20)]})
    with pytest.MonkeyPatch.context() as patch:
        attach(hub, patch, folder / "home")
        model = fit_soap(BACKBONE, images, mu=2, image_processor=processor, progress=False)
        model.save_pretrained(folder / "head")
    return folder


def publish(hub, vit: Path) -> None:
    hub.store.write(BACKBONE, {path.name: path.read_bytes() for path in vit.iterdir()})


@pytest.fixture
def backbone(hub, made, tmp_path):
    """The backbone, on the Hub and in a folder."""
    publish(hub, made / "vit")
    return shutil.copytree(made / "vit", tmp_path / "vit")


@pytest.fixture
def head(backbone, made, tmp_path):
    """The folder of a head whose backbone is on the Hub."""
    return shutil.copytree(made / "head", tmp_path / "head")


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def push(folder: Path, repo: str = REPO, **options) -> str:
    return push_head(folder, Push(repo, **options))


def in_another_process(hub, how: str, folder: Path, revision: str = "main", **environment) -> torch.Tensor:
    """The tokens that a client with an empty cache gets."""
    command = [sys.executable, "-c", CLIENT, how, REPO, revision, str(folder)]
    done = subprocess.run(command, env=hub.environment(**environment), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    return torch.load(folder / "tokens.pt")


@pytest.fixture
def inputs(processor, images, tmp_path):
    """An image, its pixels, and a folder that holds both."""
    image = images[0]["image"]
    image.save(tmp_path / "image.png")
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    torch.save(pixels, tmp_path / "pixels.pt")
    return tmp_path, pixels


def test_one_commit_holds_all(hub, head):
    before = digest(head)
    hub.requests.clear()
    address = push(head)
    repo = hub.store[REPO]
    assert [commit.title for commit in repo.history("main")] == [
        "SOAP head: 2 of 32 directions of layer -1, fitted on 20 images of a data set in memory",
        "initial commit",
    ]
    assert address.endswith(f"{REPO}/commit/{repo.branches['main']}")
    assert set(repo.files()) == FILES
    for name in set(before) - {"config.json", "README.md"}:
        assert repo[name] == (head / name).read_bytes()
    assert digest(head) == before


def test_nothing_private_is_pushed(hub, head, tmp_path):
    (head / "notes.txt").write_text("mine")
    (head / "optimizer.pt").write_text("mine")
    push(head)
    assert set(hub.store[REPO].files()) == FILES
    assert not any(str(tmp_path).encode() in data for data in hub.store[REPO].files().values())


def test_the_backbone_is_pinned(hub, head):
    """To the commit it was fitted on, whatever its branch has become."""
    commit = hub.store[BACKBONE].branches["main"]
    hub.store.write(BACKBONE, {"note.txt": b"newer"})
    push(head)
    assert AutoModel.from_pretrained(REPO).config.backbone_revision == commit
    hub.store.write(BACKBONE, {"model.safetensors": b"newer and broken"})
    assert AutoModel.from_pretrained(REPO).config.backbone_revision == commit


@pytest.mark.parametrize("how", ["package", "package pipeline", "code", "code pipeline"])
def test_pulled_elsewhere_bit_for_bit(hub, head, inputs, how):
    folder, pixels = inputs
    push(head)
    with torch.no_grad():
        expected = AutoModel.from_pretrained(head)(pixels).last_hidden_state
    assert torch.equal(in_another_process(hub, how, folder), expected)


def test_pulled_by_branch_tag_and_commit(hub, head, inputs):
    folder, pixels = inputs
    push(head)
    HfApi().create_tag(REPO, tag="v1")
    first = hub.store[REPO].branches["main"]
    AutoModel.from_pretrained(head).reweight(mu=1).save_pretrained(head)
    push(head, revision="weaker")
    push(head, create_pr=True)
    ranks = {
        revision: AutoModel.from_pretrained(REPO, revision=revision).config.ranks
        for revision in ("main", "v1", first, "weaker", "refs/pr/1")
    }
    assert ranks == {"main": [2], "v1": [2], first: [2], "weaker": [1], "refs/pr/1": [1]}
    with torch.no_grad():
        weaker = AutoModel.from_pretrained(head)(pixels).last_hidden_state
    assert torch.equal(in_another_process(hub, "code", folder, revision="weaker"), weaker)


@pytest.mark.parametrize("how", ["package", "code", "package pipeline", "code pipeline"])
def test_offline_after_one_pull(hub, head, inputs, tmp_path, how):
    folder, _ = inputs
    push(head)
    first = in_another_process(hub, how, folder, home=tmp_path / "cache")
    hub.requests.clear()
    assert torch.equal(in_another_process(hub, how, folder, home=tmp_path / "cache", offline=True), first)
    assert hub.requests == []


def test_statistics_are_fetched_when_asked_for(hub, head, monkeypatch, tmp_path):
    push(head)
    model = AutoModel.from_pretrained(REPO)
    name = f"{REPO}/statistics.safetensors"
    assert name not in hub.fetched()
    attach(hub, monkeypatch, tmp_path / "home", offline=True)
    with pytest.raises(HeadError, match=r"never fetched, and the Hub is out of reach"):
        model.reweight(mu=1)
    assert model.image_processor is not None
    attach(hub, monkeypatch, tmp_path / "home")
    assert model.reweight(mu=1).config.ranks == [1]
    assert hub.fetched().count(name) == 1


def test_late_statistics_belong_to_the_head_that_was_loaded(hub, head):
    push(head)
    model = AutoModel.from_pretrained(REPO)
    hub.store.write(REPO, {"statistics.safetensors": b"of a newer head"})
    assert torch.equal(model.statistics.scores, AutoModel.from_pretrained(head).statistics.scores)


def test_without_statistics(hub, head):
    push(head)
    push(head, statistics=False)
    assert set(hub.store[REPO].files()) == FILES - {"statistics.safetensors"}
    with pytest.raises(HeadError, match="without statistics"):
        AutoModel.from_pretrained(REPO).reweight(mu=1)


def test_files_of_an_earlier_head_go(hub, head):
    (head / "figures").mkdir()
    (head / "figures/score_curve.png").write_bytes(b"png")
    push(head, include_backbone=True)
    assert "backbone/model.safetensors" in hub.store[REPO].files()
    assert b"![score curve](figures/score_curve.png)" in hub.store[REPO]["README.md"]
    AutoModel.from_pretrained(head).save_pretrained(head)  # an older picture does not belong to it
    push(head)
    assert set(hub.store[REPO].files()) == FILES


def test_a_local_backbone_is_refused_or_included_or_named(hub, backbone, images, processor, tmp_path, inputs):
    _, pixels = inputs
    model = fit_soap(tmp_path / "vit", images, mu=2, num_images=20, image_processor=processor, progress=False)
    with pytest.raises(HubError, match=r"backbone is local .*--backbone-id.*--include-backbone"):
        model.push_to_hub(REPO)
    model.save_pretrained(tmp_path / "local")
    with pytest.raises(HubError, match=r"backbone is local"):
        push(tmp_path / "local")
    assert REPO not in str(hub.store.repos)
    expected = model(pixels).last_hidden_state

    push(tmp_path / "local", backbone_id=BACKBONE)
    loaded = AutoModel.from_pretrained(REPO)
    assert (loaded.config.backbone_name_or_path, loaded.config.backbone_revision) == (
        BACKBONE,
        hub.store[BACKBONE].branches["main"],
    )
    assert torch.equal(loaded(pixels).last_hidden_state, expected)

    model.push_to_hub("tester/whole", include_backbone=True)
    del hub.store.repos["model", BACKBONE]
    loaded = AutoModel.from_pretrained("tester/whole")
    assert torch.equal(loaded(pixels).last_hidden_state, expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "again")(pixels).last_hidden_state, expected)


def test_the_named_backbone_must_be_the_same(hub, backbone, images, processor, tmp_path):
    model = fit_soap(tmp_path / "vit", images, mu=2, num_images=20, image_processor=processor, progress=False)
    other = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=32))
    other.push_to_hub("tester/other")
    with pytest.raises(HeadError, match="hidden_size"):
        model.push_to_hub(REPO, backbone_id="tester/other")
    with pytest.raises(HubError, match="there is no model tester/nowhere on the Hub"):
        model.push_to_hub(REPO, backbone_id="tester/nowhere")


def test_another_copy_of_the_backbone(hub, head, inputs, backbone):
    _, pixels = inputs
    push(head)
    expected = AutoModel.from_pretrained(REPO)(pixels).last_hidden_state
    live = AutoModel.from_pretrained(BACKBONE)
    assert torch.equal(AutoModel.from_pretrained(REPO, backbone=live)(pixels).last_hidden_state, expected)
    assert torch.equal(AutoModel.from_pretrained(REPO, backbone=BACKBONE)(pixels).last_hidden_state, expected)


def test_another_revision_warns(hub, head, caplog):
    push(head)
    AutoModel.from_pretrained(REPO, backbone_revision="main")
    hub.store.write(BACKBONE, {"note.txt": b"newer"})
    AutoModel.from_pretrained(REPO, backbone=BACKBONE)
    assert "fitted on revision" not in caplog.text
    model = AutoModel.from_pretrained(REPO, backbone_revision="main")
    newer = hub.store[BACKBONE].branches["main"]
    assert f"and is put on revision {newer}" in caplog.text
    assert model.config.backbone_revision == newer


def test_card_has_what_the_hub_expects(hub, head):
    push(head)
    text = hub.store[REPO]["README.md"].decode()
    assert problems(text) == ([], [])
    data = ModelCard(text).data.to_dict()
    assert data["tags"][:2] == ["soap", "soap-hf"]
    assert {key: data[key] for key in data if key != "tags"} == {
        "base_model": BACKBONE,
        "base_model_relation": "adapter",
        "library_name": "transformers",
        "license": "mit",  # the backbone's
        "pipeline_tag": "image-feature-extraction",
    }
    commit = hub.store[BACKBONE].branches["main"]
    for pattern in (
        rf"^# {REPO}$",
        rf"\[{BACKBONE}\]\(https://huggingface.co/{BACKBONE}\) at revision `{commit}`",
        r"^## What is removed$",
        r"^2 of 32 directions of `last_hidden_state` \(mu=2",
        r"^\| 0 \| \d+ \| 0\.\d{4} \| 0\.\d{4} \| \d+\.\d\d% \| 0\.\d{4} \| removed \|$",
        r"^## How to use it$",
        rf'AutoModel.from_pretrained\("{REPO}"\)$',
        rf'AutoModel.from_pretrained\("{REPO}", trust_remote_code=True\)$',
        r"^## How it was fitted$",
        rf"^soap-hf fit {BACKBONE} .*--revision {commit} .*--num-images 20 .*--mu 2 .*--seed 0 ",
        r"^## Limits$",
        r"^## Citation$",
        r"^@inproceedings",
    ):
        assert re.search(pattern, text, flags=re.MULTILINE), pattern


def test_what_a_person_wrote_survives(hub, head):
    push(head)
    text = hub.store[REPO]["README.md"].decode()
    mine = text.replace("## Limits\n", "## Limits\n\nNot for maps.\n")
    mine = mine.replace("license: mit", "license: cc-by-4.0\nlanguage: en")
    HfApi().upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id=REPO)
    AutoModel.from_pretrained(head).reweight(mu=1).save_pretrained(head)
    push(head)
    new = hub.store[REPO]["README.md"].decode()
    assert "\nNot for maps.\n" in new
    assert "1 of 32 directions" in new
    data = ModelCard(new).data
    assert (data.license, data.language) == ("cc-by-4.0", "en")
    (head / "README.md").write_text((head / "README.md").read_text() + "\nMy last word.\n")
    push(head, license="mit")
    assert hub.store[REPO]["README.md"].decode().endswith("\nMy last word.\n")
    assert ModelCard(hub.store[REPO]["README.md"].decode()).data.license == "mit"


def test_something_else_is_not_overwritten(hub, head, backbone):
    with pytest.raises(HubError, match=r"holds something else .*--force"):
        push(head, BACKBONE)
    hub.store.write("tester/cards", {"README.md": b"# Only a card"})
    push(head, "tester/cards")
    assert b"# Only a card" in hub.store["tester/cards"]["README.md"]
    hub.store.write("tester/old", {"config.json": b'{"model_type": "vit"}'})
    push(head, "tester/old", force=True)
    assert AutoModel.from_pretrained("tester/old").config.ranks == [2]


FAULTS = {
    "no answer": {"kind": "drop"},
    "cut": {"kind": "cut"},
    **{str(status): {"status": status} for status in (401, 403, 404, 409, 412, 429, 500, 503)},
}
MOMENTS = ("/api/models/tester/tiny-vit", "/repos/create", "/preupload/", "/lfs/objects/batch", "/lfs/", "/commit/")
PASSING = {"no answer", "cut", "429", "500", "503"}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_moment(hub, head, fault, moment, capfd, monkeypatch):
    """The folder is whole, and the command that the message names does the push; what passes is waited for."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    before = digest(head)
    planned = hub.faults.add(path=moment, times=99, **FAULTS[fault])
    if (fault, moment) == ("cut", "/commit/"):  # the commit was made, and the second try finds it
        push(head)
        assert set(hub.store[REPO].files()) == FILES
        return
    with pytest.raises(HubError) as refused:
        push(head)
    message = str(refused.value)
    assert planned.seen == 1 or fault in PASSING or moment == "/lfs/"
    assert planned.seen > 4 or fault not in PASSING
    assert digest(head) == before
    assert "\n" not in message
    hub.faults.clear()
    command = shlex.split(re.search("`(soap-hf .*)` repeats", message)[1])
    result = CliRunner().invoke(app, command[1:])
    assert result.exit_code == 0, result.output
    assert REPO in result.output
    assert set(hub.store[REPO].files()) == FILES
    said = capfd.readouterr()
    assert hub.token not in message + result.output + said.out + said.err


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("fault", sorted(PASSING))
def test_a_fault_that_passes(hub, head, fault, moment, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.faults.add(path=moment, times=2, **FAULTS[fault])
    push(head)
    assert set(hub.store[REPO].files()) == FILES
    assert len(hub.store[REPO].commits) == 2  # a commit whose reply was lost is not made again


def test_a_lost_reply_opens_no_second_pull_request(hub, head):
    hub.faults.add("cut", path="/commit/")
    with pytest.raises(HubError, match="repeats the push"):
        push(head, create_pr=True)
    assert len(hub.store[REPO].pulls) == 1


TOKENS = {"none": (None, "hf auth login"), "wrong": ("hf_wrong", "hf auth login"), "reader": ("read", "no right")}


@pytest.mark.parametrize(("token", "words"), TOKENS.values(), ids=TOKENS)
def test_tokens(hub, head, backbone, monkeypatch, tmp_path, token, words):
    attach(hub, monkeypatch, tmp_path / "home", token=token)
    with pytest.raises(HubError, match=words) as refused:
        push(head)
    assert not any(secret in str(refused.value) for secret in ("hf_wrong", hub.read_token))
    assert not hub.store.repos.keys() - {("model", BACKBONE)}
    push(head, token=hub.token)
    assert hub.token not in repr(Push(REPO, token=hub.token))
    assert hub.token not in Push(REPO, token=hub.token).command(head)


@pytest.mark.parametrize("name", ["a b", "a/b/c", "-a", "a--b", "", "../x", "a.git"])
def test_names_that_cannot_be(head, hub, name):
    hub.requests.clear()
    with pytest.raises(HubError, match="no name of a repository"):
        push(head, name)
    assert hub.requests == []


def test_a_broken_head_is_not_pushed(hub, head):
    (head / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(HeadError, match="cannot be read as safetensors"):
        push(head)
    assert ("model", REPO) not in hub.store.repos


def test_a_push_from_memory_that_fails_loses_nothing(hub, head):
    model = AutoModel.from_pretrained(head).reweight(mu=1)
    hub.faults.add(status=403, path="/commit/")
    with pytest.raises(HubError) as refused:
        model.push_to_hub(REPO)
    command = shlex.split(re.search("`(soap-hf .*)` repeats", str(refused.value))[1])
    result = CliRunner().invoke(app, command[1:])
    assert result.exit_code == 0, result.output
    assert AutoModel.from_pretrained(REPO).config.ranks == [1]


def test_options_of_a_push_are_repeated(head):
    push = Push(REPO, backbone_id="a/b", statistics=False, private=True, commit_message="two words", create_pr=True)
    assert push.command("my head") == (
        f"soap-hf push 'my head' {REPO} --backbone-id a/b --no-statistics --private --create-pr "
        "--commit-message 'two words'"
    )


def test_private(hub, head, monkeypatch, tmp_path):
    push(head, private=True)
    assert hub.store[REPO].private
    attach(hub, monkeypatch, tmp_path / "other", token=None)
    with pytest.raises(HeadError, match="cannot be read"):
        SOAPModelWrapper.from_pretrained(REPO)
    pulled = SOAPModelWrapper.from_pretrained(REPO, token=hub.read_token, cache_dir=tmp_path / "cache")
    assert pulled.config.ranks == [2]


def test_fit_and_push(hub, backbone, photos, tmp_path):
    """What cannot be pushed is said before the fit."""
    run = CliRunner().invoke
    arguments = ["--output", str(tmp_path / "out"), "--num-images", "8", "--image-size", "32", "--mu", "2", "--quiet"]
    local = run(app, ["fit", str(tmp_path / "vit"), str(photos), *arguments, "--push-to-hub", REPO])
    other = run(app, ["fit", BACKBONE, str(photos), *arguments, "--push-to-hub", BACKBONE])
    nameless = run(app, ["fit", BACKBONE, str(photos), *arguments, "--push-to-hub", "a b"])
    stranger = run(app, ["fit", BACKBONE, str(photos), *arguments, "--push-to-hub", REPO, "--token", "hf_wrong"])
    assert [type(result.exception) for result in (local, other, nameless, stranger)] == [HubError] * 4
    assert not (tmp_path / "out").exists()
    done = run(app, ["fit", BACKBONE, str(photos), *arguments, "--push-to-hub", REPO])
    assert done.exit_code == 0, done.output
    assert AutoModel.from_pretrained(REPO).config.fit["num_images"] == 8
    refused = hub.faults.add(status=403, path="/commit/")
    arguments[1] = str(tmp_path / "second")
    failed = run(app, ["fit", BACKBONE, str(photos), *arguments, "--seed", "1", "--push-to-hub", REPO])
    assert refused.seen
    assert "repeats the push" in str(failed.exception)
    assert AutoModel.from_pretrained(tmp_path / "second").config.fit["num_images"] == 8


def test_fit_and_push_in_two_processes(hub, backbone, photos, tmp_path):
    """One of them writes and pushes; the head is that of one process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--num-images", "8", "--batch-size", "2", "--image-size", "32", "--mu", "2", "--no-figures"]
    fit = ["-m", "soap_hf", "fit", BACKBONE, str(photos), *options, "--output", str(tmp_path / "out")]
    environment = hub.environment(tmp_path / "client") | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, *fit, "--push-to-hub", REPO], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Head pushed to ") == 1
    assert len(hub.store[REPO].commits) == 2  # that of creation and the push
    assert hub.token not in done.stdout + done.stderr
    pulled, alone = AutoModel.from_pretrained(REPO), tmp_path / "alone"
    single = CliRunner().invoke(app, ["fit", BACKBONE, str(photos), *options, "--output", str(alone), "--quiet"])
    assert single.exit_code == 0, single.output
    projections = [model.projections["-1"].matrix() for model in (pulled, AutoModel.from_pretrained(alone))]
    torch.testing.assert_close(*projections, rtol=0, atol=1e-3)


REAL = {"HF_TOKEN": os.environ.get("HF_TOKEN", ""), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "https://huggingface.co"}


@pytest.mark.skipif(
    not (os.environ.get("HF_TOKEN") and os.environ.get("SOAP_HF_REAL_HUB")),
    reason="writes to the real Hub: set HF_TOKEN and SOAP_HF_REAL_HUB=your-name",
)
def test_real_hub():
    """In private repositories that are deleted at the end."""
    command = [sys.executable, EXAMPLES / "hub_round_trip.py", "--real-hub", os.environ["SOAP_HF_REAL_HUB"]]
    done = subprocess.run(command, env=os.environ | REAL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bit-identical: yes") == 2


def test_the_example_shows_the_round_trip():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "hub_round_trip.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bit-identical: yes") == 2
