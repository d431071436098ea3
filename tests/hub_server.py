"""What a Hugging Face Hub and a server of files answer to their clients, in a thread beside the test."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """Keeps files by their path: ``/NAME/resolve/REVISION/FILE`` of a repository, or any other."""

    files: dict[str, bytes]
    requests: list[str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, repository: str, revision: str, name: str, content: bytes) -> None:
        self.files[f"/{repository}/resolve/{revision}/{name}"] = content


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._send_file(with_content=False)

    def do_GET(self) -> None:
        self._send_file(with_content=True)

    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self._answer({"url": f"{self.server.address}/{asked['organization']}/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            how = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._answer({"files": [how | {"path": file["path"]} for file in json.loads(body)["files"]]})
        else:
            self._commit(body)

    def _commit(self, body: bytes) -> None:
        _, _, _, *repository, _, revision = self.path.split("/")  # /api/models/NAME/commit/REVISION
        name = "/".join(repository)
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.put(name, revision, entry["value"]["path"], base64.b64decode(entry["value"]["content"]))
        commit = "1" * 40
        url = f"{self.server.address}/{name}/commit/{commit}"
        self._answer({"commitUrl": url, "commitOid": commit, "success": True})

    def _answer(self, content: dict[str, Any]) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send_file(self, with_content: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        content = self.server.files.get(self.path)
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "1" * 40})
        etag = hashlib.sha256(content).hexdigest()
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": "1" * 40}, with_content)

    def _send(self, status: int, content: bytes, headers: dict[str, str], with_content: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_content and self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the screen."""


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub(("127.0.0.1", 0), Handler)
    hub.files, hub.requests = {}, []
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
