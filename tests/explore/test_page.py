"""The page answers on this computer alone, asks nothing of others, keeps no upload, and says errors in a sentence."""

import os
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from soap_hf.explore import Explorer, Session
from soap_hf.runtime.errors import DataError, SOAPError
from tests.conftest import EXAMPLES, noise_image

pytest.importorskip(
    "gradio", reason="the page needs gradio, which the extra explore brings; `make test-explore` has it"
)

from soap_hf.explore import page
from soap_hf.explore.serving import free_port, served

CONTROLS = ("similarity", -1, "soap", 2.0, 0)
SENTENCE = r'^<p class="soap-message" role="alert">[^<>]+[.]</p>$'


def answer(explorer, session, *values, change=None):
    """The session, pictures, message and notes after a change."""
    return page._answer(explorer, session, change or (lambda: session), values or CONTROLS)


def test_an_answer_shows_pictures_with_words_for_all_of_them(explorer, session):
    changed, pictures, message, notes = answer(explorer, session)
    assert (message, notes) == ("", "")
    assert pictures.count("<img ") == 7
    assert len(re.findall(r' alt="[^"]{10,}"', pictures)) == 7
    assert len(re.findall(r'src="data:image/jpeg;base64,', pictures)) == 7
    assert set(changed.images[0].pictures) == {(-1, False)}


@pytest.mark.parametrize("view", page.VIEWS)
def test_every_view_follows_the_strength_but_the_responses_of_raw_tokens(explorer, session, view):
    weak, strong = (answer(explorer, session, view, -1, "soap", mu, 0) for mu in (0, 20))
    assert weak[2] == strong[2] == ""
    assert (weak[1] == strong[1]) == (view == "responses")


@pytest.mark.parametrize(
    "values",
    [
        ("nonsense", -1, "soap", 2, 0),
        ("similarity", 7, "soap", 2, 0),
        ("similarity", -1, "ridge", 2, 0),
        ("similarity", -1, "zero-image", 32, 0),
        ("responses", -1, "soap", 2, 99),
        ("responses", -1, "soap", 2, None),
        ("similarity", -1, "soap", float("nan"), 0),
        ("similarity", -1, "soap", 2),
        ("similarity", "<b>", "soap", [], {}),
    ],
)
def test_what_cannot_be_shown_is_said_and_all_stays(explorer, session, values):
    after, pictures, message, _ = answer(explorer, session, *values)
    assert after is session
    assert re.match(SENTENCE, message), message
    assert "Traceback" not in message
    assert not isinstance(pictures, str)


def test_an_error_of_another_kind_is_a_sentence_too(explorer, session, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("<b>broken</b>\n  at line 3")

    monkeypatch.setattr(explorer, "look", fail)
    *_, message, _ = answer(explorer, session)
    assert re.match(SENTENCE, message), message
    assert "RuntimeError: &lt;b&gt;broken&lt;/b&gt;); the terminal says more" in message


def test_without_statistics_there_is_no_slider_and_the_reason(bare, session):
    explorer = Explorer(bare, "bare")
    assert page._strength(explorer, -1).visible is False
    *_, message, notes = answer(explorer, session)
    assert message == ""
    assert "There is no other strength: this head was saved without statistics" in notes
    *_, message, _ = answer(explorer, session, "responses", -1, "soap", 2, None)
    assert "saved without" in message


def test_the_slider_goes_as_far_as_the_statistics(explorer):
    slider = page._strength(explorer, -1)
    assert (slider.minimum, slider.maximum, slider.value) == (0, 32, 2)


def test_an_upload_is_used_up_and_other_files_are_not(tmp_path, monkeypatch):
    uploads, mine = tmp_path / "uploads", tmp_path / "mine.png"
    (uploads / "digest").mkdir(parents=True)
    inside = uploads / "digest" / "a.png"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    for path in (inside, mine):
        noise_image(0).save(path)
        with page._used_up(str(path)) as name:
            assert name == path.name
    assert not inside.parent.exists()
    assert mine.exists()
    inside.parent.mkdir()
    inside.write_bytes(b"no image")
    with pytest.raises(DataError), page._used_up(str(inside)):
        raise DataError("no image")
    assert not inside.exists()
    with pytest.raises(DataError, match="No file arrived"), page._used_up(None):
        pass


def test_examples_of_one_name_are_told_apart_and_bad_ones_refused(tmp_path, explorer):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        noise_image(0).save(tmp_path / folder / "same.png")
    assert list(page._named([tmp_path / "a/same.png", tmp_path / "b/same.png"])) == ["same.png", "same.png (2)"]
    with pytest.raises(DataError, match=r"no_image\.png cannot be read"):
        page.build(explorer, [tmp_path / "no_image.png"])


def test_the_photographs_that_come_with_it_are_named_in_their_attribution():
    words = (Path(page.__file__).parent / "photographs" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert len(page.PHOTOGRAPHS) == 4
    for path in page.PHOTOGRAPHS:
        assert f"| {path.name} | [" in words
        Image.open(path).verify()


def test_it_answers_here_alone_and_leaves_nothing(explorer):
    with served(explorer) as address:
        uploads = os.environ["GRADIO_TEMP_DIR"]
        port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", address)[1])
        assert urllib.request.urlopen(address, timeout=30).status == 200
        addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
        for other in addresses - {"127.0.0.1"}:
            with pytest.raises(ConnectionError), socket.create_connection((other, port), timeout=5):
                pass
        config = urllib.request.urlopen(f"{address}config", timeout=30).read().decode()
        assert '"analytics_enabled":false' in config
        assert "googleapis" not in config
    assert not Path(uploads).exists()
    assert "GRADIO_TEMP_DIR" not in os.environ
    with pytest.raises(urllib.error.URLError), urllib.request.urlopen(address, timeout=5):
        pass


def test_a_port_in_use_is_refused_in_a_sentence(explorer, run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            SOAPError, match=rf"^Port {port} of 127.0.0.1 cannot be had \(.+\); choose another, or none\.$"
        ):
            free_port(port)
        with pytest.raises(SOAPError, match=f"Port {port}"), served(explorer, port=port):
            pass
        status, out, err = run("explore", EXAMPLES / "soap-vit-mae-tiny", "--port", port)
        assert (status, out) == (1, "")
        assert re.fullmatch(rf"Error: Port {port} of 127.0.0.1 cannot be had \(.+\); choose another, or none\.\n", err)


def test_a_session_begins_empty_and_a_lost_one_says_what_to_do(explorer):
    *_, message, _ = answer(explorer, Session())
    assert "There is no image yet; upload one or choose an example." in message
