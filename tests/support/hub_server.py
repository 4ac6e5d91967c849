"""A server that speaks as much of the Hub's HTTP interface as pushing and pulling a model uses. No dependencies.

    python tests/support/hub_server.py FOLDER        the token on standard input; prints its address, then serves

Blobs lie in FOLDER by their SHA-256; repositories, branches and commits are kept in memory. As on the Hub, a private
repository does not exist for a reader without the token, large files travel by the LFS protocol (in parts above
``PART_BYTES``) to addresses that must not be sent the token, and a commit changes a branch at once or not at all.

What is not the Hub's: ``/_control`` takes faults to inject and gives the log of requests. A fault is
``{"match": regular expression on "METHOD path", "do": what, "times": n, "after": m}``: it leaves out the first m
requests that match and meets the n after those. ``do`` is one of

- ``429``, ``500``, ...: answer so, with ``retry_after`` as header where given, and a page that is no JSON;
- ``drop``: close the connection after half the body;
- ``drop_answer``: do what was asked, then close the connection instead of answering;
- ``stall``: log the request, then wait for ``/_control/release``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

PART_BYTES = 200_000
LFS_ABOVE_BYTES = 50_000
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Entry:
    """One file of a commit: its blob, and the name that git and the HTTP cache know it by."""

    sha256: str
    size: int
    oid: str
    is_lfs: bool


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    stored: set[str] = field(default_factory=set)
    """LFS objects that were uploaded for it."""
    num_pushes: int = 0

    def commit(self, branch: str, tree: dict[str, Entry]) -> str:
        parents = f"{len(self.commits)} {branch} {sorted(tree.items())}"
        sha = hashlib.sha1(parents.encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha  # one assignment: a reader sees the branch before or after it
        return sha


class Answer(Exception):
    def __init__(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        self.status, self.headers = status, headers or {}
        self.body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()


def refusal(status: int, code: str, message: str) -> Answer:
    return Answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})


class Hub:
    def __init__(self, folder: Path, token: str) -> None:
        self.folder, self.token = folder, token
        self.lock, self.released = threading.Lock(), threading.Event()
        self.repositories: dict[str, Repository] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.key = secrets.token_hex(8)  # in upload addresses, in place of the token
        self.faults: list[dict[str, Any]] = []
        self.log: list[str] = []
        (folder / "blobs").mkdir(parents=True)

    def fault_for(self, request: str) -> dict[str, Any] | None:
        with self.lock:
            for fault in self.faults:
                if fault["times"] > 0 and re.search(fault["match"], request):
                    if fault.get("after", 0) > 0:
                        fault["after"] -= 1
                        continue
                    fault["times"] -= 1
                    return fault
        return None

    # ------------------------------------------------------------------------------------------------------ blobs

    def blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256

    def store(self, content: bytes, expected: str | None = None) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        if expected not in (None, sha256):
            raise Answer(400, {"error": "content is not what its name says"})
        self.blob(sha256).write_bytes(content)
        return sha256

    def entry(self, content: bytes) -> Entry:
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return Entry(self.store(content), len(content), git, False)

    # ------------------------------------------------------------------------------------------------ repositories

    def create(self, body: dict[str, Any], address: str) -> None:
        name = f"{body.get('organization') or 'somebody'}/{body['name']}"
        if body.get("organization") == "forbidden":
            raise refusal(403, "Forbidden", "You don't have the rights to create a model under this namespace")
        with self.lock:
            if name in self.repositories:
                raise Answer(409, {"error": "You already created this model repo", "url": f"{address}/{name}"})
            repository = Repository(private=body.get("visibility") == "private")
            repository.commit("main", {".gitattributes": self.entry(b"*.safetensors filter=lfs\n")})
            self.repositories[name] = repository
        raise Answer(200, {"url": f"{address}/{name}", "id": name})

    def repository(self, name: str, is_known: bool) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not is_known):
            raise refusal(404 if is_known else 401, "RepoNotFound", "Repository not found")
        return repository

    def revision(self, repository: Repository, name: str) -> str:
        name = unquote(name)
        sha = repository.branches.get(name, name)
        if sha not in repository.commits:
            raise refusal(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return sha

    def preupload(self, tree: dict[str, Entry], body: dict[str, Any]) -> None:
        files = []
        for file in body["files"]:
            is_lfs = file["path"].endswith(".safetensors") or file["size"] > LFS_ABOVE_BYTES
            old = tree.get(file["path"])
            oid = {"oid": old.sha256 if old.is_lfs else old.oid} if old else {}
            files.append(
                {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, **oid}
            )
        raise Answer(200, {"files": files})

    def batch(self, name: str, repository: Repository, body: dict[str, Any], address: str) -> None:
        objects = []
        for wanted in body["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            found: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in repository.stored:
                url, query = f"{address}/_lfs/{oid}", f"?repository={name}&key={self.key}"
                upload: dict[str, Any] = {"href": url + query}
                if size > PART_BYTES:
                    numbers = range(1, -(-size // PART_BYTES) + 1)
                    parts = {f"{number:05}": f"{url}/{number}{query}" for number in numbers}
                    upload = {"href": f"{url}/complete{query}", "header": {"chunk_size": str(PART_BYTES), **parts}}
                found["actions"] = {"upload": upload, "verify": {"href": f"{url}/verify{query}"}}
            objects.append(found)
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, branch: str, lines: list[dict[str, Any]], address: str) -> None:
        with self.lock:
            if branch not in repository.branches:
                raise refusal(404, "RevisionNotFound", f"Invalid rev id: {branch}")
            head = repository.branches[branch]
            tree = dict(repository.commits[head])
            for line in lines:
                kind, value = line["key"], line["value"]
                if kind == "header":
                    if value.get("parentCommit", head) != head:
                        raise Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
                elif kind == "file":
                    tree[value["path"]] = self.entry(base64.b64decode(value["content"]))
                elif kind == "lfsFile":
                    blob = self.blob(value["oid"])
                    if value["oid"] not in repository.stored or blob.stat().st_size != value["size"]:
                        raise Answer(400, {"error": f"LFS object of {value['path']} was not uploaded"})
                    pointer = hashlib.sha1(value["oid"].encode()).hexdigest()
                    tree[value["path"]] = Entry(value["oid"], value["size"], pointer, True)
                elif kind == "deletedFile":
                    if tree.pop(value["path"], None) is None:
                        raise refusal(404, "EntryNotFound", "A file with this name doesn't exist")
                else:
                    raise Answer(400, {"error": f"unknown operation {kind}"})
            sha = repository.commit(branch, tree)
            repository.num_pushes += 1
        raise Answer(200, {"commitUrl": f"{address}/commit/{sha}", "commitOid": sha, "success": True})


def info(name: str, repository: Repository, sha: str) -> dict[str, Any]:
    siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
    return {"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []}


def tree_page(tree: dict[str, Entry]) -> list[dict[str, Any]]:
    page = []
    for path, entry in sorted(tree.items()):
        lfs = {"lfs": {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}} if entry.is_lfs else {}
        page.append({"type": "file", "path": path, "size": entry.size, "oid": entry.oid, **lfs})
    return page


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        self.url = urlsplit(self.path)
        request = f"{self.command} {self.url.path}"
        fault = None if self.url.path.startswith("/_control") else self.hub.fault_for(request)
        action = fault["do"] if fault else ""
        if action == "drop":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.note(request, "dropped")
            return self.hang_up()
        body = self.body()
        if action == "stall":
            self.note(request, "stalled")
            self.hub.released.wait()
        try:
            if action.isdigit():
                wait = {"Retry-After": fault["retry_after"]} if fault and "retry_after" in fault else {}
                raise Answer(int(action), b"<html>not now</html>", wait)
            self.route(request, body)
        except Answer as answer:
            self.note(request, "lost" if action == "drop_answer" else str(answer.status))
            if action == "drop_answer":
                return self.hang_up()
            self.reply(answer)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def note(self, request: str, outcome: str) -> None:
        if not self.url.path.startswith("/_control"):
            with self.hub.lock:
                self.hub.log.append(f"{request} {outcome}")

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def reply(self, answer: Answer) -> None:
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(answer.body)), "Content-Type": "application/json", **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    # ------------------------------------------------------------------------------------------------------ routes

    def route(self, request: str, body: bytes) -> None:
        hub, address = self.hub, f"http://{self.headers['Host']}"
        if self.url.path.startswith("/_control/"):
            self.control(body)
        if self.url.path.startswith("/_lfs/"):
            self.lfs(body)
        authorization = self.headers.get("Authorization")
        is_known = authorization == f"Bearer {hub.token}"
        if authorization and not is_known:
            raise refusal(401, "Unauthorized", "Invalid credentials in Authorization header")
        if self.command not in ("GET", "HEAD") and not is_known:
            raise refusal(401, "Unauthorized", "Invalid username or password.")
        parsed = (
            json.loads(body) if body and "json" in self.headers.get("Content-Type", "") and b"\n" not in body else {}
        )
        if request == "GET /api/whoami-v2":
            raise Answer(200, {"name": "somebody", "type": "user"}) if is_known else Answer(401)
        if request == "POST /api/repos/create":
            hub.create(parsed, address)
        if request == "POST /api/validate-yaml":
            front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
            good = front and isinstance(yaml.safe_load(front[1]), dict)
            raise Answer(200, {}) if good else Answer(400, {"errors": [{"message": "no YAML at the top"}]})
        if match := re.fullmatch(r"POST /(.+)\.git/info/lfs/objects/batch", request):
            hub.batch(match[1], hub.repository(match[1], is_known), json.loads(body), address)
        if match := re.fullmatch(r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", request):
            repository = hub.repository(match[1], is_known)
            self.download(repository, hub.revision(repository, match[2]), unquote(match[3]))
        if match := re.fullmatch(r"(GET|POST) /api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?", request):
            method, name, what, revision = match.groups()
            repository = hub.repository(name, is_known)
            if (method, what) == ("POST", "branch"):
                if unquote(revision) in repository.branches:
                    raise Answer(409, {"error": "Reference already exists"})
                repository.branches[unquote(revision)] = repository.branches["main"]
                raise Answer(200, {})
            if (method, what) == ("POST", "commit"):
                lines = [json.loads(line) for line in body.splitlines()]
                hub.commit(repository, unquote(revision), lines, f"{address}/{name}")
            if what in (None, "revision", "tree", "preupload"):
                sha = hub.revision(repository, revision or "main")
                if what == "tree":
                    raise Answer(200, tree_page(repository.commits[sha]))
                if what == "preupload":
                    hub.preupload(repository.commits[sha], json.loads(body))
                raise Answer(200, info(name, repository, sha))
        raise Answer(404, {"error": f"no such address: {request}"})  # so this server offers no Xet

    def lfs(self, body: bytes) -> None:
        """The storage: whoever has the key may write, and nobody sees what is in it."""
        hub, query = self.hub, parse_qs(self.url.query)
        _, _, oid, *rest = self.url.path.split("/")
        if query.get("key") != [hub.key]:
            raise Answer(403, {"error": "no key"})
        stored = hub.repositories[query["repository"][0]].stored
        if self.command == "PUT" and self.headers.get("Authorization"):
            raise Answer(400, {"error": "the token was sent to the storage"})
        if rest == ["verify"]:
            raise Answer(200 if oid in stored else 404, {})
        if rest and self.command == "PUT":
            hub.parts[oid, int(rest[0])] = body
            raise Answer(200, None, {"ETag": hashlib.md5(body).hexdigest()})
        if rest == ["complete"]:
            numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
            body = b"".join(hub.parts[oid, number] for number in numbers)
        hub.store(body, oid)
        stored.add(oid)
        raise Answer(200, {})

    def download(self, repository: Repository, sha: str, path: str) -> None:
        entry = repository.commits[sha].get(path)
        if entry is None:
            raise refusal(404, "EntryNotFound", "Entry not found")
        content = self.hub.blob(entry.sha256).read_bytes()
        etag = f'"{entry.sha256 if entry.is_lfs else entry.oid}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag, "Content-Type": "application/octet-stream"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            raise Answer(206, content[first : last + 1], headers)
        raise Answer(200, content, headers)

    def control(self, body: bytes) -> None:
        hub, what = self.hub, self.url.path.removeprefix("/_control/")
        if what == "faults":
            hub.released.clear()
            hub.faults = json.loads(body)
        elif what == "release":
            hub.released.set()
        elif what == "pushes":
            raise Answer(200, {name: repository.num_pushes for name, repository in hub.repositories.items()})
        left = [fault for fault in hub.faults if fault["times"] > 0]
        raise Answer(200, {"log": hub.log, "faults_left": left})


def main() -> None:
    Handler.hub = Hub(Path(sys.argv[1]), sys.stdin.readline().strip())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
