"""Trains a tiny masked autoencoder (ViT-MAE) from scratch: a small backbone of your own to fit a SOAP head on.

The images are a folder, searched with its sub-folders, or parquet files with a column of images:

    python examples/pretrain_tiny_mae.py --data path/to/photos --output_dir tiny-mae
    python examples/pretrain_tiny_mae.py --data photos.parquet --image_column image --output_dir tiny-mae

Every option of `transformers.TrainingArguments` is taken as well: `--max_steps 3000`, `--bf16 --torch_compile` and
`--dataloader_num_workers 8` on a GPU, `--resume_from_checkpoint tiny-mae/checkpoint-500` to go on after a break.
`--help` lists them with the defaults of this script, which train on about 200 images a second on two CPU cores.

The output folder gets the encoder alone, without the decoder, as a float16 `ViTMAEModel` with its image processor, so
that `AutoModel.from_pretrained("tiny-mae")` loads it, and the loss by step in `training_log.json`.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image
from torch import Tensor, nn
from transformers import (
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    set_seed,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class PretrainingError(ValueError):
    """What was asked for cannot be trained; the message is one sentence that says what to change."""


@dataclass
class DataArguments:
    """Where the images are."""

    data: list[str] = field(metadata={"help": "Folders of images, or parquet files with a column of images."})
    image_column: str = field(default="image", metadata={"help": "Column of the parquet files that holds the images."})


@dataclass
class ModelArguments:
    """Shape of the masked autoencoder; the names are those of `ViTMAEConfig`."""

    hidden_size: int = field(default=192, metadata={"help": "Width of the encoder, a multiple of 4."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers of the encoder."})
    num_attention_heads: int = field(default=3, metadata={"help": "Attention heads of the encoder."})
    image_size: int = field(default=64, metadata={"help": "Side of the square that the images are cropped to."})
    patch_size: int = field(default=8, metadata={"help": "Side of a patch."})
    mask_ratio: float = field(default=0.75, metadata={"help": "Share of the patches hidden from the encoder."})
    norm_pix_loss: bool = field(default=True, metadata={"help": "Predict pixels normalised patch by patch."})
    decoder_hidden_size: int = field(default=96, metadata={"help": "Width of the decoder, a multiple of 4."})
    decoder_num_hidden_layers: int = field(default=1, metadata={"help": "Layers of the decoder."})
    decoder_num_attention_heads: int = field(default=3, metadata={"help": "Attention heads of the decoder."})


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


def augment(image: Image.Image, size: int) -> Tensor:
    """Returns a random view of an image, cropped and flipped, as a `(3, size, size)` tensor of bytes."""
    view = random_resized_crop(image, size)
    if random_integer(1):
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(view)).permute(2, 0, 1)


def collate(examples: list[dict[str, Image.Image]], processor: ViTImageProcessorPil) -> dict[str, Tensor]:
    """Stacks a random view of each example, normalised as `processor` does it, into a batch for the model."""
    size = processor.size["height"]
    views = torch.stack([augment(image, size) for example in examples for image in example.values()])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return {"pixel_values": (views * processor.rescale_factor - mean) / std}


def make_config(model: ModelArguments) -> ViTMAEConfig:
    """Turns the arguments into a configuration; raises `PretrainingError` if the sizes do not fit together."""
    divisors = {
        "image_size": "patch_size",
        "hidden_size": "num_attention_heads",
        "decoder_hidden_size": "decoder_num_attention_heads",
    }
    for name, divisor_name in divisors.items():
        size, divisor = getattr(model, name), getattr(model, divisor_name)
        if min(size, divisor) < 1 or size % divisor:
            raise PretrainingError(f"{name} {size} has to be a multiple of {divisor_name} {divisor}.")
    for name in ("hidden_size", "decoder_hidden_size"):
        if getattr(model, name) % 4:
            raise PretrainingError(f"{name} {getattr(model, name)} has to be a multiple of 4, for sines and cosines.")
    patches = (model.image_size // model.patch_size) ** 2
    if not 1 <= int(patches * (1 - model.mask_ratio)) < patches:
        raise PretrainingError(f"mask_ratio {model.mask_ratio} has to hide and to show some of {patches} patches.")
    sizes = {"intermediate_size": 4 * model.hidden_size, "decoder_intermediate_size": 4 * model.decoder_hidden_size}
    return ViTMAEConfig(**asdict(model), **sizes)


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


def build_model(config: ViTMAEConfig) -> ViTMAEForPreTraining:
    """Builds a masked autoencoder with random weights and fixed position embeddings.

    transformers 5.23 leaves the position embeddings of encoder and decoder, the CLS token and the mask token at zero
    when it builds a ViT-MAE from a configuration. Such a model never learns where a patch is, and the layer norm of an
    all-zero CLS token has gradients of several hundred. Here they start as in the original ViT-MAE.
    """
    model = ViTMAEForPreTraining(config)
    embeddings, decoder = model.vit.embeddings, model.decoder
    fill_positions(embeddings.position_embeddings)
    fill_positions(decoder.decoder_pos_embed)
    nn.init.normal_(embeddings.cls_token, std=config.initializer_range)
    nn.init.normal_(decoder.mask_token, std=config.initializer_range)
    nn.init.xavier_uniform_(embeddings.patch_embeddings.projection.weight.flatten(1))
    return model


def check_positions(model: ViTMAEForPreTraining) -> None:
    """Raises `PretrainingError` if the position embeddings of the encoder or the decoder are all the same."""
    positions = {"encoder": model.vit.embeddings.position_embeddings, "decoder": model.decoder.decoder_pos_embed}
    for part, position_embeddings in positions.items():
        if position_embeddings.std() == 0:
            raise PretrainingError(f"The {part}'s position embeddings are all the same; call fill_positions on them.")


def make_processor(image_size: int) -> ViTImageProcessorPil:
    """Builds the image processor that the trained encoder is used with."""
    return ViTImageProcessorPil(
        size={"height": image_size, "width": image_size},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        do_convert_rgb=True,
    )


class ResumableTrainer(Trainer):
    """`Trainer` that gets every weight of a checkpoint back when it resumes.

    That of transformers 5.23 gets back only those that have the same name in the file and in the model, which the
    layers of a ViT-MAE do not, and goes on with random ones (https://github.com/huggingface/transformers/issues/43701).
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = ViTMAEForPreTraining.from_pretrained(resume_from_checkpoint)
        (self.model if model is None else model).load_state_dict(saved.state_dict())


def save_log(trainer: Trainer, folder: Path) -> None:
    """Writes the loss by step, and how many images a second were trained on, to `training_log.json`."""
    history = trainer.state.log_history
    log = {
        "steps": trainer.state.global_step,
        "images_per_second": next(entry["train_samples_per_second"] for entry in reversed(history)),
        "loss": [{"step": entry["step"], "loss": entry["loss"]} for entry in history if "loss" in entry],
    }
    (folder / "training_log.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


def save_encoder(encoder: ViTMAEModel, processor: ViTImageProcessorPil, folder: Path) -> None:
    """Saves the encoder in float16 with its image processor; raises `PretrainingError` if it has diverged."""
    encoder = encoder.half()
    if not all(weights.isfinite().all() for weights in encoder.parameters()):
        raise PretrainingError("Training diverged, so that the encoder is not saved; lower --learning_rate.")
    encoder.save_pretrained(folder)
    processor.save_pretrained(folder)


def pretrain(data: DataArguments, model_arguments: ModelArguments, training: PretrainingArguments) -> None:
    """Trains a masked autoencoder and saves its encoder, its image processor and the loss log."""
    config = make_config(model_arguments)
    images = load_images(data.data, data.image_column)
    set_seed(training.seed)
    model, processor = build_model(config), make_processor(config.image_size)
    check_positions(model)
    collator = partial(collate, processor=processor)
    trainer = ResumableTrainer(model=model, args=training, train_dataset=images, data_collator=collator)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        folder = Path(training.output_dir)
        save_log(trainer, folder)
        save_encoder(model.vit, processor, folder)


def main(arguments: list[str] | None = None) -> None:
    """Runs `pretrain` with arguments from the command line; what cannot be trained ends in one sentence."""
    parser = HfArgumentParser([DataArguments, ModelArguments, PretrainingArguments], description=__doc__)
    try:
        pretrain(*parser.parse_args_into_dataclasses(arguments))
    except PretrainingError as error:
        sys.exit(f"{Path(__file__).name}: {error}")


if __name__ == "__main__":
    main()
