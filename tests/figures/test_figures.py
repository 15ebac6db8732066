"""Figures show what the statistics hold, every word of them can be read, and the same head gives the same file."""

import os
import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from soap_hf import PatchLayout, SOAPConfig, SOAPModelWrapper, SOAPProjection, SOAPStatistics
from soap_hf.evaluation.arguments import ViewRule
from soap_hf.evaluation.comparison import Comparison
from soap_hf.evaluation.matching import nearest, tokens_of
from soap_hf.evaluation.views import draw_views, true_places
from soap_hf.figures import (
    Picture,
    backbone_label,
    head_figures,
    look_at,
    match_fields,
    patch_neighbours,
    rendered,
    response_maps,
    response_overlay,
    saliency_masks,
    save_figure,
    score_by_layer,
    score_curve,
    similarity_maps,
    to_png,
    token_colours,
)
from soap_hf.figures.matching import place_colours
from soap_hf.figures.neighbours import nearest_patches
from soap_hf.figures.panels import coloured, enlarged, laid_over
from soap_hf.figures.pictures import colour_axes, colours_of
from soap_hf.figures.similarity import best_match, similarities, similarity_panel, similarity_scale
from soap_hf.runtime.errors import BackboneError, DataError, HeadError, OutputError
from tests.conftest import ROOT, noise_image, random_projection
from tests.tiny_backbones import TINY_BACKBONES

NO_DISPLAY = """
import sys
from soap_hf.figures import score_curve
assert "matplotlib.pyplot" not in sys.modules
"""


def record(*layers, grid=(4, 4), dim=16, mu=2, with_statistics=True):
    """A head of random tokens with a few directions that answer to position, without a backbone."""
    layers = layers or (-1,)
    generator = torch.Generator().manual_seed(len(layers))
    statistics = {}
    for layer in layers:
        real, synthetic = torch.randn(2, 24, *grid, dim, generator=generator)
        place = 3 * torch.randn(*grid, 3, generator=generator)
        real[..., :3] += place
        synthetic[..., :3] += place
        statistics[layer] = SOAPStatistics.from_tokens(real, synthetic)
    count = len(layers)
    config = SOAPConfig(
        layers=list(layers),
        hidden_sizes=[dim] * count,
        ranks=[single.projection(mu).rank for single in statistics.values()],
        layouts=[PatchLayout().to_dict()] * count,
        mu=mu,
        components=[single.table(mu) for single in statistics.values()],
    )
    return SimpleNamespace(config=config, statistics_by_layer=statistics if with_statistics else {})


@pytest.fixture
def fitted(vit, processor):
    """The tiny ViT under a head with statistics that removes two directions."""
    statistics = record(dim=32).statistics_by_layer[-1]
    model = SOAPModelWrapper.from_backbone(vit, None, statistics=statistics, image_processor=processor)
    return model.reweight(mu=2)


def overlay(aspects, mu=2):
    """Responses of random tokens over images of some aspects (height over width)."""
    head, tokens = record(mu=mu), torch.linspace(-3, 3, 256).view(4, 4, 16)
    pictures = [Picture(noise_image(0, (40, round(40 * aspect))), -1, {"raw": tokens}) for aspect in aspects]
    return response_overlay(pictures, head)


