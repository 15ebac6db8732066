"""Help is in the order of a job, in groups, and without noise."""

import re

import pytest
import typer

from soap_hf.cli.app import COMMANDS, app
from soap_hf.cli.help import ORDER

EVALUATIONS = ("matching", "position", "knn", "segmentation", "saliency")
ALL = ["", *ORDER, *(f"evaluate {name}" for name in EVALUATIONS)]


def test_commands_come_in_the_order_of_a_job(run):
    _, out, _ = run("--help")
    named = re.findall(r"^│ (\w+) ", out, flags=re.MULTILINE)
    assert sorted(named) == sorted(ORDER)
    for group in (["fit", "score", "convert"], ["evaluate", "tune", "reweight"]):
        assert [name for name in named if name in group] == group
    assert named[0] == "fit"
    titles = [out.index(title) for title in COMMANDS]
    assert titles == sorted(titles)


@pytest.mark.parametrize("command", ALL)
def test_flags_are_shown_by_one_name_and_without_a_type(run, command):
    status, out, _ = run(*command.split(), "--help")
    assert status == 0
    assert "bool" not in out
    assert not re.search(r"--progress|--figures|--bilateral|--statistics", out)
    assert " --help  " in out


def test_options_are_in_groups(run):
    _, out, _ = run("fit", "--help")
    groups = re.split(r"╭─ (.+?) ─+╮", out)
    found = dict(zip(groups[1::2], groups[2::2], strict=True))
    assert list(found) == ["Arguments", "Options", "Images", "Running", "Hub", "Scores", "Backbone"]
    for name, option in {
        "Options": "--output",
        "Images": "--image-column",
        "Running": "--num-workers",
        "Hub": "--push-to-hub",
        "Scores": "--threshold",
        "Backbone": "--dtype",
    }.items():
        assert option in found[name]


def test_both_names_of_a_flag_are_understood():
    fit = typer.main.get_command(app).commands["fit"]
    flags = [one for one in fit.params if one.name in ("figures", "progress")]
    assert [(one.opts, one.secondary_opts) for one in flags] == [
        (["--progress"], ["--quiet"]),
        (["--figures"], ["--no-figures"]),
    ]
