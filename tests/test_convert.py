"""A checkpoint of iBOT or DINO becomes a backbone of transformers that gives the same tokens."""

import argparse

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel

from soap_hf import fit_soap
from soap_hf.compat import AutoImageProcessor
from soap_hf.convert import convert_vit
from soap_hf.runtime.errors import BackboneError


class Attention(nn.Module):
    """As in DINO's code."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens):
        batch, number, width = tokens.shape
        query, key, value = self.qkv(tokens).reshape(batch, number, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, number, width))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens):
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(tokens))))


class VisionTransformer(nn.Module):
    """A ViT with the names of iBOT's and DINO's."""

    def __init__(self, width=64, heads=1):
        super().__init__()
        self.cls_token, self.pos_embed = (
            nn.Parameter(torch.randn(1, 1, width)),
            nn.Parameter(torch.randn(1, 17, width)),
        )
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 8, stride=8)
        self.blocks, self.norm = nn.ModuleList(Block(width, heads) for _ in range(2)), nn.LayerNorm(width, eps=1e-6)
        self.masked_embed = nn.Parameter(torch.zeros(1, width))

    def forward(self, pixels):
        patches = self.patch_embed.proj(pixels).flatten(2).mT
        tokens = torch.cat((self.cls_token.expand(len(pixels), -1, -1), patches), dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


def trained(student, teacher):
    """What a training saves: both models, with the prefixes of their wrappers, and the options beside them."""
    head = {"module.head.mlp.0.weight": torch.zeros(2, 2), "module.head.last_layer.weight_g": torch.zeros(2)}
    models = {
        name: {**{f"module.backbone.{key}": value for key, value in model.state_dict().items()}, **head}
        for name, model in (("student", student), ("teacher", teacher))
    }
    return {**models, "epoch": 3, "args": argparse.Namespace(arch="vit_base", lr=0.1), "optimizer": {"state": {}}}


@torch.no_grad()
@pytest.mark.parametrize("weights", ["teacher", "student"])
def test_it_gives_the_tokens_of_the_code_that_trained_it(weights, tmp_path, images):
    models = {"student": VisionTransformer().eval(), "teacher": VisionTransformer().eval()}
    torch.save(trained(**models), tmp_path / "checkpoint.pth")
    convert_vit(tmp_path / "checkpoint.pth", tmp_path / "vit", weights=weights)
    loaded = AutoModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False).eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(pixels).last_hidden_state, models[weights](pixels), rtol=0, atol=1e-6)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (36, 32)
    model = fit_soap(tmp_path / "vit", images, num_images=8, mu=1, check=0, progress=False)
    assert model.backbone.pooler is None
    assert model.config.layouts[0]["prefix"] == 1


@torch.no_grad()
@pytest.mark.parametrize("form", ["state_dict", "bare", "prefixed", "safetensors"])
def test_all_shapes_of_files_are_read(form, tmp_path):
    model = VisionTransformer(width=48, heads=3).eval()
    tensors = dict(model.state_dict())
    path = tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(tensors, path)
    elif form == "prefixed":
        torch.save({f"module.{name}": value for name, value in tensors.items()}, path)
    else:
        torch.save({"state_dict": tensors} if form == "state_dict" else tensors, path)
    converted = convert_vit(path, tmp_path / "vit", num_heads=3)
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(converted(pixels).last_hidden_state, model(pixels), rtol=0, atol=1e-6)


class Evil:
    def __reduce__(self):
        return (print, ("it ran",))


def changed(change):
    tensors = dict(VisionTransformer().state_dict())
    change(tensors)
    return tensors


BAD = {
    "code": (lambda: {"teacher": Evil()}, {}, "cannot be read as weights alone"),
    "a missing weight": (lambda: changed(lambda found: found.pop("blocks.1.norm1.weight")), {}, "missing keys: "),
    "an unexpected weight": (
        lambda: changed(lambda found: found.update({"fc_norm.weight": torch.zeros(64)})), {}, "keys: fc_norm",
    ),
    "layer scale": (
        lambda: changed(lambda found: found.update({"blocks.0.gamma_1": torch.ones(64)})), {}, "unexpected keys: ",
    ),
    "another model": (lambda: {"conv1.weight": torch.zeros(3)}, {}, "no ViT of iBOT or DINO: cls_token is missing"),
    "no such kind": (lambda: {"teacher": {}}, {"weights": "student"}, "holds no student weights"),
    "no weights": (lambda: {"epoch": 3}, {}, "holds no weights by name"),
    "no heads": (lambda: changed(lambda _: None), {"num_heads": 7}, "no 7 heads of attention"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused_and_nothing_is_written(name, tmp_path, capsys):
    make, options, what = BAD[name]
    torch.save(make(), tmp_path / "checkpoint.pth")
    with pytest.raises(BackboneError, match=what):
        convert_vit(tmp_path / "checkpoint.pth", tmp_path / "vit", **options)
    assert not (tmp_path / "vit").exists()
    assert "it ran" not in capsys.readouterr().out


def test_the_command_line_converts_and_refuses(run, tmp_path):
    torch.save(VisionTransformer().state_dict(), tmp_path / "weights.pth")
    status, out, err = run("convert", "ibot", "weights.pth", "vit")
    assert (status, out) == (0, "Backbone written to vit\n"), err
    status, _, err = run("convert", "dino", "weights.pth", "vit")
    assert status == 1
    assert "--overwrite" in err
    status, _, err = run("convert", "dino", "nowhere.pth", "other")
    assert err.endswith("Error: There is no checkpoint nowhere.pth.\n")