DEEP = range(13)
FIGURES = {
    "a curve": lambda: score_curve({"facebook/dinov2-base": record()}),
    "a curve of nothing removed": lambda: score_curve({"a": record(mu=0)}),
    "a curve of few components": lambda: score_curve({"a": record(dim=4)}),
    "a curve of many layers": lambda: score_curve({"a": record(*DEEP, -1)}),
    "curves of many models": lambda: score_curve({f"organisation/a-rather-long-name-{n}": record() for n in range(9)}),
    "a curve with an endless name": lambda: score_curve({"$x$_" + "very-long-" * 20: record()}),
    "a curve without statistics": lambda: score_curve({"name": record(with_statistics=False)}),
    "layers": lambda: score_by_layer({"a": record(*DEEP, -1), "b": record(1, 3, 5, -1)}),
    "very many layers": lambda: score_by_layer({"a": record(*range(41), -1)}),
    "two layers": lambda: score_by_layer({"a": record(4, 8, mu=0)}),
    "maps": lambda: response_maps(record()),
    "maps of one patch": lambda: response_maps(record(grid=(1, 1))),
    "maps of a tall grid": lambda: response_maps(record(grid=(24, 3))),
    "maps of a wide grid": lambda: response_maps(record(grid=(2, 20))),
    "maps of a clip": lambda: response_maps(record(grid=(5, 4, 3))),
    "maps of few components": lambda: response_maps(record(dim=4)),
    "maps of several layers": lambda: response_maps(record(0, 6, 12, -1)),
    "maps of high numbers": lambda: response_maps(record(dim=1200, grid=(1, 2))),
    "responses": lambda: overlay([1, 0.7]),
    "responses over tall images": lambda: overlay([6]),
    "responses over wide images": lambda: overlay([0.1, 0.1]),
}


def drawn_texts(figure):
    """Texts of a figure that are drawn: tick labels beyond the limits of their axis are not."""
    figure.draw_without_rendering()
    beyond = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks() + axis.get_minor_ticks():
            if not low <= tick.get_loc() <= high:
                beyond |= {tick.label1, tick.label2}
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in beyond]


@pytest.mark.parametrize("name", FIGURES)
def test_every_word_is_inside_the_figure_and_none_on_another(name):
    figure = FIGURES[name]()
    boxes = {text: text.get_window_extent().padded(-1) for text in drawn_texts(figure)}
    assert boxes
    for text, box in boxes.items():
        assert min(box.x0, box.y0) >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    for (one, first), (other, second) in combinations(boxes.items(), 2):
        assert not first.overlaps(second), (one, other)


@pytest.mark.parametrize("name", ["a curve", "maps of one patch", "responses"])
def test_the_same_figure_gives_the_same_file_whatever_the_users_style(name):
    first = to_png(FIGURES[name]())
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "axes.grid": True, "savefig.dpi": 30}):
        assert to_png(FIGURES[name]()) == first
    assert first != to_png(FIGURES["a curve of few components"]())
    assert b"Software" not in first


@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_a_figure_that_scales_is_the_same_in_every_process(kind, tmp_path):
    code = (
        f"import sys; from tests.figures.test_figures import FIGURES, rendered; "
        f"sys.stdout.buffer.write(rendered(FIGURES['maps'](), {kind!r}))"
    )
    again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout
    assert again == rendered(FIGURES["maps"](), kind)
    assert again.startswith({"svg": b"<?xml", "pdf": b"%PDF"}[kind])
    assert again != rendered(FIGURES["a curve"](), kind)
    assert b"<dc:date>" not in again
    assert b"/CreationDate" not in again


