"""A Hugging Face Hub on this machine, with as much of its HTTP API as reading a dataset takes.

The real `datasets` and `huggingface_hub` talk to it over HTTP, as they do to the real one.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Files = dict[str, bytes]  # path in the repository → content


class LocalHub:
    """Datasets as commits. `with LocalHub() as hub:`; `url` is the value for HF_ENDPOINT.

    requests  (method, path, bytes that were asked for as in "0-99", or "") of all requests so far
    """

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], Files] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.requests: list[tuple[str, str, str]] = []
        hub = self

        class Handler(_Handler):
            def files(self, repo: str, revision: str) -> tuple[str, Files] | None:
                sha = hub.branches.get((repo, revision), revision)
                found = hub.commits.get((repo, sha))
                return None if found is None else (sha, found)

            def knows(self, repo: str) -> bool:
                return any(known == repo for known, _ in hub.commits)

            def record(self) -> None:
                asked = (self.headers.get("Range") or "").removeprefix("bytes=")
                hub.requests.append((self.command, self.path.partition("?")[0], asked))

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def commit(self, repo: str, files: dict[str, bytes | str], branch: str = "main") -> str:
        """A new commit of a dataset, to which its branch then points. Returns its id."""
        content = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
        sha = hashlib.sha1(repr((repo, branch, sorted(content.items()))).encode()).hexdigest()
        self.commits[repo, sha] = content
        self.branches[repo, branch] = sha
        return sha

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def files(self, repo: str, revision: str) -> tuple[str, Files] | None:
        raise NotImplementedError

    def knows(self, repo: str) -> bool:
        raise NotImplementedError

    def record(self) -> None:
        raise NotImplementedError

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.record()
        path = self.path.partition("?")[0].replace("%2F", "/")
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        listing = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path)
        info = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        found = file or listing or info
        if not found:
            return self._send(404)
        repo, revision = found[1], found[2] or "main"
        if not self.knows(repo):
            return self._send(404, X_Error_Code="RepoNotFound")
        commit = self.files(repo, revision)
        if commit is None:
            return self._send(404, X_Error_Code="RevisionNotFound")
        sha, files = commit
        if info:
            return self._send_json({"id": repo, "sha": sha, "siblings": [{"rfilename": path} for path in files]})
        if listing:
            return self._send_json(_tree(files, listing[3]))
        if found[3] not in files:
            return self._send(404, X_Error_Code="EntryNotFound")
        self._send_file(sha, files[found[3]])

    def _send_file(self, sha: str, data: bytes) -> None:
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self._send(200, data, **headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(206, data[first : last + 1], **headers)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tree(files: Files, folder: str) -> list[dict[str, Any]]:
    """The entries directly in a folder."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, data in files.items():
        if path.startswith(prefix):
            name, below, _ = path.removeprefix(prefix).partition("/")
            oid = hashlib.sha1(data).hexdigest()
            kind = {"type": "directory", "oid": oid} if below else {"type": "file", "oid": oid, "size": len(data)}
            entries[prefix + name] = {**kind, "path": prefix + name}
    return list(entries.values())
