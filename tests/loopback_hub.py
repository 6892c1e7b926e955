"""A Hub on 127.0.0.1, as much of one as huggingface_hub's clients need to create, fill and read models and Spaces.

    with LoopbackHub(tokens={"hf_writer": "org"}) as hub:
        hub.add_folder("org/base", folder)
        subprocess.run(..., env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"})

Routes as in huggingface_hub's `hf_api.py`, `_commit_api.py`, `lfs.py` and `file_download.py`: create a repository,
preupload, LFS batch and upload, commit (ndjson), model info, tree, resolve with ranges, ETags and X-Repo-Commit. Every
commit keeps its files, so old revisions stay readable. A Space is the repository "spaces/org/name", as in its address;
it is stored, not run. Repositories are kept in memory, or where `add_folder` put them
on disk, as files that are read when asked for.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

DATE = "2026-01-01T00:00:00.000Z"
# Those that the tests' cards may have.
LICENCES = "mit|apache-2.0|bsd-3-clause|cc0-1.0|cc-by(-nc)?(-sa)?-[34].0|other"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
ID = r"(?P<repo>(spaces/)?[^/]+/[^/]+)"
API = rf"/api/(models/|(?=spaces/)){ID}"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass
class Blob:
    """A file's content, in memory or on disk; `lfs` as the Hub would store it."""

    source: bytes | Path
    lfs: bool

    def __post_init__(self):
        data = self.read()
        self.size = len(data)
        git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
        self.oid = git.hexdigest()
        self.sha256 = hashlib.sha256(data).hexdigest()

    def read(self):
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=lambda: {"0" * 40: {}})
    head: str = "0" * 40
    sdk: str | None = None  # of a Space
    variables: dict[str, str] = field(default_factory=dict)

    def commit(self, changes):
        """`changes`: path -> Blob, or None to delete."""
        files = {path: blob for path, blob in {**self.commits[self.head], **changes}.items() if blob is not None}
        listing = json.dumps([self.head, sorted((path, blob.oid) for path, blob in files.items())])
        self.head = hashlib.sha1(listing.encode(), usedforsecurity=False).hexdigest()
        self.commits[self.head] = files
        return self.head

    def revision(self, name):
        """Commit id of a revision's name, or None."""
        name = unquote(name)
        return self.head if name == "main" else name if name in self.commits else None


