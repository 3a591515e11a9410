"""A small Hugging Face Hub on 127.0.0.1, for the real clients in a child process; nothing goes out.

`hub.environment(home)` gives a child HF_ENDPOINT, its own HF_HOME, and the hub as its proxy, so that a request for
any other host ends here too (404). What is sent, as regular files or by LFS, becomes a commit of `hub.repos`.
Left out: Xet, spaces, pages of long listings.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

MEMBER_TOKEN = "hf_member"  # opens gated repos
OUTSIDER_TOKEN = "hf_outsider"  # a valid account without access to gated repos
LFS_SUFFIXES = {".arrow", ".bin", ".gguf", ".gz", ".h5", ".onnx", ".parquet", ".pt", ".safetensors", ".zip"}
SIGNATURE = "5ignature0fAnUpload"  # in the addresses that large files are sent to
DATE = "2024-01-01T00:00:00.000Z"
LFS_BATCH = re.compile(r"/(?P<id>.+)\.git/info/lfs/objects/batch")
API = re.compile(
    r"/api/(models|datasets)/(?P<id>.+?)(?:/(?P<verb>revision|tree|paths-info|refs|preupload|commit)(?:/(?P<rest>.*))?)?"
)
RESOLVE = re.compile(r"/(datasets/)?(?P<id>.+?)/resolve/(?P<revision>refs/\w+/[^/]+|[^/]+)/(?P<path>.+)")
CACHED = re.compile(r"/api/resolve-cache/(models|datasets)/(?P<id>.+)/(?P<revision>[0-9a-f]{40})/(?P<path>.+)")
CARD = """---
configs:
- config_name: plain_text
  default: true
  data_files:
  - {split: train, path: plain_text/train-*}
  - {split: test, path: plain_text/test-*}
- config_name: short
  data_files:
  - {split: train, path: short/train-*}
---
"""
"""The README of a dataset with two subsets, one of them with two splits."""


class Answer(Exception):
    """A reply, raised from wherever it is known; `cut` bytes of its body are sent, None for all."""

    def __init__(self, status, body=b"", cut=None, **headers):
        super().__init__(status)
        self.status, self.body, self.cut = status, body, cut
        self.headers = {name.replace("_", "-"): value for name, value in headers.items() if value}

    @classmethod
    def error(cls, status, message, code=None, **headers):
        """The Hub's way to refuse: what the clients read is in the headers."""
        headers |= {"X_Error_Code": code, "X_Error_Message": message}
        return cls(status, json.dumps({"error": message}).encode(), **headers)

    @classmethod
    def data(cls, value):
        """A JSON reply."""
        return cls(200, json.dumps(value).encode(), Content_Type="application/json; charset=utf-8")


class File:
    """One file of a commit: its bytes, and its name by git or, where the Hub would keep it there, by LFS."""

    def __init__(self, path, content):
        self.path, self.content, self.size = path, content, len(content)
        self.oid = hashlib.sha1(b"blob %d\0" % self.size + content).hexdigest()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.lfs = Path(path).suffix in LFS_SUFFIXES
        self.etag = f'"{self.sha256 if self.lfs else self.oid}"'
        self.sizes = {"size": self.size}
        if self.lfs:
            self.sizes["lfs"] = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": 130}


