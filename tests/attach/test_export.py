"""Exported heads give the same tokens elsewhere, whatever the batch and the image size."""

import builtins

import pytest
import torch

from soap_hf import SOAPBackbone, SOAPModelWrapper
from soap_hf.attach.export import export_onnx
from soap_hf.runtime.errors import BackboneError, HeadError
from tests.conftest import random_projection
from tests.tiny_backbones import TINY_BACKBONES

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZES = ((1, 32, 32), (3, 24, 40), (2, 48, 32))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def run(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize("name", ["dinov2_with_registers", pytest.param("vit_mae", marks=pytest.mark.slow)])
def test_a_wrapper_gives_the_same_tokens_at_any_size_and_batch(name, tmp_path):
    backbone = TINY_BACKBONES[name].build()
    model = SOAPModelWrapper.from_backbone(backbone, {1: random_projection(32), -1: random_projection(32)})
    modes = [module.training for module in model.train().modules()]
    export_onnx(model, tmp_path / "model.onnx")
    assert [module.training for module in model.modules()] == modes
    assert "random_masking" not in vars(model.backbone.embeddings)
    model.eval()
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    for batch, height, width in SIZES:
        pixels = torch.randn(batch, 3, height, width)
        outputs, expected = run(tmp_path / "model.onnx", pixels), model(pixels)
        assert list(outputs) == ["hidden_states.1", "last_hidden_state"]
        torch.testing.assert_close(outputs["last_hidden_state"], expected.last_hidden_state, rtol=0, atol=1e-4)
        torch.testing.assert_close(outputs["hidden_states.1"], expected.hidden_states[1], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_backbone_of_one_size_keeps_any_batch(tmp_path):
    model = SOAPModelWrapper.from_backbone(TINY_BACKBONES["aimv2_vision_model"].build(), random_projection(32))
    export_onnx(model, tmp_path / "model.onnx")
    for batch in (1, 3):
        pixels = torch.randn(batch, 3, 32, 32)
        clean = run(tmp_path / "model.onnx", pixels)["last_hidden_state"]
        torch.testing.assert_close(clean, model(pixels).last_hidden_state, rtol=0, atol=1e-4)


def test_a_projection_alone(projection, tmp_path):
    export_onnx(projection, tmp_path / "projection.onnx")
    for shape in ((1, 16, 32), (4, 9, 32)):
        tokens = torch.randn(shape)
        clean = run(tmp_path / "projection.onnx", tokens)["clean_tokens"]
        torch.testing.assert_close(clean, projection(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_class", [SOAPModelWrapper, pytest.param(SOAPBackbone, marks=pytest.mark.slow)])
def test_torch_export_takes_the_classes_as_they_are(vit, projection, model_class):
    model, any_size = model_class.from_backbone(vit, projection).eval(), torch.export.Dim.DYNAMIC
    native, others = {0: any_size}, {0: any_size, 2: any_size, 3: any_size}
    for example, shapes, used in (((32, 32), native, (32, 32)), ((24, 40), others, (48, 32))):
        program = torch.export.export(model, (torch.zeros(2, 3, *example),), dynamic_shapes={"pixel_values": shapes})
        pixels = torch.randn(3, 3, *used)
        exported, expected = program.module()(pixels), model(pixels)
        for one, other in zip(_flat(exported), _flat(expected), strict=True):
            torch.testing.assert_close(one, other)


def _flat(outputs):
    return [tensor for value in outputs.values() for tensor in (value if isinstance(value, tuple) else (value,))]


def test_what_cannot_be_exported_is_refused(projection, tmp_path, monkeypatch):
    with pytest.raises(HeadError, match=r"ends in .onnx, not 'model.pt'"):
        export_onnx(projection, tmp_path / "model.pt")
    importing = builtins.__import__

    def without_onnx(name, *arguments, **options):
        if name == "onnxscript":
            raise ImportError(name)
        return importing(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with pytest.raises(HeadError, match=r'pip install "soap-hf\[onnx\]"'):
        export_onnx(projection, tmp_path / "projection.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_that_no_runtime_takes_is_refused_before_the_trace(dtype, vit, projection, tmp_path):
    model = SOAPModelWrapper.from_backbone(vit.to(dtype), projection)
    with pytest.raises(BackboneError, match=rf"take no model in {str(dtype)[6:]}; export model\.float\(\)"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_in_the_dtype_of_the_model_opens(dtype, vit, projection, tmp_path):
    model = SOAPModelWrapper.from_backbone(vit.to(dtype), projection)
    export_onnx(model, tmp_path / "model.onnx")
    outputs = run(tmp_path / "model.onnx", torch.randn(1, 3, 32, 32).to(dtype))
    assert outputs["last_hidden_state"].dtype == dtype
