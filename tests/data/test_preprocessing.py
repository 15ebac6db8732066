"""Real and synthetic images reach the backbone through one map of colours and at one size."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import (
    BeitImageProcessorPil,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    PixtralImageProcessorPil,
    ViTImageProcessorPil,
)

from soap_hf.compat import AutoImageProcessor
from soap_hf.data.preprocessing import ImagePreprocessor, load_image_processor, to_rgb
from soap_hf.runtime.errors import DataError
from soap_hf.statistics.synthetic import IMAGENET_MEAN, IMAGENET_STD
from tests.conftest import noise_image

OPENCLIP = {"image_mean": [0.481, 0.458, 0.408], "image_std": [0.269, 0.261, 0.276]}
IMAGENET = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
COLOUR = (200, 90, 30)


def dinov2(size=256, crop=224):
    """DINOv2's: shortest edge to 256, 224 from the centre."""
    crop_size = {"height": crop, "width": crop}
    return BitImageProcessorPil(size={"shortest_edge": size}, crop_size=crop_size, **IMAGENET)


class SwappedChannels(BeitImageProcessorPil):
    """Makes BGR, as MobileViT's processor does."""

    def preprocess(self, images, **kwargs):
        features = super().preprocess(images, **kwargs)
        features["pixel_values"] = features["pixel_values"].flip(1)
        return features


PROCESSORS = {
    "vit": ViTImageProcessorPil(),
    "clip": CLIPImageProcessorPil(),
    "beit": BeitImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3, do_center_crop=False),
    "beit with crop": BeitImageProcessorPil(do_center_crop=True),
    "openclip convnext": ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875, **OPENCLIP),
    "dinov2": dinov2(),
    "unnormalised": ViTImageProcessorPil(do_normalize=False),
}


@pytest.fixture(params=PROCESSORS)
def any_processor(request):
    """The image processors of common backbones, each in turn."""
    return PROCESSORS[request.param]


def horizontal_ramp(width, height):
    """A picture whose red grows from 0 at its left to 255 at its right."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    return Image.fromarray(pixels)


def plain_rgb(size, colour=COLOUR):
    """The same colour as an RGB tensor in [0, 1]."""
    return torch.tensor(colour).div(255).view(1, 3, 1, 1).expand(1, 3, *size)


def test_real_and_synthetic_images_of_one_colour_give_the_same_pixels(any_processor):
    preprocess = ImagePreprocessor(any_processor)
    real = preprocess(Image.new("RGB", (250, 310), COLOUR))
    synthetic = preprocess.normalize(plain_rgb(preprocess.size))[0]
    assert real.shape == synthetic.shape == (3, 224, 224)
    torch.testing.assert_close(real, synthetic, rtol=0, atol=1e-6)


def test_the_same_pixels_are_those_of_the_processor_alone(any_processor):
    square = noise_image(0, (224, 224))
    expected = any_processor(square, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(ImagePreprocessor(any_processor)(square), expected)


def test_normalize_is_affine_and_clips_nothing():
    preprocess = ImagePreprocessor(PROCESSORS["vit"])
    rgb = torch.tensor([-0.5, 0.3, 1.7]).view(1, 3, 1, 1).expand(2, 3, 5, 7)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.5] * 3, [0.5] * 3))
    torch.testing.assert_close(preprocess.normalize(rgb), (rgb - mean) / std)


def test_normalize_follows_a_processor_that_swaps_channels():
    preprocess = ImagePreprocessor(BeitImageProcessorPil(do_normalize=False))
    swapping = ImagePreprocessor(SwappedChannels(do_normalize=False))
    rgb = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(swapping.normalize(rgb), preprocess.normalize(rgb).flip(1))


@pytest.mark.parametrize("size", [(112, 112), (448, 448), (224, 448)], ids=str)
def test_image_size_scales_the_resize_in_proportion_to_the_crop(size):
    preprocess = ImagePreprocessor(dinov2(), size)
    pixels = preprocess(noise_image(1, (500, 400)))
    assert tuple(pixels.shape) == (3, *size)
    assert preprocess.resized_processor().size["shortest_edge"] == round(256 * max(size) / 224)
    assert preprocess.resized_processor().crop_size == {"height": size[0], "width": size[1]}


def test_a_scaled_crop_shows_the_same_part_of_the_picture():
    photo = horizontal_ramp(600, 512)
    small = ImagePreprocessor(dinov2(), (112, 112))(photo)
    large = ImagePreprocessor(dinov2())(photo)
    shrunk = interpolate(large[None], (112, 112), mode="area")[0]
    torch.testing.assert_close(small, shrunk, rtol=0, atol=0.05)


def test_a_height_and_width_before_a_crop_scale_too():
    processor = CLIPImageProcessorPil(size={"height": 256, "width": 256}, crop_size={"height": 224, "width": 224})
    resized = ImagePreprocessor(processor, (112, 448)).resized_processor()
    assert dict(resized.size)["height"] == 128
    assert dict(resized.size)["width"] == 512


def test_a_shortest_edge_alone_crops_about_the_centre():
    processor = BitImageProcessorPil(size={"shortest_edge": 64}, do_center_crop=False, do_normalize=False)
    preprocess = ImagePreprocessor(processor)
    wide, tall = preprocess(horizontal_ramp(256, 64)), preprocess(horizontal_ramp(256, 64).transpose(Image.ROTATE_90))
    assert wide.shape == tall.shape == (3, 64, 64)
    assert wide[0].mean() == pytest.approx(0.5, abs=0.01)  # the middle quarter of the ramp, 3/8 to 5/8
    assert wide[0].min() == pytest.approx(3 / 8, abs=0.02)
    assert wide[0].max() == pytest.approx(5 / 8, abs=0.02)
    torch.testing.assert_close(tall, wide.transpose(1, 2).flip(1), rtol=0, atol=0.02)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16", "LA"])
def test_every_mode_becomes_three_channels(mode, processor):
    pixels = ImagePreprocessor(processor)(in_mode(mode))
    assert pixels.shape == (3, 32, 32)
    assert torch.isfinite(pixels).all()


def in_mode(mode):
    """A ramp in one of Pillow's modes."""
    ramp = horizontal_ramp(64, 48)
    if mode == "I;16":
        return Image.fromarray(np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1)))
    return ramp.convert(mode)


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1))
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    rgb = np.asarray(to_rgb(image), dtype=float)
    assert np.abs(rgb - values[..., None] / 257).max() <= 1


