"""Every vision type of transformers takes a head: patches found, nothing else touched, loaded as it was saved."""

import contextlib
import re
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from soap_hf import PatchLayout, SOAPModelWrapper
from soap_hf.runtime.errors import BackboneError, LayoutError, NonFiniteTokensError
from soap_hf.runtime.patch_layout import layer_tokens
from soap_hf.runtime.vision_backbone import bare_backbone, load_backbone
from tests import matrix
from tests.conftest import random_projection
from tests.tiny_backbones import COMPOSITES, MISSING, TINY_BACKBONES

PAGE = matrix.TABLE.read_text(encoding="utf-8")
OLDER_THAN_THE_TABLE = Version(transformers.__version__) < Version(re.search(r"of transformers ([\d.]+)[;,]", PAGE)[1])

REPLAY = """
import sys, torch, soap_hf
from safetensors.torch import load_file, save_file
from soap_hf.runtime.patch_layout import layer_tokens
from transformers import AutoModel
torch.set_num_threads(1)
outputs = {}
for name, pixels in load_file(sys.argv[1] + "/pixels.safetensors").items():
    with torch.no_grad():
        outputs[name] = layer_tokens(AutoModel.from_pretrained(f"{sys.argv[1]}/{name}/head")(pixels), -1).contiguous()
save_file(outputs, sys.argv[1] + "/outputs.safetensors")
"""


def wrapped(name):
    """A tiny backbone under a head that removes two random directions."""
    tiny = TINY_BACKBONES[name]
    model = tiny.build()
    width = SOAPModelWrapper.from_backbone(model, None, image_size=tiny.size).config.hidden_size
    return SOAPModelWrapper.from_backbone(model, random_projection(width), image_size=tiny.size)


def pixels_for(name, size=None):
    """Two images or, for a video backbone, clips."""
    tiny = TINY_BACKBONES[name]
    frames = () if tiny.frames is None else (tiny.frames,)
    return torch.randn(2, *frames, 3, *(size or tiny.size))


@pytest.mark.parametrize("name", TINY_BACKBONES)
def test_patches_are_found_at_every_size_it_takes(name):
    tiny, wrapper = TINY_BACKBONES[name], wrapped(name)
    layout = wrapper.layouts[-1]
    assert (layout.prefix, layout.suffix) == (tiny.prefix, tiny.suffix)
    assert wrapper.patch_tokens(pixels_for(name)).shape[1:-1] == tiny.grid
    if tiny.other_size is not None:
        assert wrapper.patch_tokens(pixels_for(name, tiny.other_size)).shape[1:-1] == tiny.other_grid


@pytest.mark.parametrize("name", TINY_BACKBONES)
def test_only_patch_tokens_change_and_exactly_by_the_dense_projector(name):
    wrapper, pixels = wrapped(name), pixels_for(name)
    outputs = wrapper(pixels, output_raw=True)
    raw, clean = outputs["raw_last_hidden_state"], layer_tokens(outputs, -1)
    layout, size = wrapper.layouts[-1], pixels.shape[-2:]
    patches, cleaned = layout.patches(raw, size), layout.patches(clean, size)
    expected = patches @ wrapper.projections["-1"].matrix().T
    scale = float(patches.abs().max())
    torch.testing.assert_close(cleaned, expected, rtol=1e-5, atol=1e-5 * max(1.0, scale))
    assert not torch.equal(cleaned, patches)
    if layout.prefix or layout.suffix:
        end = raw.shape[1] - layout.suffix
        assert torch.equal(clean[:, : layout.prefix], raw[:, : layout.prefix])
        assert torch.equal(clean[:, end:], raw[:, end:])
    with wrapper.disabled():
        bare = wrapper(pixels)
    assert torch.equal(layer_tokens(bare, -1), raw)
    assert set(bare) == set(outputs) - {"raw_last_hidden_state"}


