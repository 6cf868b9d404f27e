"""A server on 127.0.0.1 with the routes of the Hugging Face hub that its client calls.

Repositories have one branch, `main`, and every commit keeps its files. Files are served with the
headers of the hub, in ranges, and can be interrupted; those whose names match `LARGE` are uploaded
by the LFS protocol, as on the hub.
"""

import base64
import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, READ_TOKEN = "hf_write", "hf_read"
LARGE = (".safetensors",)


class Repository:
    """The commits of a repository: sha -> files."""

    def __init__(self, files: dict[str, bytes], *, private: bool = False, gated: bool = False):
        self.private, self.gated = private, gated
        self.commits: dict[str, dict[str, bytes]] = {}
        self.commit(files)

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the newest commit."""
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes]) -> str:
        """Adds a commit with exactly these files."""
        content = [[name, hashlib.sha1(data).hexdigest()] for name, data in sorted(files.items())]
        text = json.dumps([len(self.commits), content])
        self.head = hashlib.sha1(text.encode()).hexdigest()
        self.commits[self.head] = files
        return self.head

    def resolve(self, revision: str) -> str | None:
        """The commit of a revision."""
        return self.head if revision == "main" else revision if revision in self.commits else None


class Hub:
    """The state of the server, which tests change and read."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.interruptions: dict[str, int] = {}  # name of a file -> responses that end halfway
        self.dead: set[str] = set()  # names of files whose responses end at once
        self.status: int | None = None  # of every response, if the hub is down
        self.requests: list[str] = []  # "METHOD path"
        self.url = ""

    def downloaded(self) -> set[str]:
        """The names of the files that were requested."""
        paths = [r.split(" ")[1] for r in self.requests if r.startswith("GET") and "/resolve/" in r]
        return {path.split("/resolve/")[1].split("/", 1)[1] for path in paths}


class Rejected(Exception):
    """A response with an error."""

    def __init__(self, status: int, code: str = "", message: str = "", **fields: str):
        super().__init__(status)
        self.status, self.code, self.message, self.fields = status, code, message, fields


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Runs a server on a free port; its `url` is the value of HF_ENDPOINT."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 10  # seconds that a connection may be idle

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self):
        parts = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(parts.path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self._read_body()
        try:
            if self.hub.status is not None:
                raise Rejected(self.hub.status)
            if "/resolve/" in path:
                self._send_file(path)
                return
            self._send(200, json.dumps(self._json(path)).encode())
        except Rejected as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            body = json.dumps({"error": error.message, **error.fields}).encode()
            self._send(error.status, body, {n: v for n, v in headers.items() if v})

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def _token(self) -> str | None:
        value = self.headers.get("Authorization")
        return value.removeprefix("Bearer ") if value else None

    def _repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None:  # the hub does not tell strangers which private ones exist
            raise Rejected(404 if self._token else 401, "RepoNotFound", "Repository not found")
        if repository.private and self._token not in (TOKEN, READ_TOKEN):
            raise Rejected(401, "RepoNotFound", "Repository not found")
        if repository.gated and self._token != TOKEN:
            raise Rejected(403, "GatedRepo", "Access to this model is restricted")
        return repository

    def _commit(self, name: str, revision: str) -> tuple[Repository, str]:
        repository = self._repository(name)
        sha = repository.resolve(revision)
        if sha is None:
            raise Rejected(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, sha

    def _send_file(self, path: str):
        name, rest = path.strip("/").split("/resolve/")
        revision, file = rest.split("/", 1)
        repository, sha = self._commit(name, revision)
        data = repository.commits[sha].get(file)
        if data is None:
            raise Rejected(404, "EntryNotFound", "Entry not found")
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(data)
        if file in self.hub.dead:
            end = start
        elif self.hub.interruptions.get(file, 0) > 0:
            self.hub.interruptions[file] -= 1
            end = start + (len(data) - start) // 2
        self.wfile.write(data[start:end])
        if end < len(data):
            self.close_connection = True

    def _json(self, path: str):
        parts = path.strip("/").split("/")
        match parts:
            case ["api", "whoami-v2"]:
                if self._token not in (TOKEN, READ_TOKEN):
                    raise Rejected(401, message="Invalid credentials in Authorization header")
                return {"name": "user"}
            case ["api", "repos", "create"]:
                return self._create(json.loads(self.body))
            case ["api", "validate-yaml"]:
                is_card = json.loads(self.body)["content"].startswith("---\n")
                return {"errors": [] if is_card else [{"message": "no header"}], "warnings": []}
            case ["api", "models", org, name]:
                return self._info(f"{org}/{name}", "main")
            case ["api", "models", org, name, "revision", *revision]:
                return self._info(f"{org}/{name}", "/".join(revision))
            case ["api", "models", org, name, "tree", *revision]:
                repository, sha = self._commit(f"{org}/{name}", "/".join(revision))
                return [
                    {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                    for file, data in repository.commits[sha].items()
                ]
            case ["api", "models", org, name, "preupload", _]:
                self._check_write(f"{org}/{name}")
                return {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(self.body)["files"]
                    ]
                }
            case ["api", "models", org, name, "commit", "main"]:
                return self._add_commit(f"{org}/{name}")
            case [org, name, "info", "lfs", "objects", "batch"]:
                self._check_write(f"{org}/{name}".removesuffix(".git"))
                objects = json.loads(self.body)["objects"]
                for item in objects:
                    if item["oid"] not in self.hub.uploads:
                        href = f"{self.hub.url}/upload/{item['oid']}"
                        item["actions"] = {"upload": {"href": href}}
                return {"objects": objects}
            case ["upload", oid]:
                assert hashlib.sha256(self.body).hexdigest() == oid
                self.hub.uploads[oid] = self.body
                return {}
        raise Rejected(404)

    def _info(self, name: str, revision: str):
        repository, sha = self._commit(name, revision)
        files = [{"rfilename": file} for file in repository.commits[sha]]
        return {"id": name, "sha": sha, "private": repository.private, "siblings": files}

    def _create(self, fields):
        name = f"{fields['organization']}/{fields['name']}"
        if self._token != TOKEN:
            raise Rejected(403, message="You don't have the rights to create a model")
        if name in self.hub.repositories:
            raise Rejected(409, message="You already created it", url=f"{self.hub.url}/{name}")
        private = fields.get("visibility") == "private" or fields.get("private") is True
        self.hub.repositories[name] = Repository({".gitattributes": b""}, private=private)
        return {"url": f"{self.hub.url}/{name}"}

    def _check_write(self, name: str):
        self._repository(name)
        if self._token != TOKEN:
            raise Rejected(403, message="You don't have write access")

    def _add_commit(self, name: str):
        self._check_write(name)
        repository = self.hub.repositories[name]
        files = dict(repository.files)
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.uploads[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = repository.commit(files)
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha}