def test_colours_of_other_modes_are_kept():
    one_bit = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1")
    assert to_rgb(one_bit).getpixel((1, 0)) == (255, 255, 255)
    assert to_rgb(one_bit).getpixel((0, 0)) == (0, 0, 0)
    palette = Image.new("RGB", (4, 4), COLOUR).convert("P", palette=Image.Palette.ADAPTIVE)
    for image in (palette, Image.new("RGBA", (4, 4), (*COLOUR, 128)), Image.new("CMYK", (4, 4), (55, 165, 225, 0))):
        assert to_rgb(image).getpixel((0, 0)) == pytest.approx(COLOUR, abs=1), image.mode
    assert to_rgb(Image.new("L", (4, 4), 77)).getpixel((0, 0)) == (77, 77, 77)


def test_without_a_processor_the_documented_default_warns(vit, tmp_path, caplog, monkeypatch):
    vit.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for name in (None, str(tmp_path)):
        processor = load_image_processor(name, (32, 48))
        assert "ImageNet mean and std" in caplog.text
        caplog.clear()
        preprocess = ImagePreprocessor(processor)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        expected = (torch.tensor(COLOUR).view(3, 1, 1) / 255 - mean) / std
        pixels = preprocess(Image.new("RGB", (90, 70), COLOUR))
        torch.testing.assert_close(pixels, expected.expand(3, 32, 48), rtol=0, atol=1e-5)


def test_the_backbones_own_processor_is_loaded_without_a_warning(mae_folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert ImagePreprocessor(load_image_processor(str(mae_folder), (32, 32))).size == (64, 64)
    assert not caplog.text


def test_a_processor_without_a_fixed_size_needs_image_size():
    processor = PixtralImageProcessorPil(size={"longest_edge": 128}, patch_size={"height": 16, "width": 16})
    with pytest.raises(DataError, match="PixtralImageProcessorPil has no fixed size; pass image_size"):
        ImagePreprocessor(processor)


def test_a_processor_that_cannot_make_one_size_is_refused():
    with pytest.raises(DataError, match=r"not \(3, 96, 160\).*hoose another image_size or image processor"):
        ImagePreprocessor(ConvNextImageProcessorPil(size={"shortest_edge": 224}), (96, 160))
    with pytest.raises(DataError, match="hoose another image_size or image processor"):
        ImagePreprocessor(ViTImageProcessorPil(do_resize=False))


@pytest.mark.parametrize("name", ["vit", "clip", "dinov2", "openclip convnext"])
def test_a_resized_processor_comes_back_with_the_same_pixels(name, tmp_path):
    preprocess = ImagePreprocessor(PROCESSORS[name], (96, 96))
    preprocess.resized_processor().save_pretrained(tmp_path)
    loaded = ImagePreprocessor(AutoImageProcessor.from_pretrained(tmp_path))
    photo = noise_image(2, (150, 110))
    assert loaded.size == (96, 96)
    assert torch.equal(loaded(photo), preprocess(photo))


def test_a_processor_at_its_own_size_is_left_alone():
    processor = PROCESSORS["vit"]
    assert ImagePreprocessor(processor, (224, 224)).resized_processor() is processor
    assert ImagePreprocessor(processor).resized_processor() is processor


@pytest.mark.parametrize("size", [(60_000, 2), (2, 60_000), (4_000, 7)])
def test_a_very_long_image_is_cropped_before_it_is_resized(size):
    preprocess = ImagePreprocessor(dinov2())
    largest = []
    resize = preprocess.processor.resize
    preprocess.processor.resize = lambda image, *args, **kwargs: (
        largest.append(image.shape) or resize(image, *args, **kwargs)
    )
    image = noise_image(3).resize(size)
    assert preprocess(image).shape == (3, 224, 224)
    assert max(largest[-1]) <= 32 * min(size)


def test_an_image_that_is_not_very_long_is_not_cropped():
    preprocess = ImagePreprocessor(dinov2())
    image = noise_image(3).resize((20 * 31, 20))
    expected = dinov2()(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(preprocess(image), torch.as_tensor(expected))
