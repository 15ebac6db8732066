"""Masks are read for what they mean, whatever they were saved as, and turned with their images."""

import io

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from soap_hf import SOAPModelWrapper
from soap_hf.data.image_files import TURNS
from soap_hf.evaluation.comparison import Comparison
from soap_hf.evaluation.examples import Examples
from soap_hf.evaluation.masks import TWO_LEVELS, read_mask
from soap_hf.evaluation.saliency import evaluate_saliency
from soap_hf.runtime.errors import DataError
from tests.conftest import noise_image

OBJECT = np.zeros((6, 8), bool)
OBJECT[1:4, 2:7] = True


def levels(background, thing, dtype=np.uint8):
    return Image.fromarray(np.where(OBJECT, thing, background).astype(dtype))


def palette(colours, thing=1, void=False):
    numbers = np.where(OBJECT, thing, 0).astype(np.uint8)
    if void:
        numbers[5, 7] = 255
    image = Image.fromarray(numbers, "P")
    image.putpalette(np.array([*colours, *[(0, 0, 0)] * (255 - len(colours)), (224, 224, 192)]).flatten().tolist())
    return image


def coloured(background, thing, mode="RGB"):
    return Image.fromarray(np.where(OBJECT[..., None], thing, background).astype(np.uint8), mode)


def several():
    image = np.array(coloured((0, 0, 0), (128, 0, 0)))
    image[1, 2:7] = (0, 64, 0)
    return Image.fromarray(image)


def numbers(*things, dtype=np.uint8):
    """Classes side by side in the object."""
    image = np.zeros(OBJECT.shape, dtype)
    image[1:4, 2:5], image[1:4, 5:7] = things
    return Image.fromarray(image)


def of_its_own(*colours):
    """A palette image whose numbers go from the object to the background, as quantisation may order them."""
    image = Image.fromarray(np.where(OBJECT, 0, len(colours) - 1).astype(np.uint8), "P")
    image.putpalette(np.array(colours).flatten().tolist())
    return image


def cut_out(mode, hidden=0):
    """A picture with dark parts on a clear ground."""
    colours = np.random.default_rng(0).integers(0, 255, (*OBJECT.shape, 4))
    colours[2, 3:6, :3] = 0
    colours[~OBJECT, :3] = hidden
    image = Image.fromarray(np.dstack([colours[..., :3], np.where(OBJECT, 255, 0)]).astype(np.uint8), "RGBA")
    return image.convert(mode)


MASKS = {
    "classes 7 and 255": numbers(7, 255),
    "classes 13 and 130": numbers(13, 130),
    "classes 40 and 200": numbers(40, 200),
    "16 bits of classes 300 and 1000": numbers(300, 1000, dtype=np.uint16),
    "32 bits of instances": numbers(1000, 70000, dtype=np.int32),
    "classes as RGB": numbers(13, 130).convert("RGB"),
    "palette of its own, red and black": of_its_own((255, 0, 0), (0, 0, 0)),
    "palette of its own, three colours": of_its_own((255, 0, 0), (0, 9, 0), (0, 0, 0)),
    "cut-out": cut_out("RGBA"),
    "cut-out on hidden white": cut_out("RGBA", 255),
    "grey cut-out": cut_out("LA"),
    "clear ground round a drawn mask": coloured((0, 0, 0, 200), (255, 0, 0, 255), "RGBA"),
    "0 and 255": levels(0, 255),
    "0 and 1": levels(0, 1),
    "0 and 100": levels(0, 100),
    "1 and 2": levels(1, 2),
    "one bit": levels(False, True, bool),
    "16 bits": levels(0, 65535, np.uint16),
    "16 bits of 0 and 1": levels(0, 1, np.uint16),
    "32 bits of numbers": levels(0, 7, np.int32),
    "fractions": levels(0, 0.75, np.float32),
    "palette of VOC": palette([(0, 0, 0), (128, 0, 0)], void=True),
    "palette of DAVIS, second object": palette([(0, 0, 0), (128, 0, 0), (0, 128, 0)], thing=2),
    "dark palette": palette([(0, 0, 0), (1, 0, 3)]),
    "grey palette, white first": palette([(0, 0, 0), (255, 255, 255)]),
    "red on black": coloured((0, 0, 0), (255, 0, 0)),
    "dark blue on black": coloured((0, 0, 0), (0, 0, 60)),
    "white on green": coloured((0, 120, 0), (255, 255, 255)),
    "grey as RGB": coloured((0, 0, 0), (100, 100, 100)),
    "several colours on black": several(),
    "grey with alpha": coloured((0, 255), (255, 255), "LA"),
    "alpha of one grey": coloured((90, 0), (90, 255), "LA"),
    "alpha of one colour": coloured((9, 8, 7, 0), (9, 8, 7, 255), "RGBA"),
    "alpha of black": coloured((0, 0, 0, 0), (0, 0, 0, 200), "RGBA"),
    "colour with alpha everywhere": coloured((0, 0, 0, 255), (255, 0, 0, 255), "RGBA"),
    "object on clear": coloured((0, 0, 0, 0), (255, 255, 255, 255), "RGBA"),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("saved", [False, True])
def test_the_object_is_found(name, saved):
    mask = MASKS[name]
    if saved:
        file = io.BytesIO()
        mask.save(file, "PNG" if mask.mode not in ("F", "I") else "TIFF")
        mask = Image.open(file)
    assert np.array_equal(read_mask(mask).object, OBJECT), read_mask(mask).reading


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_mask_saved_with_losses_is_found(mode):
    thing = np.zeros((64, 64), bool)
    thing[16:40, 8:48] = True
    file = io.BytesIO()
    Image.fromarray(np.where(thing[..., None], (255, 0, 0), 0).astype(np.uint8)).convert(mode).save(file, "JPEG")
    found = read_mask(Image.open(file)).object
    assert (found == thing).mean() > 0.99


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 127, 128, 255], [0, 0, 1, 1]), ([0, 30, 60, 100], [0, 0, 1, 1]), ([0, 1, 2, 3], [0, 1, 1, 1])],
)
def test_levels_between_are_divided_in_the_middle_and_numbers_are_not(values, expected):
    assert read_mask(Image.fromarray(np.array([values], np.uint8))).object.astype(int).tolist() == [expected]


