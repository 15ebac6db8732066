"""A head from a stranger loads to a model that works or is refused in the package's own words, and nothing else."""

import copy
import json
import os
import pickle
import shutil
import struct
from collections import Counter
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save
from transformers import Dinov2Config, PretrainedConfig, ViTConfig, ViTImageProcessorPil, ViTModel

from soap_hf import SOAPConfig, fit_soap
from tests.heads.hostile import ENTRIES, Loader

NUMBERS = [0, 1, -1, 3, 0.5, -0.5, 2**20, 10**9, 2**31, 2**63, 2**64, 10**400, 1e308, np.nan, np.inf, -np.inf]
WORDS = [
    "", "auto", "tokens", "packed", "channels_first", "rows_columns_frames", "vit", "swin", "soap", "timm_wrapper",
    "float16", "float8_e4m3fn", "int8", "nn", "load", "last", "stem", "kernels-community/flash-attn2", "evil/attn",
    "..", "../..", "./", "../vit", "./model.safetensors", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "~",
    "https://example.com/model", "hf://me/vit", "a/b/c", "CON", "\0", "../vit\0", "\ud800", "\x1b[2J", "F64", "I64",
]  # fmt: skip
KEYS = sorted({
    *dir(SOAPConfig), "attn_implementation", "auto_map", "quantization_config", "layer_types", "rope_theta", "depths",
    "custom_pipelines", "configuration_files", "__deepcopy__", "num_layers", "pruned_heads", "experts_implementation",
    "backbone_config", "vision_config", "use_timm_backbone", "initializer", "__float__", "image_processor_type",
})  # fmt: skip
LARGE = {
    "text": "x" * 100_000,
    "zeros": [0] * 5000,
    "lists": [[]] * 5000,
    "names": {str(number): number for number in range(5000)},
}
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64]

scalars = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(WORDS)
keys = st.sampled_from(KEYS)
nested = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))
values = scalars | nested | st.sampled_from(sorted(LARGE)).map(LARGE.get)
entries = st.sampled_from(sorted(ENTRIES))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """A folder with a backbone of width 8 and a sound head on it."""
    folder = tmp_path_factory.mktemp("strangers")
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    ViTModel(config).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    noise = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    images = Dataset.from_dict({"image": [Image.fromarray(pixels) for pixels in noise]})
    fit_soap(folder / "vit", images, mu=2, num_images=20, progress=False).save_pretrained(folder / "head")
    return folder


@pytest.fixture(scope="module")
def loader(strangers):
    loader = Loader(strangers)
    yield loader
    loader.close()


@pytest.fixture
def head(strangers):
    """A copy of the sound head, to be changed."""
    copied = strangers / "copy"
    shutil.copytree(strangers / "head", copied)
    yield copied
    shutil.rmtree(copied)


def examples(number):
    """So many of them, the same in each run."""
    return settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


