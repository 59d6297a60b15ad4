"""Answers the real kubectl as an API server would, and notes what it asks.

It keeps what is created and runs nothing: it shows which requests our commands
make, and that kubectl takes these commands, not what a cluster does.
"""

from __future__ import annotations

import http.server
import json
import pathlib
import threading
import urllib.parse
from types import TracebackType
from typing import Any

_GROUPS = {
    "batch": ("v1", "jobs", "Job"),
    "jobset.x-k8s.io": ("v1alpha2", "jobsets", "JobSet"),
}
_CORE = (("services", "Service"), ("pods", "Pod"))
_VERBS = ("create", "delete", "get", "list", "patch", "watch")

_KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
contexts: [{{name: test, context: {{cluster: test, namespace: research}}}}]
current-context: test
"""


class KubernetesApi:
    """The server; a context manager.

    Attributes:
        objects: what there is, by resource and name.
        requests: method, path with its query, and body of each one but those
            by which kubectl learns what a server has.
        log: what each pod said.
    """

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.requests: list[tuple[str, str, Any]] = []
        self.log: dict[str, str] = {}
        # What the next creation of a kind is refused with.
        self.refused: dict[str, str] = {}
        outer = self

        class Handler(_Handler):
            api = outer

        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), Handler
        )

    def write_config(self, path: pathlib.Path) -> None:
        """Writes the KUBECONFIG that leads here."""
        path.write_text(_KUBECONFIG.format(port=self._server.server_port))

    def __enter__(self) -> KubernetesApi:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    api: KubernetesApi
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Prints nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PATCH(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size) or "null")
        url = urllib.parse.urlsplit(self.path)
        found = _discover(url.path)
        if found is not None:
            self._send(200, found)
            return
        if "/namespaces/" not in url.path:
            self._send(404, _status(404, "NotFound", "no such path"))
            return
        self.api.requests.append((self.command, self.path, body))
        resource, *rest = url.path.partition("/namespaces/")[2].split("/")[1:]
        query = dict(urllib.parse.parse_qsl(url.query))
        self._send(*self._do(resource, rest, query, body))

    def _do(
        self, resource: str, rest: list[str], query: dict[str, str], body: Any
    ) -> tuple[int, Any]:
        objects = self.api.objects
        if self.command == "POST":
            key = (resource, body["metadata"]["name"])
            if body["kind"] in self.api.refused and "dryRun" not in query:
                words = self.api.refused[body["kind"]]
                return 403, _status(403, "Forbidden", words)
            made = {**body, "metadata": {**body["metadata"], "uid": key[1]}}
            made["metadata"]["namespace"] = "research"
            if "dryRun" not in query:
                objects[key] = made
            return 201, made
        if not rest:
            name, _, value = query.get("labelSelector", "").partition("=")
            items = [
                each
                for (kind, _), each in objects.items()
                if kind == resource
                and each["metadata"].get("labels", {}).get(name) == value
            ]
            return 200, {"kind": "List", "apiVersion": "v1", "items": items}
        if rest[1:] == ["log"]:
            return 200, self.api.log[rest[0]]
        key = (resource, rest[0])
        if key not in objects:
            return 404, _status(404, "NotFound", f"{resource} {rest[0]}")
        if self.command == "PATCH":
            objects[key]["metadata"].update(body["metadata"])
        if self.command == "DELETE":
            return 200, objects.pop(key)
        return 200, objects[key]

    def _send(self, code: int, answer: Any) -> None:
        is_text = isinstance(answer, str)
        data = (answer if is_text else json.dumps(answer)).encode()
        self.send_response(code)
        kind = "text/plain" if is_text else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _status(code: int, reason: str, message: str) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }


def _discover(path: str) -> dict[str, Any] | None:
    """Tells what there is; None if the path is that of something else."""
    if path.startswith("/openapi/v3"):
        return _schema(path.removeprefix("/openapi/v3").strip("/"))
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/api/v1":
        return _resources("v1", _CORE)
    if path == "/apis":
        groups = []
        for name, (version, _, _) in _GROUPS.items():
            both = {"groupVersion": f"{name}/{version}", "version": version}
            groups.append(
                {"name": name, "versions": [both], "preferredVersion": both}
            )
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    for name, (version, plural, kind) in _GROUPS.items():
        if path == f"/apis/{name}/{version}":
            return _resources(f"{name}/{version}", [(plural, kind)])
    return None


def _schema(which: str) -> dict[str, Any]:
    """Tells that the server itself finds fields that it does not know."""
    versions = {"api/v1": ("", "v1", [kind for _, kind in _CORE])}
    for name, (version, _, kind) in _GROUPS.items():
        versions[f"apis/{name}/{version}"] = (name, version, [kind])
    if not which:
        return {
            "paths": {
                each: {"serverRelativeURL": f"/openapi/v3/{each}"}
                for each in versions
            }
        }
    group, version, kinds = versions[which]
    paths = {
        f"/{which}/namespaces/{{namespace}}/{kind}": {
            "patch": {
                "parameters": [{"name": "fieldValidation", "in": "query"}],
                "responses": {"200": {"description": "OK"}},
                "x-kubernetes-group-version-kind": {
                    "group": group,
                    "version": version,
                    "kind": kind,
                },
            }
        }
        for kind in kinds
    }
    return {
        "openapi": "3.0.0",
        "info": {"title": "x", "version": "1"},
        "paths": paths,
    }


def _resources(version: str, kinds: Any) -> dict[str, Any]:
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": version,
        "resources": [
            {
                "name": plural,
                "singularName": kind.lower(),
                "namespaced": True,
                "kind": kind,
                "verbs": list(_VERBS),
            }
            for plural, kind in kinds
        ],
    }
