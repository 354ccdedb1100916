"""A small Hub on the loopback interface: what huggingface_hub asks of one to create, fill and read model repositories.

Repositories live in memory and have one branch. Large files go the way of Git LFS; Xet is to be switched off.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import unquote, urlsplit

USER = "tester"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"


@dataclass
class Commit:
    """The files of a repository at one time."""

    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class HubServer:
    """What is stored, and every request: (method, path)."""

    url: str = ""
    repos: dict[str, list[Commit]] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo][-1].files

    def create(self, repo: str) -> bool:
        """False where it exists."""
        with self.lock:
            if repo in self.repos:
                return False
            self.repos[repo] = [Commit(_sha1(repo.encode()), "initial commit", {".gitattributes": b""})]
            return True

    def commit(self, repo: str, message: str, added: dict[str, bytes], deleted: set[str]) -> Commit:
        with self.lock:
            parent = self.repos[repo][-1]
            files = {name: data for name, data in parent.files.items() if name not in deleted} | added
            commit = Commit(_sha1(f"{parent.sha}{message}{sorted(files)}".encode()), message, files)
            self.repos[repo].append(commit)
            return commit

    def find(self, repo: str, revision: str) -> Commit | None:
        commits = self.repos.get(repo, [])
        if revision == "main":
            return commits[-1] if commits else None
        return next((commit for commit in commits if commit.sha == revision), None)


@contextmanager
def hub_server():
    """A running server, on a free port."""
    hub = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def handle_one_route(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self._read_chunks() if "Transfer-Encoding" in self.headers else self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        for methods, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                return handle(self, **match.groupdict())
        self.send_error_json(404, f"no such route: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_one_route

    def log_message(self, *args) -> None:
        """Quiet: the test that fails says what it saw."""

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_json(self, value: object, status: int = 200, **headers: str) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def send_error_json(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.send_json({"error": message}, status, **headers)

    def _read_chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data


def _whoami(request: _Handler) -> None:
    request.send_json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})


def _validate_card(request: _Handler) -> None:
    request.send_json({"errors": [], "warnings": []})


def _create(request: _Handler) -> None:
    if "Authorization" not in request.headers:
        return request.send_error_json(401, "creating a repository needs a token")
    body = json.loads(request.body)
    repo = f"{body.get('organization') or USER}/{body['name'].rpartition('/')[2]}"
    created = request.hub.create(repo)
    answer = {"url": f"{request.hub.url}/{repo}", "id": repo, "name": repo}
    request.send_json(answer, 200 if created else 409)


def _preupload(request: _Handler, repo: str, revision: str) -> None:
    files = json.loads(request.body)["files"]
    request.send_json(
        {
            "files": [
                {"path": file["path"], "uploadMode": _upload_mode(file["path"]), "shouldIgnore": False}
                for file in files
            ]
        }
    )


def _upload_mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def _lfs_batch(request: _Handler, repo: str) -> None:
    objects = [
        {**entry, "actions": {"upload": {"href": f"{request.hub.url}/lfs/{entry['oid']}", "header": {}}}}
        for entry in json.loads(request.body)["objects"]
    ]
    request.send_json({"transfer": "basic", "objects": objects})


def _lfs_put(request: _Handler, oid: str) -> None:
    if hashlib.sha256(request.body).hexdigest() != oid:
        return request.send_error_json(400, "the content does not have this oid")
    request.hub.lfs[oid] = request.body
    request.send(200, b"", {})


def _commit(request: _Handler, repo: str, revision: str) -> None:
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    added, deleted, message = {}, set(), ""
    for line in lines:
        value = line["value"]
        if line["key"] == "header":
            message = value["summary"]
        elif line["key"] == "file":
            added[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            added[value["path"]] = request.hub.lfs[value["oid"]]
        elif line["key"] == "deletedFile":
            deleted.add(value["path"])
        else:
            return request.send_error_json(400, f"unknown operation {line['key']!r}")
    commit = request.hub.commit(repo, message, added, deleted)
    url = f"{request.hub.url}/{repo}/commit/{commit.sha}"
    request.send_json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})


def _info(request: _Handler, repo: str, revision: str | None = None) -> None:
    commit = request.hub.find(repo, revision or "main")
    if commit is None:
        return _not_found(request, repo)
    siblings = [{"rfilename": name} for name in sorted(commit.files)]
    request.send_json({"id": repo, "modelId": repo, "sha": commit.sha, "private": False, "siblings": siblings})


def _tree(request: _Handler, repo: str, revision: str, folder: str | None = None) -> None:
    commit = request.hub.find(repo, revision)
    if commit is None:
        return _not_found(request, repo)
    start = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
    request.send_json(
        [
            {"type": "file", "path": name, "size": len(data), "oid": _sha1(data)}
            for name, data in sorted(commit.files.items())
            if name.startswith(start)
        ]
    )


def _resolve(request: _Handler, repo: str, revision: str, file: str) -> None:
    commit = request.hub.find(repo, revision)
    if commit is None:
        return _not_found(request, repo)
    if file not in commit.files:
        return request.send_json(
            {"error": "Entry not found"},
            404,
            **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.sha},
        )
    data, status, headers = commit.files[file], 200, {}
    if byte_range := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
        first, last = int(byte_range[1]), int(byte_range[2] or len(data) - 1)
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        data, status = data[first : last + 1], 206
    etag = hashlib.sha256(commit.files[file]).hexdigest()
    request.send(status, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", **headers})


def _not_found(request: _Handler, repo: str) -> None:
    known = repo in request.hub.repos
    request.send_error_json(404, f"{repo} not found", "RevisionNotFound" if known else "RepoNotFound")


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


ROUTES: list[tuple[tuple[str, ...], str, Callable]] = [
    (("GET",), "/api/whoami-v2", _whoami),
    (("POST",), "/api/validate-yaml", _validate_card),
    (("POST",), "/api/repos/create", _create),
    (("POST",), f"/api/models/{REPO}/preupload/{REVISION}", _preupload),
    (("POST",), f"/api/models/{REPO}/commit/{REVISION}", _commit),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", _lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", _lfs_put),
    (("GET",), f"/api/models/{REPO}", _info),
    (("GET",), f"/api/models/{REPO}/revision/{REVISION}", _info),
    (("GET",), f"/api/models/{REPO}/tree/{REVISION}(?P<folder>/.*)?", _tree),
    (("GET", "HEAD"), f"/{REPO}/resolve/{REVISION}/(?P<file>.+)", _resolve),
]