@pytest.mark.parametrize(("level", "shown"), [(0, False), (1, True), (255, True)])
def test_a_mask_of_one_level_is_empty_or_full(level, shown):
    assert (read_mask(Image.new("L", (3, 2), level)).object == shown).all()


def png(image, **kwargs):
    file = io.BytesIO()
    image.save(file, "PNG", **kwargs)
    return {"bytes": file.getvalue(), "path": None}


def stored(image, orientation):
    """A file that shows `image` to those who heed its orientation."""
    undone = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[274] = orientation
    file = png(image.transpose(undone.get(orientation, TURNS[orientation])), exif=exif)
    assert np.array_equal(ImageOps.exif_transpose(Image.open(io.BytesIO(file["bytes"]))), image)
    return file


def pairs(*rows):
    made = Dataset.from_dict({"image": [image for image, _ in rows], "mask": [mask for _, mask in rows]})
    return made.cast_column("image", ImageFeature()).cast_column("mask", ImageFeature())


def read(dataset, **kwargs):
    examples = Examples(dataset, mask_column="mask", **kwargs)
    return [example for part in examples.measured(lambda example: example, list) for example in part.value]


SIDEWAYS = [5, 6, 7, 8]


@pytest.mark.parametrize("orientation", SIDEWAYS)
@pytest.mark.parametrize("scale", [1, 2])
def test_a_mask_of_the_stored_shape_is_turned_with_its_image(orientation, scale, caplog):
    image, mask = noise_image(3, (20, 12)), Image.new("L", (20, 12))
    mask.paste(255, (2, 2, 8, 6))
    file = stored(image, orientation)
    undone = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}.get(orientation, TURNS[orientation])
    unturned = png(mask.transpose(undone).reduce(scale))
    for example in read(pairs((file, unturned), (file, stored(mask, orientation)))):
        assert np.array_equal(example.image, image)
        assert np.array_equal(example.mask, mask)
    assert "1 masks were turned as the EXIF orientation of their images says: row 0" in caplog.text


@pytest.mark.parametrize("orientation", SIDEWAYS)
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("size", [(20, 12), (64, 63)])
def test_a_mask_of_the_shape_that_is_seen_is_left_as_it_is(orientation, scale, size, caplog):
    if size == (64, 63) and scale == 2:
        size = (68, 60)
    image, mask = noise_image(3, size), Image.new("L", size)
    mask.paste(255, (2, 2, 8, 6))
    for example in read(pairs(*[(stored(image, orientation), png(mask.reduce(scale)))] * 2)):
        assert np.array_equal(example.mask, mask)
    assert not caplog.text


