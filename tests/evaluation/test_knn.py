"""The search is exact however it is cut, votes add up, and what k-NN cannot classify is refused before the work."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import normalize

from soap_hf import SOAPModelWrapper, SOAPProjection
from soap_hf.evaluation.comparison import Comparison
from soap_hf.evaluation.examples import Examples
from soap_hf.evaluation.knn import TEMPERATURE, evaluate_knn, nearest, weighted_vote
from soap_hf.runtime.errors import DataError, SOAPError
from tests.conftest import random_projection
from tests.tiny_backbones import TINY_BACKBONES

properties = settings(max_examples=40, deadline=None, derandomize=True)
COLOURS = {"green": (20, 200, 40), "red": (220, 30, 20)}


def unit_vectors(seed, number, dim=5):
    """Random vectors of length 1 in float64, so that round-off orders no two of them."""
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(number, dim, generator=generator, dtype=torch.float64), dim=-1)


def coloured(number, classes=COLOURS, seed=0):
    """Images of one colour each, a little noisy, with the colour's name for a label."""
    names = sorted(classes)
    rows: dict = {"image": [], "label": []}
    generator = torch.Generator().manual_seed(seed)
    for label, name in enumerate(names):
        for _ in range(number):
            shade = torch.randint(-15, 15, (3,), generator=generator)
            pixels = (torch.tensor(classes[name]) + shade).clamp(0, 255).expand(32, 32, 3)
            rows["image"].append(Image.fromarray(pixels.to(torch.uint8).numpy()))
            rows["label"].append(label)
    return Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "label": ClassLabel(names=names)}))


def labelled(dataset, **kwargs):
    return Examples(dataset, label_column="label", **kwargs)


@pytest.fixture
def comparison(vit, projection, processor):
    """Raw and clean on the tiny ViT, which has a CLS token."""
    return Comparison.of(SOAPModelWrapper.from_backbone(vit, projection, image_processor=processor))


@properties
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.integers(1, 45), st.data())
def test_blocks_find_what_one_big_product_finds(seed, num_queries, num_bank, block, data):
    k = data.draw(st.integers(1, num_bank))
    queries, bank = unit_vectors(seed, num_queries), unit_vectors(seed + 1, num_bank)
    cosines, rows = nearest(queries, bank, k, block=block)
    whole = (queries @ bank.T).sort(dim=1, descending=True)
    assert torch.equal(rows, whole.indices[:, :k])
    torch.testing.assert_close(cosines, whole.values[:, :k])


def test_no_product_is_larger_than_a_block(monkeypatch):
    sizes = []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: sizes.append((len(a), b.shape[1])) or product(a, b))
    nearest(unit_vectors(0, 50), unit_vectors(1, 70), 3, block=16)
    assert len(sizes) == 4 * 5
    assert max(map(max, sizes)) == 16


def test_too_few_vectors_are_refused():
    with pytest.raises(DataError, match="3 neighbours needs as many vectors, but there are 2"):
        nearest(torch.eye(2), torch.eye(2), 3)


def test_votes_weigh_as_the_cosine_says():
    cosines, labels = torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[2, 0, 0]])
    votes = weighted_vote(cosines, labels, 3)
    weights = (cosines / TEMPERATURE).exp()
    torch.testing.assert_close(
        votes, torch.stack([weights[0, 1:].sum(), torch.tensor(0), weights[0, 0]])[None] / weights.sum()
    )
    assert votes.argmax() == 2, "one near neighbour outvotes two that lie further off"
    assert weighted_vote(torch.tensor([[0.9, 0.89, 0.89]]), labels, 3).argmax() == 0


def test_colours_are_told_apart(comparison):
    found = evaluate_knn(
        comparison, labelled(coloured(8)), labelled(coloured(3, seed=1)), neighbours=(1, 5), batch_size=5
    )
    metrics = {f"{feature}_k{k}" for feature in ("cls", "mean", "cls_mean") for k in (1, 5)}
    assert found.summary["means"]["raw"] == dict.fromkeys(metrics, 1.0)
    assert found.summary["means"]["soap"] == {name: 1.0 for name in metrics if not name.startswith("cls_k")}
    assert [row["label"] for row in found.rows] == ["green"] * 3 + ["red"] * 3
    assert found.summary["counts"] == {"test_images": 6, "training_images": 16, "classes": 2, "bad_images": 0}
    assert found.summary["settings"]["ranks"] == {"raw": 0, "soap": 2}


def test_cleaning_away_the_content_costs_the_clean_arm_alone(vit, processor):
    bare = Comparison.of(SOAPModelWrapper.from_backbone(vit, None, image_processor=processor))
    pixels = torch.stack([bare.preprocess(image) for image in coloured(8)["image"]])
    means = bare.raw_tokens(pixels).patches.flatten(1, -2).mean(dim=1)
    content = torch.linalg.svd(means - means.mean(dim=0), full_matrices=False).Vh[:3].T
    harmful = SOAPModelWrapper.from_backbone(vit, SOAPProjection(content, torch.ones(3)), image_processor=processor)
    found = evaluate_knn(Comparison.of(harmful), labelled(coloured(8)), labelled(coloured(8, seed=1)), neighbours=(5,))
    assert found.summary["means"]["raw"]["mean_k5"] == 1
    assert found.summary["differences"]["soap"]["mean_k5"].high < 0, "a harm is shown as one"


