"""The chosen strength is the smallest that is nearly best, and none where nothing is gained."""

import json

import pytest
import torch
from transformers import AutoModel

from soap_hf import Examples, SOAPModelWrapper, choose_mu, fit_soap
from soap_hf.data.data_sets import open_dataset
from soap_hf.evaluation.results import Interval
from soap_hf.evaluation.strength import StrengthChoice, TriedStrength, choose, curve_of
from soap_hf.runtime.errors import HeadError, SOAPError
from soap_hf.runtime.projection import SOAPProjection
from tests.conftest import EXAMPLES


def tried(mu: float, gain: float, low: float, error: float = 0.01) -> TriedStrength:
    return TriedStrength(mu, int(mu), 0.3 + gain, 0.1, Interval(gain, low, 2 * gain - low), error)


IDENTITY = tried(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("curve", "mu"),
    [
        ([IDENTITY, tried(2, 0.05, 0.02), tried(4, 0.10, 0.08), tried(8, 0.105, 0.08)], 4),
        ([IDENTITY, tried(2, 0.05, 0.02), tried(4, 0.10, 0.08), tried(8, 0.12, 0.08)], 8),
        ([IDENTITY, tried(2, 0.005, -0.01), tried(4, 0.004, -0.01)], 0),
        ([IDENTITY, tried(2, -0.05, -0.07)], 0),
        ([IDENTITY, tried(1, 0.1, -0.01, 0.2), tried(2, 0.12, 0.01, 0.03)], 0),
    ],
)
def test_the_smallest_within_one_error_of_the_best_if_its_gain_is_sure(curve, mu):
    assert choose(curve) == mu


def test_a_curve_tells_gains_over_raw():
    rows = [{"raw_right_1": 0.2, "raw_stuck": 0.5, "4_right_1": 0.2 + gain, "4_stuck": 0.1} for gain in (0.1, 0.3)]
    methods = {"raw": SOAPProjection.identity(6), "4": SOAPProjection(torch.eye(6)[:, :4], torch.ones(4))}
    identity, four = curve_of(rows, methods)
    assert (identity.mu, identity.gain.mean, identity.removed) == (0, 0, 0)
    assert (four.mu, four.removed, four.stuck) == (4, 4, pytest.approx(0.1))
    assert four.gain.mean == pytest.approx(0.2)
    assert four.standard_error == pytest.approx(0.1)


def test_a_masked_autoencoder_is_given_a_strength_and_its_control_none():
    found = {}
    for name in ("vit-mae-tiny", "matched-pair/vit-simclr"):
        model = fit_soap(EXAMPLES / name, EXAMPLES / "photos" / "fit", num_images=64, check=0, progress=False)
        before = model.config.mu
        found[name] = choose_mu(model, Examples(open_dataset(EXAMPLES / "photos" / "heldout")), progress=False)
        assert model.config.mu == before, "the model stays as it is"
    masked, control = found.values()
    assert masked.mu > 0
    assert masked.chosen.gain.low > 0.05
    assert control.mu == 0
    assert "the identity" in control.reason


def test_strengths_end_where_the_statistics_do(mae_folder, photos, tmp_path):
    model = fit_soap(mae_folder, photos, num_images=16, check=0, progress=False)
    choice = choose_mu(model, Examples(open_dataset(photos), num_images=4), strengths=[2, 500], progress=False)
    assert [one.mu for one in choice.curve] == [0, 2]
    with pytest.raises(SOAPError, match="from 0 upwards"):
        choose_mu(model, Examples(open_dataset(photos), num_images=4), strengths=[-1], progress=False)


def test_a_head_without_statistics_says_what_to_do(mae_folder, photos):
    model = SOAPModelWrapper.from_backbone(AutoModel.from_pretrained(mae_folder), None)
    with pytest.raises(HeadError, match="without statistics; fit it again"):
        choose_mu(model, Examples(open_dataset(photos), num_images=4), progress=False)


def test_the_command_writes_the_head_and_its_curve(run, tmp_path):
    head, photos = EXAMPLES / "soap-vit-mae-tiny", EXAMPLES / "photos" / "heldout"
    status, out, err = run("tune", head, photos, "--num-images", 40, "--output", "tuned", "--quiet")
    assert status == 0, err
    assert "chosen" in out
    assert (tmp_path / "tuned" / "figures" / "matching_curve.png").is_file()
    written = AutoModel.from_pretrained(tmp_path / "tuned")
    assert written.config.mu > 0
    assert written.config.checks[0]["low"] > 0
    assert written.projections["-1"].rank == written.config.ranks[0] == written.config.mu
    measured = tmp_path / "tuned" / "evaluation" / "position"
    assert run("evaluate", "position", "tuned", photos, "--num-images", 8, "--output", measured, "--quiet")[0] == 0
    status, out, _ = run("tune", "tuned", photos, "--num-images", 12, "--apply", "--quiet")
    assert status == 0
    assert (measured / "summary.json").is_file(), "an evaluation says at which strength it was made"
    assert "by which the strength was chosen" in run("info", "tuned")[1].replace("\n", " ")


def test_a_head_of_several_layers_is_checked_in_each(run, tmp_path):
    photos = EXAMPLES / "photos"
    model = fit_soap(EXAMPLES / "vit-mae-tiny", photos / "fit", num_images=40, layer=[3, -1], check=0, progress=False)
    model.save_pretrained(tmp_path / "head")
    assert run("tune", "head", photos / "heldout", "--num-images", 12, "--apply", "--quiet")[0] == 0
    checks = AutoModel.from_pretrained(tmp_path / "head").config.checks
    assert [(check["images"], check["unseen"]) for check in checks] == [(12, False), (12, False)]


def test_heads_of_one_name_have_a_curve_each(monkeypatch):
    from soap_hf import figures
    from soap_hf.cli.tune import _drawn

    drawn = {}
    monkeypatch.setattr(figures, "matching_curve", lambda choices: drawn.update(choices))
    monkeypatch.setattr(figures, "to_png", lambda _: b"")
    choice = StrengthChoice(0, [IDENTITY], 8, -1)
    _drawn({"a/head": choice, "b/head": choice})
    assert list(drawn) == ["a/head", "b/head"]


def test_an_evaluation_of_another_fit_goes_with_its_head(mae_folder, photos, tmp_path, caplog):
    for number in (16, 20):
        model = fit_soap(mae_folder, photos, num_images=number, check=0, progress=False)
        model.save_pretrained(tmp_path / "head")
        kept = tmp_path / "head" / "evaluation" / "knn" / "summary.json"
        if number == 16:
            kept.parent.mkdir(parents=True)
            kept.write_text(json.dumps({"settings": {"mu": -1}}), encoding="utf-8")
    assert not kept.exists()
    assert "was measured on an earlier head" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--apply", "--output", "x"), "pass one of them"),
        (("--figure", "nowhere/curve.png"), "There is no folder"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(refused, options, message):
    assert message in refused("tune", EXAMPLES / "soap-vit-mae-tiny", EXAMPLES / "photos" / "heldout", *options)
