"""A small Hub on this machine, from the standard library: what huggingface_hub asks for when it pushes and loads.

It listens on 127.0.0.1 only and keeps everything in memory. A repository is a list of revisions, and a revision all of
its files, so that what a commit leaves is either the old or the new state. Large files go the way of Git LFS, with
their SHA-256 checked; Xet, which needs a storage service of its own, has to be off (`HF_HUB_DISABLE_XET=1`).
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".parquet", ".png", ".gif")
KINDS = {"models": "model", "datasets": "dataset"}


@dataclass(frozen=True)
class StoredFile:
    """A file of a revision; `is_large` if it came by LFS."""

    data: bytes
    is_large: bool

    @property
    def sha256(self) -> str:
        """As LFS names it."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        """As Git names it, or LFS."""
        return self.sha256 if self.is_large else hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def entry(self, path: str) -> dict:
        """What the listing of a tree says of it."""
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.etag}
        if self.is_large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass
class Repository:
    """Its revisions, the newest last, each with all its files."""

    kind: str
    name: str
    private: bool = False
    revisions: list[tuple[str, str, dict[str, StoredFile]]] = field(default_factory=list)

    def commit(self, title: str, files: dict[str, StoredFile]) -> str:
        """Adds a revision and returns its id."""
        listing = "".join(f"{path} {file.etag}\n" for path, file in sorted(files.items()))
        identity = f"{self.kind} {self.name} {len(self.revisions)} {title}\n{listing}"
        sha = hashlib.sha1(identity.encode()).hexdigest()
        self.revisions.append((sha, title, files))
        return sha

    def revision(self, wanted: str) -> tuple[str, str, dict[str, StoredFile]] | None:
        """The revision of that id, or the newest."""
        if wanted in ("main", "HEAD"):
            return self.revisions[-1]
        return next((revision for revision in self.revisions if revision[0] == wanted), None)

    @property
    def files(self) -> dict[str, bytes]:
        """The newest files."""
        return {path: file.data for path, file in self.revisions[-1][2].items()}

    @property
    def titles(self) -> list[str]:
        """What the commits are called, the oldest first."""
        return [title for _, title, _ in self.revisions]


class LocalHub:
    """
    The server, as a context manager.

    Args:
        tokens (`dict[str, str]`): The users by their tokens.

    Attributes:
        repositories (`dict[tuple[str, str], Repository]`): By kind (`model`, `dataset`) and name.
        requests (`list[str]`): Methods and paths, as they came.
        cut_uploads_after (`int`, *optional*): Bytes of an LFS upload after which the connection is closed.
        stall_uploads_after (`int`, *optional*): Bytes after which the server waits for the client's end.
        stalled (`threading.Event`): That it waits.
        refused_title (`str`, *optional*): Of commits that are refused.
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.collections: dict[str, list[dict]] = {}
        self.cut_uploads_after: int | None = None
        self.stall_uploads_after: int | None = None
        self.stalled = threading.Event()
        self.refused_title: str | None = None
        self.lock = threading.Lock()

    def __enter__(self) -> "LocalHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def model(self, name: str) -> Repository:
        """The model of that name."""
        return self.repositories["model", name]

    def dataset(self, name: str) -> Repository:
        """The data set of that name."""
        return self.repositories["dataset", name]