def test_drawing_neither_needs_nor_touches_pyplot(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    subprocess.run([sys.executable, "-c", NO_DISPLAY], env=environment | {"MPLBACKEND": "tkagg"}, check=True)


def test_a_score_curve_holds_every_score_and_says_which_components_are_removed():
    head = record(mu=3)
    statistics = head.statistics_by_layer[-1]
    whole, leading = score_curve({"name": head}).axes
    scores = statistics.scores.sort(descending=True).values
    np.testing.assert_array_equal(whole.lines[0].get_ydata(), scores)
    marks = [line for line in leading.lines if line.get_marker() == "o"]
    np.testing.assert_array_equal([line.get_ydata()[0] for line in marks], scores[:10])
    assert [line.get_markerfacecolor() == "white" for line in marks] == [False] * 3 + [True] * 7
    (bars,) = leading.collections
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    errors = statistics.standard_errors[statistics.scores.sort(descending=True).indices[:10]]
    np.testing.assert_allclose((ends[:, 1] - ends[:, 0]) / 2, errors, atol=1e-12)
    assert [line.get_ydata()[0] for line in leading.lines if line.get_linestyle() == "--"] == [0.75]


def test_the_leading_scores_fill_their_panel():
    head = record(mu=3)
    whole, leading = score_curve({"name": head}).axes
    scores = head.statistics_by_layer[-1].scores.sort(descending=True).values[:10]
    low, high = leading.get_ylim()
    assert (max(float(scores[0]), 0.75) - min(float(scores[-1]), 0.75)) / (high - low) > 0.75
    assert low < 0.75 < high
    assert low < float(scores[-1])
    assert float(scores[0]) < high
    assert whole.get_ylim() != (low, high)


def test_without_statistics_a_curve_shows_the_components_that_the_config_names():
    (leading,) = score_curve({"name": record(with_statistics=False)}).axes
    expected = score_curve({"name": record()}).axes[1]
    for mine, theirs in zip(leading.lines, expected.lines, strict=True):
        np.testing.assert_array_equal(mine.get_ydata(), theirs.get_ydata())


def test_the_curves_of_several_heads_and_layers_have_names_of_their_own():
    figure = score_curve({"kept": record(), "deep": record(2, -1)})
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:4] == ["kept", "deep, hidden_states[2]", "deep, last_hidden_state", "removed"]
    alone = score_curve({"deep": record(2, -1)}).legends[0]
    assert [text.get_text() for text in alone.get_texts()][:2] == ["hidden_states[2]", "last_hidden_state"]
    assert alone.get_title().get_text() == "deep"


def test_a_long_legend_leaves_the_panels_their_height():
    heights = []
    for name in ("a curve", "a curve of many layers"):
        figure = FIGURES[name]()
        figure.draw_without_rendering()
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] == pytest.approx(heights[0], rel=0.05)


def test_scores_by_layer_run_in_order_of_depth_and_last_hidden_state_comes_last():
    head = record(-1, 0, 7, 3, mu="auto")
    scores, counts = score_by_layer({"name": head}).axes
    tops = {layer: float(single.scores.max()) for layer, single in head.statistics_by_layer.items()}
    ranks = dict(zip(head.config.layers, head.config.ranks, strict=True))
    for axes, expected in ((scores, tops), (counts, ranks)):
        marks = next(line for line in axes.lines if line.get_marker() == "o")
        np.testing.assert_array_equal(marks.get_xdata(), [0, 3, 7, 8])
        np.testing.assert_array_equal(marks.get_ydata(), [expected[layer] for layer in (0, 3, 7, -1)])
        assert [label.get_text() for label in axes.get_xticklabels()][-1] == "last"


@pytest.mark.parametrize("grid", [(4, 4), (24, 3), (2, 20), (1, 1), (5, 4, 3)])
def test_response_maps_hold_the_statistics(grid):
    head = record(grid=grid)
    statistics = head.statistics_by_layer[-1]
    panels = [axes for axes in response_maps(head).axes if axes.images]
    order = statistics.scores.argsort(descending=True)
    assert len(panels) == 20
    for rank, pair in enumerate(zip(panels[::2], panels[1::2], strict=True)):
        for axes, response in zip(pair, (statistics.real_response, statistics.synthetic_response), strict=True):
            drawn = axes.images[0].get_array().filled(np.nan)
            expected = response[..., order[rank]].numpy()
            if len(grid) == 3:  # three frames in the first row, two in the second
                np.testing.assert_array_equal(drawn[:4, :3], expected[0])
                np.testing.assert_array_equal(drawn[5:, 4:7], expected[4])
                assert np.isfinite(drawn).sum() == expected.size
            else:
                np.testing.assert_array_equal(drawn, expected)
                assert axes.get_aspect() == 1
            assert axes.images[0].get_clim() == (0, 1)


def test_responses_need_statistics_and_scores_a_fit():
    bare = record(with_statistics=False)
    picture = Picture(noise_image(0), -1, {"raw": torch.zeros(4, 4, 16)})
    for draw in (lambda: response_maps(bare), lambda: response_overlay([picture], bare), lambda: head_figures(bare)):
        with pytest.raises(HeadError, match="Responses need a head's statistics, but this one was saved without"):
            draw()
    bare.config.components = []
    with pytest.raises(HeadError, match="made without a fit"):
        score_curve({"name": bare})
    with pytest.raises(HeadError, match="The head name has one layer"):
        score_by_layer({"name": record()})


