"""Endpoints that bring files in: metadata check, upload mode, large files, commits and pull requests."""

import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Iterator
from typing import Any

from .cards import problems
from .routes import REPO, WEB_REPO, Reply, Request, as_json, require_write, route, web_url, when
from .store import REGULAR_LIMIT, Blob, HubError, PullRequest, Repo, Store, is_large


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Request, store: Store) -> Reply:
    """400 with errors[] for a card that the Hub refuses."""
    errors, warnings = problems(str(request.json().get("content", "")))
    content = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return as_json(content, 400 if errors else 200)


@route("POST", f"/api/{REPO}/preupload/(?P<revision>[^/]+)", write=True)
def preupload(request: Request, store: Store, repo: Repo, revision: str) -> dict:
    """Large or regular, for each file, and what is there already."""
    tree = repo.resolve(revision).tree
    files = []
    for asked in request.json()["files"]:
        path, there = asked["path"], tree.get(asked["path"])
        large = is_large(path, asked["size"], tree, b"\0" in base64.b64decode(asked.get("sample", "")))
        oid = there and (there.sha256 if large else there.oid)
        files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
    return {"files": files}


@route("POST", rf"/{WEB_REPO}\.git/info/lfs/objects/batch", write=True)
def lfs_batch(request: Request, store: Store, repo: Repo) -> dict:
    """Where to send each large file; no actions for those the server has."""
    objects = []
    for asked in request.json()["objects"]:
        oid, entry = asked["oid"], {"oid": asked["oid"], "size": asked["size"]}
        if not re.fullmatch(r"[0-9a-f]{64}", oid):
            entry["error"] = {"code": 422, "message": "Invalid oid"}
        elif oid not in store.objects:
            url = f"{request.endpoint}/lfs/{oid}"
            entry["actions"] = {
                "upload": {"href": f"{url}?signature={signature(request, oid)}"},
                "verify": {"href": f"{url}/verify"},
            }
        objects.append(entry)
    return {"transfer": "basic", "objects": objects}


@route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(request: Request, store: Store, oid: str) -> Reply:
    """The signed address stands for the token, as in a bucket."""
    if not hmac.compare_digest(request.query.get("signature", [""])[0], signature(request, oid)):
        raise HubError(403, "SignatureDoesNotMatch")
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "The body does not have the announced SHA-256")
    store.objects[oid] = request.body
    return Reply()


@route("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", write=True)
def lfs_verify(request: Request, store: Store, oid: str) -> dict:
    """Is it here, and as long as announced?"""
    if len(store.objects.get(oid, b"")) != request.json().get("size"):
        raise HubError(404, "Object not found or of another size")
    return {}


def signature(request: Request, oid: str) -> str:
    """Of the upload address of one large file."""
    return hmac.new(request.secret.encode(), oid.encode(), "sha256").hexdigest()


@route("POST", f"/api/{REPO}/commit/(?P<revision>[^/]+)", write=True)
def commit(request: Request, store: Store, repo: Repo, revision: str) -> dict:
    """NDJSON: a header, then the operations; all or nothing."""
    try:
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        changes = list(operations(store, lines))
    except (ValueError, KeyError, TypeError, StopIteration, binascii.Error) as error:
        raise HubError(400, f"Malformed commit: {type(error).__name__}") from error
    if not header.get("summary"):
        raise HubError(400, "A commit needs a summary")
    for path, blob in changes:
        if path == "README.md" and blob is not None and (errors := problems(blob.data.decode())[0]):
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
    made, pull = repo.commit(
        revision,
        changes,
        header["summary"],
        header.get("description", ""),
        header.get("parentCommit"),
        request.flag("create_pr"),
    )
    url = web_url(request, repo)
    reply = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}", "hookOutput": ""}
    return reply | ({"pullRequestUrl": f"{url}/discussions/{pull.number}"} if pull else {})


def operations(store: Store, lines: list[dict]) -> Iterator[tuple[str, Blob | None]]:
    """(path, blob or None to delete) of each line."""
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "header":
            continue
        path = value["path"]
        if key == "file":
            content = value["content"]
            data = base64.b64decode(content, validate=True) if value.get("encoding") == "base64" else content.encode()
            if len(data) > REGULAR_LIMIT:
                raise HubError(400, f"{path} is larger than 10 MiB: use git-lfs")
            yield path, Blob(data)
        elif key == "lfsFile":
            if value["oid"] not in store.objects:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            yield path, Blob(store.objects[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            yield path.rstrip("/") + ("/" if key == "deletedFolder" else ""), None
        else:
            raise HubError(400, f"Unknown operation {key}")


def discussion(request: Request, repo: Repo, pull: PullRequest) -> dict:
    """A pull request as a list of them shows it."""
    return {
        "num": pull.number,
        "title": pull.title,
        "status": pull.status,
        "author": {"name": request.user},
        "createdAt": when(pull.date),
        "isPullRequest": True,
        "repo": {"name": repo.id, "type": repo.kind},
    }


@route("GET", f"/api/{REPO}/discussions")
def discussions(request: Request, store: Store, repo: Repo) -> dict:
    """All on one page."""
    wanted = request.query.get("status", ["all"])[0]
    pulls = [pull for pull in repo.pulls.values() if wanted in ("all", pull.status)]
    return {"discussions": [discussion(request, repo, pull) for pull in pulls], "count": len(pulls), "start": 0}


@route("POST", f"/api/{REPO}/discussions", write=True)
def open_discussion(request: Request, store: Store, repo: Repo) -> dict:
    """Pull requests only."""
    asked = request.json()
    if not asked.get("pullRequest"):
        raise HubError(400, "This Hub has pull requests, but no discussions")
    return {"num": repo.open_pull(asked["title"], asked.get("description", "")).number}


@route("GET", f"/api/{REPO}/discussions/(?P<number>[0-9]+)")
def discussion_details(request: Request, store: Store, repo: Repo, number: str) -> dict:
    """With its commits as events."""
    pull = repo.pull(int(number))
    changes = {"base": f"refs/heads/{pull.base}", "mergeCommitId": pull.merged}
    made: list[dict[str, Any]] = []
    base = {one.oid for one in repo.history(pull.base)}
    for one in repo.history(pull.head):
        if one.oid in base:
            break
        event = {"id": one.oid[:24], "type": "commit", "createdAt": when(one.date), "author": {"name": request.user}}
        made.insert(0, event | {"data": {"subject": one.title, "oid": one.oid}})
    return discussion(request, repo, pull) | {"events": made, "changes": changes, "filesWithConflicts": [], "diff": ""}


@route("POST", f"/api/{REPO}/discussions/(?P<number>[0-9]+)/(?P<action>merge|status)")
def change_discussion(request: Request, store: Store, repo: Repo, number: str, action: str) -> dict:
    """Merge, close or open again."""
    require_write(request)
    pull = repo.pull(int(number))
    if action == "merge":
        repo.merge(pull.number)
        return {}
    pull.status = request.json().get("status", "closed")
    event = {"id": "status", "type": "status-change", "createdAt": when(pull.date), "author": {"name": request.user}}
    return {"newStatus": event | {"data": {"status": pull.status}}}
