"""The repositories in memory: commits, branches, tags, pull requests and large files."""

import hashlib
import itertools
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch

REGULAR_LIMIT = 10 * 1024**2
KINDS = ("model", "dataset", "space")
NAME = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)[A-Za-z0-9_]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
LARGE = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.gz *.h5 *.joblib *.model *.msgpack *.npy *.npz *.onnx *.parquet *.pb *.pickle"
    " *.pkl *.pt *.pth *.rar *.safetensors *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*"
)
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE.split())


class HubError(Exception):
    """A refusal: the HTTP status, the message and the Hub's error code."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Blob:
    """The bytes of a file; `lfs` says how it was uploaded."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        """What names the large file."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git holds in place of a large file."""
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        )

    @property
    def oid(self) -> str:
        """The SHA-1 that git gives the file, for a large file that of its pointer."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        """As the Hub has it: SHA-256 of a large file, git's SHA-1 of any other."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A commit with its complete tree of files."""

    parent: str | None
    title: str
    tree: dict[str, Blob]
    message: str = ""
    serial: int = 0
    date: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    @property
    def oid(self) -> str:
        """40 hexadecimal digits; two commits never share them."""
        return hashlib.sha1(f"{self.parent} {self.serial} {self.title}".encode()).hexdigest()


@dataclass
class PullRequest:
    """A pull request; its commits are at refs/pr/`number`."""

    number: int
    title: str
    base: str
    head: str
    description: str = ""
    status: str = "open"
    merged: str | None = None
    date: datetime = field(default_factory=lambda: datetime.now(timezone.utc))


class Repo:
    """One repository of a kind (model, dataset or space)."""

    def __init__(self, kind: str, name: str, private: bool = False):
        self.kind, self.id, self.private = kind, name, private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pulls: dict[int, PullRequest] = {}
        self._serial = itertools.count()
        first = self._add(Commit(None, "initial commit", {".gitattributes": Blob(GITATTRIBUTES.encode())}))
        self.branches["main"] = first.oid

    def __getitem__(self, path: str) -> bytes:
        """The bytes of a file at main."""
        return self.files()[path]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path → bytes."""
        return {path: blob.data for path, blob in self.resolve(revision).tree.items()}

    def refs(self) -> dict[str, str]:
        """Revision → commit: branches, tags and pull requests."""
        pulls = {f"refs/pr/{pull.number}": pull.head for pull in self.pulls.values()}
        return pulls | self.tags | self.branches

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, tag, refs/pr/N or full oid."""
        commit = self.commits.get(self.refs().get(revision.removeprefix("refs/heads/"), revision))
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def history(self, revision: str) -> Iterator[Commit]:
        """Newest first."""
        commit: Commit | None = self.resolve(revision)
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent or "")

    def commit(
        self,
        revision: str,
        changes: Iterable[tuple[str, Blob | None]],
        title: str,
        message: str = "",
        parent: str | None = None,
        create_pr: bool = False,
    ) -> tuple[Commit, PullRequest | None]:
        """Apply (path, blob or None to delete) in order; a deleted folder ends in a slash."""
        head = self.resolve(revision)
        if parent is not None and parent != head.oid and not create_pr:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        if not create_pr and revision not in self.branches and not revision.startswith("refs/pr/"):
            raise HubError(400, f"Cannot commit to {revision}, which is no branch")
        base = self.resolve(parent) if create_pr and parent is not None else head
        commit = self._add(Commit(base.oid, title, applied(base.tree, changes), message, next(self._serial) + 1))
        if create_pr:
            pull = self.open_pull(title, message, revision, commit.oid)
            return commit, pull
        self._move(revision, commit.oid)
        return commit, None

    def open_pull(self, title: str, description: str, base: str = "main", head: str | None = None) -> PullRequest:
        """A new pull request, empty unless `head` is a commit."""
        number = len(self.pulls) + 1
        pull = PullRequest(number, title, base, head or self.resolve(base).oid, description)
        self.pulls[number] = pull
        return pull

    def merge(self, number: int) -> Commit:
        """Bring the files that the pull request changed into its base branch."""
        pull = self.pull(number)
        if pull.status not in ("open", "draft"):
            raise HubError(400, f"Pull request {number} is {pull.status}")
        fork = next(c for c in self.history(pull.head) if c in list(self.history(pull.base)))
        ours, theirs = fork.tree, self.resolve(pull.head).tree
        changes = [(path, theirs.get(path)) for path in {*ours, *theirs} if ours.get(path) != theirs.get(path)]
        commit, _ = self.commit(pull.base, changes, f"{pull.title} (#{number})")
        pull.status, pull.merged = "merged", commit.oid
        return commit

    def pull(self, number: int) -> PullRequest:
        """By its number."""
        if number not in self.pulls:
            raise HubError(404, f"No discussion {number}")
        return self.pulls[number]

    def _add(self, commit: Commit) -> Commit:
        self.commits[commit.oid] = commit
        return commit

    def _move(self, revision: str, oid: str) -> None:
        if revision in self.branches:
            self.branches[revision] = oid
        else:
            self.pulls[int(revision.removeprefix("refs/pr/"))].head = oid