def test_features_are_those_of_the_model(comparison, processor):
    train, test = coloured(4), coloured(2, seed=1)
    found = evaluate_knn(comparison, labelled(train), labelled(test), neighbours=(1,))
    model, preprocess = comparison.model, comparison.preprocess
    features = []
    for dataset in (train, test):
        with torch.no_grad():
            clean = model(torch.stack([preprocess(image) for image in dataset["image"]])).last_hidden_state
        parts = normalize(clean[:, 0], dim=-1), normalize(clean[:, 1:].mean(dim=1), dim=-1)
        features.append(normalize(torch.cat(parts, dim=-1), dim=-1))
    rows = (features[1] @ features[0].T).argmax(dim=1)
    expected = [train["label"][row] == label for row, label in zip(rows.tolist(), test["label"], strict=True)]
    assert [row["soap_cls_mean_k1"] for row in found.rows] == [int(right) for right in expected]


def test_a_backbone_without_cls_has_only_the_mean():
    comparison = Comparison.of(SOAPModelWrapper.from_backbone(TINY_BACKBONES["ijepa"].build(), None))
    found = evaluate_knn(comparison, labelled(coloured(4)), labelled(coloured(2, seed=1)), neighbours=(1,))
    assert found.summary["means"].keys() == {"raw", "soap"}
    assert found.summary["means"]["raw"].keys() == {"mean_k1"}


def test_labels_with_names_match_by_name(comparison):
    turned = coloured(2, seed=1).cast_column("label", ClassLabel(names=["green", "red"]))
    turned = turned.map(lambda row: {"label": 1 - row["label"]}).cast_column(
        "label", ClassLabel(names=["red", "green"])
    )
    found = evaluate_knn(comparison, labelled(coloured(4)), labelled(turned), neighbours=(1,))
    assert found.summary["means"]["raw"]["mean_k1"] == 1


def test_what_cannot_be_classified_is_refused_before_any_image_is_read(comparison, monkeypatch):
    monkeypatch.setattr(Examples, "measured", lambda *_, **__: pytest.fail("read an image"))
    train, test = labelled(coloured(6)), labelled(coloured(2, seed=1))
    with pytest.raises(
        DataError, match=r"^Class 'green' has 6 training images, fewer than k = 20; leave it out or lower"
    ):
        evaluate_knn(comparison, train, test)
    with pytest.raises(DataError, match=r"^The training images are of 1 class"):
        evaluate_knn(comparison, labelled(coloured(6).select(range(6))), test, neighbours=(1,))
    more = labelled(coloured(2, {**COLOURS, "blue": (0, 0, 250)}))
    with pytest.raises(DataError, match=r"^Class 'blue' of the test images has no training image"):
        evaluate_knn(comparison, train, more, neighbours=(1,))
    few = Examples(coloured(6), label_column="label", num_images=6)
    with pytest.raises(
        DataError, match=r"training images in the sample of 6 of 12, fewer than k = 20; draw more \(--num-train"
    ):
        evaluate_knn(comparison, few, test)
    for neighbours in ((), (0, 1)):
        with pytest.raises(SOAPError, match="k must be a whole number"):
            evaluate_knn(comparison, train, test, neighbours=neighbours)


def test_no_batch_size_changes_the_result(comparison):
    rows = [
        evaluate_knn(
            comparison, labelled(coloured(4)), labelled(coloured(3, seed=1)), neighbours=(3,), batch_size=size
        ).rows
        for size in (1, 5, 32)
    ]
    assert rows[0] == rows[1] == rows[2]


def test_the_identity_differs_from_raw_in_nothing(vit, processor):
    comparison = Comparison.of(SOAPModelWrapper.from_backbone(vit, None, image_processor=processor))
    found = evaluate_knn(comparison, labelled(coloured(4)), labelled(coloured(3, seed=1)), neighbours=(3,))
    assert set(found.summary["differences"]["soap"].values()) == {(0, 0, 0)}


def test_rivals_stand_beside(vit, processor):
    model = SOAPModelWrapper.from_backbone(vit, random_projection(32), image_processor=processor)
    comparison = Comparison.of(model, ["soap", "zero-image"])
    found = evaluate_knn(comparison, labelled(coloured(4)), labelled(coloured(2, seed=1)), neighbours=(1,))
    assert list(found.summary["means"]) == ["raw", "soap", "zero-image"]
    assert {"raw_mean_k1", "soap_mean_k1", "zero-image_mean_k1"} <= found.rows[0].keys()
