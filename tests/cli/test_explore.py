"""`soap-hf explore` says what is missing before it loads anything; its page is tested in `tests/explore`."""

import sys

from tests.conftest import EXAMPLES


def test_without_gradio_it_says_what_to_install(run, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "gradio" or name == "soap_hf.explore.page"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "soap_hf.explore.serving", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, out, err = run("explore", "nowhere", "--quiet")
    assert (status, out) == (1, "")
    assert err == 'Error: The explorer needs gradio; run pip install "soap-hf[explore]".\n'


def test_a_port_that_is_none_is_refused(refused):
    head = EXAMPLES / "soap-vit-mae-tiny"
    assert "Invalid value for '--port'" in refused("explore", head, "--port", "65536")
    assert "Invalid value for '--port'" in refused("explore", head, "--port", "http")
