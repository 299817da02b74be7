"""The part of the Hub's API that an upload speaks: repositories, LFS objects by their hash, commits. In a thread."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    def __init__(self):
        self.repos = {}
        self.objects = {}
        self.received = []
        self.tokens = set()
        self.breaks = set()
        self.refuses = None
        self.lock = threading.Lock()

    def files(self, repo):
        return self.repos[repo]["files"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def _answer(self, value, code=200, headers=()):
        body = json.dumps(value).encode()
        self.send_response(code)
        for name, content in (("Content-Length", str(len(body))), *headers):
            self.send_header(name, content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _url(self, path):
        return f"http://{self.headers['Host']}/{path}"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[2:3] == ["resolve"]:
            content = self.hub.repos["/".join(parts[:2])]["files"].get("/".join(parts[4:]))
            if content is None:
                return self._answer({}, 404, [("X-Error-Code", "EntryNotFound")])
            self.send_response(200)
            for name, value in (("ETag", '"x"'), ("X-Repo-Commit", "0" * 40), ("Content-Length", str(len(content)))):
                self.send_header(name, value)
            self.end_headers()
            return self.wfile.write(content if self.command == "GET" else b"")
        name = "/".join(parts[2:4])
        if name not in self.hub.repos:
            return self._answer({"error": "no such repository"}, 404, [("X-Error-Code", "RepoNotFound")])
        if parts[4:] == ["auth-check", "write"] and self.hub.refuses:
            return self._answer({"error": self.hub.refuses}, 403)
        private = bool(self.hub.repos[name]["private"])
        return self._answer({"id": name, "sha": "0" * 40, "siblings": [], "private": private})

    def do_POST(self):
        body = self._body()
        self.hub.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0].strip("/")
        parts = path.split("/")
        if self.hub.refuses:
            return self._answer({"error": self.hub.refuses}, 403)
        if path == "api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            known = name in self.hub.repos
            self.hub.repos.setdefault(
                name, {"files": {}, "private": asked.get("private") or asked.get("visibility") == "private"}
            )
            return self._answer({"url": self._url(name)}, 409 if known else 200)
        if "preupload" in parts:
            files = [
                {"path": file["path"], "uploadMode": self._mode(file["path"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            return self._answer({"transfer": "basic", "objects": list(map(self._object, json.loads(body)["objects"]))})
        if path == "verify":
            return self._answer({})
        if path == "api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "commit" in parts:
            repo = "/".join(parts[2:4])
            self._commit(repo, body)
            return self._answer({"commitUrl": self._url(f"{repo}/commit/1"), "commitOid": "1" * 40, "success": True})
        return self._answer({"error": f"no such call: {path}"}, 404)

    def _mode(self, path):
        return "lfs" if path.endswith((".safetensors", ".gguf")) else "regular"

    def _object(self, asked):
        if asked["oid"] in self.hub.objects:
            return asked
        upload = {"href": self._url(f"objects/{asked['oid']}"), "header": {}}
        return asked | {"actions": {"upload": upload, "verify": {"href": self._url("verify"), "header": {}}}}

    def _commit(self, repo, body):
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.files(repo)[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.files(repo)[value["path"]] = self.hub.objects[value["oid"]]

    def do_PUT(self):
        oid, size = self.path.rpartition("/")[2], int(self.headers["Content-Length"])
        with self.hub.lock:
            broken = oid in self.hub.breaks
            if broken and self.hub.refuses is None:
                self.hub.refuses = "the line is down"
            elif broken:
                # All of it is read, or the rest would be taken for the next request of this connection.
                self.rfile.read(size)
                return self._answer({"error": "the line is down"}, 403)
        content = self.rfile.read(size // 2 if broken else size)
        self.hub.received.append((oid, len(content)))
        if broken:
            self.close_connection = True
            return self.connection.close()
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        return self._answer({}, headers=[("ETag", '"x"')])


@contextmanager
def serving():
    """(a Hub, its address)"""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
