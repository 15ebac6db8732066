"""What the site takes from the rest of the repository: pages, pictures, the commands as they say, formulas."""

import posixpath
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]

PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "model_cards/RESULTS.md": "results.md",
    "model_cards/SUPPORTED.md": "supported.md",
}
"""Pages that lie elsewhere in the repository, where people look for them, too."""

COMMANDS = "reference/commands.md"
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"(^```.*?^```$)", flags=re.DOTALL | re.MULTILINE)


def on_files(files, config):
    """Adds pages and pictures that lie elsewhere, and the page of the commands."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, COMMANDS, content=_commands()))
    wanted = {path for file in files.documentation_pages() for path in _pictures(file)}
    for path in sorted(wanted):
        files.append(File.generated(config, _published(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links between files of the repository into links between pages."""
    place = _place(page.file)

    def follow(match):
        bang, words, target = match.groups()
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return match[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
        if bang and not there.startswith("docs/"):
            return f"![{words}]({_relative(_published(there), page)})"
        if there.startswith("docs/") or there in PAGES:
            to = PAGES.get(there, there.removeprefix("docs/"))
            return f"{bang}[{words}]({_relative(to, page)}{'#' + anchor if anchor else ''})"
        if not (ROOT / there).exists():
            return match[0]  # mkdocs will complain
        return words if words.startswith("`") else f"{words} (`{there}`)" if words != there else f"`{there}`"

    parts = FENCE.split(markdown)
    return "".join(part if place == COMMANDS or part.startswith("```") else LINK.sub(follow, part) for part in parts)


def on_page_content(html, page, config, files):
    """Formulas become MathML, which browsers draw without a script."""
    return re.sub(
        r'<(span|div) class="arithmatex">(.*?)</\1>', lambda match: _formula(match[2]), html, flags=re.DOTALL
    )


def _formula(text):
    display = text.strip().startswith("\\[")
    return convert(unescape(text.strip()[2:-2]), display="block" if display else "inline")


def _place(file):
    """Where the file of a page lies in the repository."""
    elsewhere = {page: source for source, page in PAGES.items()}
    return elsewhere.get(file.src_uri, COMMANDS if file.src_uri == COMMANDS else f"docs/{file.src_uri}")


def _pictures(file):
    """Files of the repository, outside of docs, that a page shows."""
    for _, _, target in re.findall(r"(!)\[([^\]]*)\]\(([^)\s]+)\)", file.content_string):
        there = posixpath.normpath(posixpath.join(posixpath.dirname(_place(file)), target))
        if not target.startswith("http") and not there.startswith("docs/"):
            yield there


def _published(path):
    return f"pictures/{path.replace('/', '-')}"


def _relative(target, page):
    return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")


def _commands():
    """Every command and option, as the command line itself has them."""
    words = [
        sys.executable,
        "-m",
        "typer",
        "soap_hf.cli.app",
        "utils",
        "docs",
        "--name",
        "soap-hf",
        "--title",
        "Command line",
    ]
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
    return done.stdout.replace("\\[", "[")
