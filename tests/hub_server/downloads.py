"""Endpoints that give files out: repository info, trees, paths and the files themselves."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from .cards import metadata, tags
from .routes import REPO, WEB_REPO, Reply, Request, as_json, route, when
from .store import Blob, Commit, HubError, Repo, Store


@route("GET", f"/api/{REPO}")
@route("GET", f"/api/{REPO}/revision/(?P<revision>[^/]+)")
def info(request: Request, store: Store, repo: Repo, revision: str = "main") -> dict:
    """Model or data set info, always in full."""
    commit = repo.resolve(revision)
    card = metadata(commit.tree["README.md"].data) if "README.md" in commit.tree else {}
    found = {
        "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.oid,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags(card),
        "cardData": card,
        "createdAt": when(min(one.date for one in repo.commits.values())),
        "lastModified": when(commit.date),
        "siblings": [sibling(path, blob, request.flag("blobs")) for path, blob in commit.tree.items()],
    }
    if repo.kind == "model":
        found |= {"modelId": repo.id}
        found |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
    return found


def sibling(path: str, blob: Blob, blobs: bool) -> dict:
    """A file in the info."""
    found: dict[str, Any] = {"rfilename": path}
    if blobs:
        found |= {"size": len(blob.data), "blobId": blob.oid}
        if blob.lfs:
            found["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return found


@route("GET", f"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
def tree(request: Request, store: Store, repo: Repo, revision: str, path: str = "") -> Reply:
    """Files and folders below a path, in pages."""
    commit = repo.resolve(revision)
    prefix = f"{path.rstrip('/')}/" if path.rstrip("/") else ""
    if prefix and not any(name.startswith(prefix) for name in commit.tree):
        raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
    paths = [name for name in everything(commit.tree) if name.startswith(prefix)]
    if not request.flag("recursive"):
        paths = [name for name in paths if "/" not in name.removeprefix(prefix)]
    start = int(request.query.get("cursor", ["0"])[0])
    page = [entry(request, repo, commit, name) for name in paths[start : start + request.page_size]]
    if start + request.page_size >= len(paths):
        return as_json(page)
    flags = "".join(f"&{key}={request.query[key][0]}" for key in ("recursive", "expand") if key in request.query)
    following = f"{request.endpoint}{request.path}?cursor={start + request.page_size}{flags}"
    return as_json(page, Link=f'<{following}>; rel="next"')


@route("POST", f"/api/{REPO}/paths-info/(?P<revision>[^/]+)")
def paths_info(request: Request, store: Store, repo: Repo, revision: str) -> list[dict]:
    """Of the paths that are there."""
    commit, asked = repo.resolve(revision), request.form()
    request.query.setdefault("expand", asked.get("expand", ["false"]))
    there = set(everything(commit.tree))
    return [entry(request, repo, commit, path) for path in asked.get("paths", []) if path in there]


def everything(paths: Iterable[str]) -> list[str]:
    """Files and the folders that hold them."""
    folders = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
    return sorted((folders - {"."}) | set(paths))


def entry(request: Request, repo: Repo, commit: Commit, path: str) -> dict:
    """A file or folder in a tree, with the last commit that changed it if the client wants to know."""
    blob = commit.tree.get(path)
    if blob is None:
        found: dict[str, Any] = {"type": "directory", "path": path, "size": 0, "oid": digest(commit, path)}
    else:
        found = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
        if blob.lfs:
            found["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    if request.flag("expand"):
        last, now = commit, digest(commit, path)
        for one in repo.history(commit.oid):
            if digest(one, path) != now:
                break
            last = one
        found["lastCommit"] = {"id": last.oid, "title": last.title, "date": when(last.date)}
    return found


def digest(commit: Commit, path: str) -> str:
    """Changes when a file, or anything in a folder, changes."""
    below = [(n, b.oid) for n, b in commit.tree.items() if n == path or n.startswith(f"{path}/")]
    return hashlib.sha1(repr(below).encode()).hexdigest()


@route("GET HEAD", f"/{WEB_REPO}/(?:resolve|raw)/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request: Request, store: Store, repo: Repo, revision: str, path: str) -> Reply:
    """A file, or the part of it that Range asks for."""
    commit = repo.resolve(revision)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    blob = commit.tree.get(path)
    if blob is None:
        error = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return Reply(404, b"Entry not found", headers | error | {"Content-Type": "text/plain"})
    raw = f"/raw/{revision}/" in request.path
    data = blob.pointer if raw and blob.lfs else blob.data
    headers |= {"ETag": f'"{blob.etag}"', "Content-Type": "application/octet-stream"}
    if blob.lfs and not raw:
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{blob.etag}"'}
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return Reply(304, b"", headers)
    return ranged(data, headers, request.headers.get("Range"))


def ranged(data: bytes, headers: dict[str, str], wanted: str | None) -> Reply:
    """200, 206 or 416."""
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if asked is None or not any(asked.groups()):
        return Reply(200, data, headers)
    start = int(asked[1]) if asked[1] else max(len(data) - int(asked[2]), 0)
    end = min(int(asked[2]), len(data) - 1) if asked[1] and asked[2] else len(data) - 1
    if start > end:
        return Reply(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
    return Reply(206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})
