"""What the README says can be done, can be done."""

import re
from pathlib import Path

from typer.main import get_command

from soap_hf.cli.app import app
from tests.conftest import EXAMPLES

README = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")


def test_python_runs_from_top_to_bottom(tmp_path: Path, monkeypatch):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    assert names["tokens"].shape == (1, 65, 192)
    assert names["grid"].shape == (1, 8, 8, 192)
    assert names["logits"].shape == (1, 21, 64, 64)
    assert names["half"].backbone.dtype.is_floating_point


def test_every_option_and_command_is_there():
    commands = get_command(app).commands
    every = [one for command in commands.values() for one in (command, *getattr(command, "commands", {}).values())]
    options = {option for command in every for single in command.params for option in single.opts}
    options |= {option for command in every for single in command.params for option in single.secondary_opts}
    mentioned = set(re.findall(r"--[a-z][a-z-]+", README)) - {"--help", "--debug"}
    assert mentioned <= options
    assert set(re.findall(r"^soap-hf (\w+)", README, flags=re.MULTILINE)) <= set(commands)


def test_every_linked_file_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (EXAMPLES.parent / link).exists()] == []


def test_the_page_on_plain_modules_runs_and_names_real_options(tmp_path: Path, monkeypatch):
    page = (EXAMPLES.parent / "docs" / "plain-modules.md").read_text(encoding="utf-8")
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "plain-modules.md", "exec"), names)
    assert names["clean"].shape == (1, 64, 32)
    assert not names["module"].blocks[1]._forward_hooks
    commands = get_command(app).commands.values()
    options = {option for command in commands for single in command.params for option in single.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", page)) <= options
