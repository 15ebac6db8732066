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

from dataclasses import asdict, dataclass, field
from functools import partial

from pretraining import (
    DataArguments,
    EncoderArguments,
    PretrainingArguments,
    PretrainingError,
    check_multiples,
    check_shares,
    check_widths,
    collate,
    fill_positions,
    initialise_embeddings,
    load_images,
    make_processor,
    run,
    train_and_save,
)
from torch import nn
from transformers import Trainer, ViTMAEConfig, ViTMAEForPreTraining, set_seed


@dataclass
class ModelArguments(EncoderArguments):
    """Shape of the masked autoencoder; the names are those of `ViTMAEConfig`."""

    mask_ratio: float = field(default=0.75, metadata={"help": "Share of the patches hidden from the encoder."})
    norm_pix_loss: bool = field(default=True, metadata={"help": "Predict pixels normalised patch by patch."})
    decoder_hidden_size: int = field(default=96, metadata={"help": "Width of the decoder, a multiple of 4."})
    decoder_num_hidden_layers: int = field(default=1, metadata={"help": "Layers of the decoder."})
    decoder_num_attention_heads: int = field(default=3, metadata={"help": "Attention heads of the decoder."})


def make_config(model: ModelArguments) -> ViTMAEConfig:
    """Turns the arguments into a configuration; raises `PretrainingError` if the sizes do not fit together."""
    divisors = {
        "image_size": "patch_size",
        "hidden_size": "num_attention_heads",
        "decoder_hidden_size": "decoder_num_attention_heads",
    }
    check_multiples(model, divisors)
    check_widths(model, ["hidden_size", "decoder_hidden_size"])
    patches = (model.image_size // model.patch_size) ** 2
    if not 1 <= int(patches * (1 - model.mask_ratio)) < patches:
        raise PretrainingError(f"mask_ratio {model.mask_ratio} has to hide and to show some of {patches} patches.")
    sizes = {"intermediate_size": 4 * model.hidden_size, "decoder_intermediate_size": 4 * model.decoder_hidden_size}
    return ViTMAEConfig(**asdict(model), **sizes)


def build_model(config: ViTMAEConfig) -> ViTMAEForPreTraining:
    """Builds a masked autoencoder with random weights and fixed position embeddings, those of the decoder too."""
    model = ViTMAEForPreTraining(config)
    initialise_embeddings(model.vit.embeddings, config.initializer_range)
    fill_positions(model.decoder.decoder_pos_embed)
    nn.init.normal_(model.decoder.mask_token, std=config.initializer_range)
    return model


def check_positions(model: ViTMAEForPreTraining) -> None:
    """Raises `PretrainingError` if the position embeddings of the encoder or the decoder are all the same."""
    positions = {"encoder": model.vit.embeddings.position_embeddings, "decoder": model.decoder.decoder_pos_embed}
    for part, position_embeddings in positions.items():
        if position_embeddings.std() == 0:
            raise PretrainingError(f"The {part}'s position embeddings are all the same; call fill_positions on them.")


class ResumableTrainer(Trainer):
    """`Trainer` that gets every weight of a checkpoint back when it resumes.

    That of transformers 5.23 gets back only those that have the same name in the file and in the model, which the
    layers of a ViT-MAE do not, and goes on with random ones (https://github.com/huggingface/transformers/issues/43701).
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = ViTMAEForPreTraining.from_pretrained(resume_from_checkpoint)
        (self.model if model is None else model).load_state_dict(saved.state_dict())


def pretrain(data: DataArguments, model_arguments: ModelArguments, training: PretrainingArguments) -> None:
    """Trains a masked autoencoder and saves its encoder, its image processor and the loss log."""
    config = make_config(model_arguments)
    check_shares(data)
    images = load_images(data.data, data.image_column)
    set_seed(training.seed)
    model, processor = build_model(config), make_processor(config.image_size)
    check_positions(model)
    collator = partial(collate, processor=processor, arguments=data)
    trainer = ResumableTrainer(model=model, args=training, train_dataset=images, data_collator=collator)
    train_and_save(trainer, model.vit, processor)


def main(arguments: list[str] | None = None) -> None:
    """Trains with arguments from the command line."""
    run(pretrain, arguments, [DataArguments, ModelArguments, PretrainingArguments], __doc__)


if __name__ == "__main__":
    main()
