"""A fit that was killed goes on to the same end, and never into another fit's sums."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from soap_hf import SOAPStatistics, fit_soap
from soap_hf.fitting.checkpoint import Checkpoint
from soap_hf.fitting.convergence import CHECK_EVERY
from soap_hf.runtime.errors import CheckpointError, DataError, FitInterrupted, OutputError
from tests.conftest import noise_image
from tests.tiny_backbones import TINY_BACKBONES

EVERY = 24


class Killed(BaseException):
    """Nothing in a fit catches it, as nothing catches a kill."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fit.checkpoint"


@pytest.fixture
def fit(vit, images, processor, path):
    """A fit of 80 images in batches of 8 that saves every 24 of them."""
    common = {"image_processor": processor, "progress": False, "batch_size": 8, "num_workers": 0, "check": 0}
    saving = {"checkpoint": path, "checkpoint_every": EVERY}
    return lambda backbone=vit, data=images, **options: fit_soap(backbone, data, **{**common, **saving, **options})


@pytest.fixture
def killed_fit(fit, monkeypatch):
    """Runs a fit that dies right after so many checkpoints were written."""

    def run(saves, **options):
        save, done = Checkpoint.save, []

        def save_and_die(self, state):
            save(self, state)
            done.append(state.phase)
            if len(done) == saves:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "save", save_and_die)
            with pytest.raises(Killed):
                fit(**options)

    return run


def assert_equal(ours: SOAPStatistics, theirs: SOAPStatistics) -> None:
    assert (ours.num_real, ours.num_synthetic) == (theirs.num_real, theirs.num_synthetic)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.eigenvalues, theirs.eigenvalues, rtol=1e-9, atol=1e-12)
    assert torch.equal(ours.real_response, theirs.real_response)
    assert torch.equal(ours.synthetic_response, theirs.synthetic_response)


CASES = {
    "one pass": ({}, 6),
    "exact": ({"exact": True}, 9),
    "worker processes": ({"num_workers": 1}, 2),
    "two layers": ({"layer": [0, -1]}, 4),
    "a cache in 16 bits": ({"token_cache": "60kB"}, 3),
}


@pytest.mark.parametrize(("options", "saves"), CASES.values(), ids=CASES)
def test_after_any_checkpoint_a_fit_goes_on_to_the_unbroken_result(fit, killed_fit, path, options, saves):
    whole = fit(**options)
    for number in range(1, saves + 1):
        path.unlink()
        killed_fit(number, **options)
        resumed = fit(resume=True, **options)
        if len(whole.config.layers) == 1:
            assert_equal(resumed.statistics, whole.statistics)
        else:
            for layer in whole.config.layers:
                assert_equal(resumed.statistics[layer], whole.statistics[layer])
        assert resumed.config.fit == whole.config.fit


def test_a_stream_goes_on_too_and_so_does_the_check_for_convergence(fit, killed_fit, path):
    stream = IterableDataset.from_generator(lambda: ({"image": noise_image(seed, (16, 16))} for seed in range(1000)))
    options = {"data": stream, "num_images": 1000, "batch_size": 32, "tolerance": 0.3, "mu": 1}
    options["checkpoint_every"] = CHECK_EVERY
    whole = fit(**options)
    assert whole.config.fit["num_images"] < 1000
    for number in (1, 3, 4):
        path.unlink()
        killed_fit(number, **options)
        resumed = fit(resume=True, **options)
        assert_equal(resumed.statistics, whole.statistics)
        assert resumed.config.fit == whole.config.fit


def test_unreadable_images_are_counted_once_across_a_resume(fit, killed_fit, images):
    files = [dict(row["image"]) for row in images.cast_column("image", type(images.features["image"])(decode=False))]
    files[3] = {"bytes": b"broken", "path": "broken.png"}
    data = Dataset.from_dict({"image": files})
    killed_fit(3, data=data)
    told = fit(data=data, resume=True).config.fit
    assert (told["num_images"], told["num_bad_images"]) == (79, 1)


DIFFERENCES = {
    "seed: 0 there, 1 here": {"seed": 1},
    r"layer: \[-1\] there, \[1\] here": {"layer": 1},
    r"the image size: \[32, 32\] there, \[32, 40\] here": {"image_size": (32, 40)},
    "num_images: 1000 there, 70 here": {"num_images": 70},
    "exact: false there, true here": {"exact": True},
    "isotropic: false there, true here": {"isotropic": True},
    "token_cache: 2000000000 there, 1000000 here": {"token_cache": "1MB"},
}


@pytest.mark.parametrize(("message", "options"), DIFFERENCES.items(), ids=[str(each) for each in DIFFERENCES.values()])
def test_a_checkpoint_of_another_fit_is_refused_by_the_name_of_the_difference(fit, killed_fit, path, message, options):
    killed_fit(1)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=rf"belongs to another fit \(.*{message}"):
        fit(resume=True, **options)
    assert path.read_bytes() == before


def test_other_weights_and_other_images_are_told_apart(fit, killed_fit, vit, images):
    killed_fit(1)
    with pytest.raises(CheckpointError, match="the first image is another one"):
        fit(resume=True, data=images.map(lambda row: {"image": row["image"].rotate(90)}))
    with pytest.raises(CheckpointError, match='the backbone: "ViTModel" there, "Dinov2Model" here'):
        fit(TINY_BACKBONES["dinov2"].build(), resume=True)
    vit.layernorm.weight.data *= 2
    with pytest.raises(CheckpointError, match="the backbone has other weights"):
        fit(resume=True)