@pytest.mark.parametrize("size", [(96, 24), (24, 96), (40, 40), (3, 60)])
def test_images_keep_their_shape_on_as_many_pixels_as_in_the_fit(fitted, size):
    width, height = size
    (picture,) = look_at(fitted, [noise_image(0, size)])
    rows, columns, _ = picture.tokens["raw"].shape
    assert picture.image.size == size
    assert (rows > columns) == (height > width) or height == width
    assert 8 <= rows * columns <= 24, "4 x 4 in the fit"


def test_both_arms_come_from_one_forward_pass(fitted):
    (picture,) = look_at(fitted, [noise_image(0, (32, 32))])
    pixels = fitted.image_processor(noise_image(0, (32, 32)), return_tensors="pt")["pixel_values"]
    for method, raw in (("raw", True), ("soap", False)):
        expected = fitted.patch_tokens(pixels, raw=raw)[0]
        torch.testing.assert_close(picture.tokens[method], expected, rtol=1e-4, atol=1e-4)


def test_a_size_that_is_given_is_the_backbones_and_not_the_pictures(fitted):
    (picture,) = look_at(fitted, [noise_image(0, (100, 40))], image_size=(64, 32))
    assert picture.image.size == (100, 40)
    assert picture.tokens["raw"].shape == (8, 4, 32)


@pytest.mark.parametrize("name", ["resnet", "videomae", "swin"])
def test_maps_and_clips_are_looked_at(name):
    tiny = TINY_BACKBONES[name]
    backbone = tiny.build()
    width = SOAPModelWrapper.from_backbone(backbone, None, image_size=tiny.size).config.hidden_size
    model = SOAPModelWrapper.from_backbone(backbone, random_projection(width), image_size=tiny.size)
    pictures = look_at(model, [noise_image(0), noise_image(1)], image_size=tiny.size)
    assert pictures[0].tokens["soap"].shape == (*tiny.grid[-2:], width)
    to_png(token_colours(pictures))


def test_a_size_that_the_backbone_cannot_take_is_refused_in_a_sentence():
    tiny = TINY_BACKBONES["levit"]
    model = SOAPModelWrapper.from_backbone(tiny.build(), None, image_size=tiny.size)
    with pytest.raises(BackboneError, match=r"LevitModel cannot take images of 64 x 64 pixels .* pass an image_size"):
        look_at(model, [noise_image(0)], image_size=(64, 64))


def at_patches(panel, grid):
    """Colours in the middle of each patch of a panel, (rows, columns, 3)."""
    panel = np.asarray(panel)
    down, across = ((np.arange(count) + 0.5) / count for count in grid)
    return panel[(down * panel.shape[0]).astype(int)[:, None], (across * panel.shape[1]).astype(int)]


def colours(*pictures):
    """Colours of the raw and the clean tokens of each picture, (rows, columns, 3), which the figure shows."""
    shares = colours_of(pictures, colour_axes(pictures), with_removed=True)
    drawn = [axes.images[0].get_array() for axes in token_colours(pictures).axes]
    for number, own in enumerate(shares):
        assert list(own) == ["raw", "soap", "removed"]
        for panel, share in zip(drawn[4 * number + 1 : 4 * number + 4], own.values(), strict=True):
            np.testing.assert_allclose(at_patches(panel, share.shape[:2]) / 255, share, atol=0.5 / 255 + 1e-9)
    return [[own[name].numpy() for name in ("raw", "soap")] for own in shares]


def test_what_was_removed_is_raw_without_clean_and_grey_where_nothing_was():
    raw = torch.randn(4, 4, 8)
    clean = raw.clone()
    clean[:2] = random_projection(8)(raw[:2])
    picture = Picture(noise_image(0), -1, {"raw": raw, "soap": clean})
    (own,) = colours_of([picture], colour_axes([picture]), with_removed=True)
    assert (own["removed"][2:] == 0.5).all()
    inside = ((own["raw"] > 0) & (own["raw"] < 1) & (own["soap"] > 0) & (own["soap"] < 1))[:2]
    expected = (own["raw"] - own["soap"])[:2][inside] + 0.5
    torch.testing.assert_close(own["removed"][:2][inside], expected.clamp(0, 1))
    assert (own["removed"][:2] != 0.5).any()
    assert [axes.get_title() for axes in token_colours([picture]).axes][-1] == "removed"


