"""A model hub on this machine's loopback: the few requests that huggingface_hub makes to list and fetch."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LoopbackHub:
    """repositories: hub id -> the folder with its files. `fetched` has those that were sent, as
    owner/name/file."""

    def __init__(self, repositories: dict[str, Path]):
        hub = self
        self.repositories, self.fetched = repositories, set()

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *arguments) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        for name, folder in self.repositories.items():
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            if path.startswith(f"api/models/{name}/tree/"):
                entries = [{"type": "file", "path": file.relative_to(folder).as_posix(), "size": file.stat().st_size,
                            "oid": self.tag(file)} for file in files]
                return self.send(request, json.dumps(entries).encode(), body)
            if path.startswith(f"api/models/{name}"):
                siblings = [{"rfilename": file.relative_to(folder).as_posix()} for file in files]
                about = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
                return self.send(request, json.dumps(about).encode(), body)
            if path.startswith(f"{name}/resolve/"):
                file = folder / path.removeprefix(f"{name}/resolve/").partition("/")[2]
                if file.is_file():
                    if body:
                        self.fetched.add(f"{name}/{file.relative_to(folder).as_posix()}")
                    return self.send(request, file.read_bytes(), body, {"ETag": f'"{self.tag(file)}"'})
        return self.send(request, b"", body, {"X-Error-Code": "RepoNotFound"}, 404)

    def tag(self, file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def send(self, request, content: bytes, body: bool, headers: dict | None = None, status: int = 200) -> None:
        request.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(content)
