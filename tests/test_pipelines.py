"""The task is registered, answers like the evaluation, and takes images however they come."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from soap_hf import SOAPModelWrapper, SOAPProjection
from soap_hf.evaluation.bilateral_solver import BilateralGrid
from soap_hf.evaluation.comparison import Comparison
from soap_hf.evaluation.salient_object import coarse_mask, in_whole_patches, raw_grid, resized
from soap_hf.runtime.errors import HeadError
from tests.conftest import noise_image

TASK = "salient-object-segmentation"
BOX = (16, 8, 48, 40)


@pytest.fixture
def scene():
    """A red rectangle on green."""
    image = Image.new("RGB", (80, 64), (20, 200, 40))
    image.paste((220, 30, 20), BOX)
    return image


@pytest.fixture
def model(vit, projection, processor):
    """A head on the tiny ViT, without anything of the positions in its tokens."""
    torch.nn.init.zeros_(vit.embeddings.position_embeddings)
    return SOAPModelWrapper.from_backbone(vit, projection, image_processor=processor)


@pytest.fixture
def segment(model):
    return pipeline(TASK, model=model, device="cpu")


@pytest.fixture
def head(model, vit, tmp_path):
    vit.save_pretrained(tmp_path / "vit")
    model.config.backbone_name_or_path = str(tmp_path / "vit")
    model.save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def same(one, other):
    return (
        one["mask"].tobytes() == other["mask"].tobytes()
        and torch.equal(one["score_map"], other["score_map"])
        and one["box"] == other["box"]
    )


def test_the_object_comes_as_mask_score_map_and_box(segment, scene):
    found = segment(scene)
    assert list(found) == ["mask", "score_map", "box"]
    assert (found["mask"].mode, found["mask"].size) == ("L", scene.size)
    expected = np.zeros((64, 80), np.uint8)
    expected[8:40, 16:48] = 255
    assert (np.array(found["mask"]) == expected).all()
    assert found["box"] == {"xmin": 16, "ymin": 8, "xmax": 48, "ymax": 40}
    assert found["score_map"].shape == (64, 80)
    assert found["score_map"].dtype == torch.float32
    assert torch.equal(found["score_map"] > 0.5, torch.from_numpy(expected) > 0)


@pytest.mark.parametrize(("apply_soap", "method"), [(True, "soap"), (False, "raw")])
def test_it_is_what_the_evaluation_measures(model, segment, apply_soap, method):
    image = noise_image(0, (61, 45))
    comparison = Comparison.of(model)
    tokens = comparison.methods[method](raw_grid(comparison, resized(image, in_whole_patches((45, 61), 8))))
    mask = coarse_mask(tokens, (45, 61))
    scores = BilateralGrid(np.array(image)).refine(mask).clip(0, 1)
    assert segment(image, apply_soap=apply_soap)["score_map"].numpy() == pytest.approx(scores, abs=1e-6)
    assert (np.array(segment(image, apply_soap=apply_soap, refine=False)["mask"]) == 255 * mask).all()


def test_clean_tokens_are_the_default_and_raw_ones_an_option(vit, processor):
    basis = torch.linalg.qr(torch.randn(32, 32)).Q[:, :31]
    model = SOAPModelWrapper.from_backbone(vit, SOAPProjection(basis, torch.ones(31)), image_processor=processor)
    segment, image = pipeline(TASK, model=model, device="cpu"), noise_image(1, (80, 64))
    assert same(segment(image), segment(image, apply_soap=True))
    assert not same(segment(image), segment(image, apply_soap=False))
    raw_by_default = pipeline(TASK, model=model, device="cpu", apply_soap=False)
    assert same(raw_by_default(image), segment(image, apply_soap=False))


def test_images_come_as_paths_urls_lists_and_generators(segment, scene, tmp_path, monkeypatch):
    scene.save(tmp_path / "scene.png")
    expected = segment(scene)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/scene.png"
        sources = [str(tmp_path / "scene.png"), tmp_path / "scene.png", url, scene, scene.convert("RGBA")]
        assert all(same(found, expected) for found in segment(sources, timeout=10))
        server.shutdown()
    assert all(same(found, expected) for found in segment(image for image in (scene, scene)))


def test_a_batch_of_images_of_different_sizes_is_one_by_one(segment, scene):
    images = [scene, noise_image(0, (33, 50)), scene.convert("L"), noise_image(1, (5, 3))]
    found = segment(images, batch_size=4)
    assert [one["mask"].size for one in found] == [image.size for image in images]
    assert all(same(one, segment(image)) for one, image in zip(found, images, strict=True))


def test_sixteen_bit_images_are_scaled_not_clipped(segment):
    levels = np.full((64, 80), 6000, np.uint16)
    levels[8:40, 16:48] = 60000
    assert segment(Image.fromarray(levels))["box"] == {"xmin": 16, "ymin": 8, "xmax": 48, "ymax": 40}


@pytest.mark.parametrize("refine", [True, False])
def test_an_image_of_one_colour_has_an_empty_mask(segment, caplog, refine):
    found = segment(Image.new("RGB", (40, 32), "red"), refine=refine)
    assert found["box"] is None
    assert not np.array(found["mask"]).any()
    assert not found["score_map"].any()
    assert "No object is found in this image" in caplog.text


def test_one_size_for_all_on_request(segment, scene, vit):
    seen = []
    vit.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["pixel_values"].shape), with_kwargs=True)
    assert segment(scene, image_size=32)["mask"].size == scene.size
    assert seen == [(1, 3, 32, 32)]


def test_a_head_is_loaded_by_name_with_its_processor_or_without(segment, scene, head):
    expected = segment(scene)
    assert same(pipeline(TASK, model=str(head), device="cpu")(scene), expected)
    (head / "preprocessor_config.json").unlink()
    without = pipeline(TASK, model=str(head), device="cpu")
    assert without.image_processor is None
    assert without(scene)["mask"].tobytes() == expected["mask"].tobytes()


def test_a_processor_passed_is_the_one_used(model, processor, vit, scene):
    processor.image_mean = [0.9, 0.9, 0.9]
    segment = pipeline(TASK, model=model, image_processor=processor, device="cpu")
    seen = []
    vit.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
    segment(scene)
    assert seen[0].min() == pytest.approx((20 / 255 - 0.9) / processor.image_std[0], abs=1e-5)


def test_saving_writes_the_head_alone(segment, scene, head, tmp_path):
    loaded = pipeline(TASK, model=str(head), device="cpu")
    loaded.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(path.name for path in head.iterdir())
    assert same(pipeline(TASK, model=str(tmp_path / "again"), device="cpu")(scene), loaded(scene))


def test_a_bare_backbone_is_refused(vit):
    with pytest.raises(HeadError, match="ViTModel is no head; fit one"):
        pipeline(TASK, model=vit, device="cpu")


def test_a_slip_of_the_pen_is_not_ignored(segment, scene):
    with pytest.raises(TypeError, match="apply_soup"):
        segment(scene, apply_soup=False)
