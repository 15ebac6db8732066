"""A card as a visitor of the Hub reads it: its code runs as it stands, and it names nothing of the fitter's disk."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModel, ViTConfig, ViTImageProcessorPil, ViTModel

from soap_hf import SOAPModelWrapper, fit_soap
from soap_hf.heads.card import is_edited, refresh_card
from soap_hf.heads.hub import Push, push_head
from tests.conftest import EXAMPLES, noise_image, random_projection
from tests.hub_server import client
from tests.tiny_backbones import TINY_BACKBONES

hub, _client = client.hub, client.client

BACKBONE, REPO = "tester/card-vit", "tester/soap-card-vit"
DEMO = EXAMPLES / "soap-vit-mae-tiny"


def snippets(card):
    """The blocks of Python in a card."""
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)


def command(card):
    return re.search(r"^soap-hf fit .*$", card, flags=re.MULTILINE)[0]


def run_together(card, **names):
    """Runs the code of a card from top to bottom, as it stands, and gives its names."""
    for code in snippets(card):
        exec(compile(code, "card", "exec"), names)
    return names


@pytest.fixture
def published(hub):
    """A backbone with a licence, and images, on the Hub."""
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTModel(config).push_to_hub(BACKBONE)
    HfApi().upload_file(path_or_fileobj=b"---\nlicense: mit\n---\n", path_in_repo="README.md", repo_id=BACKBONE)
    return hub


def noise():
    return Dataset.from_dict({"image": [noise_image(seed) for seed in range(20)]})


def fit(images=None, backbone=BACKBONE, **options):
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    options = {"mu": 2, "check": 0, "image_processor": processor, "progress": False} | options
    return fit_soap(backbone, noise() if images is None else images, **options)


def card_of(hub, repo):
    return hub.store[repo]["README.md"].decode()


def test_the_code_of_a_pushed_card_runs_as_it_stands(published, tmp_path):
    fit().push_to_hub(REPO)
    packaged, without, attached = snippets(card_of(published, REPO))
    names = run_together(card_of(published, REPO).replace(f"```python\n{without}```", ""))
    pixels = names["inputs"]["pixel_values"]
    assert torch.equal(names["tokens"], AutoModel.from_pretrained(REPO)(pixels).last_hidden_state)
    assert packaged.startswith("import soap_hf\n")
    assert "attach_soap(yours" in attached
    blocked = f"import sys; sys.modules['soap_hf'] = None\n{without}\nprint(tuple(tokens.shape))"
    environment = published.environment()
    done = subprocess.run(
        [sys.executable, "-c", blocked], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "(1, 17, 32)\n"), done.stderr


@pytest.mark.parametrize("layer", [-1, 1, [0, -1]])
def test_the_code_of_a_saved_card_runs_and_reads_a_clean_layer(vit, images, tmp_path, monkeypatch, layer):
    monkeypatch.chdir(tmp_path)
    fit(images, vit, layer=layer, num_images=20).save_pretrained("head", include_backbone=True)
    names = run_together((tmp_path / "head/README.md").read_text())
    model, last = names["model"], layer if layer == 1 else -1
    clean = model.patch_tokens(names["inputs"]["pixel_values"], layer=last)
    torch.testing.assert_close(names["tokens"][:, 1:].view_as(clean), clean)


@pytest.mark.parametrize("name", ["vit_mae", "videomae", "siglip2_vision_model"])
def test_the_code_runs_without_an_image_processor(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = TINY_BACKBONES[name]
    backbone = tiny.build()
    width = SOAPModelWrapper.from_backbone(backbone, None, image_size=tiny.size).config.hidden_size
    model = SOAPModelWrapper.from_backbone(backbone, random_projection(width), image_size=tiny.size)
    model.save_pretrained("head", include_backbone=True)
    assert run_together((tmp_path / "head/README.md").read_text())["tokens"].shape[-1] == width


FIT_ON_THE_HUB = """
import sys
from soap_hf import fit_soap
from transformers import ViTImageProcessorPil
processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
model = fit_soap(sys.argv[1], "tester/noise", mu=2, check=0, image_processor=processor, progress=False)
model.save_pretrained(sys.argv[2])
"""


def test_the_command_names_the_true_data_set_and_backbone(published, tmp_path):
    noise().to_parquet(tmp_path / "train.parquet")
    published.store.write("datasets/tester/noise", {"train.parquet": (tmp_path / "train.parquet").read_bytes()})
    # in a process of its own, since datasets keeps the address of the hub that it had at import
    code = [sys.executable, "-c", FIT_ON_THE_HUB, BACKBONE, str(tmp_path / "head")]
    subprocess.run(code, env=published.environment(), check=True)
    card = (tmp_path / "head/README.md").read_text()
    assert command(card).startswith(f"soap-hf fit {BACKBONE} tester/noise --output ")
    assert ModelCard(card).data.datasets == ["tester/noise"]
    assert "path/to" not in card


def test_an_included_backbone_stays_what_the_head_is_based_on(published, tmp_path):
    model = fit()
    commit = published.store[BACKBONE].branches["main"]
    model.push_to_hub(REPO, include_backbone=True)
    model.save_pretrained(tmp_path / "head")
    push_head(tmp_path / "head", Push("tester/staged", include_backbone=True))
    AutoModel.from_pretrained(REPO).push_to_hub("tester/again")
    for repo in (REPO, "tester/staged", "tester/again"):
        data = ModelCard(card_of(published, repo)).data
        assert (data.base_model, data.license) == (BACKBONE, "mit"), repo
        assert f"[{BACKBONE}](https://huggingface.co/{BACKBONE})" in card_of(published, repo)
        assert command(card_of(published, repo)).startswith(f"soap-hf fit {BACKBONE} path/to/images "), repo
        assert "backbone/model.safetensors" in published.store[repo].files()
    assert f"--revision {commit}" in command(card_of(published, "tester/staged"))


def test_a_local_backbone_that_goes_along_can_say_where_it_is_at_home(published, vit, images, tmp_path):
    vit.save_pretrained(tmp_path / "vit")
    fit(images, tmp_path / "vit", num_images=20).save_pretrained(tmp_path / "head")
    push_head(tmp_path / "head", Push(REPO, include_backbone=True))
    assert ModelCard(card_of(published, REPO)).data.base_model is None
    push_head(tmp_path / "head", Push(REPO, include_backbone=True, backbone_id=BACKBONE))
    data = ModelCard(card_of(published, REPO)).data
    assert (data.base_model, data.license) == (BACKBONE, "mit")


def test_a_base_that_is_gone_does_not_cost_the_push(published, caplog):
    model = fit()
    del published.store.repos["model", BACKBONE]
    model.push_to_hub(REPO, include_backbone=True)
    data = ModelCard(card_of(published, REPO)).data
    assert (data.base_model, data.license) == (BACKBONE, None)
    assert f"licence of {BACKBONE} is not known" in caplog.text


@pytest.mark.parametrize("relative", [True, False])
def test_no_path_of_the_fitters_disk_is_in_a_card(vit, tmp_path, monkeypatch, relative):
    secret = tmp_path / "home-of-somebody"
    shutil.copytree(EXAMPLES / "photos/fit", secret / "photos")
    vit.save_pretrained(secret / "vit")
    monkeypatch.chdir(secret / "photos")
    backbone, images = ("../vit", ".") if relative else (secret / "vit", secret / "photos")
    fit(images, backbone, num_images=16).save_pretrained(secret / "head")
    plain = fit(images, "tests.plain_modules:build", backbone_arguments={"name": "a map"}, num_images=16, **PLAIN)
    plain.config.plain_backbone["reference"]["arguments"] = {"weights": [str(secret / "weights.pt"), "~/more.pt"]}
    plain.save_pretrained(secret / "plain")
    for head in ("head", "plain"):
        card = (secret / head / "README.md").read_text()
        assert secret.name not in card
        assert not re.search(r"(?<![\w:/])(/|~/|\.\./)\w", re.sub(r"<!-- .*? -->", "", card))
        assert "path/to/photos" in command(card)
        assert "Put your own in the place of what begins with `path/to`." in card
    assert "path/to/vit " in command((secret / "head/README.md").read_text())
    assert "path/to/weights.pt" in card


PLAIN = {"trust_remote_code": True, "image_size": 32, "image_processor": None}


def test_a_card_that_nobody_changed_takes_the_order_of_today(tmp_path):
    shutil.copytree(DEMO, tmp_path / "head")
    refresh_card(tmp_path / "head")
    today = (tmp_path / "head/README.md").read_text()
    headings = re.findall("^## (.*)$", today, flags=re.MULTILINE)
    assert headings == [
        *("How to use it", "What was measured", "What is removed", "How it was fitted", "Limits", "Citation"),
    ]
    assert today.index("](figures/") < today.index("## How to use it")
    metadata, _, body = today.partition("\n---\n")
    first, *sections = re.split("(?m)^(?=## )", body)
    used, measured, removed, *rest = sections
    earlier = "".join([f"{metadata}\n---\n", first, removed, used, measured, *rest])
    (tmp_path / "head/README.md").write_text(earlier)
    assert not is_edited(earlier)
    refresh_card(tmp_path / "head")
    assert (tmp_path / "head/README.md").read_text() == today
    (tmp_path / "head/README.md").write_text(earlier.replace("## Limits\n", "## Limits\n\nNot for maps.\n"))
    refresh_card(tmp_path / "head")
    kept = (tmp_path / "head/README.md").read_text()
    assert is_edited(kept)
    assert kept.index("## What is removed") < kept.index("## How to use it"), "a person's card keeps its order"