def test_a_colour_means_the_same_in_both_arms_and_in_every_image():
    raw = torch.randn(2, 4, 4, 8)
    clean = raw.clone()
    clean[:, :2] = random_projection(8)(raw[:, :2])
    clean[0, 3, 3] = raw[1, 2, 2]
    (first, second), (other, _) = colours(
        *(Picture(noise_image(0), -1, {"raw": raw[n], "soap": clean[n]}) for n in range(2))
    )
    np.testing.assert_array_equal(first[2], second[2])
    assert (first[:2] != second[:2]).any()
    np.testing.assert_array_equal(second[3, 3], other[2, 2])


def test_nothing_removed_gives_two_equal_pictures_and_one_token_one_colour():
    tokens = torch.randn(4, 4, 8)
    ((raw, clean),) = colours(Picture(noise_image(0), -1, {"raw": tokens, "soap": SOAPProjection.identity(8)(tokens)}))
    np.testing.assert_array_equal(raw, clean)
    assert raw.std() > 0.1
    one = torch.randn(1, 1, 8)
    ((raw, clean),) = colours(Picture(noise_image(0), -1, {"raw": one, "soap": one}))
    np.testing.assert_array_equal(raw, np.full((1, 1, 3), 0.5))


def test_round_off_is_not_shown_as_colour():
    line = torch.linspace(-1, 1, 16)[:, None] * torch.randn(8)
    ((raw, _),) = colours(Picture(noise_image(0), -1, dict.fromkeys(("raw", "soap"), line.view(4, 4, 8))))
    assert raw[..., 0].std() > 0.2
    assert (raw[..., 1:] == 0.5).all()


def test_an_overlay_shows_responses_in_standard_deviations():
    head, tokens = record(), torch.randn(3, 5, 16)
    statistics = head.statistics_by_layer[-1]
    image = noise_image(0, (50, 30))
    figure = response_overlay([Picture(image, -1, {"raw": tokens})], head)
    grey = enlarged(image).convert("L").convert("RGB")
    for axes, number in zip(figure.axes[1:5], statistics.scores.argsort(descending=True), strict=False):
        response = (tokens.double() - statistics.mean) @ statistics.components[:, number]
        shares = response / statistics.eigenvalues[number].sqrt() / 4 + 0.5  # from -2 to 2 standard deviations
        expected = 0.65 * 255 * matplotlib.colormaps["PuOr_r"](shares.numpy())[..., :3] + 0.35 * at_patches(
            grey, (3, 5)
        )
        np.testing.assert_allclose(at_patches(axes.images[0].get_array(), (3, 5)), expected, atol=2)