def test_heads_come_back_bit_for_bit_in_another_process(tmp_path):
    pixels, expected = {}, {}
    for name in TINY_BACKBONES:
        wrapper = wrapped(name)
        wrapper.backbone.save_pretrained(tmp_path / name / "backbone")
        if name == "vit_mae":  # as it masks
            TINY_BACKBONES[name].build().config.save_pretrained(tmp_path / name / "backbone")
        wrapper.config.backbone_name_or_path = str(tmp_path / name / "backbone")
        wrapper.save_pretrained(tmp_path / name / "head")
        pixels[name] = pixels_for(name)
        with torch.no_grad():
            expected[name] = layer_tokens(wrapper(pixels[name]), -1)
    save_file(pixels, tmp_path / "pixels.safetensors")
    (tmp_path / "replay.py").write_text(REPLAY)
    run = subprocess.run(
        [sys.executable, tmp_path / "replay.py", tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    loaded = load_file(tmp_path / "outputs.safetensors")
    for name in (name for name in TINY_BACKBONES if not torch.equal(loaded[name], expected[name])):
        # a grouped convolution rounds by where its weights lie in memory: then the bare backbone must do the same
        bare = AutoModel.from_pretrained(tmp_path / name / "backbone").eval()
        before = wrapped(name).backbone
        assert not torch.equal(bare(pixels[name]).last_hidden_state, before(pixels[name]).last_hidden_state), name
        torch.testing.assert_close(loaded[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY_BACKBONES)
def test_the_supported_table_is_current(name):
    row = matrix.measure(name)
    # a transformers older than the table's may take fewer sizes
    known = f"| {name} | {row.tokens} | " if OLDER_THAN_THE_TABLE else row.line()
    assert any(line.startswith(known) for line in PAGE.splitlines())


def test_the_supported_table_lists_what_is_measured_and_nothing_else():
    types, _, _ = PAGE.partition("## Modules of other libraries")
    in_table = [line.split()[1] for line in types.splitlines() if line.startswith("| ")][1:]
    assert [name for name in in_table if name not in MISSING] == list(TINY_BACKBONES)
    assert OLDER_THAN_THE_TABLE or not MISSING
    composites, packed = (
        re.search(r"or not at all:\n(.*)\.\n", PAGE)[1],
        re.search(r"refused by name: (.*)\.\n", PAGE)[1],
    )
    assert [name for name in composites.split(", ") if name not in MISSING] == list(COMPOSITES)
    assert PAGE.endswith(matrix.footer(composites, packed))


def test_types_that_came_and_went_since_the_table_was_made_are_reported():
    packed = set(re.search(r"refused by name: (.*)\.\n", PAGE)[1].split(", "))
    for what, names in (
        ("new", set(matrix.packed_types()) - packed),
        ("missing", packed - set(matrix.packed_types())),
    ):
        if names:
            page = "run python -m tests.matrix to write the page anew"
            warnings.warn(
                f"transformers {transformers.__version__}, {what}: {', '.join(sorted(names))}; {page}", stacklevel=1
            )
    if MISSING:
        pytest.skip(f"transformers {transformers.__version__} has no {', '.join(MISSING)}: no test here runs them")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_mae", "dinov2", "swin"])
def test_compiles_with_inductor(name):
    wrapper, pixels = wrapped(name), pixels_for(name)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(wrapper, fullgraph=True)(pixels).last_hidden_state
        torch.testing.assert_close(compiled, wrapper(pixels).last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", COMPOSITES)
def test_the_vision_tower_of_a_composite_is_taken_whole(name, tmp_path):
    composite = COMPOSITES[name]
    full = composite.build()
    full.save_pretrained(tmp_path / "full")
    live = full.get_submodule(composite.tower)
    assert bare_backbone(full) is live
    loaded = load_backbone(str(tmp_path / "full"))
    assert type(loaded) is type(live)
    assert {key: tensor.shape for key, tensor in loaded.state_dict().items()} == {
        key: tensor.shape for key, tensor in live.state_dict().items()
    }
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in live.state_dict().items())


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_head_on_a_composite_comes_back(name, tmp_path):
    composite, pixels = COMPOSITES[name], torch.randn(2, 3, *COMPOSITES[name].size)
    composite.build().save_pretrained(tmp_path / "full")
    bare = SOAPModelWrapper.from_backbone(str(tmp_path / "full"), None, image_size=composite.size)
    projection = random_projection(bare.config.hidden_size)
    wrapper = SOAPModelWrapper.from_backbone(str(tmp_path / "full"), projection, image_size=composite.size)
    assert wrapper.patch_tokens(pixels).shape[1:3] == composite.grid
    wrapper.save_pretrained(tmp_path / "head")
    wrapper.save_pretrained(tmp_path / "whole", include_backbone=True)
    expected = wrapper(pixels).last_hidden_state
    for folder in ("head", "whole"):
        assert torch.equal(AutoModel.from_pretrained(tmp_path / folder)(pixels).last_hidden_state, expected)


def test_a_tower_with_a_missing_weight_is_refused(tmp_path):
    COMPOSITES["clip"].build().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(key for key in weights if "vision_model" in key and "fc1.weight" in key)
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"lacks weights of CLIPVisionModel .*fc1\.weight"):
        load_backbone(str(tmp_path))


def test_stills_and_clips_of_stills_are_one(tmp_path):
    wrapper = wrapped("videomae")
    still = torch.randn(2, 3, 32, 32)
    clip = still[:, None].expand(-1, 4, -1, -1, -1)
    assert torch.equal(wrapper(still).last_hidden_state, wrapper(clip).last_hidden_state)
    named = wrapped("vjepa2")
    assert torch.equal(named(pixel_values_videos=clip).last_hidden_state, named(clip).last_hidden_state)


def test_siglip2_takes_images_and_its_processors_patches_alike():
    wrapper, pixels = wrapped("siglip2_vision_model"), torch.randn(2, 3, 24, 40)
    packed = wrapper.convention.complete(pixels, {})
    assert packed["pixel_values"].shape == (2, 15, 192)
    assert torch.equal(wrapper(pixels).last_hidden_state, wrapper(**packed).last_hidden_state)


def test_pixtral_packs_images_of_any_sizes_but_lays_out_one_size_at_a_time():
    wrapper = wrapped("pixtral")
    mixed = wrapper(torch.randn(2, 3, 32, 32), image_sizes=torch.tensor([[32, 32], [16, 24]]))
    assert mixed.last_hidden_state.shape == (1, 16 + 6, 32)
    with pytest.raises(LayoutError, match="one size at a time"):
        wrapper.layouts[-1].patches(mixed.last_hidden_state, (32, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dinov2", "swin", "convnextv2"])
def test_half_precision_is_the_float32_projection_rounded(name, dtype):
    wrapper = wrapped(name).to(dtype)
    outputs = wrapper(pixels_for(name).to(dtype), output_raw=True)
    layout, size = wrapper.layouts[-1], TINY_BACKBONES[name].size
    raw, clean = (layout.patches(t, size) for t in (outputs.raw_last_hidden_state, outputs.last_hidden_state))
    expected = wrapper.projections["-1"](raw.float()).to(dtype)
    spacing = torch.finfo(dtype).eps * expected.float().abs().clamp_min(torch.finfo(dtype).tiny)
    assert ((clean.float() - expected.float()).abs() <= spacing).all()


def test_a_probe_finds_what_the_parameters_do_not_say(vit):
    """Tokens under a name that nobody knows: the spots of the probe show where the patches are."""
    vit.register_forward_hook(
        lambda module, inputs, outputs: outputs.__class__(
            last_hidden_state=torch.cat((torch.zeros(len(outputs[0]), 3, 32), outputs.last_hidden_state), dim=1)
        )
    )
    assert PatchLayout.detect(vit) == PatchLayout(prefix=4, stride=8)


def test_evidence_that_disagrees_is_said_with_the_way_out(vit):
    def swap(module, inputs, outputs):
        tokens = outputs.last_hidden_state
        return outputs.__class__(last_hidden_state=torch.cat((tokens[:, 1:], tokens[:, :1]), dim=1))

    vit.register_forward_hook(swap)
    with pytest.raises(LayoutError, match=r"say PatchLayout\(.*prefix=1.* lay with 0 tokens .*pass a PatchLayout"):
        PatchLayout.detect(vit)
    assert PatchLayout.detect(vit, prefix=0, suffix=1) == PatchLayout(suffix=1, stride=8)


def test_hierarchical_states_that_are_not_raster_are_refused():
    model = TINY_BACKBONES["hiera"].build()
    with pytest.raises(LayoutError, match="no raster order"):
        PatchLayout.detect(model, image_size=TINY_BACKBONES["hiera"].size, layer=0)


def test_random_masking_and_packed_inputs_are_refused(vit):
    class Dropping(torch.nn.Module):
        def forward(self, tokens):
            return tokens * (torch.rand_like(tokens) > 0.5)

    vit.layernorm = Dropping()
    with pytest.raises(BackboneError, match="masks its input or drops patches"):
        PatchLayout.detect(vit)


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        ("BertConfig", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}, "not a vision backbone"),
        ("Glm4vVisionConfig", {"depth": 1, "hidden_size": 32, "num_heads": 2}, "grid_thw|not a vision backbone"),
    ],
)
def test_what_takes_no_images_is_refused(config_class, options, message):
    model = AutoModel.from_config(getattr(transformers, config_class)(**options))
    with pytest.raises(BackboneError, match=message):
        SOAPModelWrapper.from_backbone(model, None)


def test_a_transposed_grid_is_refused_at_any_size(vit):
    """Also where a single spot of the probe lies on the diagonal."""

    def transpose(module, inputs, outputs):
        tokens = outputs.last_hidden_state
        side = round((tokens.shape[1] - 1) ** 0.5)
        patches = tokens[:, 1:].unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
        return outputs.__class__(last_hidden_state=torch.cat((tokens[:, :1], patches), dim=1))

    vit.register_forward_hook(transpose)
    for side in (2, 3, 4, 5, 7):
        with pytest.raises(LayoutError, match="no raster order"):
            PatchLayout.detect(vit, image_size=8 * side)


def test_massive_activations_of_a_cls_token_do_not_hide_the_patches(vit):
    def amplify(module, inputs, outputs):
        scale = torch.ones(17, 1)
        scale[0] = 1000
        return outputs.__class__(last_hidden_state=outputs.last_hidden_state * scale)

    vit.register_forward_hook(amplify)
    assert PatchLayout.detect(vit) == PatchLayout(prefix=1, stride=8)


def test_an_image_smaller_than_a_window_leaves_swin_as_it_was():
    swin = AutoModel.from_config(
        transformers.SwinConfig(
            image_size=64, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4
        )
    ).eval()
    pixels = torch.randn(1, 3, 64, 64)
    before = swin(pixels).last_hidden_state
    with contextlib.suppress(BackboneError, LayoutError):
        PatchLayout.detect(swin, image_size=16)
    assert torch.equal(swin(pixels).last_hidden_state, before)


def test_a_split_vit_mae_still_gives_every_patch(tmp_path):
    """accelerate binds the forward of each part to it; a view of the model must not lose its own."""
    wrapper = wrapped("vit_mae")
    TINY_BACKBONES["vit_mae"].build().save_pretrained(tmp_path / "backbone")
    wrapper.config.backbone_name_or_path = str(tmp_path / "backbone")
    wrapper.save_pretrained(tmp_path / "head")
    places = {"embeddings": "cpu", "layers": "disk", "layernorm": "cpu"}
    split = AutoModel.from_pretrained(tmp_path / "head", device_map=places, offload_folder=tmp_path / "offload")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(split(pixels).last_hidden_state, wrapper(pixels).last_hidden_state)


def test_attention_can_be_chosen_after_loading(vit):
    for wrapper in (wrapped("vit_mae"), SOAPModelWrapper.from_backbone(vit, None)):
        wrapper.set_attn_implementation("eager")
        outputs = wrapper(torch.randn(1, 3, 32, 32), output_attentions=True)
        assert [attention.shape[-1] for attention in outputs.attentions] == [17, 17]


def test_backbone_classes_and_detectors_are_refused():
    maps = transformers.Dinov2Backbone(TINY_BACKBONES["dinov2"].build().config)
    with pytest.raises(BackboneError, match="feature maps of its own"):
        SOAPModelWrapper.from_backbone(maps, None)
    resnet = TINY_BACKBONES["resnet"].build().config
    detector = transformers.DetrModel(
        transformers.DetrConfig(
            backbone_config=resnet, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        )
    )  # fmt: skip
    with pytest.raises(BackboneError, match="not a vision backbone"):
        SOAPModelWrapper.from_backbone(detector, None)


def test_the_encoder_of_an_encoder_decoder_is_taken(tmp_path):
    encoder = TINY_BACKBONES["swin"].build()
    decoder = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=32, add_cross_attention=True)
    )
    model = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.save_pretrained(tmp_path)
    assert bare_backbone(model) is encoder
    loaded = load_backbone(str(tmp_path))
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in encoder.state_dict().items())


def test_weights_with_nan_are_not_taken_for_masking(vit):
    torch.nn.init.constant_(vit.layernorm.weight, torch.nan)
    with pytest.raises(NonFiniteTokensError, match=r"NaN or Inf in float32"):
        PatchLayout.detect(vit)


@pytest.mark.parametrize("size", [0, (3, 4, 5), (-3, 4), "32", 2.5])
def test_impossible_sizes_are_refused(vit, size):
    with pytest.raises(LayoutError, match="image_size must be"):
        PatchLayout.detect(vit, image_size=size)
