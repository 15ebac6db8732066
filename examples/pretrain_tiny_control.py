"""Trains the control of `pretrain_tiny_mae.py`: the same vision transformer on the same images, without masking.

The objective is SimCLR's (Chen et al. 2020, arXiv 2002.05709): the CLS tokens of two views of an image are to find
each other among those of all others. Both scripts take the same options for data, views, encoder and training:

    pip install pytorch-metric-learning
    python examples/pretrain_tiny_control.py --data photos/ --color_jitter 0.4 --grayscale 0.2 --output_dir control

A step sees `--per_device_train_batch_size` images twice, and compares those of one process. The output folder gets the
encoder as a float16 `ViTModel` with its image processor, the loss by step in `training_log.json`, and its curve;
`AutoModel.from_pretrained("control", add_pooling_layer=False)` loads it without a random pooler.
"""

from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from pretraining import (
    DataArguments,
    EncoderArguments,
    PretrainingArguments,
    PretrainingError,
    check_multiples,
    check_shares,
    check_widths,
    collate,
    initialise_embeddings,
    load_images,
    make_processor,
    run,
    train_and_save,
)
from torch import Tensor, nn
from transformers import Trainer, ViTConfig, ViTModel, set_seed

try:
    from pytorch_metric_learning.losses import SelfSupervisedLoss, SupConLoss
except ImportError:
    SelfSupervisedLoss = SupConLoss = None


@dataclass
class ContrastArguments(EncoderArguments):
    """Shape of the vision transformer and of what is compared."""

    projection_size: int = field(default=128, metadata={"help": "Width of the vectors that are compared."})
    temperature: float = field(default=0.2, metadata={"help": "Cosines are divided by it."})


@dataclass
class ContrastTrainingArguments(PretrainingArguments):
    """As for the masked autoencoder, but a last batch of fewer images, which would be an easier task, is left out."""

    dataloader_drop_last: bool = field(default=True, metadata={"help": "Leave out a last batch of fewer images."})


class TwoViewEncoder(nn.Module):
    """A vision transformer whose CLS token is to tell images apart, whatever the view.

    Args:
        encoder ([`ViTModel`]): what is kept.
        projection_size (`int`): width of the vectors that are compared.
        temperature (`float`): cosines are divided by it.
    """

    def __init__(self, encoder: ViTModel, projection_size: int, temperature: float):
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False),
            nn.BatchNorm1d(4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, projection_size),
        )
        # with two views an image, the supervised contrastive loss whose classes are the images is SimCLR's
        self.criterion = SelfSupervisedLoss(SupConLoss(temperature=temperature))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Loss of a batch `(B, 2, 3, H, W)`: two views an image."""
        views = self.encoder(pixel_values.flatten(0, 1)).last_hidden_state[:, 0]
        first, second = self.projector(views).unflatten(0, (-1, 2)).unbind(dim=1)
        return {"loss": self.contrast(first, second)}

    @torch.compiler.disable
    def contrast(self, first: Tensor, second: Tensor) -> Tensor:
        """Loss of two views of `B` images, both `(B, projection_size)`, in float32."""
        with torch.autocast(first.device.type, enabled=False):
            return self.criterion(first.float(), second.float())


def build_encoder(arguments: ContrastArguments) -> ViTModel:
    """Builds the encoder of the masked autoencoder of the same shape, with the same fixed position embeddings."""
    check_multiples(arguments, {"image_size": "patch_size", "hidden_size": "num_attention_heads"})
    check_widths(arguments, ["hidden_size"])
    shape = {name: value for name, value in asdict(arguments).items() if hasattr(EncoderArguments, name)}
    encoder = ViTModel(ViTConfig(**shape, intermediate_size=4 * arguments.hidden_size), add_pooling_layer=False)
    initialise_embeddings(encoder.embeddings, encoder.config.initializer_range)
    return encoder


def pretrain(data: DataArguments, contrast: ContrastArguments, training: ContrastTrainingArguments) -> None:
    """Trains an encoder by contrast and saves it, its image processor and the loss log."""
    if SupConLoss is None:
        raise PretrainingError("The loss comes from pytorch-metric-learning: pip install pytorch-metric-learning.")
    if contrast.temperature <= 0 or contrast.projection_size < 1:
        raise PretrainingError("temperature has to be above 0 and projection_size at least 1.")
    check_shares(data)
    set_seed(training.seed)
    encoder, processor = build_encoder(contrast), make_processor(contrast.image_size)
    images = load_images(data.data, data.image_column)
    if not 2 <= training.train_batch_size <= len(images):
        raise PretrainingError(
            "per_device_train_batch_size has to be 2 or more, since images are told apart from others of their batch, "
            f"and at most {len(images)}, the number of images."
        )
    model = TwoViewEncoder(encoder, contrast.projection_size, contrast.temperature)
    collator = partial(collate, processor=processor, arguments=data, views=2)
    trainer = Trainer(model=model, args=training, train_dataset=images, data_collator=collator)
    train_and_save(trainer, encoder, processor)


def main(arguments: list[str] | None = None) -> None:
    """Trains with arguments from the command line."""
    run(pretrain, arguments, [DataArguments, ContrastArguments, ContrastTrainingArguments], __doc__)


if __name__ == "__main__":
    main()