class LoopbackHub:
    """The server; starts on `with`. `tokens`: who may write and read private repositories: token -> user's name.

    `requests` lists (method, path) of what was asked. `refuse_uploads` makes that many LFS uploads fail, after
    `accept_uploads` that do not.
    """

    def __init__(self, tokens):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, Blob] = {}
        self.uploads: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.accept_uploads = self.refuse_uploads = 0
        self.lock = threading.Lock()
        self.port = 0  # any; entered again, after a break, it is the same one

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Bound", (Handler,), {"hub": self}))
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def add_folder(self, repo_id, folder):
        """A public repository with the files of a local folder, which stay where they are. Returns the commit."""
        repository = self.repositories.setdefault(repo_id, Repository())
        files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        return repository.commit(
            {path.relative_to(folder).as_posix(): Blob(path, path.suffix in LFS_SUFFIXES) for path in files}
        )

    def files(self, repo_id):
        """path -> bytes at the head of a repository."""
        repository = self.repositories[repo_id]
        return {path: blob.read() for path, blob in repository.commits[repository.head].items()}

    def write(self, repo_id, lines):
        """Apply a commit's ndjson `lines`; returns the commit id, or None when an LFS object was never uploaded."""
        changes = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return None
                changes[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
        return self.repositories[repo_id].commit(changes)

    def upload(self, oid, data):
        """Store an LFS object; False for one that is refused or broken."""
        with self.lock:
            if self.accept_uploads:
                self.accept_uploads -= 1
            elif self.refuse_uploads:
                self.refuse_uploads -= 1
                return False
            if hashlib.sha256(data).hexdigest() != oid:
                return False
            self.uploads.append(oid)
            self.objects[oid] = Blob(data, lfs=True)
            return True


def card_header(content):
    return yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else None


def card_errors(content):
    """What the Hub would not take in the header of a model card (its modelcard.md is the specification)."""
    header = card_header(content)
    if header is None:
        return []
    if not isinstance(header, dict):
        return ["the header must be a mapping"]
    errors = []
    for key in ("license", "license_name", "library_name", "pipeline_tag"):
        if key in header and not isinstance(header[key], str):
            errors.append(f'"{key}" must be a string')
    if "license" in header and not re.fullmatch(LICENCES, str(header["license"])):
        errors.append(f'"license" must be one of the Hub\'s, not {header["license"]}')
    if header.get("license") == "other" and not re.fullmatch("[a-z0-9-.]+", header.get("license_name", "")):
        errors.append('"license_name" must name the licence when "license" is other')
    for key in ("base_model", "datasets"):
        errors += [
            f'"{key}": {name} is no repository' for name in header.get(key) or [] if not REPOSITORY.fullmatch(name)
        ]
    errors += [f'"language": {code}' for code in header.get("language") or [] if not re.fullmatch("[a-z]{2,3}", code)]
    for model in header.get("model-index", []):
        for result in model["results"]:
            if not {"type"} <= set(result["task"]) or not {"type", "name"} <= set(result["dataset"]):
                errors.append('"model-index": a result needs task.type, dataset.type and dataset.name')
            errors += [
                f'"model-index": metric {metric}'
                for metric in result["metrics"]
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), (int, float, str))
            ]
    return errors


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub
    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", rf"{API}/variables", "set_variable"),
        ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
        ("GET", rf"{API}(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/datasets/(?P<repo>[^/]+/[^/]+)", "info"),
        ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("HEAD", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def log_message(self, *arguments):
        """Quiet."""

    def handle_request(self):
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size)
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                found = {key: value for key, value in match.groupdict().items() if value is not None}
                repository = self.hub.repositories.get(found.get("repo"))
                hidden = repository is not None and repository.private and not self.user()
                if "repo" in found and (repository is None or hidden):
                    # The Hub does not tell a private repository from none.
                    return self.fail(404 if self.user() else 401, "RepoNotFound", "Repository not found")
                return getattr(self, name)(**found)
        return self.fail(404, "", f"the loopback Hub has no {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def user(self):
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def answer(self, data, status=200, **headers):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content_Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status, code, message):
        self.answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    # ---- accounts and repositories

    def whoami(self):
        user = self.user()
        if user is None:
            return self.fail(401, "", "Invalid credentials")
        return self.answer({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self):
        errors = [{"message": message} for message in card_errors(json.loads(self.body)["content"])]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self):
        if self.user() is None:
            return self.fail(401, "", "Invalid username or password.")
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or self.user()}/{wanted['name']}"
        if wanted.get("type") == "space":
            if not wanted.get("sdk"):
                return self.fail(400, "", "a Space needs an sdk")
            repo_id = f"spaces/{repo_id}"
        if repo_id in self.hub.repositories:
            return self.answer({"error": "You already created this repo", "url": f"{self.hub.url}/{repo_id}"}, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repositories[repo_id] = Repository(private=bool(private), sdk=wanted.get("sdk"))
        return self.answer({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def set_variable(self, repo):
        if self.user() is None:
            return self.fail(403, "", "You do not have write access")
        wanted, variables = json.loads(self.body), self.hub.repositories[repo].variables
        variables[wanted["key"]] = wanted["value"]
        return self.answer({name: {"key": name, "value": value} for name, value in variables.items()})

    # ---- reading

    def files_at(self, repo, revision):
        """(commit, its files); answers by itself and gives None when there is no such revision."""
        repository = self.hub.repositories[repo]
        commit = repository.revision(revision)
        if commit is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, repository.commits[commit]

    def info(self, repo, revision="main"):
        if (found := self.files_at(repo, revision)) is None:
            return
        siblings = [{"rfilename": path} for path in found[1]]
        private = self.hub.repositories[repo].private
        answer = {"_id": repo, "id": repo, "modelId": repo, "sha": found[0], "private": private, "siblings": siblings}
        if "README.md" in found[1] and (header := card_header(found[1]["README.md"].read().decode())):
            answer["cardData"] = header
        self.answer({**answer, "tags": [], "downloads": 0, "likes": 0, "lastModified": DATE, "createdAt": DATE})

    def entry(self, path, blob):
        lfs = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}} if blob.lfs else {}
        return {"type": "file", "path": path, "size": blob.size, "oid": blob.oid, **lfs}

    def tree(self, repo, revision, folder=""):
        if (found := self.files_at(repo, revision)) is None:
            return
        prefix = unquote(folder).strip("/")
        prefix = f"{prefix}/" if prefix else ""
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        files = {path: blob for path, blob in found[1].items() if path.startswith(prefix)}
        if prefix and not files:
            return self.fail(404, "EntryNotFound", f"{prefix} does not exist")
        inside = {path: path.removeprefix(prefix) for path in files}
        self.answer([self.entry(path, files[path]) for path in files if recursive or "/" not in inside[path]])

    def paths_info(self, repo, revision):
        if (found := self.files_at(repo, revision)) is None:
            return
        wanted = parse_qs(self.body.decode()).get("paths") or json.loads(self.body or b"{}").get("paths", [])
        self.answer([self.entry(path, found[1][path]) for path in wanted if path in found[1]])

    def resolve(self, repo, revision, path):
        if (found := self.files_at(repo, revision)) is None:
            return
        commit, files = found
        blob = files.get(unquote(path))
        if blob is None:
            headers = {"X_Repo_Commit": commit, "X_Error_Code": "EntryNotFound"}
            return self.answer({"error": "Entry not found"}, 404, **headers)
        etag = f'"{blob.sha256 if blob.lfs else blob.oid}"'
        headers = {"X_Repo_Commit": commit, "ETag": etag, "Accept_Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X_Linked_ETag": etag, "X_Linked_Size": str(blob.size)}
        if self.command == "HEAD":
            return self.answer(b"", 200, **{**headers, "Content_Length": str(blob.size)})
        data = blob.read()
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            return self.answer(data, **headers)
        start, stop = int(part[1]), int(part[2] or blob.size - 1) + 1
        if start >= blob.size:
            return self.answer(b"", 416, **headers, Content_Range=f"bytes */{blob.size}")
        content_range = f"bytes {start}-{min(stop, blob.size) - 1}/{blob.size}"
        return self.answer(data[start:stop], 206, **headers, Content_Range=content_range)

    # ---- writing

    def preupload(self, repo, revision):
        if self.user() is None:
            return self.fail(403, "", "You do not have write access")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer({"files": files})

    def lfs_batch(self, repo):
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(answer)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        if self.hub.upload(oid, self.body):
            return self.answer(b"")
        return self.fail(403, "", "the upload was cut short")

    def commit(self, repo, revision):
        if self.user() is None:
            return self.fail(403, "", "You do not have write access")
        commit = self.hub.write(repo, [json.loads(line) for line in self.body.splitlines() if line])
        if commit is None:
            return self.fail(422, "", "an LFS object was never uploaded")
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        return self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
