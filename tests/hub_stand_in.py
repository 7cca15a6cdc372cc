"""A hub on 127.0.0.1: enough of the HTTP API of huggingface.co for its own client to push and pull models.

Repositories with branches and commits, private and gated ones, tokens that may read or write, small files in
the commit and large ones by LFS, which are downloaded from another host name, as from a CDN. `fail` makes a
request fail, or the whole server die in the midst of an answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

READ, WRITE = "hf_read", "hf_write"  # tokens; anything else is nobody's


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    refs: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    messages: list[str] = field(default_factory=list)

    def commit_of(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    def commit(self, revision: str, changes: dict[str, bytes], message: str) -> str:
        files = {**self.commits[self.refs[revision]], **changes}
        content = json.dumps(
            [message, len(self.commits), {n: hashlib.sha1(d).hexdigest() for n, d in files.items()}]
        )
        number = hashlib.sha1(content.encode()).hexdigest()
        self.commits[number], self.refs[revision] = files, number
        self.messages.append(message)
        return number

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs[revision]]


class Hub(ThreadingHTTPServer):
    """Context manager; `url` is its endpoint."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS: sha256 -> content
        self.asked: list[tuple[str, str, bool]] = []  # (method, path, whether a token came along)
        self.lfs_from = 1000  # bytes; larger files go by LFS, smaller ones in the commit
        # (method, path) -> what goes wrong: a status, `die` before or `break` in the midst of the answer
        self.fail: Callable[[str, str], int | str | None] = lambda method, path: None
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *about: object) -> None:
        self.die()
        self._thread.join()

    def die(self) -> None:
        """Listen no more."""
        self.shutdown()
        self.server_close()

    def add(self, name: str, files: dict[str, bytes], **about: bool) -> Repo:
        repo = self.repos[name] = Repo(**about)
        repo.commit("main", files, "first")
        return repo

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the console."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    # One request

    def answer(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(iter(self.chunk, b""))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.token = token if token in (READ, WRITE) else None
        hub.asked.append((self.command, path, bool(token)))
        failure = hub.fail(self.command, path)
        if isinstance(failure, int):
            return self.send(failure, {"error": "as the test wants it"})
        if failure == "die":
            threading.Thread(target=hub.die).start()
            self.close_connection = True
            return None
        self.breaks = failure == "break"
        routes = {
            r"/api/repos/create": self.create,
            r"/api/validate-yaml": lambda: self.send(200, {"errors": [], "warnings": []}),
            r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?": self.info,
            r"/api/models/([^/]+/[^/]+)/tree/(.+)": self.tree,
            r"/api/models/([^/]+/[^/]+)/branch/(.+)": self.branch,
            r"/api/models/([^/]+/[^/]+)/preupload/(.+)": self.preupload,
            r"/api/models/([^/]+/[^/]+)/commit/(.+)": self.commit,
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self.batch,
            r"/lfs/(\w+)": self.store,
            r"/verify": lambda: self.send(200, {}),
            r"/cdn/(\w+)": self.cdn,
            r"/([^/]+/[^/]+)/resolve/(.+?)/([^/]+(?:/.+)?)": self.resolve,
        }
        # a branch may have a slash in it, which is quoted in the path
        raw = urlsplit(self.path).path
        for pattern, route in routes.items():
            if found := re.fullmatch(pattern, raw):
                return route(*(None if part is None else unquote(part) for part in found.groups()))
        return self.send(404, {"error": f"no route {raw}"})

    def chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def send(self, status: int, content: object, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            if self.breaks:
                data = data[: len(data) // 2]
                threading.Thread(target=self.server.die).start()
                self.close_connection = True
            self.wfile.write(data)

    breaks = False

    def refuse(self, status: int, code: str, message: str = "") -> None:
        self.send(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message or code)

    def seen(self, name: str, write: bool = False) -> Repo | None:
        """The repository if the token may see (or change) it; else the refusal has been sent."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.token is None):
            self.refuse(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
        elif write and self.token != WRITE:
            self.refuse(403 if self.token else 401, "Forbidden", "You need write access to this repository")
        else:
            return repo
        return None

    # The routes

    def create(self) -> None:
        given = json.loads(self.body)
        name = f"{given['organization'] or 'me'}/{given['name']}"
        if self.token != WRITE:
            return self.refuse(
                403 if self.token else 401, "Forbidden", "You may not create repositories here"
            )
        if name in self.server.repos:
            return self.send(
                409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
            )
        self.server.repos[name] = Repo(private=given.get("visibility") == "private")
        return self.send(200, {"url": f"{self.server.url}/{name}"})

    def info(self, name: str, revision: str | None) -> None:
        if repo := self.seen(name):
            commit = repo.commit_of(revision or "main")
            self.send(200, {"id": name, "sha": commit, "private": repo.private, "gated": repo.gated})

    def tree(self, name: str, revision: str) -> None:
        if repo := self.seen(name):
            files = repo.commits[repo.commit_of(revision) or ""]
            about = {
                n: {"size": len(data), "oid": hashlib.sha1(data).hexdigest()} for n, data in files.items()
            }
            self.send(200, [{"type": "file", "path": name, **found} for name, found in about.items()])

    def branch(self, name: str, branch: str) -> None:
        if repo := self.seen(name, write=True):
            if branch in repo.refs:
                return self.send(409, {"error": "Reference already exists"})
            repo.refs[branch] = repo.refs["main"]
            return self.send(200, {})
        return None

    def preupload(self, name: str, revision: str) -> None:
        if repo := self.seen(name, write=True):
            if revision not in repo.refs:
                return self.refuse(404, "RevisionNotFound")
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > self.server.lfs_from else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            return self.send(200, {"files": files})
        return None

    def batch(self, name: str) -> None:
        if self.seen(name, write=True):
            objects = []
            for item in json.loads(self.body)["objects"]:
                actions = {
                    "upload": {"href": f"{self.server.url}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.server.url}/verify"},
                }
                objects.append(item if item["oid"] in self.server.objects else {**item, "actions": actions})
            self.send(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self.send(200, {})

    def commit(self, name: str, revision: str) -> None:
        if repo := self.seen(name, write=True):
            header, *lines = (json.loads(line) for line in self.body.splitlines())
            changes = {}
            for line in lines:
                value = line["value"]
                large = line["key"] == "lfsFile"
                content = self.server.objects[value["oid"]] if large else base64.b64decode(value["content"])
                changes[value["path"]] = content
            number = repo.commit(revision, changes, header["value"]["summary"])
            self.send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{number}", "commitOid": number})

    def resolve(self, name: str, revision: str, file: str) -> None:
        repo = self.seen(name)
        if repo is None:
            return None
        if repo.gated and self.token is None:
            return self.refuse(401, "GatedRepo", f"Access to model {name} is restricted")
        number = repo.commit_of(revision)
        if number is None:
            return self.refuse(404, "RevisionNotFound")
        content = repo.commits[number].get(file)
        if content is None:
            return self.send(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=number)
        if len(content) <= self.server.lfs_from:
            return self.send(
                200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=number
            )
        oid = hashlib.sha256(content).hexdigest()
        self.server.objects[oid] = content
        at = f"http://localhost:{self.server.server_address[1]}/cdn/{oid}"
        headers = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(content)), "X_Repo_Commit": number}
        return self.send(302, b"", Location=at, **headers)

    def cdn(self, oid: str) -> None:
        content = self.server.objects[oid]
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers["Range"] else 0
        self.send(206 if start else 200, content[start:], ETag=f'"{oid}"')
