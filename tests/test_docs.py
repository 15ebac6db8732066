"""What the site says can be done, can be done: its Python runs, its commands are known, its links lead somewhere."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from transformers import SiglipConfig, SiglipForImageClassification

from soap_hf import SOAPModelWrapper
from soap_hf.cli.app import app
from soap_hf.cli.options import Command
from tests.conftest import EXAMPLES, ROOT, random_projection

DOCS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")}
PAGES = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8"), **DOCS}
NAMES = {"facebook/dinov2-base": "examples/vit-mae-tiny"}
"""What needs the network in the pages, and what stands for it here."""

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
NETWORK = 'title="needs the network"'


def blocks(text, language):
    """The code of one language in a page, without what is marked as needing the network."""
    return [code for kind, mark, code in FENCE.findall(text) if kind == language and NETWORK not in mark]


def commands(text):
    """The words of each `soap-hf` command in a page."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        for start in ("soap-hf", "soap_hf"):
            if start in words and "…" not in words:
                yield words[words.index(start) + 1 :]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder where everything lies that the pages speak of."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    for name, there in {"my-photos": "photos/fit", "other-photos": "photos/heldout"}.items():
        (tmp_path / name).symlink_to(EXAMPLES / there)
    shutil.copytree(EXAMPLES / "soap-vit-mae-tiny", tmp_path / "my-head")
    (tmp_path / "vit-mae-tiny").symlink_to(EXAMPLES / "vit-mae-tiny")
    config = (
        (tmp_path / "my-head" / "config.json").read_text().replace("../vit-mae-tiny", str(EXAMPLES / "vit-mae-tiny"))
    )
    (tmp_path / "my-head" / "config.json").write_text(config)
    shutil.copy(EXAMPLES / "photos/heldout/04c1bde5affb7b5b.jpg", tmp_path / "my-photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own_classifier(desk):
    """A classifier that reads patch tokens, and in the place of `my-head` a head of its vision tower."""
    small = {"hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = SiglipConfig(vision_config={**small, "image_size": 64, "patch_size": 8}, text_config=small)
    classifier = SiglipForImageClassification(config).eval()
    classifier.save_pretrained(desk / "my-classifier")
    shutil.rmtree(desk / "my-head")
    head = SOAPModelWrapper.from_backbone(classifier.vision_model, random_projection(192))
    head.save_pretrained(desk / "my-head", include_backbone=True)


PYTHON = sorted(page for page, text in PAGES.items() if blocks(text, "python"))


@pytest.mark.parametrize("page", PYTHON)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, desk):
    if page == "docs/attach.md":
        own_classifier(desk)
    if page in ("docs/scale.md", "docs/search.md"):  # they read what `soap-hf extract` wrote
        extract(*(["--with-raw", "--normalize"] if "search" in page else []))
    names: dict = {}
    for code in blocks(PAGES[page], "python"):
        for name, stands_for in NAMES.items():
            code = code.replace(name, stands_for)
        exec(compile(code, page, "exec"), names)
    assert names


def extract(*options):
    """Features of the photographs, as the pages before have them."""
    app(["extract", "my-head", "my-photos", "--output", "features", "--quiet", *options], standalone_mode=False)


@pytest.mark.parametrize("page", sorted(page for page, text in PAGES.items() if any(commands(text))))
def test_the_commands_of_a_page_are_understood(page, monkeypatch):
    monkeypatch.setattr(Command, "start", lambda command: command)  # not run
    for words in commands(PAGES[page]):
        if not words[0].startswith("--"):  # an option of `soap-hf` itself, which would be carried out
            assert isinstance(app(words, standalone_mode=False), Command), words


def test_the_tutorial_does_what_it_says(desk, run):
    """With its numbers, up to what another processor may change."""
    shutil.rmtree(desk / "my-head")
    said = ""
    for words in commands(PAGES["docs/tutorial.md"]):
        if words[1] != "facebook/dinov2-base":
            status, out, err = run(*words)
            assert status == 0, err
            said += out
    assert "this head helps" in said
    assert "Directions removed: 6 of 192" in said
    assert "On 12 photographs that the fit did not see" in said
    assert {path.name for path in Path("drawn").iterdir()} >= {"patch_tokens.png", "matching.png"}
    assert Path("features.parquet").is_file()


def anchors(text):
    """The anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(FENCE, "", text), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


def test_links_between_files_lead_somewhere():
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "CHANGELOG.md")}
    seen = 0
    for page, text in {**PAGES, **texts}.items():
        for target in re.findall(r"\]\(([^()\s]+)\)", re.sub(FENCE, "", text)):
            path, _, anchor = target.partition("#")
            if re.match("[a-z]+:", target) or path.startswith("reference/commands.md"):  # made from the commands
                continue
            there = (ROOT / page).parent / path if path else ROOT / page
            assert there.exists(), f"{page}: {target}"
            if anchor and there.suffix == ".md":
                assert anchor in anchors(there.read_text(encoding="utf-8")), f"{page}: {target}"
            seen += 1
    assert seen > 50


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 120


def test_every_public_name_is_in_the_reference():
    import soap_hf
    import soap_hf.evaluation
    import soap_hf.figures

    told = {name for text in PAGES.values() for name in re.findall(r"^::: soap_hf[\w.]*\.(\w+)$", text, re.MULTILINE)}
    assert {*soap_hf.__all__, *soap_hf.evaluation.__all__, *soap_hf.figures.__all__} <= told


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in DOCS if page.removeprefix("docs/") not in navigation] == []
