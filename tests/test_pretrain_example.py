"""The pretraining examples, run for real for a few steps, and the position embeddings they fill in."""

import importlib
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, ViTMAEForPreTraining, ViTMAEModel, ViTModel

from soap_hf.compat import AutoImageProcessor
from tests.conftest import EXAMPLES, noise_image

SCRIPT = EXAMPLES / "pretrain_tiny_mae.py"
PHOTOS = EXAMPLES / "photos" / "fit"
ENCODER = [
    "--hidden_size",
    "24",
    "--num_hidden_layers",
    "2",
    "--num_attention_heads",
    "2",
    "--image_size",
    "32",
    "--patch_size",
    "8",
]
TRAINING = ["--per_device_train_batch_size", "16", "--logging_steps", "1", "--use_cpu", "--disable_tqdm", "True"]
TINY = [*ENCODER, *TRAINING, "--decoder_hidden_size", "16", "--decoder_num_attention_heads", "2"]


def load_script(name: str) -> ModuleType:
    """An example as a module, found beside the module that it shares with others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script that trains a masked autoencoder."""
    return load_script("pretrain_tiny_mae")


@pytest.fixture(scope="module")
def control() -> ModuleType:
    """The script that trains its control."""
    return load_script("pretrain_tiny_control")


@pytest.fixture(scope="module")
def shared() -> ModuleType:
    """What the two share."""
    return load_script("pretraining")


