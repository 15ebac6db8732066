"""Checks a built site: every link inside it resolves, it asks nobody else for anything, and search knows the names.

python docs/_site/check.py site
"""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
"""What a browser fetches by itself."""


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links, self.loads = {""}, [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list) -> None:
        """Notes what is of interest here."""
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get(LOADED.get(tag, "")) and given.get("rel") != "canonical":
            self.loads.append(given[LOADED[tag]])


def main(site: Path) -> int:
    """Prints what is wrong; the exit status."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    wrong = [problem for path, page in pages.items() for problem in problems(path, page, pages, site.resolve())]
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    titles = {entry["title"] for entry in index["docs"]}
    wrong += [
        f"search does not find {name}" for name in ("fit_soap", "attach_soap") if not any(name in t for t in titles)
    ]
    print("\n".join(wrong) or f"{len(pages)} pages: every link inside resolves, nothing is loaded from elsewhere.")
    return int(bool(wrong))


def problems(path: Path, page: Page, pages: dict, site: Path) -> list[str]:
    """What is wrong with the links of one page."""
    found = []
    for target in page.loads:
        if urlsplit(target).netloc:
            found.append(f"{path.name} loads {target}")
    for target in (*page.links, *page.loads):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if path.name == "404.html" and target.startswith("/"):
            there = site / parts.path.lstrip("/")
        there = there / "index.html" if there.is_dir() else there
        if not there.exists():
            found.append(f"{path.name} links to {target}, which is not there")
        elif there in pages and unquote(parts.fragment) not in pages[there].anchors:
            found.append(f"{path.name} links to {target}, whose anchor is not there")
    return found


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
