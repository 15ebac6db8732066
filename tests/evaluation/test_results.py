"""Differences are paired, their intervals honest, and the files whole."""

import csv
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from soap_hf.evaluation import results
from soap_hf.evaluation.results import (
    Interval,
    command_line,
    paired_difference,
    resamples,
    results_table,
    summary,
    verdict,
    write_results,
)
from soap_hf.runtime.errors import SOAPError

VALUES = st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=2, max_size=30)
ROWS = [
    {"image": "a.jpg", "raw_iou": 0.25, "soap_iou": 0.5, "raw_cls": 1},
    {"image": "b, c.jpg", "raw_iou": 0.75, "soap_iou": 0.75, "raw_cls": 0},
]


@pytest.fixture
def found():
    """The summary of two images."""
    return summary(
        ROWS, ["raw", "soap"], ["iou", "cls"], counts={"images": 2}, settings={"layer": -1}, command="do it"
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(VALUES)
def test_the_interval_holds_the_mean_and_turns_round_with_the_arms(pairs):
    before, after = zip(*pairs, strict=True)
    mean, low, high = paired_difference(before, after, repeats=200)
    assert low - 1e-9 <= mean <= high + 1e-9
    assert mean == pytest.approx(sum(after) / len(after) - sum(before) / len(before), abs=1e-9)
    turned = paired_difference(after, before, repeats=200)
    assert turned == pytest.approx((-mean, -high, -low), abs=1e-9)


def test_pairing_takes_out_what_both_arms_share():
    level = torch.randn(100)
    mean, low, high = paired_difference(level, level + 0.1)
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1), abs=1e-6)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
    draws = torch.randn(300, 40, generator=torch.Generator().manual_seed(1)) + 0.3
    intervals = [paired_difference(torch.zeros(40), one, repeats=400) for one in draws]
    share = sum(low <= 0.3 <= high for _, low, high in intervals) / len(intervals)
    assert 0.91 < share < 0.98


@pytest.mark.parametrize(
    ("ends", "metric", "effect"),
    [
        ((0.1, 0.01, 0.2), "iou", "helps"),
        ((-0.1, -0.2, -0.01), "iou", "hurts"),
        ((0.1, 0.01, 0.2), "stuck", "hurts"),
        ((-0.1, -0.2, -0.01), "stuck", "helps"),
        ((-0.1, -0.2, -0.01), "share", "less position"),
        ((0.1, 0.01, 0.2), "row_r2", "more position"),
        ((0.0, 0.0, 0.0), "iou", "no difference"),
        ((0.0, -0.1, 0.1), "iou", "no measurable difference"),
    ],
)
def test_a_verdict_is_plain(ends, metric, effect):
    assert verdict(Interval(*ends), metric, images=100) == (effect, None)
    few = "no difference" if effect == "no difference" else "too few images"
    assert verdict(Interval(*ends), metric, images=7) == (few, None)


def test_so_many_images_would_tell_four_times_in_five():
    draw = torch.Generator().manual_seed(5)
    first = torch.randn(100, generator=draw)
    first = (first - first.mean()) / first.std() + 0.1  # the true difference, as chance shows it
    told = verdict(paired_difference(torch.zeros(100), first), "iou", images=100)
    assert told.effect == "no measurable difference"
    assert told.images_to_tell == pytest.approx(0.1**-2 * 2.8**2, rel=0.1)
    again = torch.randn(200, told.images_to_tell, generator=draw) + 0.1
    seen = [paired_difference(torch.zeros(len(one)), one, repeats=300).low > 0 for one in again]
    assert 0.7 < sum(seen) / len(seen) < 0.9


def test_a_number_of_images_without_end_is_not_told():
    assert str(verdict(Interval(1e-300, -1.0, 1.0), "iou", images=100)).endswith("; over a million images would tell")
    assert verdict(Interval(0.1, -1e-6, 0.2), "iou", images=100).images_to_tell >= 100


def test_a_seed_names_the_resamples_and_memory_does_not_change_them(monkeypatch):
    whole = torch.cat(list(resamples(7, 1000)))
    assert whole.shape == (1000, 7)
    assert (whole.sum(dim=1) == 7).all()
    assert not torch.equal(torch.cat(list(resamples(7, 1000, seed=1))), whole)
    monkeypatch.setattr(results, "DRAWS_AT_ONCE", 70)
    blocks = list(resamples(7, 1000))
    assert max(map(len, blocks)) == 10
    assert torch.equal(torch.cat(blocks), whole)


def test_resampling_leaves_the_global_random_numbers_alone():
    before = torch.random.get_rng_state()
    paired_difference([0, 1], [1, 0])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([0.5], [0.6], "at least 2 images, not 1"),
        ([], [], "at least 2 images, not 0"),
        ([0.1, 0.2], [0.3, 0.4, 0.5], "a finite value per image on both sides"),
        ([0.1, float("nan")], [0.3, 0.4], "a finite value per image on both sides"),
    ],
)
def test_what_gives_no_interval_is_refused(before, after, message):
    with pytest.raises(SOAPError, match=message):
        paired_difference(before, after)


def test_a_summary_holds_means_and_differences(found):
    assert found["means"] == {"raw": {"iou": 0.5, "cls": 0.5}, "soap": {"iou": 0.625}}
    assert found["differences"].keys() == {"soap"}
    assert found["differences"]["soap"]["iou"] == (0.125, 0.0, 0.25)
    assert found["counts"] == {"images": 2}
    assert found["versions"].keys() == {"soap_hf", "transformers", "torch", "datasets"}


def test_the_table_shows_every_number(found):
    console = Console(record=True, width=80, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table(found, "saliency"))
    text = console.export_text()
    for word in ("saliency", "iou", "cls", "0.500", "0.625", "+0.125", "+0.000 to +0.250"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80


def test_both_files_come_back(found, tmp_path):
    write_results(tmp_path / "new", "saliency", ROWS, found)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["saliency.csv", "summary.json"]
    with open(tmp_path / "new" / "saliency.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["a.jpg", "b, c.jpg"]
    assert [float(row["soap_iou"]) for row in rows] == [0.5, 0.75]
    read = json.loads((tmp_path / "new" / "summary.json").read_text(encoding="utf-8"))
    assert read["differences"]["soap"]["iou"] == {"mean": 0.125, "low": 0.0, "high": 0.25}
    assert read["verdicts"]["soap"]["iou"] == {"effect": "too few images", "images_to_tell": None}
    others = found.keys() - {"differences", "verdicts"}
    assert {name: read[name] for name in others} == {name: found[name] for name in others}


def test_nothing_half_written_is_left(found, tmp_path):
    with pytest.raises(ValueError, match="more"):
        write_results(tmp_path / "new", "saliency", [*ROWS, {**ROWS[0], "more": 1}], found)
    with pytest.raises(TypeError):
        write_results(tmp_path / "new", "saliency", ROWS, {**found, "settings": object()})
    assert not list(tmp_path.iterdir())


def test_other_files_of_the_folder_stay(found, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "summary.json").write_text("old")
    write_results(tmp_path, "saliency", ROWS, found)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "summary.json").read_text().startswith("{")


def test_a_token_is_not_written_down():
    shown = command_line(["evaluate", "knn", "head", "--token=hf_secret", "--token", "hf_secret", "--k", "1"])
    assert shown == "soap-hf evaluate knn head --token=… --token … --k 1"
