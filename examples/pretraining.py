"""What the two pretraining examples share: images, random views of them, training arguments, and what is saved.

`pretrain_tiny_mae.py` trains a masked autoencoder, `pretrain_tiny_control.py` the same vision transformer without
masking. They differ in what they ask of the model; everything here is the same for both.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments, ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class PretrainingError(ValueError):
    """What was asked for cannot be trained; the message is one sentence that says what to change."""


@dataclass
class DataArguments:
    """Where the images are, and how a view of one is drawn."""

    data: list[str] = field(metadata={"help": "Folders of images, or parquet files with a column of images."})
    image_column: str = field(default="image", metadata={"help": "Column of the parquet files that holds the images."})
    smallest_crop: float = field(default=0.2, metadata={"help": "Smallest share of an image's area in a view."})
    color_jitter: float = field(
        default=0.0, metadata={"help": "Largest relative change of brightness, contrast and saturation."}
    )
    grayscale: float = field(default=0.0, metadata={"help": "Share of the views that lose their colours."})


@dataclass
class EncoderArguments:
    """Shape of the vision transformer; the names are those of `ViTConfig` and `ViTMAEConfig`."""

    hidden_size: int = field(default=192, metadata={"help": "Width of the encoder, a multiple of 4."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers of the encoder."})
    num_attention_heads: int = field(default=3, metadata={"help": "Attention heads of the encoder."})
    image_size: int = field(default=64, metadata={"help": "Side of the square that the images are cropped to."})
    patch_size: int = field(default=8, metadata={"help": "Side of a patch."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "Or eager, the faster one on CPU if compiled."})


@dataclass
class PretrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of masked-autoencoder pretraining, scaled down to a tiny model."""

    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images per step and device."})
    num_train_epochs: float = field(default=20.0, metadata={"help": "Passes over the images."})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW; the first is 0.9."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate after warm-up."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or below 1 their share."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two entries of the loss log."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept for resuming."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave off: the model takes no 'image'."})


def find_files(paths: list[str], suffixes: set[str]) -> list[str]:
    """Returns the files with one of these suffixes among the paths and, for folders, anywhere below them, sorted."""
    files = (file for path in map(Path, paths) for file in (path.rglob("*") if path.is_dir() else [path]))
    return sorted(str(file) for file in files if file.suffix.lower() in suffixes and file.is_file())


def load_images(paths: list[str], column: str = "image") -> Dataset:
    """Loads a data set with one column of RGB images, which are decoded when they are read.

    Args:
        paths (`list[str]`): image files, folders with images anywhere below them, or parquet files.
        column (`str`): name of the column; parquet files have to have it.

    Raises:
        PretrainingError: there are no images, or the column is missing or holds something else.
    """
    where = ", ".join(paths)
    tables, files = find_files(paths, {".parquet"}), find_files(paths, IMAGE_SUFFIXES)
    if tables and files:
        raise PretrainingError(f"There are both images and parquet files in {where}; name either with --data.")
    dataset = Dataset.from_parquet(tables) if tables else Dataset.from_dict({column: files})
    if not len(dataset):
        raise PretrainingError(f"There are no images in {where}; name folders or parquet files with images.")
    if column not in dataset.column_names:
        names = ", ".join(dataset.column_names)
        raise PretrainingError(f"There is no column {column!r} in {where}; choose from {names} with --image_column.")
    try:
        images = dataset.select_columns(column).cast_column(column, ImageColumn(mode="RGB"))
        images[0]
    except (OSError, TypeError, ValueError, NotImplementedError) as error:
        raise PretrainingError(f"Column {column!r} of {where} starts with something that is no image.") from error
    return images


def random_view(image: Image.Image, size: int, arguments: DataArguments) -> Tensor:
    """Returns a random view of an image, cropped, flipped and re-coloured, as a `(3, size, size)` tensor of bytes."""
    view = random_resized_crop(image, size, arguments.smallest_crop)
    if random_integer(1):
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if jitter := arguments.color_jitter:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            view = enhance(view).enhance(uniform(max(0.0, 1 - jitter), 1 + jitter))
    if arguments.grayscale and uniform(0, 1) < arguments.grayscale:
        view = view.convert("L").convert("RGB")
    return torch.from_numpy(np.array(view)).permute(2, 0, 1)


def random_resized_crop(image: Image.Image, size: int, smallest: float = 0.2) -> Image.Image:
    """Cuts out a random rectangle and resizes it to a square.

    It covers from `smallest` to all of the image's area, with sides of 3:4 to 4:3, and shrinks where it would not fit.
    Chance comes from torch's global generator, which `DataLoader` seeds in each worker.
    """
    width, height = image.size
    area = width * height * uniform(smallest, 1.0)
    aspect = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
    crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
    shrink = min(1.0, width / crop_width, height / crop_height)
    crop_width, crop_height = max(1, int(shrink * crop_width)), max(1, int(shrink * crop_height))
    left, top = random_integer(width - crop_width), random_integer(height - crop_height)
    box = (left, top, left + crop_width, top + crop_height)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def uniform(low: float, high: float) -> float:
    """Draws a number between `low` and `high` from torch's global generator."""
    return low + (high - low) * torch.rand(()).item()


def random_integer(highest: int) -> int:
    """Draws an integer from 0 to `highest`, both included, from torch's global generator."""
    return int(torch.randint(highest + 1, ()).item())