def rewrite(path, **identity):
    """Puts other values into a checkpoint's identity."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    told = {**json.loads(metadata["identity"]), **identity}
    save_file(load_file(path), path, {**metadata, "identity": json.dumps(told)})


def test_a_checkpoint_of_another_version_is_refused(fit, killed_fit, path):
    killed_fit(1)
    rewrite(path, **{"the version of torch": '"1.13.0"'})
    with pytest.raises(CheckpointError, match=r'the version of torch: "1.13.0" there,'):
        fit(resume=True)


def test_what_is_no_checkpoint_is_refused(fit, path):
    for content in (b"", b"no safetensors"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read"):
            fit(resume=True)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        fit(resume=True)


def test_a_checkpoint_may_be_larger_than_any_head(fit, killed_fit, monkeypatch):
    killed_fit(1)
    monkeypatch.setattr("soap_hf.runtime.head_files.MAX_FILE", 64)
    assert fit(resume=True).config.fit["num_images"] == 80


def test_a_checkpoint_is_not_lost_by_forgetting_to_resume(fit, killed_fit, path):
    killed_fit(2)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="resume from it, or remove it"):
        fit()
    assert path.read_bytes() == before


def test_resuming_without_a_checkpoint_begins_and_says_so(fit, monkeypatch):
    said = []
    monkeypatch.setattr("soap_hf.fitting.checkpoint.logger.warning", said.append)
    assert fit(resume=True).config.fit["num_images"] == 80
    assert "starts from the beginning" in said[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": None, "resume": True, "checkpoint_every": None}, "need to know where the checkpoint lies"),
        ({"checkpoint": None}, "need to know where the checkpoint lies"),
        ({"checkpoint_every": 0}, "at least 1 image"),
        ({"checkpoint": "no/such/folder/file"}, "does not exist; create it first"),
    ],
)
def test_impossible_wishes_are_refused_before_any_work(fit, options, message):
    with pytest.raises((DataError, CheckpointError), match=message):
        fit(**options)


def test_a_data_set_that_drops_out_keeps_what_was_done(fit, path, monkeypatch):
    def rows(number, drops):
        yield from ({"image": noise_image(seed)} for seed in range(number))
        if drops:
            raise ConnectionError("the server has gone")

    def stream(number, drops=False):
        return IterableDataset.from_generator(rows, gen_kwargs={"number": number, "drops": drops})

    monkeypatch.setattr("soap_hf.data.image_sample.SHUFFLE_BUFFER", 1)  # which reads ahead
    options = {"num_images": None, "checkpoint_every": None}
    whole = fit(data=stream(80), **options)
    with pytest.raises(DataError, match=r"stopped giving images .*the server has gone"):
        fit(data=stream(50, drops=True), **options)
    assert path.exists()
    assert_equal(fit(data=stream(80), resume=True, **options).statistics, whole.statistics)


def test_a_full_disk_ends_the_fit_and_leaves_the_checkpoint_before(fit, path, monkeypatch):
    from soap_hf import files

    save, written = files.save_file, []

    def fill_the_disk(tensors, file, metadata):
        if written:
            raise OSError(28, "No space left on device")
        written.append(save(tensors, file, metadata))

    monkeypatch.setattr(files, "save_file", fill_the_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        fit()
    monkeypatch.undo()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert fit(resume=True).config.fit["num_images"] == 80


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["components", "synthetic responses"])
def test_a_signal_writes_a_checkpoint_and_leaves_with_a_message(fit, vit, path, number, phase):
    whole = fit()
    path.unlink()
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    calls = []

    def ask_to_stop(module, inputs, outputs):
        calls.append(1)
        if len(calls) == (6 if phase == "components" else 16):
            os.kill(os.getpid(), number)

    hook = vit.layernorm.register_forward_hook(ask_to_stop)
    with pytest.raises(FitInterrupted, match=rf"{number.name} came during the {phase}, after \d+ images.*--resume"):
        fit(checkpoint_every=None)
    hook.remove()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert_equal(fit(resume=True).statistics, whole.statistics)


@pytest.fixture
def _interruptible():
    """SIGINT raises KeyboardInterrupt, also in a process that a shell has started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_without_a_checkpoint_signals_do_what_they_always_do(fit, vit):
    vit.layernorm.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        fit(checkpoint=None, checkpoint_every=None)


def test_a_fit_outside_the_main_thread_saves_as_well(fit, path):
    thread = threading.Thread(target=fit)
    thread.start()
    thread.join()
    assert path.exists()


def test_a_killed_command_goes_on_to_the_same_head(vit, processor, images, tmp_path):
    vit.save_pretrained(tmp_path / "vit")
    processor.save_pretrained(tmp_path / "vit")
    images.save_to_disk(tmp_path / "data")
    command = [sys.executable, "-m", "soap_hf", "fit", "vit", "data", "--output", "head", "--mu", "1", "--resume"]
    command += ["--batch-size", "2", "--num-synthetic", "600", "--checkpoint-every", "10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    checkpoint = tmp_path / "head.checkpoint"
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not checkpoint.exists():
            time.sleep(0.01)
        time.sleep(0.1)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it was to be killed before its end"
    assert checkpoint.exists()
    subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, check=True)
    assert not checkpoint.exists()
    whole = fit_soap(str(tmp_path / "vit"), images, batch_size=2, num_synthetic=600, progress=False)
    whole.save_pretrained(tmp_path / "whole")
    ours, theirs = (SOAPStatistics.load(tmp_path / name / "statistics.safetensors") for name in ("head", "whole"))
    assert_equal(ours, theirs)
