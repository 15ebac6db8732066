"""The command line answers before the heavy imports, and works as well with them as `import soap_hf` does."""

import os
import signal
import subprocess
import sys

import pytest

from soap_hf import SOAPModelWrapper, fit_soap
from soap_hf.heads.glance import glance
from soap_hf.heads.opening import HeadRecord
from soap_hf.heads.report import print_report
from tests.conftest import EXAMPLES, ROOT, random_projection

HEAD = EXAMPLES / "soap-vit-mae-tiny"
HEAVY = ("torch", "transformers", "datasets", "accelerate", "scipy", "matplotlib", "pandas", "huggingface_hub")

ANSWERS = {
    "": "Usage: soap-hf",
    "--help": "--install-completion",
    "--version": "0.",
    "fitt": "No such command 'fitt'",
    "fit --nonsense": "No such option",
    "fit a b --output c --image-size 0": "'0' is no image size",
    "fit --help": "--num-images",
    "evaluate": "saliency",
    "evaluate matching --help": "--hpatches",
    "extract --help": "--shard-size",
    "tune --help": "--apply",
    "figures --help": "--compare",
    "push --help": "--backbone-id",
    f"info {HEAD}": "Directions removed: 8 of 192",
}

START = """
import sys
import soap_hf_cli
sys.argv[0] = "soap-hf"
try:
    soap_hf_cli.main()
finally:
    print("IMPORTED", *{name.partition(".")[0] for name in sys.modules})
"""


def start(*arguments, code=START, folder=ROOT, **environment):
    """What `soap-hf` of an environment without anything else prints, in a process of its own: stdout and stderr."""
    environment = {"COLUMNS": "160", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize(("arguments", "answer"), ANSWERS.items(), ids=[key.split("/")[0] for key in ANSWERS])
def test_help_errors_and_info_import_nothing_heavy(arguments, answer):
    out, err = start(*arguments.split())
    said, _, imported = out.partition("IMPORTED")
    assert answer in said + err
    assert "Error: \n" not in err, "help is no error"
    assert not set(imported.split()) & set(HEAVY)


def test_a_command_says_what_it_will_do_before_the_heavy_imports():
    code = f"import sys\nsys.modules['torch'] = None\n{START}"
    for arguments, plan in (
        ("fit a b --output c", "Fitting a head on a and images of b, to be written to c …"),
        ("score a b", "Scoring the components of a on images of b …"),
        ("evaluate knn h b", "Measuring knn with the head h …"),
        ("push h me/h", "Pushing the head in h to me/h …"),
    ):
        err = start(*arguments.split(), code=code)[1]
        assert err.startswith(f"{plan}\n"), plan
        assert "Error: ModuleNotFoundError: import of torch halted" in err
        assert plan not in start(*arguments.split(), code=code, RANK="3")[1], "of several processes one says it"
    assert "Scoring" not in start("score", "a", "b", "--quiet", code=code)[1]


def test_once_there_is_work_the_package_is_whole(tmp_path):
    code = START.replace("finally:", "except SystemExit:") + (
        "import soap_hf\nfrom transformers import AutoModel\n"
        f"print(sorted(set(soap_hf.__all__) - set(vars(soap_hf)))[0], type(AutoModel.from_pretrained({str(HEAD)!r})))"
    )
    out, err = start("figures", HEAD, "--output", "drawn", code=code, folder=tmp_path)
    assert (tmp_path / "drawn" / "score_curve.png").is_file(), err
    assert out.endswith("Comparison <class 'soap_hf.heads.model.SOAPModelWrapper'>\n"), err


def test_words_are_completed():
    asked = {"_SOAP_HF_COMPLETE": "complete_bash", "COMP_WORDS": "soap-hf ev", "COMP_CWORD": "1"}
    out, err = start(**asked)
    assert out.splitlines()[0] == "evaluate", err
    assert not set(out.partition("IMPORTED")[2].split()) & set(HEAVY)


def test_an_interrupt_is_no_traceback(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("soap_hf.cli.heads.glance", interrupted)
    assert run("info", "a") == (130, "", "Interrupted.\n")


@pytest.fixture
def heads(vit, images, tmp_path):
    """Heads of every kind: fitted, of several layers, of many layers, made by hand, removing nothing."""
    chosen = {"mu": 2, "num_images": 64, "progress": False, "check": 8}
    made = {
        f"{len(layers)} layers": fit_soap(vit, images, layer=layers, **chosen) for layers in ([0, -1], [0, 1, 2, -1])
    }
    made["by hand"] = SOAPModelWrapper.from_backbone(vit, random_projection(32))
    made["identity"] = fit_soap(vit, images, **{**chosen, "mu": 0})
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
    return [HEAD, *(tmp_path / name for name in made)]


def test_a_glance_shows_what_opening_the_head_shows(heads, capsys):
    for head in heads:
        shown = []
        for config in (glance(str(head)), HeadRecord.open(head).config):
            assert config is not None, head
            print_report(config)
            shown.append(capsys.readouterr().out)
        assert shown[0] == shown[1] != ""


@pytest.mark.parametrize("moment", ["rich", "torch", "datasets", "accelerate"])
def test_ctrl_c_during_imports_ends_with_130_and_one_word(moment, tmp_path):
    """A module that is imported early stands still, and says so; one that swallows the exception does no harm."""
    (tmp_path / "hold").mkdir()
    (tmp_path / "hold" / "sitecustomize.py").write_text(HOLD.format(moment=moment), encoding="utf-8")
    command = [sys.executable, "-c", "import soap_hf_cli; soap_hf_cli.main()"]
    words = ["fit", str(EXAMPLES / "vit-mae-tiny"), str(EXAMPLES / "photos" / "fit"), "--output", "head"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'hold'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *words], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holding\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (130, "Interrupted.")
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hold"]


HOLD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)

class Hold:
    def find_spec(self, name, path=None, target=None):
        if name == {moment!r}:
            print("holding", flush=True)
            try:
                time.sleep(60)
            except KeyboardInterrupt as error:
                raise ImportError("cannot import " + name) from error

sys.meta_path.insert(0, Hold())
"""
