"""The Hub's endpoints: what each answers, over the store."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, unquote

from .store import HubError, Repo, Store

REPO = r"(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)"
WEB_REPO = r"(?:(?P<kind>dataset|space)s/)?(?P<id>[^/]+/[^/]+?)"
ONE_NAME = re.compile(r"/api/\w+s/[^/]+(/(revision|tree|refs)(/.*)?)?|/((dataset|space)s/)?[^/]+/resolve/.*")


@dataclass
class Request:
    """What a route reads; `path` is still percent-encoded, `role` is "write", "read" or None."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    role: str | None
    endpoint: str
    user: str
    organizations: tuple[str, ...]
    secret: str
    page_size: int

    def json(self) -> dict:
        """The body, which must be a JSON object."""
        try:
            found = json.loads(self.body or b"{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise HubError(400, "The body is not a JSON object")
        return found

    def form(self) -> dict[str, list[str]]:
        """The form-encoded body, or a JSON body as lists."""
        if "json" in self.headers.get("Content-Type", ""):
            return {key: value if isinstance(value, list) else [str(value)] for key, value in self.json().items()}
        return parse_qs(self.body.decode())

    def flag(self, name: str) -> bool:
        """A query value such as ?recursive=true."""
        return self.query.get(name, ["false"])[0].lower() in ("1", "true")


@dataclass
class Reply:
    """Status, body and headers."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


Route = Callable[..., Any]
ROUTES: list[tuple[str, re.Pattern[str], bool, Route]] = []


def route(methods: str, pattern: str, write: bool = False) -> Callable[[Route], Route]:
    """Register a function of (request, store, **groups)."""

    def register(function: Route) -> Route:
        ROUTES.extend((method, re.compile(pattern), write, function) for method in methods.split())
        return function

    return register


def answer(request: Request, store: Store) -> Reply:
    """The reply of the first route that matches."""
    for method, pattern, write, function in ROUTES:
        match = pattern.fullmatch(request.path)
        if match is None or method != request.method:
            continue
        if write:
            require_write(request)
        groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
        if "id" in groups:
            groups["repo"] = find(request, store, groups.pop("kind", "model"), groups.pop("id"), write)
        reply = function(request, store, **groups)
        return reply if isinstance(reply, Reply) else as_json(reply)
    if ONE_NAME.fullmatch(request.path):
        raise missing(request)  # the real Hub has repositories without a user, such as "gpt2"
    raise HubError(404, f"No such endpoint: {request.method} {request.path}")


def as_json(content: Any, status: int = 200, **headers: str) -> Reply:
    """A JSON reply."""
    return Reply(status, json.dumps(content).encode(), {"Content-Type": "application/json; charset=utf-8", **headers})


def require_write(request: Request) -> None:
    """401 without a token, 403 for one that only reads."""
    if request.role is None:
        raise HubError(401, "Invalid username or password.")
    if request.role != "write":
        raise HubError(403, "This token does not have the required permissions: write")


def require_namespace(request: Request, name: str) -> None:
    """403 unless the namespace belongs to the user."""
    if name.split("/")[0] not in (request.user, *request.organizations):
        raise HubError(403, f"You don't have the rights to write under the namespace {name.split('/')[0]!r}")


def find(request: Request, store: Store, kind: str, name: str, write: bool = False) -> Repo:
    """The repository; a missing one looks like a private one to a client without a token."""
    repo = store.repos.get((kind, name))
    if repo is None or (repo.private and request.role is None):
        raise missing(request)
    if write:
        require_namespace(request, name)
    return repo


def missing(request: Request) -> HubError:
    """401 without a token, 404 with one."""
    if request.role is None:
        return HubError(401, "Invalid username or password.", "RepoNotFound")
    return HubError(404, "Repository not found", "RepoNotFound")


def when(date: datetime) -> str:
    """A date as the Hub writes it."""
    return date.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def web_url(request: Request, repo: Repo) -> str:
    """The page of a repository."""
    return f"{request.endpoint}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.id}"


@route("GET", "/api/whoami-v2")
def whoami(request: Request, store: Store) -> dict:
    """The user of the token."""
    if request.role is None:
        raise HubError(401, "Invalid username or password.")
    return {
        "type": "user",
        "name": request.user,
        "fullname": request.user,
        "email": f"{request.user}@example.com",
        "orgs": [{"type": "org", "name": name, "fullname": name} for name in request.organizations],
        "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": request.role}},
    }


def named(request: Request) -> tuple[str, str]:
    """Kind and name in the body of a create or delete request."""
    asked = request.json()
    if not isinstance(asked.get("name"), str):
        raise HubError(400, "A repository needs a name")
    return asked.get("type") or "model", f"{asked.get('organization') or request.user}/{asked['name']}"


@route("POST", "/api/repos/create", write=True)
def create_repo(request: Request, store: Store) -> Any:
    """409 with the address if it is there already."""
    kind, name = named(request)
    asked = request.json()
    require_namespace(request, name)
    private = asked.get("private") is True or asked.get("visibility") == "private"
    try:
        repo = store.create(name, kind, private)
    except HubError as error:
        if error.status == 409:
            return as_json({"error": error.message, "url": web_url(request, store.repos[kind, name])}, 409)
        raise
    return {"url": web_url(request, repo), "name": name, "id": name, "private": private}


@route("DELETE", "/api/repos/delete", write=True)
def delete_repo(request: Request, store: Store) -> str:
    """Forget a repository."""
    repo = find(request, store, *named(request), write=True)
    del store.repos[repo.kind, repo.id]
    return "OK"


@route("PUT", f"/api/{REPO}/settings", write=True)
def settings(request: Request, store: Store, repo: Repo) -> dict:
    """Make private or public."""
    asked = request.json()
    if "visibility" in asked or "private" in asked:
        repo.private = asked.get("private") is True or asked.get("visibility") == "private"
    return {"private": repo.private}


@route("GET", f"/api/{REPO}/refs")
def refs(request: Request, store: Store, repo: Repo) -> dict:
    """Branches, tags and pull requests."""
    found = {
        "branches": [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo.branches.items()],
        "tags": [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in repo.tags.items()],
        "converts": [],
    }
    if request.flag("include_prs"):
        pulls = [(str(n), f"refs/pr/{n}", pull.head) for n, pull in repo.pulls.items()]
        found["pullRequests"] = [{"name": n, "ref": ref, "targetCommit": oid} for n, ref, oid in pulls]
    return found


@route("GET", f"/api/{REPO}/commits/(?P<revision>[^/]+)")
def commits(request: Request, store: Store, repo: Repo, revision: str) -> list[dict]:
    """Newest first."""
    return [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "date": when(commit.date),
            "authors": [{"user": request.user}],
        }
        for commit in repo.history(revision)
    ]


@route("POST DELETE", f"/api/{REPO}/branch/(?P<name>.+)", write=True)
def branch(request: Request, store: Store, repo: Repo, name: str) -> str:
    """Create from `startingPoint` or delete."""
    if request.method == "DELETE":
        if name == "main":
            raise HubError(403, "Cannot delete the default branch")
        if repo.branches.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return "OK"
    start = repo.resolve(request.json().get("startingPoint") or "main")
    if name in repo.branches or name in repo.tags:
        raise HubError(409, f"Reference already exists: {name}")
    if name.startswith("refs/") or not re.fullmatch(r"[\w.][\w./-]*", name) or ".." in name:
        raise HubError(400, f"Invalid reference name: {name}")
    repo.branches[name] = start.oid
    return "OK"


@route("POST DELETE", f"/api/{REPO}/tag/(?P<name>.+)", write=True)
def tag(request: Request, store: Store, repo: Repo, name: str) -> str:
    """POST tags the revision `name`, DELETE removes the tag `name`."""
    if request.method == "DELETE":
        if repo.tags.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return "OK"
    commit, wanted = repo.resolve(name), request.json().get("tag")
    if not isinstance(wanted, str) or not re.fullmatch(r"[\w.][\w./-]*", wanted) or ".." in wanted:
        raise HubError(400, f"Invalid tag name: {wanted!r}")
    if wanted in repo.tags or wanted in repo.branches:
        raise HubError(409, f"Tag reference exists already: {wanted}")
    repo.tags[wanted] = commit.oid
    return "OK"