def test_similarities_are_cosines_and_their_best_match_is_another_patch():
    own, others = torch.randn(2, 3, 4, 8)
    found = similarities(own, others, (1, 2))
    expected = torch.nn.functional.cosine_similarity(own[1, 2], others, dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert divmod(int(nearest(own[1, 2][None], others.flatten(0, 1))), 4) == best_match(found)
    alike = similarities(own, own, (1, 2))
    assert best_match(alike) == (1, 2)
    second = alike.flatten().topk(2).indices[1]
    assert best_match(alike, (1, 2)) == divmod(int(second), 4)
    assert best_match(torch.ones(1, 1), (0, 0)) is None


def test_a_map_of_similarities_marks_its_patch_and_the_best_match():
    tokens = torch.randn(6, 6, 8)
    picture = Picture(Image.new("RGB", (480, 480), "gray"), -1, {"raw": tokens})
    found = similarities(tokens, tokens, (1, 4))
    shown = similarity_scale(float(found.min()))
    plain, drawn = laid_over(picture.image, found, shown, 0.75), similarity_panel(picture, found, shown, patch=(1, 4))
    rows, columns = (np.asarray(plain) != np.asarray(drawn)).any(-1).nonzero()
    touched = {(row // 80, column // 80) for row, column in zip(rows, columns, strict=True)}
    assert {(1, 4), best_match(found, (1, 4))} <= touched, "frame and ring"
    assert (0, 0) not in touched or best_match(found, (1, 4)) in {(0, 0), (0, 1), (1, 0), (1, 1)}
    np.testing.assert_array_equal(at_patches(plain, (6, 6)), at_patches(drawn, (6, 6)))
    assert tuple(np.asarray(drawn)[80, 360]) == (0xD5, 0x5E, 0x00), "the frame runs along the patch's edge"


def test_similarity_needs_two_images_and_a_patch_inside(fitted):
    with pytest.raises(DataError, match="two images or more"):
        similarity_maps(fitted, [noise_image(0)])
    with pytest.raises(DataError, match="patch must lie between 0 and 1"):
        similarity_maps(fitted, [noise_image(0), noise_image(1)], patch=(0.5, 1.5))
    figure = similarity_maps(fitted, [noise_image(0), noise_image(1)])
    assert len([axes for axes in figure.axes if axes.images]) == 10


def test_a_field_of_matches_has_the_colours_of_the_places_that_they_find(fitted):
    images = [noise_image(seed, (90, 70)) for seed in range(2)]
    axes = match_fields(fitted, images).axes
    assert len(axes) == 12
    comparison, grid = Comparison.of(fitted), (4, 4)
    codes = np.asarray(coloured(Image.new("RGB", (480, 480)), place_colours(grid)))
    flat = at_patches(codes, grid).reshape(-1, 3)
    assert len(np.unique(flat, axis=0)) == len(flat), "each place has a colour of its own"
    for number, image in enumerate(images):
        pair = draw_views(image, ViewRule(), (32, 32), grid, np.random.default_rng([0, number]))
        (own, other), places = tokens_of(comparison, pair.views)[-1], true_places(pair.homography.inverse(), grid)
        inside = places[1].view(grid).numpy()
        for offset, clean in zip((4, 5), comparison.methods.values(), strict=True):
            panel = axes[6 * number + offset]
            matches = nearest(clean(other), clean(own)).view(grid).numpy()
            shown = at_patches(panel.images[0].get_array(), grid)
            np.testing.assert_array_equal(shown[inside], flat[matches[inside]])
            assert (shown[~inside] == 255).all()
            found = np.stack(np.divmod(matches[inside], 4), axis=-1) + 0.5
            right = np.abs(found - places[0].view(4, 4, 2).numpy()[inside]).max(-1) <= 1
            assert [text.get_text() for text in panel.texts] == [f"{right.mean():.0%} right"]
    with pytest.raises(DataError, match="at least one"):
        match_fields(fitted, [])


def test_a_patch_finds_its_copy_in_another_photograph(fitted):
    fitted.backbone.embeddings.position_embeddings.data.zero_()
    pictures = look_at(fitted, [noise_image(seed, (32, 32)) for seed in range(5)])
    pictures[3].tokens["raw"][1, 2] = pictures[1].tokens["raw"][0, 3]
    first, *others = nearest_patches(pictures, 1, (0, 3), "raw")
    assert first == (3, (1, 2), pytest.approx(1))
    assert {one.number for one in others} == {0, 2, 4}
    assert [one.cosine for one in others] == sorted((one.cosine for one in others), reverse=True)


def test_neighbours_are_shown_raw_above_clean(fitted):
    images = [noise_image(seed, (40, 30)) for seed in range(4)]
    figure = patch_neighbours(fitted, images, query=2, neighbours=9)
    assert len(figure.axes) == 2 * 4, "the query and three others"
    words = [text.get_text() for text in figure.texts]
    assert words[:2] == ["by raw tokens", "query"]
    assert words[5:7] == ["by clean tokens", "query"]
    pictures = look_at(fitted, images)
    for row, method in enumerate(("raw", "soap")):
        found = nearest_patches(pictures, 2, (pictures[2].grid[0] // 2, pictures[2].grid[1] // 2), method)
        assert words[2 + 5 * row : 5 + 5 * row] == [f"{one.cosine:.2f}" for one in found]
    for wrong in ({"query": 4}, {"neighbours": 0}):
        with pytest.raises(DataError, match="Neighbours need two images"):
            patch_neighbours(fitted, images, **wrong)
    with pytest.raises(DataError, match="patch must lie between"):
        patch_neighbours(fitted, images, patch=(0, 1.1))


@pytest.mark.parametrize("aspect", [0.1, 0.6, 1, 6])
def test_a_picture_keeps_its_aspect_and_its_place(aspect):
    figure = overlay([aspect])
    width, height = figure.axes[0].get_window_extent().size / figure.dpi
    assert height / width == pytest.approx(round(40 * aspect) / 40)
    assert width <= 1.4
    assert height <= 2.5


def test_everything_but_the_object_is_faded(fitted):
    image = Image.new("RGB", (32, 32), (30, 60, 90))
    image.paste(noise_image(0, (16, 16)), (8, 8))
    original, raw, clean = (axes.images[0].get_array() for axes in saliency_masks(fitted, [image]).axes)
    np.testing.assert_array_equal(original, np.asarray(image))
    faded = np.asarray(image) + (0.75 * (255 - np.asarray(image))).astype(int)
    for shown in (raw, clean):
        kept = (shown == np.asarray(image)).all(-1)
        assert 0 < kept.mean() < 1
        assert np.abs(shown[~kept].astype(int) - faded[~kept]).max() <= 1


def test_an_image_without_an_object_says_so(fitted, caplog):
    fitted.backbone.embeddings.position_embeddings.data.zero_()
    figure = saliency_masks(fitted, [Image.new("RGB", (32, 32))])
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [[], ["no object"], ["no object"]]

    for tokens in ("raw", "clean"):
        assert f"In {tokens} tokens there is no object in image 1: all of its patches look alike" in caplog.text
    assert "--centred" in caplog.text


def test_without_the_mean_token_an_object_is_found_in_tokens_that_point_one_way(fitted):
    fitted.statistics_by_layer[-1].mean.copy_(torch.full((32,), 1e3))
    fitted.backbone.layernorm.bias.data.fill_(1e3)
    texts = {}
    for centred in (False, True):
        figure = saliency_masks(fitted, [noise_image(0, (32, 32))], centred=centred)
        texts[centred] = [[text.get_text() for text in axes.texts] for axes in figure.axes[1:]]
    assert texts == {False: [["no object"], ["no object"]], True: [[], []]}


def test_a_figure_of_nothing_is_refused(fitted):
    for draw in (score_curve, score_by_layer):
        with pytest.raises(HeadError, match="at least one head"):
            draw({})
    for draw in (look_at, saliency_masks):
        with pytest.raises(DataError, match="at least one"):
            draw(fitted, [])


def test_a_figure_is_written_whole_or_not_at_all(tmp_path):
    figure = score_curve({"name": record()})
    save_figure(figure, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] == 1400
    save_figure(figure, tmp_path / "curve.SVG")
    assert (tmp_path / "curve.SVG").read_bytes() == rendered(figure, "svg")
    with pytest.raises(OutputError, match=r"png, svg, pdf, not as 'gif'"):
        save_figure(figure, tmp_path / "curve.gif")
    assert {path.name for path in tmp_path.iterdir()} == {"curve.png", "curve.SVG"}
    with pytest.raises(OutputError, match="Cannot write"):
        save_figure(figure, tmp_path / "nowhere" / "curve.png")


@pytest.mark.parametrize(
    ("reference", "label"),
    [("facebook/dinov2-base", "facebook/dinov2-base"), ("/home/me/vit", "vit"), ("../vit", "vit"), (None, "backbone")],
)
def test_a_backbone_is_named_without_its_path(reference, label):
    assert backbone_label(SOAPConfig(backbone_name_or_path=reference)) == label