class Store:
    """All repositories and large files, under one lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> Repo:
        """A model by "user/name", a data set by "datasets/user/name"."""
        return self.repos[split(name)]

    def write(self, name: str, files: dict[str, bytes], revision: str = "main", title: str = "files") -> Commit:
        """Commit files to a repository of `store[name]` without HTTP, with a new repository if need be."""
        kind, rest = split(name)
        with self.lock:
            repo = self.repos.get((kind, rest)) or self.create(rest, kind)
            tree = repo.resolve(revision).tree
            blobs = {path: Blob(data, is_large(path, len(data), tree, b"\0" in data)) for path, data in files.items()}
            self.objects.update({blob.sha256: blob.data for blob in blobs.values() if blob.lfs})
            return repo.commit(revision, blobs.items(), title)[0]

    def create(self, name: str, kind: str = "model", private: bool = False) -> Repo:
        """A repository with one commit, which holds .gitattributes."""
        if not all(NAME.fullmatch(part) for part in name.split("/")) or name.count("/") != 1 or kind not in KINDS:
            raise HubError(400, f"Invalid repository name: {kind} {name}")
        if (kind, name) in self.repos:
            raise HubError(409, "You already created this repo")
        self.repos[kind, name] = Repo(kind, name, private)
        return self.repos[kind, name]


def split(name: str) -> tuple[str, str]:
    """Kind and id: "datasets/user/name" is a data set, "user/name" a model."""
    kind, _, rest = name.partition("s/")
    return (kind, rest) if kind in KINDS and "/" in rest else ("model", name)


def is_large(path: str, size: int, tree: dict[str, Blob], binary: bool = False) -> bool:
    """Does the file go to git-lfs: by the patterns in .gitattributes, as binary or by its size."""
    attributes = tree[".gitattributes"].data.decode() if ".gitattributes" in tree else ""
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    named = any(fnmatch(path, pattern) or fnmatch(path.rpartition("/")[2], pattern) for pattern in patterns)
    return size > 0 and (named or binary or size > REGULAR_LIMIT)


def applied(tree: dict[str, Blob], changes: Iterable[tuple[str, Blob | None]]) -> dict[str, Blob]:
    """A new tree, sorted by path."""
    tree = dict(tree)
    for path, blob in changes:
        if blob is not None:
            tree[checked(path)] = blob
        else:
            gone = [name for name in tree if name == path or (path.endswith("/") and name.startswith(path))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del tree[name]
    for path in tree:
        if any(path.startswith(f"{other}/") for other in tree):
            raise HubError(400, f"{path} lies under a file")
    return dict(sorted(tree.items()))


def checked(path: str) -> str:
    """Refuse paths that git or the Hub refuses."""
    parts = path.split("/")
    if not path or "\\" in path or any(part in ("", ".", "..", ".git") for part in parts):
        raise HubError(400, f"Invalid path in repository: {path!r}")
    return path
