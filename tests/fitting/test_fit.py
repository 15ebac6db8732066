"""Fitting finds what is there, the same way every time, and changes nothing it was given."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, ViTMAEForPreTraining

from soap_hf import PatchLayout, SOAPStatistics, fit_soap, synthesize_images
from soap_hf.data.preprocessing import ImagePreprocessor
from soap_hf.evaluation import position_variance_share
from soap_hf.extract.arguments import ExtractArguments
from soap_hf.fitting.arguments import FitArguments
from soap_hf.runtime.errors import BackboneError, DataError, NonFiniteTokensError, SOAPError


@pytest.fixture
def leaky(vit) -> PreTrainedModel:
    """The tiny ViT with a direction added to its output that says how far left or right a patch is."""
    place = torch.linspace(-1, 1, 4).repeat(4)
    vit.embeddings.position_embeddings.data.zero_()

    def leak(module, inputs, tokens):
        tokens = tokens.clone()
        tokens[:, 1:, 7] += 40 * place
        return tokens

    vit.layernorm.register_forward_hook(leak)
    return vit


@pytest.fixture
def fit(processor):
    """`fit_soap` without bars, at 32 x 32 pixels."""
    return lambda *arguments, **options: fit_soap(
        *arguments, **{"image_processor": processor, "progress": False, "check": 0, **options}
    )


def same(ours: SOAPStatistics, theirs: SOAPStatistics, rtol: float = 1e-9) -> None:
    """Both statistics hold the same mean, variances and scores."""
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=rtol, atol=rtol)
    torch.testing.assert_close(ours.eigenvalues, theirs.eigenvalues, rtol=rtol, atol=rtol)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=rtol, atol=rtol)


def test_a_leaked_position_is_found_and_removed(leaky, images, fit):
    model = fit(leaky, images, batch_size=7)
    pixels = torch.randn(30, 3, 32, 32)
    raw, clean = model.patch_tokens(pixels, raw=True), model.patch_tokens(pixels)
    assert model.config.ranks == [1]
    assert model.statistics.table()[0]["component"] == 0
    assert position_variance_share(raw) > 0.9
    assert position_variance_share(clean, raw) < 0.02


def test_equals_statistics_of_tokens_at_hand(leaky, images, fit, processor):
    """The streamed fit is `SOAPStatistics.from_tokens` on the same images."""
    streamed = fit(leaky, images, num_images=None, num_synthetic=30, batch_size=9).statistics
    preprocess = ImagePreprocessor(processor)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0)).tolist()
    real = torch.stack([preprocess(images[row]["image"]) for row in order])
    synthetic = preprocess.normalize(synthesize_images(30, 32, seed=0))
    layout = PatchLayout.detect(leaky)
    with torch.no_grad():
        tokens = [layout.patches(leaky(pixels).last_hidden_state, (32, 32)) for pixels in (real, synthetic)]
    at_hand = SOAPStatistics.from_tokens(*tokens)
    same(streamed, at_hand, rtol=1e-5)
    assert (streamed.num_real, streamed.num_synthetic) == (at_hand.num_real, at_hand.num_synthetic) == (80, 30)


def test_batch_size_does_not_matter(mae_folder, photos):
    """Batched matrix products round differently, so equality is to 1e-4 (1e-3 for the scores)."""
    one, other = (fit_soap(mae_folder, photos, batch_size=size, progress=False).statistics for size in (5, 64))
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-4, atol=1e-4)
    largest = one.eigenvalues[0]
    torch.testing.assert_close(one.eigenvalues / largest, other.eigenvalues / largest, rtol=0, atol=1e-4)
    torch.testing.assert_close(one.scores[:24], other.scores[:24], rtol=0, atol=1e-3)


def test_a_real_mae_leaks_its_positions_and_the_head_takes_them_out(mae_folder, photos):
    model = fit_soap(mae_folder, photos, progress=False)
    held_out = sorted((photos.parent / "heldout").glob("*.jpg"))
    preprocess = ImagePreprocessor(model.image_processor)
    from PIL import Image

    pixels = torch.stack([preprocess(Image.open(path)) for path in held_out])
    raw, clean = model.patch_tokens(pixels, raw=True), model.patch_tokens(pixels)
    assert model.config.ranks[0] > 0
    assert position_variance_share(clean, raw) < position_variance_share(raw) / 3


def test_one_seed_one_fit_and_the_global_generators_stay(leaky, images, fit):
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second, other = (fit(leaky, images, num_images=20, seed=seed).statistics for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    same(first, second, rtol=0)
    assert not torch.equal(first.scores, other.scores)


def test_a_live_model_is_left_as_it_was(leaky, images, fit):
    leaky.train()
    state = {name: tensor.clone() for name, tensor in leaky.state_dict().items()}
    config = leaky.config.to_dict()
    fit(leaky, images, num_images=16)
    assert leaky.config.to_dict() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in leaky.state_dict().items())
    assert all(parameter.grad is None for parameter in leaky.parameters())


@pytest.mark.parametrize("source", ["stream", "parquet", "parquet stream", "folder", "workers"])
def test_every_source_of_the_same_images_gives_the_same_fit(leaky, images, fit, tmp_path, source):
    expected = fit(leaky, images, num_images=None).statistics
    options = {}
    data = images
    if source == "stream":
        data = images.to_iterable_dataset()
    elif source == "workers":
        options = {"num_workers": 2}
    elif source == "folder":
        for row in images:
            row["image"].save(tmp_path / f"{row['label']:03}.png")
        data = tmp_path
    else:
        images.to_parquet(tmp_path / "images.parquet")
        data, options = str(tmp_path / "images.parquet"), {"streaming": "stream" in source}
    model = fit(leaky, data, num_images=None, **options)
    same(model.statistics, expected, rtol=1e-4)
    assert model.config.fit["num_images"] == 80


def test_the_config_tells_how_it_was_fitted(leaky, images, fit):
    model = fit(leaky, images, num_images=20, num_synthetic=24, seed=3, isotropic=True, mu=2, revision="0" * 40)
    told = model.config.fit
    assert (told["num_images"], told["num_synthetic"], told["num_bad_images"]) == (20, 24, 0)
    assert (told["image_size"], told["seed"], told["isotropic"], told["image_column"]) == ([32, 32], 3, True, "image")
    assert set(told["versions"]) == {"soap_hf", "transformers", "torch", "datasets"}
    config = model.config
    assert (config.mu, config.ranks, config.layers, config.backbone_dtype) == (2, [2], [-1], "float32")
    assert config.backbone_revision == "0" * 40
    assert [row["weight"] > 1e-4 for row in config.components[0]] == [True, True] + [False] * 8


def test_no_local_path_of_the_data_reaches_the_config(leaky, images, fit, tmp_path):
    images.to_parquet(tmp_path / "images.parquet")
    assert fit(leaky, tmp_path / "images.parquet").config.fit["dataset"] == "images.parquet"


def test_several_layers_equal_one_at_a_time(leaky, images, fit):
    together = fit(leaky, images, layer=[0, 2, -1], num_images=20)
    for layer in (0, 2, -1):
        alone = fit(leaky, images, layer=layer, num_images=20)
        same(together.statistics[layer], alone.statistics, rtol=0)


def test_unreadable_images_are_counted_and_skipped(leaky, images, fit):
    data = Dataset.from_dict({"image": images.with_format("arrow")["image"]})
    files = [dict(row["image"]) for row in images.cast_column("image", type(images.features["image"])(decode=False))]
    for row in (3, 60):
        files[row] = {"bytes": files[row]["bytes"][:60], "path": f"broken{row}.png"}
    data = Dataset.from_dict({"image": files})
    with pytest.raises(DataError, match=r"broken\d+\.png .*broken\d+\.png .*max_bad_fraction"):
        fit(leaky, data)
    model = fit(leaky, data, max_bad_fraction=0.05)
    assert (model.config.fit["num_images"], model.config.fit["num_bad_images"]) == (78, 2)


def test_tokens_with_nan_name_their_batch(vit, images, fit):
    calls = []

    def poison(module, inputs, tokens):
        calls.append(len(tokens))
        return tokens * torch.nan if len(calls) > 3 and len(tokens) == 8 else tokens

    vit.layernorm.register_forward_hook(poison)
    with pytest.raises(NonFiniteTokensError, match=r"batch \d+ of the components"):
        fit(vit, images, batch_size=8)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mu": "all"}, SOAPError),
        ({"tau": 0.0}, SOAPError),
        ({"num_images": 1}, DataError),
        ({"num_synthetic": 1}, DataError),
        ({"layer": 9}, BackboneError),
        ({"image_size": 3}, BackboneError),
        ({"image_column": "photo"}, DataError),
        ({"image_column": "label"}, DataError),
        ({"dtype": "float16"}, BackboneError),
    ],
)
def test_bad_input_is_refused_before_a_single_image_is_read(vit, images, fit, options, error):
    seen = []
    vit.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0]) if inputs else 0))
    with pytest.raises(error):
        fit(vit, images, **options)
    assert len(seen) <= 1  # the probe


@pytest.mark.parametrize(("short", "name"), [("fp16", "float16"), ("bf16", "bfloat16"), ("torch.float32", "float32")])
def test_dtypes_have_short_names(short, name):
    assert FitArguments(dtype=short).dtype == ExtractArguments(dtype=short).dtype == name
    assert FitArguments(dtype=torch.float16).dtype is torch.float16


@pytest.mark.parametrize("kind", [FitArguments, ExtractArguments])
def test_what_is_no_dtype_is_refused(kind):
    for text in ("fp17", "int8", "float3"):
        with pytest.raises(DataError, match=f"'{text}' is no dtype of a backbone; give float32, .*bf16"):
            kind(dtype=text)


def test_in_what_half_precision_is_fitted_is_said(vit, images, processor, tmp_path, caplog, fit):
    options = {"num_images": 16, "check": 0, "progress": False}
    vit.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    whole = fit_soap(tmp_path / "half", images, device="cpu", **options)
    assert whole.config.backbone_dtype == "float32"
    told = "The checkpoint is in bfloat16, but is fitted in float32; pass dtype=bfloat16 to keep that."
    assert told in caplog.text
    live = fit_soap(vit, images, image_processor=processor, **options)
    assert live.config.backbone_dtype == "bfloat16"
    assert "The live model is in bfloat16, and is fitted so; move it by model.float()" in caplog.text
    caplog.clear()
    fit_soap(tmp_path / "half", images, device="cpu", dtype="bf16", **options)
    fit_soap(vit.float(), images, image_processor=processor, **options)
    assert "fitted" not in caplog.text


def test_a_pretraining_model_is_fitted_by_its_encoder(mae_folder, photos):
    task = ViTMAEForPreTraining.from_pretrained(mae_folder, dtype=torch.float32)
    model = fit_soap(task, photos, num_images=16, progress=False)
    assert model.patch_tokens(torch.zeros(1, 3, 64, 64)).shape == (1, 8, 8, 192)
    assert task.config.mask_ratio == 0.75


@pytest.mark.parametrize(
    ("name", "grid"),
    [("videomae", (2, 4, 4)), ("timesformer", (4, 4, 4)), ("siglip2_vision_model", (4, 4)), ("pixtral", (4, 4))],
)
def test_packed_and_video_backbones_are_fitted_on_stills(name, grid, images, fit):
    from tests.tiny_backbones import TINY_BACKBONES

    model = fit(TINY_BACKBONES[name].build(), images, num_images=16, mu=2)
    assert model.statistics.real_response.shape == (*grid, 32)
    assert model.patch_tokens(torch.randn(3, 3, 32, 32)).shape == (3, *grid, 32)


def test_processors_that_pack_or_keep_aspect_ratios_give_way_to_plain_ones(images):
    from transformers import PixtralImageProcessorPil, Siglip2ImageProcessorPil

    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    for processor in (
        Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16, **own),
        PixtralImageProcessorPil(size={"longest_edge": 40}, patch_size=8, **own),
    ):
        preprocess = ImagePreprocessor(processor, native_size=(32, 32))
        assert preprocess(images[0]["image"]).shape == (3, 32, 32)
        mean = torch.tensor(own["image_mean"]).view(1, 3, 1, 1)
        assert preprocess.normalize(mean.expand(1, 3, 2, 2)).abs().max() < 1e-5


def test_all_layers_leave_out_those_without_a_grid(images, fit):
    from tests.tiny_backbones import TINY_BACKBONES

    tiny = TINY_BACKBONES["hiera"]
    model = fit(tiny.build(), images, num_images=16, layer="all", image_size=tiny.size)
    assert model.config.layers == [3, -1]


def test_a_backbone_that_takes_no_rgb_is_refused(images, fit):
    from transformers import ViTConfig, ViTModel

    grey = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_channels=1))
    with pytest.raises(BackboneError, match="1 channels"):
        fit(grey, images)


@pytest.mark.slow
def test_a_compiled_backbone_gives_the_same_statistics(vit, images, fit):
    plain, compiled = (fit(vit, images, batch_size=16, compile=flag).statistics for flag in (False, True))
    same(compiled, plain, rtol=1e-3)


def test_an_automatic_batch_size_is_a_moderate_one_on_cpu(vit, images, fit):
    seen = []
    vit.register_forward_pre_hook(
        lambda module, inputs, named: seen.append(len(named["pixel_values"])), with_kwargs=True
    )
    fit(vit, images, batch_size="auto")
    assert max(seen) == 32


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": "large"}, {"seed": -1}])
def test_impossible_sizes_and_seeds_are_refused(vit, images, fit, options):
    with pytest.raises(DataError, match=r"batch_size must be at least 1|seed must lie between 0"):
        fit(vit, images, **options)


def test_the_old_name_of_the_share_of_bad_images_works_and_says_the_new_one(vit, images, fit, caplog):
    fit(vit, images, max_bad_images=0.5)
    assert "max_bad_images is called max_bad_fraction now" in caplog.text
    with pytest.raises(DataError, match="max_bad_fraction is a share from 0 to 1, not 3"):
        fit(vit, images, max_bad_images=3)


def test_an_argument_that_is_none_is_refused(vit, images):
    with pytest.raises(TypeError, match=r"fit_soap\(\) got an unexpected keyword argument 'num_image'"):
        fit_soap(vit, images, num_image=3)
