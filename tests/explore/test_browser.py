"""The page in a real browser: uploads, clicks, keys, the slider, errors, two people, a phone; no other is asked."""

import os
import re
import shutil
from pathlib import Path

import pytest

from soap_hf import SOAPModelWrapper
from soap_hf.explore import Choice, Explorer, Session, read_photo, similarity_view
from tests.conftest import EXAMPLES, noise_image

pytestmark = pytest.mark.slow
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("no chromium, chromium-browser or google-chrome in the path", allow_module_level=True)
pytest.importorskip(
    "gradio", reason="the page needs gradio, which the extra explore brings; `make test-explore` has it"
)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="a browser is driven by playwright: `make test-explore`"
)

from soap_hf.explore.serving import served

BAD = ("error", "warning")
PHOTOS = sorted((EXAMPLES / "photos" / "heldout").glob("*.jpg"))


@pytest.fixture(scope="module")
def explorer():
    return Explorer(SOAPModelWrapper.from_pretrained(EXAMPLES / "soap-vit-mae-tiny"), "demo <b>head</b>")


@pytest.fixture(scope="module")
def address(explorer):
    with served(explorer) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


class Visit:
    """Somebody at the page, who notes every error and every request to elsewhere."""

    def __init__(self, browser, address, width=1280, height=900):
        self.context = browser.new_context(viewport={"width": width, "height": height})
        self.page, self.errors, self.elsewhere = self.context.new_page(), [], []
        self.page.on(
            "console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._note(address))
        self.page.goto(address)
        self.page.wait_for_selector("img[data-image]", timeout=60_000)

    def _note(self, address):
        own = (address, "data:", "blob:")
        return lambda request: None if request.url.startswith(own) else self.elsewhere.append(request.url)

    def pictures(self):
        return [image.get_attribute("src") for image in self.page.locator("img[data-image]").all()]

    def changed(self, act):
        """Does something, and waits until the pictures are others."""
        before = self.pictures()
        act()
        self.page.wait_for_function(
            "before => { const now = [...document.querySelectorAll('img[data-image]')].map(image => image.src);"
            " return now.length && now.join() !== before.join(); }",
            arg=before,
            timeout=60_000,
        )
        return self.pictures()

    def upload(self, which, path):
        self.page.locator("input[type=file]").nth(which).set_input_files(path)

    def message(self):
        return self.page.get_by_role("alert").filter(has_text=re.compile(r"\w"))

    def click(self, down, across, picture=0):
        image = self.page.locator("img[data-image]").nth(picture)
        box = image.bounding_box()
        image.click(position={"x": across * box["width"], "y": down * box["height"]})

    def slide(self, value):
        slider = self.page.get_by_role("slider").first
        slider.focus()
        slider.fill(str(value))

    def close(self):
        self.context.close()
        assert self.errors == []
        assert self.elsewhere == []


@pytest.fixture
def visit(browser, address):
    visits = []

    def come(**size):
        visits.append(Visit(browser, address, **size))
        return visits[-1]

    yield come
    for each in visits:
        each.close()


def test_a_photograph_is_uploaded_a_patch_clicked_and_the_strength_moved(visit, explorer):
    here = visit()
    here.changed(lambda: here.upload(0, PHOTOS[0]))
    here.changed(lambda: here.upload(1, PHOTOS[1]))
    here.changed(lambda: here.click(0.2, 0.7))
    session = (
        Session().with_photo(0, read_photo(PHOTOS[0])).with_photo(1, read_photo(PHOTOS[1])).with_query(0, 0.2, 0.7)
    )
    sentences = similarity_view(session.at(explorer, Choice(-1))).sentences
    assert here.page.locator("p.soap-text").filter(has_text="Best match").all_inner_texts() == sentences
    before = here.pictures()
    after = here.changed(lambda: here.slide(2))
    assert [one == other for one, other in zip(before, after, strict=True)][:2] == [True, True], "image and raw stay"
    assert after[2] != before[2]
    assert here.page.get_by_text("clean tokens, 2 directions removed").count() == 2
    zero = here.changed(lambda: here.slide(0))
    assert zero[1] == zero[2], "nothing is removed"
    assert not list(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*.jpg")), "no upload is kept"


def test_the_second_image_and_the_keys_choose_a_patch_too(visit):
    here = visit()
    here.changed(lambda: here.click(0.55, 0.55, picture=4))
    assert here.page.get_by_text("cosine to the patch in row 5, column 5 of the second image").count() == 1
    here.page.locator("img[data-image][tabindex]").nth(1).focus()
    for key, row, column in (("ArrowUp", 4, 5), ("ArrowRight", 4, 6), ("ArrowRight", 4, 7), ("ArrowDown", 5, 7)):
        here.changed(lambda key=key: here.page.keyboard.press(key))
        place = f"cosine to the patch in row {row}, column {column} of the second image"
        assert here.page.get_by_text(place).count() == 1
    focused = here.page.evaluate("document.activeElement.dataset.image")
    assert focused == "1", "the picture keeps the focus"


def test_every_view_is_shown_and_every_picture_described(visit):
    here = visit()
    for label in ("tokens as colours", "responses", "salient object", "similarity"):
        here.changed(lambda label=label: here.page.get_by_label(label, exact=True).check())
        for image in here.page.locator("img").all():
            assert len(image.get_attribute("alt")) > 10
    here.page.get_by_text("The head", exact=True).click()
    here.page.get_by_text("Directions removed: 8 of 192").wait_for(state="visible")
    assert here.page.get_by_role("heading", name="demo <b>head</b>").count() == 1, "a name is no markup"


def test_the_component_is_chosen_among_its_kind(visit):
    here = visit()
    here.changed(lambda: here.page.get_by_label("responses", exact=True).check())
    chooser = here.page.get_by_role("combobox", name="Component")
    chooser.click()
    here.changed(lambda: here.page.get_by_role("option").nth(2).click())
    assert here.page.get_by_text("Rank 2, component").count() == 1


def test_baselines_are_a_switch(visit):
    here = visit()
    black = here.changed(lambda: here.page.get_by_label("black image (INSID3)").check())
    leading = here.changed(lambda: here.page.get_by_label("leading components").check())
    assert black[:2] == leading[:2]
    assert black[2] != leading[2]


def test_layers_are_a_choice_with_strengths_and_components_of_their_own(browser, deep):
    explorer = Explorer(deep, "deep")
    with served(explorer) as address:
        here = Visit(browser, address)
        here.changed(lambda: here.page.get_by_label("responses", exact=True).check())
        here.page.get_by_role("combobox", name="Layer").click()
        here.changed(lambda: here.page.get_by_role("option", name="hidden_states[1]").click())
        row = explorer.components[1][0].row
        assert here.page.get_by_text(f"Rank 0, component {row['component']}, score {row['score']:.3f}").count() == 1
        assert (
            here.page.get_by_role("combobox", name="Component")
            .input_value()
            .startswith(f"component {row['component']}:")
        )
        here.changed(lambda: here.page.get_by_label("similarity", exact=True).check())
        assert here.page.get_by_role("slider").first.input_value() == "2"
        here.close()


def test_a_head_without_statistics_is_shown_without_a_slider(browser, bare):
    with served(Explorer(bare, "bare")) as address:
        here = Visit(browser, address)
        assert here.page.get_by_role("slider").count() == 0
        assert here.page.get_by_text("There is no other strength: this head was saved without statistics").count() == 1
        here.page.get_by_label("responses", exact=True).check()
        here.message().wait_for()
        assert "saved without; fit it again." in here.message().inner_text()
        here.page.get_by_label("tokens as colours").check()
        here.message().wait_for(state="detached")
        here.close()


def test_what_is_no_image_is_said_in_a_sentence_and_the_page_goes_on(visit, tmp_path):
    here = visit()
    (tmp_path / "<i>no image.png").write_bytes(b"<script>alert(1)</script>")
    before = here.pictures()
    here.upload(0, tmp_path / "<i>no image.png")
    here.message().wait_for()
    assert "cannot be read as an image (no known image format); choose another file." in here.message().inner_text()
    assert "Traceback" not in here.page.content()
    assert here.pictures() == before
    here.changed(lambda: here.click(0.1, 0.1))
    assert here.message().count() == 0
    noise_image(0, (3000, 40)).save(tmp_path / "wide.png")
    here.changed(lambda: here.upload(0, tmp_path / "wide.png"))
    assert here.page.get_by_text("wide.png: scaled from 3000 × 40 to 1536 × 20 pixels.").count() == 1


def test_two_people_see_what_each_has_chosen(visit):
    one, other = visit(), visit()
    start = other.pictures()
    one.changed(lambda: one.upload(0, PHOTOS[0]))
    one.changed(lambda: one.slide(1))
    assert other.pictures() == start
    other.changed(lambda: other.click(0.9, 0.9))
    assert one.page.get_by_text("row 5, column 5 of the first image").count() == 1


def test_a_phone_shows_it_whole_and_can_be_touched(visit):
    here = visit(width=390, height=844)
    for label in ("responses", "salient object", "similarity"):
        here.changed(lambda label=label: here.page.get_by_label(label, exact=True).check())
        assert here.page.evaluate("document.documentElement.scrollWidth") <= 390
        for image in here.page.locator("img[data-image]").all():
            box = image.bounding_box()
            assert box["width"] >= 100
            assert box["x"] + box["width"] <= 390
    here.changed(lambda: here.click(0.2, 0.2, picture=1))