def collate(
    examples: list[dict[str, Image.Image]], processor: ViTImageProcessorPil, arguments: DataArguments, views: int = 1
) -> dict[str, Tensor]:
    """Stacks random views of the examples, normalised as `processor` does it, into a batch for the model.

    With several `views` an image `pixel_values` has shape `(B, views, 3, size, size)`, else `(B, 3, size, size)`.
    """
    size = processor.size["height"]
    images = [image for example in examples for image in example.values()]
    drawn = torch.stack([random_view(image, size, arguments) for image in images for _ in range(views)])
    drawn = drawn if views == 1 else drawn.unflatten(0, (-1, views))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return {"pixel_values": (drawn * processor.rescale_factor - mean) / std}


def check_shares(arguments: DataArguments) -> None:
    """Raises `PretrainingError` if a share of the random views is none."""
    if not 0 < arguments.smallest_crop <= 1:
        raise PretrainingError(f"smallest_crop {arguments.smallest_crop} has to be above 0 and at most 1.")
    for name in ("color_jitter", "grayscale"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise PretrainingError(f"{name} {getattr(arguments, name)} has to lie between 0 and 1.")


def check_multiples(arguments: Any, divisors: dict[str, str]) -> None:
    """Raises `PretrainingError` if an argument is no multiple of the one that has to divide it."""
    for name, divisor_name in divisors.items():
        size, divisor = getattr(arguments, name), getattr(arguments, divisor_name)
        if min(size, divisor) < 1 or size % divisor:
            raise PretrainingError(f"{name} {size} has to be a multiple of {divisor_name} {divisor}.")


def check_widths(arguments: Any, names: list[str]) -> None:
    """Raises `PretrainingError` if a width cannot be filled with sines and cosines of rows and columns."""
    for name in names:
        if getattr(arguments, name) % 4:
            raise PretrainingError(
                f"{name} {getattr(arguments, name)} has to be a multiple of 4, for sines and cosines."
            )


@torch.no_grad()
def fill_positions(position_embeddings: nn.Parameter) -> None:
    """Writes fixed sine-cosine embeddings of a square grid into a `(1, 1 + patches, width)` parameter, in place.

    As in the released ViT-MAE checkpoints, the first half of the width tells columns apart, the second half rows, and
    the CLS token in front has zeros.
    """
    _, tokens, width = position_embeddings.shape
    side = math.isqrt(tokens - 1)
    rows, columns = build_2d_sinusoidal_position_embedding(side, side, width, cls_token=True).chunk(2, dim=1)
    position_embeddings.copy_(torch.cat([columns, rows], dim=1))


@torch.no_grad()
def initialise_embeddings(embeddings: nn.Module, std: float) -> None:
    """Starts the embeddings of a ViT or a ViT-MAE as the original ViT-MAE does, in place: positions are never trained.

    transformers 5.23 leaves positions and CLS token of a ViT-MAE that is built from a configuration at zero. Such a
    model never learns where a patch is, and the layer norm of an all-zero CLS token has gradients of several hundred.

    Args:
        embeddings (`nn.Module`): of the encoder.
        std (`float`): standard deviation of the CLS token.
    """
    fill_positions(embeddings.position_embeddings)
    embeddings.position_embeddings.requires_grad_(False)
    nn.init.normal_(embeddings.cls_token, std=std)
    nn.init.xavier_uniform_(embeddings.patch_embeddings.projection.weight.flatten(1))


def make_processor(image_size: int) -> ViTImageProcessorPil:
    """Builds the image processor that the trained encoder is used with."""
    return ViTImageProcessorPil(
        size={"height": image_size, "width": image_size},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        do_convert_rgb=True,
    )


def save_log(trainer: Trainer, folder: Path) -> None:
    """Writes the loss by step, and how many images a second were trained on, to `training_log.json`."""
    history = trainer.state.log_history
    log = {
        "steps": trainer.state.global_step,
        "images_per_second": next(entry["train_samples_per_second"] for entry in reversed(history)),
        "loss": [{"step": entry["step"], "loss": entry["loss"]} for entry in history if "loss" in entry],
    }
    (folder / "training_log.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
    save_loss_curve(log, folder)


def save_loss_curve(log: dict[str, Any], folder: Path) -> None:
    """Draws the loss by step into `loss_curve.png`, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 3), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot([entry["step"] for entry in log["loss"]], [entry["loss"] for entry in log["loss"]], color="#0072b2")
    axes.set(xlabel="step", ylabel="training loss")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "loss_curve.png")


def save_encoder(encoder: PreTrainedModel, processor: ViTImageProcessorPil, folder: Path) -> None:
    """Saves the encoder in float16 with its image processor; raises `PretrainingError` if it has diverged."""
    encoder = encoder.half()
    if not all(weights.isfinite().all() for weights in encoder.parameters()):
        raise PretrainingError("Training diverged, so that the encoder is not saved; lower --learning_rate.")
    encoder.save_pretrained(folder)
    processor.save_pretrained(folder)


def train_and_save(trainer: Trainer, encoder: PreTrainedModel, processor: ViTImageProcessorPil) -> None:
    """Trains, and writes the encoder, its image processor, the loss log and its curve to the output folder."""
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        save_log(trainer, folder)
        save_encoder(encoder, processor, folder)


def run(
    pretrain: Callable[..., None], arguments: list[str] | None, kinds: list[type], description: str | None
) -> None:
    """Runs `pretrain` with arguments from the command line; what cannot be trained ends in one sentence."""
    parser = HfArgumentParser(kinds, description=description)
    try:
        pretrain(*parser.parse_args_into_dataclasses(arguments))
    except PretrainingError as error:
        sys.exit(f"{Path(sys.modules[pretrain.__module__].__file__ or '').name}: {error}")