@pytest.mark.parametrize(
    ("orientation", "size"), [*((turn, (20, 12)) for turn in (2, 3, 4)), *((turn, (16, 16)) for turn in SIDEWAYS)]
)
def test_a_mask_whose_shape_does_not_tell_is_taken_as_it_is_and_said(orientation, size, caplog):
    image, mask = noise_image(3, size), Image.new("L", size)
    mask.paste(255, (2, 2, 8, 6))
    file = stored(image, orientation)
    turned_by_itself = (file, stored(mask, orientation))
    for example in read(pairs((file, png(mask)), (file, png(mask.reduce(2))), turned_by_itself)):
        assert np.array_equal(example.mask, mask)
    assert "2 masks have the shape of their images both as stored and as turned by EXIF, and were" in caplog.text


def test_a_mask_of_another_aspect_ratio_is_told_by_name(caplog):
    image = noise_image(0, (40, 20))
    read(pairs((png(image), png(Image.new("L", (20, 10)))), (png(image), png(Image.new("L", (20, 20))))))
    assert "1 masks have another aspect ratio than their images, and were stretched: row 1." in caplog.text


@pytest.fixture
def comparison(vit, projection, processor):
    return Comparison.of(SOAPModelWrapper.from_backbone(vit, projection, image_processor=processor))


def evaluated(comparison, *masks):
    rows = pairs(*((png(noise_image(seed, (32, 32))), png(mask)) for seed, mask in enumerate(masks)))
    return evaluate_saliency(comparison, Examples(rows, mask_column="mask"), bilateral=False, progress=False)


def test_images_without_an_object_are_left_out_counted_and_named(comparison, caplog):
    thing = levels(0, 255).resize((32, 32), Image.Resampling.NEAREST)
    rows, found = evaluated(comparison, thing, Image.new("L", (32, 32)), thing)[1:]
    assert [row["image"] for row in rows] == ["row 0", "row 2"]
    assert (found["counts"]["images"], found["counts"]["empty_masks"]) == (2, 1)
    assert found["means"]["raw"]["iou"] == np.mean([row["raw_iou"] for row in rows])
    assert "1 images have an empty mask, and are left out: row 1." in caplog.text


def large(mask):
    return mask.resize((32, 32), Image.Resampling.NEAREST)


def test_levels_mean_the_same_in_all_masks(comparison):
    one, two = Image.new("L", (32, 32), 1), Image.new("L", (32, 32), 2)
    found = evaluated(comparison, large(levels(1, 2)), one, two)[2]
    assert found["counts"]["empty_masks"] == 1  # level 1 is the background
    assert found["counts"]["images"] == 2
    things = Image.fromarray(np.where(OBJECT, 7, 13).astype(np.uint8))  # no background in it
    found = evaluated(comparison, large(numbers(7, 13)), large(things))[2]
    assert found["settings"]["masks"] == {"numbers of classes": 2}


def test_numbers_without_a_background_are_refused_before_the_work(comparison, monkeypatch):
    monkeypatch.setattr("soap_hf.evaluation.saliency._measure", None)
    trimap = np.array(levels(2, 1))
    trimap[1:4, 2:5] = 3
    with pytest.raises(DataError, match=r"The mask of row 1 .* the levels 1, 2, 3: save the background as 0"):
        evaluated(comparison, large(levels(1, 2)), large(Image.fromarray(trimap)))


def test_soft_borders_are_no_classes(comparison):
    edge = np.array(large(levels(0, 255)))
    edge[4, 4:20] = [60, 190] * 8
    found = evaluated(comparison, Image.fromarray(edge), large(levels(0, 254)))[2]
    assert found["settings"]["masks"] == {"levels above the middle": 1, TWO_LEVELS: 1}


def test_masks_that_are_all_empty_or_full_are_refused(comparison):
    with pytest.raises(DataError, match="Every mask is empty or full"):
        evaluated(comparison, Image.new("L", (32, 32)), Image.new("L", (32, 32), 255))


def test_how_masks_were_read_is_told_once(comparison, caplog):
    thing = palette([(0, 0, 0), (128, 0, 0)]).resize((32, 32), Image.Resampling.NEAREST)
    found = evaluated(comparison, thing, thing, levels(0, 255).resize((32, 32)))[2]
    assert found["settings"]["masks"]["numbers of a palette"] == 2
    assert caplog.text.count("The object in the masks was read from numbers of a palette (2)") == 1
