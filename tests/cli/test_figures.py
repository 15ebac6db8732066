"""`soap-hf figures` draws what can be drawn of a head, and `soap-hf fit` puts the first two beside it."""

import sys

import pytest
from PIL import Image

from soap_hf import SOAPModelWrapper, fit_soap
from soap_hf.runtime.errors import HeadError
from tests.conftest import noise_image, random_projection

OF_THE_HEAD = ["response_maps.png", "score_curve.png"]
OF_IMAGES = ["matching.png", "patch_tokens.png", "responses.png", "saliency.png"]
OF_TWO = [*OF_IMAGES, "similarity.png"]


@pytest.fixture
def vit_folder(vit, processor, tmp_path):
    """The tiny ViT in a folder."""
    vit.save_pretrained(tmp_path / "vit")
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def photo(tmp_path):
    """An image file that is higher than wide."""
    noise_image(0, (40, 64)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def head(vit_folder, images, tmp_path):
    """A head that removes two directions."""
    fit_soap(vit_folder, images, mu=2, num_images=64, progress=False).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_all_figures_of_a_head_and_of_images(run, head, photo, tmp_path):
    status, out, err = run("figures", head, "--output", "drawn")
    assert (status, err) == (0, f"Drawing the head {head} into drawn …\n")
    assert names(tmp_path / "drawn") == OF_THE_HEAD
    assert [line.rpartition("/")[2] for line in out.splitlines()] == OF_THE_HEAD[::-1]
    assert run("figures", head, photo, photo, "--output", "drawn", "--overwrite", "--quiet") == (0, "", "")
    assert names(tmp_path / "drawn") == sorted(OF_THE_HEAD + OF_TWO)
    for path in (tmp_path / "drawn").iterdir():
        Image.open(path).verify()
    run("figures", head, "--output", "drawn", "--overwrite", "--quiet")
    assert names(tmp_path / "drawn") == OF_THE_HEAD, "those of other images would be stale"


def test_figures_that_scale(run, head, photo, tmp_path):
    for kind in ("svg", "pdf"):
        options = ("--output", "drawn", "--format", kind, "--overwrite", "--quiet")
        assert run("figures", head, photo, *options) == (0, "", "")
        stems = [name.removesuffix(".png") for name in sorted(OF_THE_HEAD + OF_IMAGES)]
        assert names(tmp_path / "drawn") == [f"{stem}.{kind}" for stem in stems]


def test_pictures_go_into_the_card_of_a_head_later(run, head, photo, refused):
    card = head / "README.md"
    assert "](figures/" not in card.read_text(encoding="utf-8")
    card.write_text(card.read_text(encoding="utf-8") + "\nMy own words.\n", encoding="utf-8")
    status, out, err = run("figures", head, photo, "--into-card")
    assert (status, err) == (0, f"Drawing the head {head} into its card …\n")
    assert names(head / "figures") == sorted(OF_THE_HEAD + OF_IMAGES)
    assert f"Figure written to {head / 'figures' / 'matching.png'}" in out
    text = card.read_text(encoding="utf-8")
    assert text.index("](figures/matching.png)") < text.index("## How to use it"), "what says most comes first"
    assert all(f"](figures/{name})" in text for name in names(head / "figures"))
    assert text.endswith("\nMy own words.\n")
    assert run("figures", head, "--into-card", "--quiet") == (0, "", "")
    assert names(head / "figures") == OF_THE_HEAD, "those of other images would be stale"
    assert "matching.png" not in card.read_text(encoding="utf-8")
    assert "is none here; download it, or draw elsewhere" in refused("figures", "me/head", "--into-card")


def test_where_to_draw_is_said_once(refused, head):
    assert "--output FOLDER, or --into-card" in refused("figures", head)
    assert "--output FOLDER, or --into-card" in refused("figures", head, "--into-card", "--output", "drawn")
    assert "A card shows png" in refused("figures", head, "--into-card", "--format", "svg")


def test_several_heads_and_layers(run, head, vit_folder, images, photo, tmp_path):
    fit_soap(vit_folder, images, layer=[0, -1], num_images=64, progress=False).save_pretrained(tmp_path / "deep")
    options = ("--compare", head, "--layer", 0, "--image-size", "32", "--output", "drawn", "--quiet")
    assert run("figures", tmp_path / "deep", photo, *options)[0] == 0
    assert names(tmp_path / "drawn") == sorted([*OF_THE_HEAD, *OF_IMAGES, "score_by_layer.png"])


def test_without_statistics_only_the_responses_are_left_out_and_it_says_so(run, head, photo, tmp_path):
    (head / "statistics.safetensors").unlink()
    status, _, err = run("figures", head, photo, "--output", "drawn", "--quiet")
    assert status == 0
    assert names(tmp_path / "drawn") == ["matching.png", "patch_tokens.png", "saliency.png", "score_curve.png"]
    assert [line.partition(":")[0] for line in err.splitlines()] == ["No response_maps.png", "No responses.png"]


def test_what_cannot_be_drawn_is_refused(refused, head, photo, vit_folder, vit, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    figures = ("figures", head, "--output", "drawn")
    assert "broken.png (no known image format) cannot be read" in refused(*figures, "broken.png")
    assert "nowhere.png (" in refused(*figures, "nowhere.png")
    assert "up to 20 images, not 21" in refused(*figures, *[photo] * 21)
    assert "no layer 1; choose from -1" in refused(*figures, photo, "--layer", 1)
    assert "'7x' is no image size" in refused(*figures, photo, "--image-size", "7x")
    assert "is not empty; choose another folder or pass --overwrite" in refused("figures", head, "--output", head)
    SOAPModelWrapper.from_backbone(vit, random_projection(32)).save_pretrained(tmp_path / "unfitted")
    assert "made without a fit" in refused("figures", "unfitted", "--output", "drawn")


def test_a_fit_puts_its_figures_beside_the_head_and_removes_those_of_an_earlier_one(run, vit_folder, images, tmp_path):
    images.save_to_disk(tmp_path / "data")
    fit = ("fit", vit_folder, "data", "--num-images", 64, "--mu", 1, "--quiet", "--output", "head")
    assert run(*fit) == (0, "", "")
    assert names(tmp_path / "head" / "figures") == OF_THE_HEAD
    first = (tmp_path / "head" / "figures" / "score_curve.png").read_bytes()
    run(*fit, "--overwrite", "--seed", 1)
    assert (tmp_path / "head" / "figures" / "score_curve.png").read_bytes() != first
    run(*fit, "--overwrite", "--no-figures")
    assert not (tmp_path / "head" / "figures").exists()


@pytest.fixture
def no_matplotlib(monkeypatch):
    """As in an environment without it."""
    for name in [name for name in sys.modules if name.startswith(("soap_hf.figures", "matplotlib"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("soap_hf.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_without_matplotlib_nothing_is_begun_that_needs_it(
    run, refused, vit_folder, images, tmp_path, no_matplotlib, monkeypatch
):
    images.save_to_disk(tmp_path / "data")
    run("fit", vit_folder, "data", "--num-images", 64, "--mu", 1, "--no-figures", "--quiet", "--output", "head")
    told = 'Figures need matplotlib; run pip install "soap-hf[figures]".'
    assert told in refused("tune", "head", "data", "--figure", "curve.png")
    said = []
    monkeypatch.setattr("soap_hf.cli.fit.show", lambda what, **_: said.append(what))
    for work, words in {
        "soap_hf.fitting.fit.fit_soap": ("fit", vit_folder, "data", "--output", "new"),
        "soap_hf.evaluation.strength.choose_mu": ("tune", "head", "data", "--output", "new"),
        "soap_hf.cli.evaluate.load_head": ("reweight", "head", "--mu", 2, "--output", "new"),
    }.items():
        said.clear()

        def begin(*_, **__):
            said.append("begun")
            raise HeadError("That is enough.")

        monkeypatch.setattr(work, begin)
        assert run(*words)[0] == 1
        assert said == [f"No figures: {told}", "begun"]


def test_a_fit_without_matplotlib_says_so_in_a_line_and_goes_on(run, vit_folder, images, tmp_path, no_matplotlib):
    images.save_to_disk(tmp_path / "data")
    status, out, err = run("fit", vit_folder, "data", "--num-images", 64, "--mu", 1, "--quiet", "--output", "head")
    assert (status, out) == (0, "")
    assert err == 'No figures: Figures need matplotlib; run pip install "soap-hf[figures]".\n'
    assert "model.safetensors" in names(tmp_path / "head")
    assert not (tmp_path / "head" / "figures").exists()
    status, _, err = run("figures", "head", "--output", "drawn", "--quiet")
    assert (status, err) == (1, 'Error: Figures need matplotlib; run pip install "soap-hf[figures]".\n')


def test_a_figure_that_fails_does_not_cost_the_fit(run, vit_folder, images, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no such font")

    images.save_to_disk(tmp_path / "data")
    monkeypatch.setattr("soap_hf.figures.head_figures", fail)
    status, _, err = run("fit", vit_folder, "data", "--num-images", 64, "--mu", 1, "--quiet", "--output", "head")
    assert (status, err) == (0, "No figures: no such font.\n")
    assert "model.safetensors" in names(tmp_path / "head")
