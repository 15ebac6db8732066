"""What the explorer shows is what the library computes, with no forward pass too many, and for each one alone."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
import pytest
import torch

from soap_hf import fit_soap
from soap_hf.evaluation.methods import method_projections
from soap_hf.explore import (
    Choice,
    Explorer,
    Photo,
    Session,
    colour_view,
    object_view,
    response_view,
    similarity_view,
)
from soap_hf.explore.explorer import KEPT_PROJECTIONS
from soap_hf.explore.session import CLEAN, MOST_KEPT
from soap_hf.figures import look_at, response_overlay, saliency_masks, token_colours
from soap_hf.figures.similarity import best_match, similarities
from soap_hf.runtime.errors import DataError, HeadError, SOAPError
from tests.conftest import noise_image

SHARP = {"rtol": 0, "atol": 1e-5}


def images_of(session):
    return [kept.photo.image for kept in session.images]


def drawn(figure):
    """The pictures of a figure, in reading order."""
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


class Forwards:
    """Counts the forward passes of a backbone."""

    def __init__(self, model):
        self.count = 0
        model.backbone.register_forward_hook(self)

    def __call__(self, *_):
        self.count += 1


def test_tokens_are_those_of_the_library_raw_and_clean(explorer, head, session):
    moment = session.at(explorer, Choice(-1))
    for number, expected in enumerate(look_at(head, images_of(session))):
        torch.testing.assert_close(moment.pictures[number].tokens["raw"], expected.tokens["raw"], **SHARP)
        torch.testing.assert_close(moment.pictures[number].tokens[CLEAN], expected.tokens["soap"], **SHARP)


def test_similarities_are_those_of_the_backbones_own_tokens(explorer, head, vit):
    """By the plain model and torch alone."""
    first, second = noise_image(0, (32, 32)), noise_image(1, (32, 32))
    session = Session().with_photo(0, Photo("a", first)).with_photo(1, Photo("b", second)).with_query(0, 0.3, 0.9)
    moment = session.at(explorer, Choice(-1))
    assert moment.patch == (1, 3)
    pixels = head.image_processor([first, second], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        raw = vit(pixels).last_hidden_state[:, 1:].view(2, 4, 4, 32)
        clean = raw @ head.projections["-1"].matrix()
    for name, tokens in (("raw", raw), (CLEAN, clean)):
        expected = torch.nn.functional.cosine_similarity(tokens[0, 1, 3], tokens, dim=-1)
        for number in (0, 1):
            found = similarities(moment.pictures[0].tokens[name], moment.pictures[number].tokens[name], moment.patch)
            torch.testing.assert_close(found, expected[number], **SHARP)
    view = similarity_view(moment)
    assert [len(row) for row in view.rows] == [3, 3]
    row, column = best_match(torch.nn.functional.cosine_similarity(clean[0, 1, 3], clean[1], dim=-1))
    assert f"clean row {row + 1}, column {column + 1}, cosine" in view.sentences[1]
    assert f"row {row + 1}, column {column + 1}" in view.rows[1][2].description


@pytest.mark.parametrize("mu", [0, 1, 5, 32])
def test_a_strength_is_that_of_a_head_reweighted(explorer, head, session, mu):
    moment = session.at(explorer, Choice(-1, "soap", mu))
    (expected, _) = look_at(copy.deepcopy(head).reweight(mu), images_of(session))
    torch.testing.assert_close(moment.pictures[0].tokens[CLEAN], expected.tokens["soap"], **SHARP)


@pytest.mark.parametrize("method", ["zero-image", "top-pc"])
def test_baselines_are_those_of_comparisons(explorer, head, session, method):
    for rank in (3, 5):
        moment = session.at(explorer, Choice(-1, method, rank))
        clean = method_projections(head, [method], rank=rank)[method]
        expected = clean(moment.pictures[0].tokens["raw"])
        torch.testing.assert_close(moment.pictures[0].tokens[CLEAN], expected, rtol=0, atol=1e-4)
    assert session.at(explorer, Choice(-1, method, 0)).removed == 0


def test_only_images_and_layers_need_a_forward_pass(deep, session):
    explorer = Explorer(deep, "deep")
    seen = Forwards(deep)
    session = session.kept_at(explorer, -1)
    assert seen.count == 2, "one for each image"
    for strength in (0, 1, 2, 3):
        for method in ("soap", "top-pc"):
            moment = session.with_query(1, 0.1 * strength, 0.5).at(explorer, Choice(-1, method, strength))
            similarity_view(moment), colour_view(moment), response_view(moment, 0)
    assert seen.count == 2
    for strength in (1, 2, 3):
        session.at(explorer, Choice(-1, "zero-image", strength))
    assert seen.count == 3, "one black image for all strengths"
    session = session.kept_at(explorer, 1).kept_at(explorer, -1).kept_at(explorer, 1)
    assert seen.count == 5


def test_layers_have_tokens_and_components_of_their_own(deep, session):
    explorer = Explorer(deep, "deep")
    assert explorer.layers == [1, -1]
    for layer in (1, -1):
        moment = session.at(explorer, Choice(layer))
        (expected, _) = look_at(deep, images_of(session), layer=layer)
        torch.testing.assert_close(moment.pictures[0].tokens[CLEAN], expected.tokens["soap"], **SHARP)
    with pytest.raises(HeadError, match="no layer 0; choose from 1, -1"):
        session.at(explorer, Choice(0))


def test_pictures_are_those_of_the_figures(explorer, head, session):
    moment = session.at(explorer, Choice(-1))
    pictures = look_at(head, images_of(session))
    figure = drawn(token_colours(pictures))
    for number, (_, raw, clean) in enumerate(colour_view(moment).rows):
        np.testing.assert_array_equal(np.asarray(raw.picture), figure[4 * number + 1])
        np.testing.assert_array_equal(np.asarray(clean.picture), figure[4 * number + 2])
    figure = drawn(response_overlay(pictures, head))
    for rank in range(4):
        response, maps = (
            response_view(moment, rank),
            [head.statistics.real_response, head.statistics.synthetic_response],
        )
        column = head.statistics.scores.argsort(descending=True)[rank]
        for number, (_, over, share) in enumerate(response.rows):
            np.testing.assert_array_equal(np.asarray(over.picture), figure[5 * number + 1 + rank])
            low, high = (float(bound(maps[number][..., column])) for bound in (torch.min, torch.max))
            assert share.description.endswith(f"{low:.2f} to {high:.2f}.")


def test_objects_are_those_of_the_figure(explorer, head):
    image = noise_image(0, (32, 32)).resize((480, 480))
    image.paste((30, 60, 90), (0, 0, 160, 480))
    head.backbone.embeddings.position_embeddings.data.zero_()
    explorer.image_size = (32, 32)
    moment = Session().with_photo(0, Photo("a", image)).at(explorer, Choice(-1), fine=True)
    ((_, raw, clean),) = object_view(moment).rows
    for panel, expected in zip(
        (raw, clean), drawn(saliency_masks(head, [image], image_size=(32, 32)))[1:], strict=True
    ):
        np.testing.assert_array_equal(np.asarray(panel.picture), expected)


def test_fine_tokens_are_of_the_image_in_its_own_size(explorer):
    session = Session().with_photo(0, Photo("a", noise_image(0, (96, 80))))
    assert session.at(explorer, Choice(-1), fine=True).pictures[0].grid == (10, 12)
    assert session.at(explorer, Choice(-1)).pictures[0].grid == (4, 4)


def test_colours_have_one_basis_that_does_not_move_with_the_strength(explorer, session):
    session = session.with_axes(explorer, -1)
    weak, strong = (session.at(explorer, Choice(-1, "soap", mu)) for mu in (0, 20))
    assert weak.axes is strong.axes
    for _, raw, clean in colour_view(weak).rows:
        np.testing.assert_array_equal(np.asarray(raw.picture), np.asarray(clean.picture))
    assert not session.with_photo(0, None).axes, "of other images"


def test_sessions_do_not_see_each_other(explorer, session):
    other = Session().with_photo(0, Photo("mine", noise_image(7, (32, 32)))).with_query(0, 0.9, 0.9)
    before = session.at(explorer, Choice(-1))
    other.kept_at(explorer, -1).at(explorer, Choice(-1, "soap", 9))
    after = session.at(explorer, Choice(-1))
    assert (before.patch, before.removed) == (after.patch, after.removed)
    torch.testing.assert_close(before.pictures[0].tokens[CLEAN], after.pictures[0].tokens[CLEAN], rtol=0, atol=0)
    assert list(other.images) != list(session.images)


class AtWork:
    """How many are in the backbone at once at the most."""

    def __init__(self, model):
        self.now, self.most, self.lock = 0, 0, Lock()
        model.backbone.register_forward_pre_hook(self.enter)
        model.backbone.register_forward_hook(self.leave)

    def enter(self, *_):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.02)

    def leave(self, *_):
        with self.lock:
            self.now -= 1


def test_several_people_at_once_get_what_each_gets_alone(explorer, head):
    photos = [Photo(str(number), noise_image(number)) for number in range(8)]
    alone = [explorer.look(photo.image, -1).tokens["raw"] for photo in photos]
    seen = AtWork(head)

    def together(photo):
        moment = Session().with_photo(0, photo).at(explorer, Choice(-1, "zero-image", 2))
        return moment.pictures[0].tokens["raw"]

    with ThreadPoolExecutor(8) as pool:
        for expected, found in zip(alone, pool.map(together, photos), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert seen.most == 1, "a model at work is in a state of its own, which another must not end"
    pixels = torch.randn(1, 3, 32, 32)
    assert not torch.equal(head.patch_tokens(pixels), head.patch_tokens(pixels, raw=True)), "the head is on again"


def test_what_is_kept_is_bounded(vit, images, processor, session):
    options = {"image_processor": processor, "num_images": 64, "check": 0, "progress": False}
    explorer = Explorer(fit_soap(vit, images, layer=[0, 1, -1], **options), "deep")
    for step in range(200):
        layer, fine = (0, 1, -1)[step % 3], step % 2 == 0
        session = session.kept_at(explorer, layer, fine=fine).with_query(step % 2, step / 200, 0.5)
        session.at(explorer, Choice(layer, "soap", step / 10), fine=fine)
        if step % 50 == 0:
            session = session.with_photo(0, Photo(str(step), noise_image(step)))
    assert all(len(kept.pictures) <= MOST_KEPT for kept in session.images)
    assert len(explorer._projections) <= KEPT_PROJECTIONS


@pytest.mark.parametrize(
    "place",
    [
        *((0, down, 0.5) for down in (1.01, -0.1, float("nan"), float("inf"), "a", None, [])),
        *((image, 0.5, 0.5) for image in (2, -1, None, True, 0.0, "0")),
    ],
)
def test_a_click_outside_the_image_is_refused(session, place):
    with pytest.raises(DataError, match="no place in an image; click inside one"):
        session.with_query(*place)


def test_a_click_in_a_place_without_an_image_is_refused(session):
    with pytest.raises(DataError, match="no place in an image"):
        session.with_photo(1, None).with_query(1, 0.5, 0.5)


def test_a_patch_goes_when_its_image_does(session):
    session = session.with_query(1, 0.9, 0.9)
    assert session.with_photo(0, Photo("other", noise_image(3))).query == session.query
    assert session.with_photo(1, Photo("other", noise_image(3))).query.image == 0
    assert session.with_photo(0, None).with_photo(1, Photo("other", noise_image(3))).query.image == 1


def test_without_an_image_it_says_what_to_do(explorer):
    with pytest.raises(DataError, match="no image yet; upload one"):
        Session().at(explorer, Choice(-1))


def test_one_image_is_enough(explorer, session):
    moment = session.with_photo(0, None).at(explorer, Choice(-1))
    assert [len(row) for row in similarity_view(moment).rows] == [3]
    assert [len(row) for row in response_view(moment, 0).rows] == [2, 2]


def test_a_head_without_statistics_has_its_own_strength_and_says_why(bare, session):
    explorer = Explorer(bare, "bare")
    assert session.at(explorer, Choice(-1)).removed == explorer.own_strength(-1) == 2
    with pytest.raises(HeadError, match="There is no other strength: this head was saved without statistics"):
        explorer.reach(-1)
    with pytest.raises(HeadError, match="saved without statistics"):
        session.at(explorer, Choice(-1, "soap", 3))
    with pytest.raises(HeadError, match="saved without"):
        response_view(session.at(explorer, Choice(-1)), 0)


def test_what_there_is_not_is_said(explorer, session):
    with pytest.raises(SOAPError, match="no method 'ridge'; choose from soap, zero-image, top-pc"):
        session.at(explorer, Choice(-1, "ridge"))
    with pytest.raises(SOAPError, match=r"differ along \d+ directions only"):
        session.at(explorer, Choice(-1, "zero-image", 32))
    with pytest.raises(SOAPError, match="No component of rank 99"):
        response_view(session.at(explorer, Choice(-1)), 99)