class Refused(Exception):
    """A request that gets an error in place of an answer."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers
        if code:
            self.headers["X-Error-Code"] = code


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing: the tests' output is theirs."""

    def _dispatch(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        self.hub.requests.append(f"{self.command} {parts.path}")
        length = self.headers.get("Content-Length")
        self.chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        try:
            if self.command == "PUT":
                self._receive(int(length or 0))
                return
            body = self._read_chunks() if self.chunked else self.rfile.read(int(length or 0))
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, self.route)
                if match and self.command in method:
                    answer(self, *match.groups(), *([body] if method == "POST" else []))
                    return
            raise Refused(404, f"There is nothing at {self.route}.")
        except Refused as refusal:
            self._send(
                refusal.status,
                json.dumps({"error": refusal.message}).encode(),
                **{"X-Error-Message": refusal.message, **refusal.headers},
            )

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _read_chunks(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, **headers: str) -> None:
        self._send(200, json.dumps(value).encode(), **headers)

    def _user(self, required: bool = True) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        if required and not token:
            raise Refused(401, "Invalid username or password.")
        return self.hub.tokens.get(token)

    def _repository(self, kind: str, name: str, writing: bool = False) -> Repository:
        user = self._user(required=writing)
        repository = self.hub.repositories.get((kind, name))
        owner = name.split("/")[0]
        if repository is None or (repository.private and user != owner):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if writing and user != owner:
            raise Refused(403, f"{user} may not write to {name}")
        return repository

    def _revision(self, kind: str, name: str, wanted: str) -> tuple[Repository, str, dict[str, StoredFile]]:
        repository = self._repository(kind, name)
        found = repository.revision(wanted)
        if found is None:
            raise Refused(404, f"Invalid rev id: {wanted}", "RevisionNotFound")
        return repository, found[0], found[2]

    # Users and repositories

    def whoami(self) -> None:
        user = self._user()
        self._json({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {"type": "access_token"}})

    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        broken = content.startswith("---") and content.count("\n---\n") < 1
        errors = [{"message": "the metadata does not end"}] if broken else []
        self._send(400 if broken else 200, json.dumps({"errors": errors, "warnings": []}).encode())

    def create(self, body: bytes) -> None:
        user, wanted = self._user(), json.loads(body)
        owner, kind = wanted.get("organization") or user, wanted.get("type") or "model"
        if owner != user:
            raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        name = f"{owner}/{wanted['name']}"
        url = f"{self.hub.url}/{'' if kind == 'model' else f'{kind}s/'}{name}"
        with self.hub.lock:
            if (kind, name) in self.hub.repositories:
                message = {"error": f"You already created this {kind} repo: {name}", "url": url}
                self._send(409, json.dumps(message).encode())
                return
            repository = Repository(kind, name, private=wanted.get("visibility") == "private")
            repository.commit("initial commit", {".gitattributes": StoredFile(b"*.safetensors filter=lfs\n", False)})
            self.hub.repositories[kind, name] = repository
        self._json({"url": url, "name": name, "id": name})

    def add_to_collection(self, slug: str, body: bytes) -> None:
        user = self._user()
        if slug.split("/")[0] != user:
            raise Refused(403, f"{user} may not write to {slug}")
        item = json.loads(body)["item"]
        self.hub.collections.setdefault(slug, []).append(item)
        items = [{"_id": item["id"], "position": 0, **item}]
        self._json(
            {"slug": slug, "title": slug, "owner": {"name": user}, "items": items, "private": False, "theme": "blue"}
            | {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "upvotes": 0, "url": f"/collections/{slug}"}
        )

    # Reading

    def info(self, kind: str, name: str, revision: str | None = None) -> None:
        repository, sha, files = self._revision(KINDS[kind], name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        base = {"id": name, "_id": name, "modelId": name, "author": name.split("/")[0], "sha": sha}
        more = {"private": repository.private, "gated": False, "disabled": False, "tags": [], "downloads": 0}
        self._json({**base, **more, "likes": 0, "siblings": siblings, "lastModified": "2026-01-01T00:00:00.000Z"})

    def tree(self, kind: str, name: str, revision: str, folder: str | None) -> None:
        _, _, files = self._revision(KINDS[kind], name, revision)
        start = f"{folder}/" if folder else ""
        entries = [file.entry(path) for path, file in files.items() if path.startswith(start)]
        below = {entry["path"].removeprefix(start).split("/")[0] for entry in entries if entry["path"] != folder}
        folders = [start + part for part in sorted(below) if start + part not in files]
        if folder and not entries:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        if "true" not in self.query.get("recursive", [""])[0].lower():
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(start)]
        listed = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
        self._json(listed + entries)

    def paths_info(self, kind: str, name: str, revision: str, body: bytes) -> None:
        _, _, files = self._revision(KINDS[kind], name, revision)
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        found = [files[path].entry(path) for path in wanted if path in files]
        folders = [path for path in wanted if path not in files and any(key.startswith(f"{path}/") for key in files)]
        self._json([*found, *({"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders)])

    def refs(self, kind: str, name: str) -> None:
        _, sha, _ = self._revision(KINDS[kind], name, "main")
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": sha}
        self._json({"branches": [branch], "converts": [], "tags": []})

    def resolve(self, prefix: str | None, name: str, revision: str, path: str) -> None:
        _, sha, files = self._revision("dataset" if prefix else "model", name, revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path not in files:
            raise Refused(404, f"{path} does not exist", "EntryNotFound", **headers)
        self._send_file(files[path].data, ETag=f'"{files[path].etag}"', **headers)

    def _send_file(self, data: bytes, **headers: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers["Content-Type"] = "application/octet-stream"
        if not wanted:
            self._send(200, data, **headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            raise Refused(416, "Range Not Satisfiable")
        self._send(206, data[first : last + 1], **headers, **{"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    # Writing

    def preupload(self, kind: str, name: str, revision: str, body: bytes) -> None:
        files = self._repository(KINDS[kind], name, writing=True).revisions[-1][2]
        answers = []
        for wanted in json.loads(body)["files"]:
            path = wanted["path"]
            mode = "lfs" if path.endswith(LARGE) or wanted["size"] > 10_000_000 else "regular"
            known = {"oid": files[path].etag} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self._json({"files": answers})

    def lfs_batch(self, prefix: str | None, name: str, body: bytes) -> None:
        self._repository("dataset" if prefix else "model", name, writing=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/large/{wanted['oid']}"}}
            objects.append(wanted if wanted["oid"] in self.hub.large else {**wanted, "actions": upload})
        self._json({"transfer": "basic", "objects": objects})

    def _receive(self, length: int) -> None:
        oid = re.fullmatch(r"/large/([0-9a-f]{64})", self.route)[1]
        for limit, stalls in ((self.hub.cut_uploads_after, False), (self.hub.stall_uploads_after, True)):
            if limit is not None and limit < length:
                self.rfile.read(limit)
                if stalls:
                    self.hub.stalled.set()
                    self.rfile.read()
                self.close_connection = True
                self.connection.close()
                return
        data = self._read_chunks() if self.chunked else self.rfile.read(length)
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, "The content is not what its SHA-256 says.")
        self.hub.large[oid] = data
        self._send(200)

    def commit(self, kind: str, name: str, revision: str, body: bytes) -> None:
        repository = self._repository(KINDS[kind], name, writing=True)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"]["summary"] == self.hub.refused_title:
            raise Refused(500, "Something went wrong.")
        with self.hub.lock:
            parent = header["value"].get("parentCommit")
            if parent not in (None, repository.revisions[-1][0]):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repository.revisions[-1][2])
            for operation in operations:
                _apply(operation["key"], operation["value"], files, self.hub.large)
            sha = repository.commit(header["value"]["summary"], files)
        url = f"{self.hub.url}/{'' if kind == 'models' else f'{kind}/'}{name}/commit/{sha}"
        self._json({"commitUrl": url, "commitOid": sha, "hookOutput": "", "success": True})


def _apply(key: str, value: dict, files: dict[str, StoredFile], large: dict[str, bytes]) -> None:
    path = value["path"]
    if key == "file":
        files[path] = StoredFile(base64.b64decode(value["content"]), False)
    elif key == "lfsFile":
        if value["oid"] not in large:
            raise Refused(400, f"{path} has not been uploaded.")
        files[path] = StoredFile(large[value["oid"]], True)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
    else:
        for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
            del files[name]


_API = r"/api/(models|datasets)/([\w.-]+/[\w.-]+)"
_PLACE = r"/(datasets/)?([\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", r"/api/collections/(.+)/items", _Handler.add_to_collection),
    ("GET", _API, _Handler.info),
    ("GET", f"{_API}/revision/(.+)", _Handler.info),
    ("GET", rf"{_API}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    ("POST", f"{_API}/paths-info/(.+)", _Handler.paths_info),
    ("GET", f"{_API}/refs", _Handler.refs),
    ("POST", f"{_API}/preupload/(.+)", _Handler.preupload),
    ("POST", f"{_API}/commit/(.+)", _Handler.commit),
    ("POST", rf"{_PLACE}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("GET HEAD", f"{_PLACE}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