class Repo:
    """A model or dataset: its commits by sha, each a {path: File}, and the names that point at them."""

    def __init__(self, kind, name):
        self.kind, self.id, self.gated, self.commits, self.names = kind, name, False, {}, {}
        self.private = False

    def commit(self, folder, revision):
        """Read a folder as a commit and point a name at it."""
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return self.keep({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}, revision)

    def keep(self, contents, revision):
        """Make a commit of {path: bytes} and point a name at it; the sha says what is in it."""
        files = {name: File(name, content) for name, content in contents.items()}
        listing = [self.kind, self.id, *(f"{name} {file.oid}" for name, file in files.items())]
        sha = hashlib.sha1("\n".join(listing).encode()).hexdigest()
        self.commits[sha], self.names[revision] = files, sha
        return sha

    def at(self, revision):
        """Revision -> (sha, files), or the Hub's refusal."""
        sha = self.names.get(revision, revision)
        if sha not in self.commits:
            raise Answer.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.commits[sha]

    def info(self, revision, blobs, expand):
        """The repo as /api/models/... and /api/datasets/... describe it."""
        sha, files = self.at(revision)
        card = files["README.md"].content.decode() if "README.md" in files else ""
        header = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
        details = {name: {"blobId": file.oid} | file.sizes if blobs else {} for name, file in files.items()}
        about = {
            "_id": self.id, "id": self.id, "author": self.id.rpartition("/")[0] or None, "sha": sha,
            "private": self.private,
            "gated": "auto" if self.gated else False, "disabled": False, "lastModified": DATE, "createdAt": DATE,
            "downloads": 0, "likes": 0, "tags": [], "cardData": yaml.safe_load(header[1]) if header else None,
            "siblings": [{"rfilename": name} | detail for name, detail in details.items()],
        }  # fmt: skip
        return {name: value for name, value in about.items() if not expand or name in {"_id", "id", *expand}}

    def tree(self, revision, folder="", recursive=True, expand=False):
        """A folder's files and folders, all the way down if asked."""
        sha, files = self.at(revision)
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for file in (file for name, file in files.items() if name.startswith(prefix)):
            parts = file.path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                path = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(path.encode()).hexdigest()
                entries[path] = {"type": "directory", "path": path, "oid": oid, "size": 0}
            if recursive or len(parts) == 1:
                entries[file.path] = {"type": "file", "path": file.path, "oid": file.oid, **file.sizes}
        if folder and not entries:
            raise Answer.error(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        more = {"lastCommit": {"id": sha, "title": "Add files", "date": DATE}} if expand else {}
        return [entry | more for entry in entries.values()]


class Handler(BaseHTTPRequestHandler):
    """Answers for the Hub and, on a port of its own, for the storage that large files are fetched from."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        """Say nothing: the hub keeps its own log."""

    def handle_any(self):
        """Log a request, find its answer, send it."""
        self.hub, self.url = self.server.hub, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.body, self.posted = body, "" if self.command == "PUT" else body.decode()
        outside = self.command == "CONNECT" or bool(self.url.scheme)
        log = self.hub.outside if outside else self.hub.requests
        log.append((self.command, self.path if outside else unquote(self.url.path)))
        try:
            if not outside:
                self.storage() if self.server is self.hub.storage_server else self.route()
            raise Answer.error(404, "Sorry, nothing here")
        except Answer as answer:
            self.send_response(answer.status)
            for name, value in ({"Content-Length": len(answer.body)} | answer.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else answer.body[: answer.cut])
            self.close_connection |= answer.cut is not None or self.command == "CONNECT"

    do_GET = do_HEAD = do_POST = do_PUT = do_CONNECT = handle_any

    def route(self):
        """Raise the Hub's answer for a path it knows."""
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.token not in {"", MEMBER_TOKEN, OUTSIDER_TOKEN}:
            raise Answer.error(401, "Invalid credentials in Authorization header")
        if self.url.path == "/api/whoami-v2":
            if not self.token:
                raise Answer.error(401, "Invalid username or password.")
            access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "read"}}
            raise Answer.data({"type": "user", "name": self.token.removeprefix("hf_"), "orgs": [], "auth": access})
        if self.url.path in ("/api/validate-yaml", "/api/repos/create") or LFS_BATCH.fullmatch(self.url.path):
            self.take()
        if match := CACHED.fullmatch(self.url.path):
            self.resolve(match, cached=True)
        if match := API.fullmatch(self.url.path):
            self.api(match)
        if match := RESOLVE.fullmatch(self.url.path):
            self.resolve(match)

    def repo(self, match):
        """The repo a path names, after a redirect if the name is an alias."""
        kind, name = (match[1] or "models").rstrip("/"), unquote(match["id"])
        if canonical := self.hub.aliases.get((kind, name)):
            raise Answer(307, Location=self.path[: match.start("id")] + canonical + self.path[match.end("id") :])
        if (kind, name) in self.hub.repos:
            return self.hub.repos[kind, name]
        if self.token:
            raise Answer.error(404, "Repository not found", "RepoNotFound")
        # the clients take a bare 401 for this only over https, so say it
        raise Answer.error(401, "Invalid username or password.", "RepoNotFound")

    def api(self, match):
        """Raise what the API says of a repo: metadata, which a gated repo shows to everybody."""
        repo, query = self.repo(match), parse_qs(self.url.query)
        revision, _, folder = (match["rest"] or "main").partition("/")
        revision, folder = unquote(revision), unquote(folder).strip("/")
        if match["verb"] in {None, "revision"}:
            raise Answer.data(repo.info(revision, "blobs" in query, query.get("expand")))
        if match["verb"] == "tree":
            recursive, expand = (query.get(name) == ["true"] for name in ("recursive", "expand"))
            raise Answer.data(repo.tree(revision, folder, recursive, expand))
        if match["verb"] == "paths-info":
            wanted = {path.strip("/") for path in parse_qs(self.posted).get("paths", [])}
            raise Answer.data([entry for entry in repo.tree(revision) if entry["path"] in wanted])
        heads = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.names.items()]
        if match["verb"] in {"preupload", "commit"}:
            self.commit(repo, match["verb"])
        raise Answer.data({"branches": heads, "converts": [], "tags": []})

    def take(self):
        """Raise what is said before files arrive: the card is fine, the repo is made, large files go to storage."""
        if self.url.path == "/api/validate-yaml":
            raise Answer.data({"warnings": [], "errors": []})
        if self.token != MEMBER_TOKEN:
            raise Answer.error(403, "Forbidden: pass a token that may write")
        posted = json.loads(self.posted)
        if self.url.path == "/api/repos/create":
            name = f"{posted['organization']}/{posted['name']}"
            repo = self.hub.repos[posted["type"] + "s", name] = Repo(posted["type"] + "s", name)
            repo.private = posted.get("private", posted.get("visibility") == "private")
            repo.keep({".gitattributes": b""}, "main")
            raise Answer.data({"url": f"{self.hub.url}/{name}"})
        place = f"{self.hub.storage_url}/uploads/{{}}?X-Amz-Signature={SIGNATURE}"
        objects = [
            {"oid": file["oid"], "size": file["size"], "actions": {"upload": {"href": place.format(file["oid"])}}}
            for file in posted["objects"]
        ]
        raise Answer.data({"transfer": "basic", "objects": objects})

    def commit(self, repo, verb):
        """Raise how files are to be sent, or make a commit of those that were, on top of those there."""
        if self.token != MEMBER_TOKEN:
            raise Answer.error(403, "Forbidden: pass a token that may write")
        if verb == "preupload":
            files = [file["path"] for file in json.loads(self.posted)["files"]]
            modes = {path: "lfs" if Path(path).suffix in LFS_SUFFIXES else "regular" for path in files}
            raise Answer.data(
                {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}
            )
        contents = {name: file.content for name, file in repo.at("main")[1].items()}
        for line in map(json.loads, self.posted.splitlines()):
            if line["key"] == "file":
                contents[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "lfsFile":
                contents[line["value"]["path"]] = self.hub.uploads[line["value"]["oid"]]
        sha = repo.keep(contents, "main")
        raise Answer.data({"commitUrl": f"{self.hub.url}/{repo.id}/commit/{sha}", "commitOid": sha})

    def resolve(self, match, cached=False):
        """Raise a file's answer: a redirect to storage (LFS), or to the Hub's own cache, which holds the rest."""
        repo, path = self.repo(match), unquote(match["path"])
        if repo.gated and self.token != MEMBER_TOKEN:
            raise Answer.error(403 if self.token else 401, f"Access to {repo.id} is restricted", "GatedRepo")
        sha, files = repo.at(unquote(match["revision"]))
        if path not in files:
            raise Answer.error(404, "Entry not found", "EntryNotFound", X_Repo_Commit=sha)
        file = files[path]
        if cached:
            self.send_file(file, X_Repo_Commit=sha)
        if path in self.hub.failures:
            raise Answer.error(self.hub.failures[path], "a failure made for a test")
        location = f"/api/resolve-cache/{repo.kind}/{repo.id}/{sha}/{quote(path)}?etag={quote(file.etag)}"
        if file.lfs:
            location = f"{self.hub.storage_url}/{file.sha256}/{quote(path)}"
        linked = {"X_Linked_Size": file.size, "X_Linked_ETag": file.etag}
        raise Answer(302 if file.lfs else 307, Location=location, X_Repo_Commit=sha, Accept_Ranges="bytes", **linked)

    def storage(self):
        """Raise a large file's bytes; signed storage refuses a request that brings the Hub's token along."""
        if "Authorization" in self.headers:
            raise Answer.error(400, "two ways to authenticate")
        sha256, _, path = unquote(self.url.path)[1:].partition("/")
        if self.command == "PUT" and sha256 == "uploads" and hashlib.sha256(self.body).hexdigest() == path:
            if "uploads" in self.hub.failures:
                raise Answer.error(self.hub.failures["uploads"], "a failure made for a test")
            self.hub.uploads[path] = self.body
            raise Answer(200)
        commits = [files for repo in self.hub.repos.values() for files in repo.commits.values()]
        for file in (files[path] for files in commits if path in files and files[path].sha256 == sha256):
            self.send_file(file)

    def send_file(self, file, **headers):
        """Raise a file's bytes, or the asked range of them; of a broken file, no more than its first half."""
        status, start, stop = 200, 0, file.size
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            self.hub.ranges.append((file.path, match[0]))
            start = int(match[1]) if match[1] else max(file.size - int(match[2]), 0)
            stop = min(int(match[2]) + 1, file.size) if match[1] and match[2] else file.size
            if start >= stop:
                raise Answer.error(416, "outside the file", Content_Range=f"bytes */{file.size}")
            status, headers["Content_Range"] = 206, f"bytes {start}-{stop - 1}/{file.size}"
        cut = max(file.size // 2 - start, 0) if file.path in self.hub.broken else None
        headers |= {"ETag": file.etag, "Accept_Ranges": "bytes", "Content_Type": "application/octet-stream"}
        raise Answer(status, file.content[start:stop], cut, **headers)


class LoopbackHub:
    """The Hub: `with LoopbackHub() as hub: hub.add_model("org/name", folder)`; it logs (method, path) in `requests`."""

    def __init__(self):
        self.repos, self.aliases, self.requests, self.ranges, self.outside = {}, {}, [], [], []
        self.broken, self.failures, self.uploads = set(), {}, {}
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        self.storage_server = self.servers[1]
        for server in self.servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add_model(self, name, folder, *, aliases=(), gated=False, revision="main", kind="models"):
        """Serve a folder as a model and return its commit; the same name again is one more commit."""
        repo = self.repos.setdefault((kind, name), Repo(kind, name))
        repo.gated = gated
        self.aliases |= {(kind, alias): name for alias in aliases}
        return repo.commit(folder, revision)

    def add_dataset(self, name, folder, **options):
        """Serve a folder as a dataset; see `add_model`."""
        return self.add_model(name, folder, kind="datasets", **options)

    def break_downloads(self, path):
        """From now on, a GET of this file hangs up at half of it, resumed or not."""
        self.broken.add(path)

    def fail_with(self, path, status):
        """From now on, asking for this file, or sending any if it is "uploads", ends in an HTTP status such as 503."""
        self.failures[path] = status

    def repair(self):
        """Undo `break_downloads` and `fail_with`."""
        self.broken.clear()
        self.failures.clear()

    def environment(self, home, *, token=None, offline=False):
        """The variables of a child process whose clients know this hub only."""
        theirs = re.compile(r"HF_|HUGGING|TRANSFORMERS_|XDG_CACHE_HOME|(http|https|all|no)_proxy$", re.IGNORECASE)
        ours = {name: value for name, value in os.environ.items() if not theirs.match(name)}
        ours |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "http_proxy": self.url, "https_proxy": self.url}
        ours |= {"no_proxy": "127.0.0.1"}
        return ours | ({"HF_TOKEN": token} if token else {}) | ({"HF_HUB_OFFLINE": "1"} if offline else {})