def places(tree, path=()):
    """The paths to all values in a tree of dicts and lists; of more than two like parts, to the first two."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree[:2]) if isinstance(tree, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def mutations(tree):
    """One or two changes of a tree."""
    actions = st.sampled_from(["replace", "replace", "delete", "rename", "add", "repeat"])
    change = st.tuples(st.sampled_from(list(places(tree))), actions, values, keys)
    return st.lists(change, min_size=1, max_size=2)


def mutated(tree, changes):
    """The tree with the changes, as far as their places are still there."""
    tree = copy.deepcopy(tree)
    for (*above, last), action, value, key in changes:
        try:
            part = tree
            for step in above:
                part = part[step]
            if action == "replace":
                part[last] = copy.deepcopy(value)
            elif action == "delete":
                del part[last]
            elif action == "rename":
                part[key] = part.pop(last)
            elif action == "add":
                part[last][key] = copy.deepcopy(value)
            else:
                part[last] = [part[last]] * 3
        except (TypeError, KeyError, IndexError, AttributeError):
            continue
    return tree


def transformers_sees_a_head(head: Path) -> bool:
    """Whether AutoConfig hands the config on to this package; what it cannot read itself, no plug-in can refuse."""
    if (head / "config.json").stat().st_size > 1 << 24:
        return False
    try:
        told, _ = PretrainedConfig.get_config_dict(head)
        return told["model_type"] == "soap" and isinstance(told.get("auto_map", {}).get("AutoConfig", ""), str)
    except Exception:
        return False


def check(loader: Loader, head: Path, entry: str) -> str:
    """What became of a head, which must be no fault."""
    if entry.startswith("Auto") and not transformers_sees_a_head(head):
        entry = "SOAPModelWrapper"
    outcome = loader.load(entry, head)
    assert outcome.kind != "fault", f"{entry}: {outcome.reason}"
    return outcome.kind


def test_mutated_configs(loader, head):
    sound, became = json.loads((head / "config.json").read_text()), Counter()

    @examples(250)
    @given(mutations(sound), entries)
    def each(changes, entry):
        (head / "config.json").write_text(json.dumps(mutated(sound, changes)))
        became[check(loader, head, entry)] += 1

    each()
    assert min(became["loaded"], became["refused"]) >= 50, became


def test_mutated_weights(loader, head):
    became = Counter()

    @examples(125)
    @given(spoilt((head / "model.safetensors").read_bytes()), entries)
    def each(content, entry):
        (head / "model.safetensors").write_bytes(content)
        became[check(loader, head, entry)] += 1

    each()
    assert became["refused"] >= 50, became


def test_mutated_statistics(loader, head):
    @examples(100)
    @given(spoilt((head / "statistics.safetensors").read_bytes()), st.sampled_from(["AutoModel", "SOAPModelWrapper"]))
    def each(content, entry):
        (head / "statistics.safetensors").write_bytes(content)
        assert check(loader, head, entry) == "loaded"  # they are read when asked for

    each()


def test_mutated_image_processors(loader, head):
    sound = json.loads((head / "preprocessor_config.json").read_text())

    @examples(25)
    @given(mutations(sound), st.sampled_from(["AutoModel", "SOAPModelWrapper"]))
    def each(changes, entry):
        (head / "preprocessor_config.json").write_text(json.dumps(mutated(sound, changes)))
        assert check(loader, head, entry) == "loaded"  # it is read when asked for

    each()


def spoilt(raw: bytes):
    """Mutations of a safetensors file: of its bytes, its header, its numbers and its tensors."""
    tensors, length = load(raw), int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    bits = st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 7))
    names, numbers = st.sampled_from(sorted(tensors)), st.sampled_from([0.0, 0.5, -1.0, 2.0, 1e38, np.nan])
    shapes, dtypes = st.lists(st.sampled_from([0, 1, 2, 4, 8]), max_size=3), st.sampled_from(DTYPES)

    def cut(end):
        return raw[:end]

    def claiming(number):
        return struct.pack("<Q", number) + raw[8:]

    def flipped(bits):
        changed = bytearray(raw)
        for place, bit in bits:
            changed[place] ^= 1 << bit
        return bytes(changed)

    def with_header(changes):
        content = json.dumps(mutated(header, changes)).encode()
        return struct.pack("<Q", len(content)) + content + raw[8 + length :]

    def with_tensor(name, tensor):
        return save({**tensors, name: tensor}, header.get("__metadata__"))

    def with_number(name, place, number):
        flat = tensors[name].flatten().clone()
        flat[place % len(flat)] = torch.tensor(number).to(flat.dtype)
        return with_tensor(name, flat.view(tensors[name].shape))

    return st.one_of(
        st.builds(cut, st.integers(0, len(raw) - 1)),
        st.builds(claiming, st.integers(0, 2**64 - 1)),
        st.builds(flipped, st.lists(bits, min_size=1, max_size=3)),
        st.builds(with_header, mutations(header)),
        st.builds(with_number, names, st.integers(0, 1000), numbers),
        st.builds(lambda name, dtype: with_tensor(name, tensors[name].to(dtype)), names, dtypes),
        st.builds(lambda name, shape, dtype: with_tensor(name, torch.ones(shape).to(dtype)), names, shapes, dtypes),
        st.binary(max_size=64),
    )


def with_config(**changes):
    """A config that says something else."""

    def change(head):
        path = head / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def holding(name, content):
    """A file of other content."""
    return lambda head: (head / name).write_bytes(content)


def of_ten_gigabytes(name, start=b""):
    """A file of so many zeros, which take no room on the disk."""

    def change(head):
        (head / name).write_bytes(start)
        os.truncate(head / name, 10 << 30)

    return change


def safetensors_header(**shapes):
    """The start of a safetensors file of float32 tensors of these shapes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[f"projections.-1.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content


def square(dim):
    """A head that removes every direction, all of them zero."""

    def change(head):
        with_config(hidden_sizes=[dim], ranks=[dim])(head)
        start = safetensors_header(basis=[dim, dim], weights=[dim])
        (head / "model.safetensors").write_bytes(start)
        os.truncate(head / "model.safetensors", len(start) + 4 * (dim * dim + dim))

    return change


def with_backbone(**changes):
    """The config of a backbone that names its stages, and says something else."""
    return with_config(backbone=Dinov2Config().to_dict() | changes)


class Payload:
    """A pickle that leaves a trace when it is read."""

    def __reduce__(self):
        return os.system, ("echo ran",)


CODE = b"import os\nos.system('echo ran')\nraise SystemExit\n"
CODE_MAP = {"AutoConfig": "code.Evil", "AutoModel": "code.Evil", "AutoImageProcessor": "code.Evil"}

REFUSED = {
    "an empty config": holding("config.json", b""),
    "a list": holding("config.json", b"[]"),
    "no UTF-8": holding("config.json", b'{"model_type": "soap", "fit": "\xff\xfe"}'),
    "UTF-16": holding("config.json", '{"model_type": "soap"}'.encode("utf-16")),
    "10,000 levels": holding("config.json", b'{"model_type": "soap", "fit": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    "200 levels": with_config(extra=reduce(lambda inner, _: [inner], range(200), [])),
    "200,000 lists": with_config(extra=[[]] * 200_000),
    "a number of 100,000 digits": holding("config.json", b'{"model_type": "soap", "mu": 1' + b"0" * 100_000 + b"}"),
    "the same key twice": holding("config.json", b'{"model_type": "soap", "ranks": [2], "ranks": [-2]}'),
    "a config of 10 GB": of_ten_gigabytes("config.json"),
    "ten million lists": holding("config.json", b'{"model_type": "soap", "fit": [' + b"[]," * 10_000_000 + b"[]]}"),
    "a billion layers": with_backbone(num_hidden_layers=10**9),
    "a billion labels": with_config(num_labels=10**9),
    "a billion labels of the backbone": with_backbone(num_labels=10**9),
    "a wide head": with_config(hidden_sizes=[10**9], ranks=[10**9]),
    "a square head": square(4096),
    "a number beyond floats": with_config(mu=10**400),
    "a dtype that nothing runs in": with_config(backbone_dtype="float8_e4m3fn"),
    "a list of backbones": with_config(backbone_name_or_path=["../vit"]),
    "a map of code to numbers": with_config(auto_map={"AutoModel": 5}),
    "a kernel as attention": with_config(attn_implementation="evil/kernel"),
    "a kernel as attention, by its inner name": with_config(_attn_implementation="evil/kernel"),
    "a config class of its own": with_config(sub_configs_defaults={}, attribute_map={"layers": "to_dict"}),
    "a method of the backbone's config": with_backbone(__deepcopy__=0),
    "a backbone that is the head": with_config(backbone_name_or_path="./"),
    "a backbone elsewhere": with_config(backbone_name_or_path="../../../../../../etc"),
    "a backbone with NUL": with_config(backbone_name_or_path="../vit\0"),
    "a backbone at an address": with_config(backbone_name_or_path="https://example.com/vit"),
    "a header of 10 GB": holding("model.safetensors", struct.pack("<Q", 10 << 30) + bytes(64)),
    "a header of 2^63 bytes": holding("model.safetensors", struct.pack("<Q", 1 << 63) + bytes(64)),
    "a header of 10,000 levels": holding(
        "model.safetensors", struct.pack("<Q", 20_000) + b"[" * 10_000 + b"]" * 10_000
    ),
    "a header of 50 MB": holding("model.safetensors", struct.pack("<Q", 50 << 20) + b" " * (50 << 20)),
    "weights of 10 GB": of_ten_gigabytes("model.safetensors", safetensors_header(basis=[8, 2**28], weights=[2**28])),
    "weights beyond any file": holding("model.safetensors", safetensors_header(basis=[2**62, 2**62], weights=[2])),
    "a pickle as weights": holding("model.safetensors", pickle.dumps(Payload())),
}
"""What makes a head that cannot be loaded."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_is_refused(loader, head, name):
    REFUSED[name](head)
    for entry in ("SOAPModelWrapper", "SOAPBackbone", "AutoModel"):
        assert check(loader, head, entry) == "refused", entry
    assert check(loader, head, "info") == ("loaded" if name.startswith("a backbone ") else "refused")


HARMLESS = {
    "a pickle": holding("pytorch_model.bin", pickle.dumps(Payload())),
    "a list of shards": holding(
        "model.safetensors.index.json", b'{"weight_map": {"projections.-1.basis": "../../../../etc/passwd"}}'
    ),
    "modules": holding("soap_hf.py", CODE),
    "statistics of 10 GB": of_ten_gigabytes("statistics.safetensors"),
    "an image processor of 10 GB": of_ten_gigabytes("preprocessor_config.json"),
    "a deep image processor": holding("preprocessor_config.json", b"[" * 10_000),
    "an image processor with code": holding("preprocessor_config.json", json.dumps({"auto_map": CODE_MAP}).encode()),
    "a config with code": with_config(auto_map=CODE_MAP),
}
"""What may lie beside a head that can be loaded, and is refused when asked for, or not looked at."""


@pytest.mark.parametrize("name", HARMLESS)
def test_what_else_there_is_does_no_harm(loader, head, name):
    (head / "code.py").write_bytes(CODE)
    HARMLESS[name](head)
    for entry in ENTRIES:
        outcome = loader.load(entry, head)
        assert outcome.kind == "loaded", f"{entry}: {outcome.reason}"


@pytest.mark.parametrize("kind", ["code", "pickle"])
def test_a_backbone_inside_the_head_runs_nothing(loader, head, strangers, kind):
    shutil.copytree(strangers / "vit", head / "backbone")
    with_config(backbone_name_or_path="./backbone")(head)
    assert check(loader, head, "SOAPModelWrapper") == "loaded"
    if kind == "code":
        told = json.loads((head / "backbone" / "config.json").read_text())
        (head / "backbone" / "config.json").write_text(
            json.dumps({**told, "model_type": "evil", "auto_map": CODE_MAP})
        )
        (head / "backbone" / "code.py").write_bytes(CODE)
    else:
        (head / "backbone" / "model.safetensors").unlink()
        torch.save({"payload": Payload()}, head / "backbone" / "pytorch_model.bin")
    assert check(loader, head, "SOAPModelWrapper") == "refused"
    assert check(loader, head, "AutoModel") == "refused"
