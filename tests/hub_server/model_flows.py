"""What transformers and datasets do with the Hub, run by `python -m tests.hub_server` in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModel, ViTConfig, ViTModel

from .server import HubServer

OFFLINE = """
import sys
from transformers import AutoModel
print(AutoModel.from_pretrained(sys.argv[1], revision="v1").pooler.dense.bias[0].item())
"""


def vit(bias: float) -> ViTModel:
    """A tiny model whose bias says which one it is."""
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4
    )
    model = ViTModel(config)
    torch.nn.init.constant_(model.pooler.dense.bias, bias)
    return model


def bias(name: str, **options: object) -> float:
    return AutoModel.from_pretrained(name, **options).pooler.dense.bias[0].item()


def test_model_by_name_and_revision(hub: HubServer, tmp_path: Path) -> None:
    api = HfApi()
    vit(1.0).push_to_hub("tiny-vit")
    name = "tester/tiny-vit"
    assert sorted(hub.store[name].files()) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    first = api.model_info(name).sha
    api.create_tag(name, tag="v1")
    assert bias(name) == 1.0
    vit(2.0).push_to_hub(name, revision="next")
    vit(3.0).push_to_hub(name)
    vit(4.0).push_to_hub(name, create_pr=True)
    found = [bias(name, revision=revision) for revision in ("main", "v1", first, "next", "refs/pr/1")]
    assert found == [3.0, 1.0, 1.0, 2.0, 4.0]
    assert AutoConfig.from_pretrained(name).hidden_size == 8
    assert f"{name}/model.safetensors" in hub.fetched()
    with pytest.raises(OSError, match="not a valid git identifier"):
        AutoModel.from_pretrained(name, revision="v9")
    with pytest.raises(OSError, match="not a local folder and is not a valid model identifier"):
        AutoModel.from_pretrained("tester/no-such-model")
    HfApi().update_repo_settings(name, private=True)
    with pytest.raises(OSError, match="not a local folder and is not a valid model identifier"):
        AutoModel.from_pretrained(name, token=False, cache_dir=tmp_path)


def test_model_offline_after_one_pull(hub: HubServer, tmp_path: Path) -> None:
    vit(5.0).push_to_hub("pulled")
    HfApi().create_tag("tester/pulled", tag="v1")
    assert bias("tester/pulled", revision="v1", cache_dir=tmp_path / "hub") == 5.0
    hub.requests.clear()
    command = [sys.executable, "-c", OFFLINE, "tester/pulled"]
    done = subprocess.run(
        command, env=hub.environment(tmp_path, offline=True), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "5.0"), done.stderr
    assert hub.requests == []


def test_model_without_the_weights(hub: HubServer, tmp_path: Path) -> None:
    vit(6.0).push_to_hub("broken")
    hub.faults.add(status=500, method="GET", path="model.safetensors", times=9)
    with pytest.raises(OSError, match="500"):
        AutoModel.from_pretrained("tester/broken", cache_dir=tmp_path)


def test_dataset(hub: HubServer, tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]}).to_parquet(tmp_path / "train.parquet")
    api = HfApi()
    api.create_repo("rows", repo_type="dataset")
    api.upload_folder(repo_id="tester/rows", folder_path=tmp_path, repo_type="dataset", path_in_repo="data")
    rows = load_dataset("tester/rows", split="train")
    assert rows["text"] == ["a", "b", "c"]
    assert "datasets/tester/rows/data/train.parquet" in hub.fetched()
    api.create_tag("tester/rows", tag="v1", repo_type="dataset")
    assert len(load_dataset("tester/rows", split="train[:2]", revision="v1")) == 2
    assert [row["label"] for row in load_dataset("tester/rows", split="train", streaming=True)] == [0, 1, 0]
    Dataset.from_dict({"x": [1, 2]}).push_to_hub("pushed")
    assert load_dataset("tester/pushed", split="train")["x"] == [1, 2]
