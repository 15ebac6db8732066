"""Images that people bring are read whole, small and upright, or refused in a sentence."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from soap_hf.explore import Session, read_photo
from soap_hf.explore.html import notes_html
from soap_hf.explore.photos import LARGEST_SIDE, Photo
from soap_hf.runtime.errors import DataError
from tests.conftest import noise_image


def header_only(width, height):
    """A PNG file that says how large it is, and holds nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_an_image_is_read_as_it_is(tmp_path):
    noise_image(0).save(tmp_path / "a.png")
    photo = read_photo(tmp_path / "a.png")
    assert (photo.name, photo.notes) == ("a.png", ())
    np.testing.assert_array_equal(np.asarray(photo.image), np.asarray(noise_image(0)))


def test_a_huge_image_is_scaled_and_that_is_said(tmp_path):
    Image.new("RGB", (6000, 3000), "red").save(tmp_path / "huge.png")
    photo = read_photo(tmp_path / "huge.png")
    assert photo.image.size == (LARGEST_SIDE, LARGEST_SIDE // 2)
    assert photo.notes == ("scaled from 6000 × 3000 to 1536 × 768 pixels",)


@pytest.mark.parametrize("size", [(12_000, 12_000), (60_000, 60_000)])
def test_a_small_file_of_too_many_pixels_is_refused_unread(tmp_path, size, recwarn):
    (tmp_path / "bomb.png").write_bytes(header_only(*size))
    with pytest.raises(
        DataError, match=r"bomb.png has (144|too many) (million )?pixels; choose an image of up to 100"
    ):
        read_photo(tmp_path / "bomb.png")
    assert not recwarn


def test_transparency_is_left_out_and_that_is_said(tmp_path):
    image = noise_image(0).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 7))
    image.save(tmp_path / "clear.png")
    photo = read_photo(tmp_path / "clear.png")
    assert photo.image.mode == "RGB"
    assert photo.notes == ("its transparency is left out",)
    np.testing.assert_array_equal(np.asarray(photo.image), np.asarray(noise_image(0)))


def test_an_animation_shows_its_first_frame_and_that_is_said(tmp_path):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    photo = read_photo(tmp_path / "moves.gif")
    assert photo.notes[0] == "the first of its 3 frames"
    assert photo.image.getpixel((5, 5)) == (255, 0, 0)


def test_a_turned_photograph_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_photo(tmp_path / "turned.jpg").image.size == (20, 40)


def test_what_is_no_image_is_refused_in_a_sentence(tmp_path):
    noise_image(0, (64, 64)).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    for name, written in {"text.png": b"<script>", "empty.jpg": b"", "half.png": content[: len(content) // 2]}.items():
        (tmp_path / name).write_bytes(written)
        with pytest.raises(DataError, match=rf"^{name} cannot be read as an image \(.+\); choose another file\.$"):
            read_photo(tmp_path / name)
    with pytest.raises(DataError, match=r"gone\.png cannot be read as an image"):
        read_photo(tmp_path / "gone.png")


def test_a_name_is_shown_printable_short_and_escaped(tmp_path):
    noise_image(0).save(tmp_path / "a.png")
    hostile = "<img src=x onerror=alert(1)>\x1b[31m" + "long" * 50 + ".png"
    photo = read_photo(tmp_path / "a.png", hostile)
    assert len(photo.name) <= 60
    assert "\x1b" not in photo.name
    shown = notes_html(Session().with_photo(0, Photo(photo.name, photo.image, ("a note",))))
    assert "<img" not in shown
    assert "&lt;img src=x onerror" in shown