def run_script(data: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Six steps from the command line, with a checkpoint after the first four, which are one pass over the photos."""
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--output_dir", str(output), *TINY]
    options = ["--max_steps", "6", "--save_steps", "4", "--save_total_limit", "2"]
    return subprocess.run([*command, *options], capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, subprocess.CompletedProcess[str]]:
    """A run on the photos and one on a folder without images, side by side to save time, by output folder."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "empty").mkdir()
    outputs = [folder / "trained", folder / "refused"]
    with ThreadPoolExecutor() as pool:
        return dict(zip(outputs, pool.map(run_script, [PHOTOS, folder / "empty"], outputs), strict=True))


@pytest.fixture(scope="module")
def trained(runs: dict[Path, subprocess.CompletedProcess[str]]) -> Path:
    """Output folder of the run on the photos."""
    folder = next(iter(runs))
    assert runs[folder].returncode == 0, runs[folder].stderr
    return folder


def losses(folder: Path) -> list[float]:
    """Losses by step, as the log has them."""
    return [entry["loss"] for entry in json.loads((folder / "training_log.json").read_text())["loss"]]


def all_patch_tokens(model: ViTMAEModel, pixels: Tensor) -> Tensor:
    """All patch tokens of a ViT-MAE encoder, in raster order."""
    model.config.mask_ratio = 0.0
    order = torch.arange(float(model.embeddings.patch_embeddings.num_patches))
    with torch.no_grad():
        return model.eval()(pixels, noise=order.expand(len(pixels), -1)).last_hidden_state[:, 1:]


def test_encoder_loads_complete_in_float16(trained: Path) -> None:
    encoder, report = AutoModel.from_pretrained(trained, output_loading_info=True)
    assert isinstance(encoder, ViTMAEModel)
    assert encoder.dtype == torch.float16
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any("decoder" in name for name in load_file(trained / "model.safetensors"))


def test_saved_positions_are_the_filled_ones(trained: Path) -> None:
    saved = AutoModel.from_pretrained(trained).embeddings.position_embeddings[0].float()
    frequencies = 10000.0 ** -(torch.arange(6) / 6)
    assert saved.shape == (17, 24)
    assert not saved[0].any()
    for row in range(4):
        for column in range(4):
            angles = torch.stack([column * frequencies, row * frequencies])
            expected = torch.cat([angles.sin(), angles.cos()], dim=1).flatten()  # columns first, sines before cosines
            torch.testing.assert_close(saved[1 + 4 * row + column], expected, atol=5e-4, rtol=0)


def test_processor_and_encoder_fit_together(trained: Path) -> None:
    photo = Image.open(next(PHOTOS.glob("*.jpg")))
    pixels = AutoImageProcessor.from_pretrained(trained)(photo, return_tensors="pt")["pixel_values"]
    tokens = all_patch_tokens(AutoModel.from_pretrained(trained, dtype=torch.float32), pixels)
    assert tokens.shape == (1, 16, 24)
    assert tokens.isfinite().all()


def test_loss_log_has_every_step(trained: Path) -> None:
    log = json.loads((trained / "training_log.json").read_text())
    assert [entry["step"] for entry in log["loss"]] == [1, 2, 3, 4, 5, 6]
    assert log["steps"] == 6
    assert all(math.isfinite(loss) and 0.5 < loss < 2.0 for loss in losses(trained))
    assert log["images_per_second"] > 0


def test_resuming_gives_the_same_encoder(script: ModuleType, trained: Path, tmp_path: Path) -> None:
    checkpoint = ["--resume_from_checkpoint", str(trained / "checkpoint-4")]
    script.main(["--data", str(PHOTOS), "--output_dir", str(tmp_path), *TINY, "--max_steps", "6", *checkpoint])
    assert losses(tmp_path) == pytest.approx(losses(trained), rel=1e-6)
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    torch.testing.assert_close(after, before)


def test_trains_on_parquet(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    photos = [{"bytes": path.read_bytes(), "path": None} for path in sorted(PHOTOS.glob("*.jpg"))[:8]]
    Dataset.from_dict({"photo": photos, "label": list(range(8))}).to_parquet(tmp_path / "photos.parquet")
    arguments = ["--data", str(tmp_path / "photos.parquet"), "--output_dir", str(tmp_path / "out"), *TINY]
    script.main([*arguments, "--image_column", "photo", "--max_steps", "1"])
    assert len(losses(tmp_path / "out")) == 1
    for column, sentence in (("image", "There is no column 'image' in "), ("label", "Column 'label' of ")):
        with pytest.raises(SystemExit, match=sentence):
            script.main([*arguments, "--image_column", column])


def test_command_line_error_is_one_sentence(runs: dict[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, run = list(runs.items())[1]
    assert run.returncode != 0
    assert not folder.exists()
    assert run.stderr.strip().splitlines()[-1].startswith("pretrain_tiny_mae.py: There are no images in ")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--image_size 60", "image_size 60 has to be a multiple of patch_size 8."),
        ("--patch_size 0", "image_size 64 has to be a multiple of patch_size 0."),
        ("--num_attention_heads 5", "hidden_size 192 has to be a multiple of num_attention_heads 5."),
        ("--decoder_hidden_size 90", "decoder_hidden_size 90 has to be a multiple of 4, for sines and cosines."),
        ("--mask_ratio 1", "mask_ratio 1.0 has to hide and to show some of 64 patches."),
        ("--data {folder}/none", "There are no images in {folder}/none; name folders or parquet files with images."),
        ("--data {folder}", "There are both images and parquet files in {folder}; name either with --data."),
        ("--data {folder}/no.jpg", "Column 'image' of {folder}/no.jpg starts with something that is no image."),
    ],
)
def test_bad_input(script: ModuleType, tmp_path: Path, options: str, sentence: str) -> None:
    (tmp_path / "no.jpg").write_text("no image")
    (tmp_path / "empty.parquet").touch()
    arguments = ["--data", str(PHOTOS), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as exit_:
        script.main([*arguments, *options.format(folder=tmp_path).split()])
    assert exit_.value.code == f"pretrain_tiny_mae.py: {sentence.format(folder=tmp_path)}"
    assert not (tmp_path / "out").exists()


def test_positions_equal_the_tiny_checkpoint(script: ModuleType) -> None:
    model = script.build_model(script.make_config(script.ModelArguments()))
    checkpoint = load_file(EXAMPLES / "vit-mae-tiny" / "model.safetensors")
    assert torch.equal(model.vit.embeddings.position_embeddings.half(), checkpoint["embeddings.position_embeddings"])
    assert model.decoder.decoder_pos_embed.std() > 0


def test_tokens_of_a_constant_image_tell_positions_apart(script: ModuleType) -> None:
    model = script.build_model(script.make_config(script.ModelArguments()))
    tokens = all_patch_tokens(model.vit, torch.full((1, 3, 64, 64), 0.5))[0]
    assert torch.pdist(tokens).min() > 0.1
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.zero_()
    assert torch.pdist(all_patch_tokens(model.vit, torch.full((1, 3, 64, 64), 0.5))[0]).max() < 1e-3


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_unfilled_positions_are_refused(script: ModuleType, part: str) -> None:
    model: ViTMAEForPreTraining = script.build_model(script.make_config(script.ModelArguments(num_hidden_layers=1)))
    script.check_positions(model)
    embeddings = {"encoder": model.vit.embeddings.position_embeddings, "decoder": model.decoder.decoder_pos_embed}
    embeddings[part].data.zero_()
    with pytest.raises(script.PretrainingError, match=f"^The {part}'s position embeddings are all the same"):
        script.check_positions(model)


TOO_SMALL_OR_LARGE = (
    "per_device_train_batch_size has to be 2 or more, since images are told apart from others of their batch, and at "
    "most 64, the number of images."
)


def views_like(shared: ModuleType, **options: float) -> Any:
    """Arguments of random views."""
    return shared.DataArguments(data=[], **options)


@pytest.mark.parametrize("size", [(256, 256), (300, 20), (5, 400), (1, 1)])
def test_views_of_any_shape(shared: ModuleType, size: tuple[int, int]) -> None:
    arguments = views_like(shared, color_jitter=0.4, grayscale=0.2)
    torch.manual_seed(0)
    image = Image.linear_gradient("L").convert("RGB").resize(size)
    views = [shared.random_view(image, 32, arguments) for _ in range(20)]
    assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in views)
    torch.manual_seed(0)
    assert torch.equal(shared.random_view(image, 32, arguments), views[0])
    if size == (256, 256):
        assert not torch.equal(views[0], views[1])


def test_colours_change_only_when_asked(shared: ModuleType) -> None:
    image = Image.new("RGB", (40, 40), (200, 100, 50))

    def colours(**options: float) -> set[tuple[int, ...]]:
        drawn = [shared.random_view(image, 8, views_like(shared, **options)) for _ in range(20)]
        return {tuple(view.flatten(1)[:, 0].tolist()) for view in drawn}

    assert colours() == {(200, 100, 50)}
    assert len(colours(color_jitter=0.4)) > 10
    assert {len(set(colour)) for colour in colours(grayscale=1.0)} == {1}


def test_batches_are_normalised_like_the_processor(shared: ModuleType) -> None:
    processor = shared.make_processor(32)
    image = Image.new("RGB", (40, 40), (200, 100, 50))
    batch = shared.collate([{"image": image}, {"image": image}], processor, views_like(shared))["pixel_values"]
    expected = processor([image, image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch, expected, atol=1e-5, rtol=0)


def test_views_of_one_image_are_drawn_anew(shared: ModuleType) -> None:
    images = [{"image": noise_image(seed)} for seed in range(3)]
    batch = shared.collate(images, shared.make_processor(8), views_like(shared), views=2)["pixel_values"]
    assert batch.shape == (3, 2, 3, 8, 8)
    assert not torch.equal(batch[:, 0], batch[:, 1])
    flat = [{"image": Image.new("RGB", (9, 9), (level, level, level))} for level in (0, 100, 200)]
    batch = shared.collate(flat, shared.make_processor(8), views_like(shared), views=2)["pixel_values"]
    assert torch.equal(batch[:, 0], batch[:, 1])
    assert not torch.equal(batch[0], batch[1])


def test_control_trains_and_loads(control: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_metric_learning")
    arguments = ["--data", str(PHOTOS), *ENCODER, *TRAINING, "--max_steps", "6", "--color_jitter", "0.4"]
    options = ["--learning_rate", "5e-3", "--save_total_limit", "2"]
    control.main([*arguments, "--output_dir", str(tmp_path), *options, "--save_steps", "4"])
    found = losses(tmp_path)
    assert len(found) == 6
    assert min(found[3:]) < found[0]
    again = tmp_path / "again"
    resumed = ["--resume_from_checkpoint", str(tmp_path / "checkpoint-4")]
    control.main([*arguments, "--output_dir", str(again), *options, *resumed])
    assert losses(again) == pytest.approx(found, rel=1e-5)
    encoder, report = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
    assert (type(encoder), encoder.dtype) == (ViTModel, torch.float16)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_control_has_the_shape_and_the_positions_of_the_autoencoder(script: ModuleType, control: ModuleType) -> None:
    autoencoder = script.build_model(script.make_config(script.ModelArguments())).vit
    encoder = control.build_encoder(control.ContrastArguments())
    shapes = [
        {name: tuple(weights.shape) for name, weights in model.named_parameters()} for model in (autoencoder, encoder)
    ]
    assert shapes[0] == shapes[1]
    positions = [model.embeddings.position_embeddings for model in (autoencoder, encoder)]
    assert torch.equal(*positions)
    assert not any(each.requires_grad for each in positions)
    spreads = [
        [
            weights.std().item()
            for weights in (model.embeddings.patch_embeddings.projection.weight, model.embeddings.cls_token)
        ]
        for model in (autoencoder, encoder)
    ]
    torch.testing.assert_close(*map(torch.tensor, spreads), rtol=0.2, atol=0)


def test_contrast_is_the_loss_of_simclr(control: ModuleType) -> None:
    pytest.importorskip("pytorch_metric_learning")
    model = control.TwoViewEncoder(control.build_encoder(control.ContrastArguments()), 8, temperature=0.5)
    first, second = torch.randn(2, 5, 8)
    vectors = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    cosines = (vectors @ vectors.T / 0.5).fill_diagonal_(-torch.inf)
    partners = torch.arange(10).roll(5)
    expected = torch.nn.functional.cross_entropy(cosines, partners)
    torch.testing.assert_close(model.contrast(first, second), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--image_size 60", "image_size 60 has to be a multiple of patch_size 8."),
        ("--hidden_size 90", "hidden_size 90 has to be a multiple of 4, for sines and cosines."),
        ("--smallest_crop 0", "smallest_crop 0.0 has to be above 0 and at most 1."),
        ("--color_jitter 2", "color_jitter 2.0 has to lie between 0 and 1."),
        ("--temperature 0", "temperature has to be above 0 and projection_size at least 1."),
        ("--per_device_train_batch_size 1", TOO_SMALL_OR_LARGE),
        ("--per_device_train_batch_size 65", TOO_SMALL_OR_LARGE),
    ],
)
def test_bad_input_of_the_control(control: ModuleType, tmp_path: Path, options: str, sentence: str) -> None:
    pytest.importorskip("pytorch_metric_learning")
    with pytest.raises(SystemExit) as exit_:
        control.main(["--data", str(PHOTOS), "--output_dir", str(tmp_path / "out"), *options.split()])
    assert exit_.value.code == f"pretrain_tiny_control.py: {sentence}"
    assert not (tmp_path / "out").exists()
