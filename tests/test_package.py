"""The package as it is installed: light to import, one version, no cycles, no pickle, and whole in its wheel."""

import ast
import inspect
import os
import re
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModel, ViTConfig

import soap_hf
from soap_hf import SOAPModelWrapper
from tests.conftest import ROOT, random_projection

SOURCES = sorted((ROOT / "soap_hf").rglob("*.py"))
HEAVY = {"accelerate", "datasets", "gradio", "matplotlib", "scipy", "typer"}

IMPORT = """
import sys
from transformers import AutoModel, PreTrainedModel
before = set(sys.modules)
import soap_hf
print(soap_hf.__file__)
print(*sorted(set(sys.modules) - before))
"""


def run_python(code, folder, **environment):
    """Runs code in a process of its own and gives the lines it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this repository; without hatchling here, pip fetches it from the registry."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--wheel-dir", str(folder)]
    offline = ["--no-build-isolation"] if find_spec("hatchling") else []
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, *offline, str(ROOT)], check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_is_whole_and_imports_little_outside_the_repository(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "unzipped")
    assert {path.relative_to(ROOT).as_posix() for path in SOURCES} <= names
    assert "soap_hf/py.typed" in names
    tops = {"soap_hf", "soap_hf_cli.py", f"soap_hf-{soap_hf.__version__}.dist-info"}
    assert {name.partition("/")[0] for name in names} == tops
    (tmp_path / "elsewhere").mkdir()
    where, imported = run_python(IMPORT, tmp_path / "elsewhere", PYTHONPATH=str(tmp_path / "unzipped"))
    assert Path(where) == tmp_path / "unzipped" / "soap_hf" / "__init__.py"
    assert "soap_hf.heads.model" in imported.split()
    assert not {name.partition(".")[0] for name in imported.split()} & HEAVY


def test_every_public_name_is_there_and_documented():
    assert sorted(soap_hf.__all__) == soap_hf.__all__
    for name in soap_hf.__all__:
        assert inspect.getdoc(getattr(soap_hf, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = soap_hf.nothing


def test_every_module_says_what_it_is():
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_the_version_is_written_in_one_place_and_agrees_with_the_papers():
    assert version("soap-hf") == soap_hf.__version__
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    changelog = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert citation[1] == changelog[1] == soap_hf.__version__
    written = [path.name for path in SOURCES if f'"{soap_hf.__version__}"' in path.read_text(encoding="utf-8")]
    assert written == ["version.py"]
    assert soap_hf.__version__ not in (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.")[0]


def module_name(path):
    """`soap_hf.data.data_sets` for `soap_hf/data.py`, `soap_hf` for its `__init__.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


def imports_of(name):
    """Modules of the package that a module imports anywhere in its source, inside functions and `try` too."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            inside = [f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in MODULES]
            yield from inside or ([base] if base in MODULES else [])


def wing_of(name):
    """The part of the house that a module stands in: a wing, or the module itself on the ground plan."""
    return name.split(".")[1] if "." in name else name


WINGS = (
    ("runtime",),
    ("compat", "files", "notebooks", "processes", "version"),
    ("statistics", "layout", "data"),
    ("heads",),
    ("evaluation",),
    ("fitting",),
    ("attach", "convert", "extract", "figures", "pipelines"),
    ("explore",),
    ("cli",),
)
"""The floors of the house: a wing imports those below it."""

FLOORS = {wing: floor for floor, wings in enumerate(WINGS) for wing in wings}
RUNTIME = sorted((ROOT / "soap_hf" / "runtime").glob("[!_]*.py"))


def test_imports_run_one_way():
    graph = {name: set(imports_of(name)) - {name} for name in MODULES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert {"soap_hf.runtime.errors", "soap_hf.data.data_sets"} <= graph["soap_hf.fitting.fit"]
    assert "soap_hf" not in set().union(*graph.values()), "no module imports the package as a whole"
    assert (
        order.index("soap_hf.runtime.projection") < order.index("soap_hf.heads.model") < order.index("soap_hf.cli.app")
    )


def test_wings_stand_on_the_wings_below_them():
    outside = {"soap_hf", "soap_hf.__main__"}  # the faces of the house
    assert {wing_of(name) for name in MODULES} - {"soap_hf", "__main__"} == set(FLOORS)
    for name in MODULES.keys() - outside:
        here = wing_of(name)
        for other in imports_of(name):
            there = wing_of(other)
            assert there == here or FLOORS[there] < FLOORS[here], f"{name} imports {other}"


def test_the_runtime_is_small_and_stands_alone():
    """It travels with every head, and transformers copies what is imported as `from .sibling import …` alone."""
    assert len(RUNTIME) <= 7
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in RUNTIME) <= 1400
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub", *sys.stdlib_module_names}
    for path in RUNTIME:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, path
                assert node.module in {sibling.stem for sibling in RUNTIME}, path
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).partition(".")[0] in allowed, path


def test_no_module_is_long():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_every_wing_names_its_door():
    for wing in (ROOT / "soap_hf").glob("*/__init__.py"):
        doors = re.findall(r"The door is `(\w+)`", ast.get_docstring(ast.parse(wing.read_text(encoding="utf-8"))))
        assert [(wing.parent / f"{door}.py").exists() for door in doors] == [True], wing


def test_nothing_opens_a_pickle():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        loads = re.findall(r"torch\.load\(.*", text)
        assert not loads or (path.name == "convert.py" and all("weights_only=True" in load for load in loads)), path
        rest = re.sub(r"torch\.load\(.*", "", text)
        assert not re.search(r"torch\.load\b|pickle|joblib|\bdill\b|allow_pickle", rest), path


def test_a_head_is_small(tmp_path):
    config = ViTConfig(
        hidden_size=768, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=16
    )
    model = SOAPModelWrapper.from_backbone(AutoModel.from_config(config), random_projection(768, rank=2))
    model.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 64 * 1024
