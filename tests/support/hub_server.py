"""A Hub on loopback: enough of the HTTP interface for the real `huggingface_hub` client, held in memory.

It knows repos, branches, commits, pull requests, LFS uploads, private and gated repos, and faults on demand. What it answers,
headers and error codes included, is what the client reads of the real Hub's answers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OWNER, OWNER_TOKEN = "org", "hf_owner"
STRANGER_TOKEN = "hf_stranger"


@dataclass
class Repo:
    """Branches (and pull requests, as `refs/pr/1`) point to commits; a commit maps paths to contents."""

    is_private: bool = False
    is_gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch, "")
        digests = sorted((path, hashlib.sha1(content).hexdigest()) for path, content in files.items())
        sha = hashlib.sha1(f"{parent} {branch} {len(self.commits)} {digests}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubServer(ThreadingHTTPServer):
    """Run it as a context manager; `url` is the endpoint.

    `faults[(repo, path)]` spoils downloads of a file: "cut" breaks the connection half way, "truncated" serves half the file
    as if it were all, "tampered" flips a byte under the right checksum.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.faults: dict[tuple[str, str], str] = {}
        self.downloads: Counter[tuple[str, str]] = Counter()
        self.num_requests = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    def put(self, repo_id: str, folder: Path) -> str:
        """Publish a folder without a client; returns the commit."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        return self.repos.setdefault(repo_id, Repo()).commit("main", files)

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """Content of a published file."""
        repo = self.repos[repo_id]
        return repo.commits[repo.branches[revision]][path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the game."""


class _Refusal(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = ""):
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._read_chunks()
        url = urlsplit(self.path)
        with self.server.lock:
            self.server.num_requests += 1
        try:
            for method, pattern, handle in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method.split("|"):
                    handle(self, *map(unquote, match.groups()), body=body, query=parse_qs(url.query))
                    return
            raise _Refusal(404, "EntryNotFound", f"no route for {self.command} {url.path}")
        except _Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            if refusal.message:
                headers["X-Error-Message"] = refusal.message
            self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    # -- who may see and write what -----------------------------------------------------------------------------------

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _check_writer(self) -> None:
        if self._token() != OWNER_TOKEN:
            raise _Refusal(403 if self._token() else 401, None, "You have no write access here")

    def _repo(self, repo_id: str, reads_files: bool = False) -> Repo:
        repo, token = self.server.repos.get(repo_id), self._token()
        if repo is None or (repo.is_private and token != OWNER_TOKEN):
            raise _Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        if reads_files and repo.is_gated and token != OWNER_TOKEN:
            raise _Refusal(403 if token else 401, "GatedRepo", f"Access to model {repo_id} is restricted")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # -- routes -------------------------------------------------------------------------------------------------------

    def create_repo(self, *, body: bytes, query: dict) -> None:
        self._check_writer()
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repos:
            self._send(409, json.dumps({"url": url, "error": "exists"}).encode())
            return
        repo = self.server.repos[repo_id] = Repo(is_private=wanted.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._send_json({"url": url, "name": repo_id})

    def validate_card(self, *, body: bytes, query: dict) -> None:
        if not json.loads(body)["content"].startswith("---\n"):
            raise _Refusal(400, None, "no metadata")
        self._send_json({"errors": [], "warnings": []})

    def repo_info(self, repo_id: str, revision: str | None = None, *, body: bytes, query: dict) -> None:
        repo = self._repo(repo_id)
        sha = self._commit(repo, revision or "main")
        self._send_json(
            {
                "id": repo_id,
                "sha": sha,
                "private": repo.is_private,
                "gated": "manual" if repo.is_gated else False,
                "siblings": [{"rfilename": path} for path in repo.commits[sha]],
            }
        )

    def tree(self, repo_id: str, revision: str, *, body: bytes, query: dict) -> None:
        repo = self._repo(repo_id, reads_files=True)
        files = repo.commits[self._commit(repo, revision)]
        entries = [{"type": "file", "path": path, "size": len(c), "oid": _git_digest(c)} for path, c in files.items()]
        self._send_json(entries)

    def create_branch(self, repo_id: str, branch: str, *, body: bytes, query: dict) -> None:
        self._check_writer()
        repo = self._repo(repo_id)
        if branch in repo.branches:
            raise _Refusal(409, None, "exists")
        repo.branches[branch] = repo.branches["main"]
        self._send_json({})

    def preupload(self, repo_id: str, revision: str, *, body: bytes, query: dict) -> None:
        self._repo(repo_id)
        files = json.loads(body)["files"]
        modes = {True: "lfs", False: "regular"}
        answers = [
            {"path": f["path"], "uploadMode": modes[_is_large(f["path"])], "shouldIgnore": False} for f in files
        ]
        self._send_json({"files": answers})

    def lfs_batch(self, repo_id: str, *, body: bytes, query: dict) -> None:
        self._check_writer()
        objects: list[dict] = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.server.large_files:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}
        self._send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str, *, body: bytes, query: dict) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refusal(400, None, "checksum")
        self.server.large_files[oid] = body
        self._send(200, b"")

    def commit(self, repo_id: str, revision: str, *, body: bytes, query: dict) -> None:
        repo = self._repo(repo_id)
        is_pull_request = "create_pr" in query
        if not is_pull_request:
            self._check_writer()
        files = dict(repo.commits[self._commit(repo, revision)])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        number = sum(branch.startswith("refs/pr/") for branch in repo.branches) + 1
        sha = repo.commit(f"refs/pr/{number}" if is_pull_request else revision, files)
        answer = {"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha}
        if is_pull_request:
            answer["pullRequestUrl"] = f"{self.server.url}/{repo_id}/discussions/{number}"
        self._send_json(answer)

    def resolve(self, repo_id: str, revision: str, path: str, *, body: bytes, query: dict) -> None:
        repo = self._repo(repo_id, reads_files=True)
        sha = self._commit(repo, revision)
        content = repo.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if content is None:
            self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
            return
        digest = hashlib.sha256(content).hexdigest() if _is_large(path) else _git_digest(content)
        headers |= {"ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        if self.command == "HEAD":
            self._send(200, content, headers)
            return
        self.server.downloads[repo_id, path] += 1
        self._send_file(content, headers, self.server.faults.get((repo_id, path)))

    def _send_file(self, content: bytes, headers: dict[str, str], fault: str | None) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start, status = (int(match[1]), 206) if match else (0, 200)
        if match:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        half = len(content) // 2
        if fault == "tampered":
            content = content[:-1] + bytes([content[-1] ^ 1])
        elif fault == "truncated":
            content = content[:half]
        elif fault == "cut":
            self._send(status, content[start:half], headers, length=len(content) - start)
            self.close_connection = True
            return
        self._send(status, content[start:], headers)


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def _git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_ID = "([^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_card),
    ("GET", f"/api/models/{_ID}", _Handler.repo_info),
    ("GET", f"/api/models/{_ID}/revision/(.+)", _Handler.repo_info),
    ("GET", f"/api/models/{_ID}/tree/([^/]+)", _Handler.tree),
    ("POST", f"/api/models/{_ID}/branch/(.+)", _Handler.create_branch),
    ("POST", f"/api/models/{_ID}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"/api/models/{_ID}/commit/([^/]+)", _Handler.commit),
    ("POST", f"/{_ID}\\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/large/([0-9a-f]+)", _Handler.lfs_upload),
    ("HEAD|GET", f"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
