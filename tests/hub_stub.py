"""A hub in one process: the routes that huggingface_hub uses to download a snapshot and to upload a folder.

It keeps what it is sent, wants a token for private repositories, fails where a test asks it to, and repeats the
request's Authorization header in every error, so that a test can see whether a client lets a token through.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", "tokenizer.json")


class StubHub(ThreadingHTTPServer):
    """`with StubHub() as hub:` serves on a free port of the loopback until the block ends.

    files: repository -> path -> bytes. private: repositories that need `token`.
    requests: (method, path) of all requests. failures: part of a path -> HTTP status to answer.
    created: payloads of created repositories. commits: messages of commits.
    """

    def __init__(self, token: str = "hf_stubstubstubstubstub"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.failures: dict[str, int] = {}
        self.created: list[dict] = []
        self.commits: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, body: bytes | dict | list = b"", status: int = 200, **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str = "") -> None:
        echo = f"refused {self.headers.get('Authorization')}"
        self._answer(
            {"error": echo}, status, X_Error_Message=echo, **({"X_Error_Code": code} if code else {})
        )

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        for part, status in self.server.failures.items():
            if part in path:
                return self._fail(status)
        if path.startswith(("/api/repos/create", "/lfs/")):
            return self._create(body) if path.startswith("/api") else self._store(path, body)
        repo = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2]).removesuffix(".git")
        if repo not in self.server.files:
            return self._fail(404, "RepoNotFound")
        wants = repo in self.server.private or self.command in ("POST", "PUT")
        if wants and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._fail(401)
        self._repository(repo, path, body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _repository(self, repo: str, path: str, body: bytes) -> None:
        files = self.server.files[repo]
        if f"/{repo}/resolve/" in path:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            if name not in files:
                return self._fail(404, "EntryNotFound")
            etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
            return self._answer(files[name], ETag=etag, X_Repo_Commit=COMMIT)
        if "/tree/" in path:
            rows = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in files.items()]
            return self._answer(rows)
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(LFS_SUFFIXES) else "regular" for name in names]
            rows = [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in zip(names, modes)]
            return self._answer({"files": rows})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                href = f"{self.server.endpoint}/lfs/{item['oid']}"
                item["actions"] = {"upload": {"href": href, "header": {}}}
            return self._answer({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            return self._commit(repo, body)
        self._answer({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})

    def _create(self, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._fail(401)
        payload = json.loads(body)
        repo = f"{payload.get('organization') or 'me'}/{payload['name']}"
        self.server.created.append(payload)
        self.server.files.setdefault(repo, {})
        self._answer({"url": f"{self.server.endpoint}/{repo}", "name": repo})

    def _store(self, path: str, body: bytes) -> None:
        oid = path.rsplit("/", 1)[1]
        if hashlib.sha256(body).hexdigest() != oid:
            return self._fail(400)
        self.server.blobs[oid] = body
        self._answer()

    def _commit(self, repo: str, body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.server.commits.append(value["summary"])
            elif entry["key"] == "lfsFile":
                self.server.files[repo][value["path"]] = self.server.blobs[value["oid"]]
            elif entry["key"] == "file":
                self.server.files[repo][value["path"]] = base64.b64decode(value["content"])
        url = f"{self.server.endpoint}/{repo}/commit/{COMMIT}"
        self._answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
