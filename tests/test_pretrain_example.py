"""The pretraining example, run for real for a few steps, and the position embeddings it fills in."""

import importlib.util
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, ViTMAEForPreTraining, ViTMAEModel

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = EXAMPLES / "pretrain_tiny_mae.py"
PHOTOS = EXAMPLES / "photos" / "fit"
TINY = [
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
    "--decoder_hidden_size",
    "16",
    "--decoder_num_attention_heads",
    "2",
    "--per_device_train_batch_size",
    "16",
    "--logging_steps",
    "1",
    "--use_cpu",
    "--disable_tqdm",
    "True",
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("pretrain_tiny_mae", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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


@pytest.mark.parametrize("size", [(256, 256), (300, 20), (5, 400), (1, 1)])
def test_crops_of_any_shape(script: ModuleType, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image = Image.linear_gradient("L").convert("RGB").resize(size)
    views = [script.augment(image, 32) for _ in range(20)]
    assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in views)
    torch.manual_seed(0)
    assert torch.equal(script.augment(image, 32), views[0])
    if size == (256, 256):
        assert not torch.equal(views[0], views[1])


def test_batches_are_normalised_like_the_processor(script: ModuleType) -> None:
    processor = script.make_processor(32)
    image = Image.new("RGB", (40, 40), (200, 100, 50))
    batch = script.collate([{"image": image}, {"image": image}], processor)["pixel_values"]
    expected = processor([image, image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch, expected, atol=1e-5, rtol=0)
