"""At work in a notebook: objects show what they hold in a line and a table, and every public name is completed."""

import re

import soap_hf
from soap_hf import Comparison, SOAPModelWrapper, choose_mu, evaluate_matching, fit_soap
from tests.conftest import EXAMPLES

HEAD = EXAMPLES / "soap-vit-mae-tiny"


def rows(html):
    """The cells of the tables of a page, row by row, the headers first."""
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    assert len({len(row) for row in cells}) == 1
    return cells


def test_completion_lists_what_is_imported_late():
    assert {*soap_hf.__all__, "__version__"} <= set(dir(soap_hf))


def test_a_head_is_a_line_and_a_table_and_a_reweighted_one_says_its_strength():
    model = SOAPModelWrapper.from_pretrained(HEAD)
    line = r"SOAPModelWrapper\(ViTMAEModel .*vit-mae-tiny: 8 of 192 directions removed, mu=auto, float32 on cpu\)"
    assert re.fullmatch(line, repr(model))
    first = rows(model._repr_html_())
    assert first[0][:3] == ["rank", "component", "score"]
    assert sum("removed" in row for row in first) == 8
    again = model.reweight(mu=2)
    assert "2 of 192 directions removed, mu=2," in repr(again)
    assert sum("removed" in row for row in rows(again._repr_html_())) == 2
    with model.disabled():
        assert "disabled" in repr(model)


def test_statistics_and_results_are_a_line_and_a_table(photos):
    model = SOAPModelWrapper.from_pretrained(HEAD)
    statistics = model.statistics
    assert re.fullmatch(
        r"SOAPStatistics\(192 components, vectors of \d+, 8 x 8 patches, \d+ real and \d+ synthetic images, .*\)",
        repr(statistics),
    )
    assert rows(statistics._repr_html_())[1][1] == str(int(statistics.scores.argmax()))
    found = evaluate_matching(Comparison.of(model), photos, progress=False)
    assert repr(found) == f"Results(matching, {len(found.rows)} images: raw, soap)"
    assert [row[1] for row in rows(found._repr_html_())][1:3] == ["raw", "soap"]
    choice = choose_mu(model, photos, progress=False)
    assert [row[0] for row in rows(choice._repr_html_())][1:] == [f"{tried.mu:g}" for tried in choice.curve]


def test_what_a_foreign_head_says_is_text():
    model = SOAPModelWrapper.from_pretrained(HEAD)
    model.config.backbone_name_or_path = "<script>\x1b[31m"
    assert "<script>" not in model._repr_html_()
    assert "&lt;script&gt;[31m" in model._repr_html_()
    assert "\x1b" not in repr(model)


def test_a_quiet_fit_prints_nothing(vit, images, capsys):
    fit_soap(vit, images, num_images=8, check=0, progress=False)
    assert capsys.readouterr().out == ""
