"""An emulator of Google Cloud Storage, for the gs:// inside TensorFlow.

    python -m tests.object_store --directory=/tmp/objects --rate=0.1

prints the variables to export and serves until it is interrupted. In a test:

    with object_store.ObjectStore() as store:
        runs.run("dtrain.main", "--run_dir=gs://bucket/run",
                 **store.environment())

TensorFlow knows the addresses of Google alone, so it is led here by a proxy:
the store answers CONNECT, and speaks TLS with a certificate of its own that
CURL_CA_BUNDLE names. Only the requests that TensorFlow makes are answered, and
those strictly: a fake that forgives hides bugs. What it checks against is
https://cloud.google.com/storage/docs/json_api/v1.

Faults come by a rule (`inject`) or at random (`rate`), see `FAULTS`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import http.server
import io
import json
import os
import pathlib
import random
import re
import secrets
import select
import shlex
import shutil
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from tests import requirement

_API, _MEDIA = "www.googleapis.com", "storage.googleapis.com"
# What a resumable upload keeps, and is sent in, is a multiple of this.
_UPLOAD_BLOCK = 256 * 1024
_PIECE = 1024 * 1024
_MAX_RESULTS = 1000

# How a request fails:
#   429, 503   the answer is this status, and nothing is done.
#   reset      the connection is reset, and nothing is done.
#   lost       it is done, and the connection is reset before the answer.
#   slow       it is done, after a while.
#   half       the connection is reset in the middle of an upload; no object.
#   stale      a listing shows what there was a few changes ago.
# Any other status may be injected by a rule, such as 401.
FAULTS = ("429", "503", "reset", "lost", "slow", "half", "stale")


@dataclasses.dataclass
class Fault:
    """A rule: which requests fail, and how.

    Attributes:
        kind: see `FAULTS`.
        pattern: a regular expression, searched in "METHOD /path?query".
        count: requests that fail.
        skip: requests that match and pass before them.
        secs: how slow `slow` is.
        lag: how many changes ago `stale` was.
    """

    kind: str
    pattern: str = ""
    count: int = 1
    skip: int = 0
    secs: float = 0.3
    lag: int = 5

    def __post_init__(self) -> None:
        if self.kind not in FAULTS and not self.kind.isdigit():
            raise ValueError(
                f"kind ({self.kind}) must be a status or one of "
                f"{', '.join(FAULTS)}"
            )

    def hits(self, line: str) -> bool:
        """Says whether a request fails, and counts it."""
        if self.count <= 0 or not re.search(self.pattern, line):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.count -= 1
        return True


class Request(NamedTuple):
    """What a client asks.

    Attributes:
        method: such as GET.
        host: that it takes this for.
        target: path and query, as sent.
        headers: by name, in lower case.
        body: all of it.
    """

    method: str
    host: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def path(self) -> str:
        """The path, quoted."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        """The query's fields, unquoted."""
        text = self.target.partition("?")[2]
        return dict(urllib.parse.parse_qsl(text, keep_blank_values=True))


class Response(NamedTuple):
    """What it is answered."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}


class Answered(NamedTuple):
    """A line of the log.

    Attributes:
        line: "METHOD /path?query".
        status: of the answer; 0 where there was none.
        fault: that it met, or "".
    """

    line: str
    status: int
    fault: str


class Refused(Exception):  # noqa: N818 - an answer, no error of the store
    """The answer to a request that the store does not carry out."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}")
        self.response = Response(
            status, _json({"error": {"code": status, "message": reason}})
        )


class Object(NamedTuple):
    """An object, which never changes: a write makes another one."""

    data: bytes
    generation: int
    updated: str


@dataclasses.dataclass
class _Upload:
    """A resumable upload; it has an object when it is complete."""

    bucket: str
    name: str
    num_bytes: int | None
    received: bytearray = dataclasses.field(default_factory=bytearray)
    resource: bytes = b""


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _check_name(name: str) -> None:
    if not 1 <= len(name.encode()) <= 1024 or re.search("[\r\n]", name):
        raise Refused(400, f"Invalid object name: {name[:40]!r}")


class Objects:
    """Buckets of objects, in memory and, if asked to, in a directory."""

    def __init__(self, directory: pathlib.Path | None) -> None:
        self._directory = directory
        self._generation = time.time_ns() // 1000
        self._buckets: dict[str, dict[str, Object]] = {}
        # Of each bucket, what it held before each of the last changes.
        self._past: dict[str, collections.deque[dict[str, Object]]] = {}
        for bucket in directory.iterdir() if directory else ():
            self.make_bucket(bucket.name)
            for path in bucket.iterdir():
                if not path.name.startswith("."):
                    self._hold(
                        bucket.name,
                        urllib.parse.unquote(path.name),
                        path.read_bytes(),
                    )

    def make_bucket(self, bucket: str) -> None:
        self._buckets.setdefault(bucket, {})
        self._past.setdefault(bucket, collections.deque(maxlen=64))
        if self._directory:
            (self._directory / bucket).mkdir(exist_ok=True)

    def bucket(self, name: str, lag: int = 0) -> dict[str, Object]:
        """Returns the objects as they were `lag` changes ago."""
        if name not in self._buckets:
            raise Refused(404, "The specified bucket does not exist.")
        past = self._past[name]
        lag = min(lag, len(past))
        return past[-lag] if lag else self._buckets[name]

    def find(self, bucket: str, name: str) -> Object:
        found = self.bucket(bucket).get(name)
        if found is None:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return found

    def put(self, bucket: str, name: str, data: bytes) -> dict[str, str]:
        """Stores an object; returns its resource."""
        self._past[bucket].append(dict(self.bucket(bucket)))
        path = self._path(bucket, name)
        if path:
            temporary = path.with_name(f".{secrets.token_hex(4)}")
            temporary.write_bytes(data)
            temporary.rename(path)
        return self._hold(bucket, name, data)

    def remove(self, bucket: str, name: str) -> None:
        self.find(bucket, name)
        self._past[bucket].append(dict(self.bucket(bucket)))
        del self._buckets[bucket][name]
        path = self._path(bucket, name)
        if path:
            path.unlink()

    def _hold(self, bucket: str, name: str, data: bytes) -> dict[str, str]:
        self._generation += 1
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        self._buckets[bucket][name] = Object(data, self._generation, now)
        return resource(bucket, name, self._buckets[bucket][name])

    def _path(self, bucket: str, name: str) -> pathlib.Path | None:
        if not self._directory:
            return None
        return self._directory / bucket / urllib.parse.quote(name, safe="")


def resource(bucket: str, name: str, found: Object) -> dict[str, str]:
    """Returns what the JSON API tells of an object."""
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "size": str(len(found.data)),
        "generation": str(found.generation),
        "metageneration": "1",
        "updated": found.updated,
        "timeCreated": found.updated,
    }


class Service:
    """The storage service: requests in, responses out, no network."""

    def __init__(self, objects: Objects, token: str) -> None:
        self.objects = objects
        self._token = token
        self._uploads: dict[str, _Upload] = {}

    def answer(self, request: Request, lag: int = 0) -> Response:
        """Carries a request out, or says why not.

        Args:
            request: the request.
            lag: how many changes a listing is behind.
        """
        try:
            if request.headers.get("authorization") != f"Bearer {self._token}":
                raise Refused(401, "Anonymous caller or invalid credentials.")
            route, names = self._route(request)
            if route is Service._list:
                return self._list(request, *names, lag=lag)
            return route(self, request, *names)
        except Refused as refused:
            return refused.response

    def _route(self, request: Request) -> tuple[Callable[..., Response], Any]:
        methods = []
        for method, host, pattern, route in _ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and host == request.host:
                methods.append(method)
                if method == request.method:
                    names = map(urllib.parse.unquote, match.groups())
                    return route, tuple(names)
        if methods:
            raise Refused(405, f"Use {' or '.join(methods)}")
        raise Refused(404, f"{request.host} has no {request.path}")

    def _describe(self, request: Request, bucket: str) -> Response:
        del request
        self.objects.bucket(bucket)
        return Response(200, _json({"name": bucket, "location": "US"}))

    def _layout(self, request: Request, bucket: str) -> Response:
        del request
        self.objects.bucket(bucket)
        flat = {"bucket": bucket, "hierarchicalNamespace": {"enabled": False}}
        return Response(200, _json(flat))

    def _list(self, request: Request, bucket: str, *, lag: int) -> Response:
        query = request.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        size = int(query.get("maxResults", _MAX_RESULTS))
        if not 1 <= size <= _MAX_RESULTS:
            raise Refused(400, f"Invalid maxResults: {size}")
        objects = self.objects.bucket(bucket, lag)
        entries = set()
        for name in objects:
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                end = len(prefix) + rest.index(delimiter) + len(delimiter)
                entries.add((name[:end], True))
            else:
                entries.add((name, False))
        after = query.get("pageToken", "")
        left = sorted(entry for entry in entries if entry[0] > after)
        page = left[:size]
        answer: dict[str, Any] = {
            "items": [
                resource(bucket, name, objects[name])
                for name, is_prefix in page
                if not is_prefix
            ],
            "prefixes": [name for name, is_prefix in page if is_prefix],
        }
        if len(left) > size:
            answer["nextPageToken"] = page[-1][0]
        # Google's leaves out what is empty.
        answer = {key: value for key, value in answer.items() if value}
        return Response(200, _json(answer))

    def _stat(self, request: Request, bucket: str, name: str) -> Response:
        del request
        found = self.objects.find(bucket, name)
        return Response(200, _json(resource(bucket, name, found)))

    def _remove(self, request: Request, bucket: str, name: str) -> Response:
        del request
        self.objects.remove(bucket, name)
        return Response(204)

    def _rewrite(
        self, request: Request, bucket: str, name: str, to: str, copy: str
    ) -> Response:
        del request
        _check_name(copy)
        self.objects.bucket(to)
        made = self.objects.put(to, copy, self.objects.find(bucket, name).data)
        size = {"objectSize": made["size"], "totalBytesRewritten": made["size"]}
        return Response(200, _json({"done": True, "resource": made, **size}))

    def _read(self, request: Request, bucket: str, name: str) -> Response:
        found = self.objects.find(bucket, name)
        tag = {"x-goog-generation": str(found.generation)}
        asked = request.headers.get("range")
        if asked is None:
            return Response(200, found.data, tag)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        if not match:
            raise Refused(400, f"Invalid range: {asked}")
        size, first = len(found.data), int(match[1])
        last = min(int(match[2] or size), size - 1)
        if first > last:
            raise Refused(416, f"{asked} of {size} bytes")
        tag["Content-Range"] = f"bytes {first}-{last}/{size}"
        return Response(206, found.data[first : last + 1], tag)

    def _begin_upload(self, request: Request, bucket: str) -> Response:
        query, objects = request.query, self.objects.bucket(bucket)
        name = query.get("name", "")
        _check_name(name)
        wanted = query.get("ifGenerationMatch")
        if wanted is not None:
            found = objects.get(name)
            if int(wanted) != (found.generation if found else 0):
                raise Refused(412, "ifGenerationMatch does not hold")
        kind = query.get("uploadType")
        if kind == "media":
            made = self.objects.put(bucket, name, request.body)
            return Response(200, _json(made))
        if kind != "resumable":
            raise Refused(400, f"Invalid uploadType: {kind}")
        size = request.headers.get("x-upload-content-length")
        identity = secrets.token_urlsafe(9)
        self._uploads[identity] = _Upload(
            bucket, name, None if size is None else int(size)
        )
        location = f"https://{_API}{request.path}?upload_id={identity}"
        return Response(200, headers={"Location": location})

    def _upload(self, request: Request) -> _Upload:
        upload = self._uploads.get(request.query.get("upload_id", ""))
        if upload is None:
            raise Refused(404, "Upload not found")
        return upload

    def _continue_upload(self, request: Request, bucket: str) -> Response:
        upload = self._upload(request)
        if upload.bucket != bucket:
            raise Refused(400, f"The upload is to {upload.bucket}")
        if upload.resource:
            return Response(200, upload.resource)
        total = self._receive(upload, request)
        if total != len(upload.received):
            last = len(upload.received) - 1
            kept = {"Range": f"bytes=0-{last}"} if upload.received else {}
            return Response(308, headers=kept)
        made = self.objects.put(bucket, upload.name, bytes(upload.received))
        upload.resource = _json(made)
        upload.received.clear()
        return Response(200, upload.resource)

    def _receive(self, upload: _Upload, request: Request) -> int | None:
        """Takes a part of an upload; returns its whole size, if known."""
        text = request.headers.get("content-range")
        if text is None:
            # All of it at once, which is how an empty file comes.
            upload.received[:] = request.body
            return len(request.body)
        match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", text)
        if not match:
            raise Refused(400, f"Invalid Content-Range: {text}")
        total = upload.num_bytes
        if match[3] != "*":
            total = int(match[3])
        if upload.num_bytes not in (None, total):
            raise Refused(400, f"{text}, but {upload.num_bytes} bytes are due")
        if match[1] is None:
            if request.body:
                raise Refused(400, f"{text} has {len(request.body)} bytes")
            return total
        first, end, had = int(match[1]), int(match[2]) + 1, len(upload.received)
        if end - first != len(request.body) or (total or end) < end:
            raise Refused(400, f"{text} has {len(request.body)} bytes")
        if first > had:
            raise Refused(400, f"{text} after {had} bytes leaves a hole")
        if end != total and (end - first) % _UPLOAD_BLOCK:
            raise Refused(400, f"{text} is no multiple of {_UPLOAD_BLOCK}")
        upload.received += request.body[had - first :]
        return total

    def receive_half(self, request: Request) -> None:
        """Keeps, of a broken upload, the whole blocks that arrived."""
        with contextlib.suppress(Refused):
            upload = self._upload(request)
            size = len(request.body) // _UPLOAD_BLOCK * _UPLOAD_BLOCK
            text = request.headers.get("content-range", "")
            match = re.match(r"bytes (\d+)-", text)
            if match and int(match[1]) == len(upload.received):
                upload.received += request.body[:size]


_BUCKET, _OBJECT = "/storage/v1/b/([^/]+)", "/storage/v1/b/([^/]+)/o/([^/]+)"
_ROUTES = (
    ("GET", _API, _BUCKET, Service._describe),
    ("GET", _API, f"{_BUCKET}/storageLayout", Service._layout),
    ("GET", _API, f"{_BUCKET}/o", Service._list),
    ("GET", _API, _OBJECT, Service._stat),
    ("DELETE", _API, _OBJECT, Service._remove),
    (
        "POST",
        _API,
        f"{_OBJECT}/rewriteTo/b/([^/]+)/o/([^/]+)",
        Service._rewrite,
    ),
    ("POST", _API, f"/upload{_BUCKET}/o", Service._begin_upload),
    ("PUT", _API, f"/upload{_BUCKET}/o", Service._continue_upload),
    ("GET", _MEDIA, "/([^/]+)/(.+)", Service._read),
)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection: to the proxy at first, and then through it."""

    protocol_version = "HTTP/1.1"
    timeout = 120
    rbufsize = _PIECE
    disable_nagle_algorithm = True

    def handle_expect_100(self) -> bool:
        # Or the client waits a second before it sends a body.
        answered = super().handle_expect_100()
        self.wfile.flush()
        return answered

    @property
    def _at(self) -> _Server:
        return cast("_Server", self.server)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        del format, arguments

    def do_CONNECT(self) -> None:
        host = self.path.partition(":")[0]
        if host not in (_API, _MEDIA):
            self.send_error(403, f"the emulator is not {host}")
            return
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        self.wfile.flush()
        inner = self._at.tls.wrap_socket(self.connection, server_side=True)
        self.connection = self.request = inner
        self.rfile = cast(io.BufferedIOBase, inner.makefile("rb", _PIECE))
        self.wfile = cast(io.BufferedIOBase, inner.makefile("wb", _PIECE))
        # The base class took the answer for the end of HTTP/1.0.
        self.close_connection = False

    def do_any(self) -> None:
        request = Request(
            self.command,
            self.headers.get("Host", "").partition(":")[0],
            self.path,
            {name.lower(): value for name, value in self.headers.items()},
        )
        fault = self._at.store.draw(request)
        if fault and fault.kind == "half":
            size = int(request.headers.get("content-length") or _PIECE)
            body = self._body(size // 2)
            self._at.store.receive_half(request._replace(body=body))
            self._reset(request, fault)
            return
        request = request._replace(body=self._body())
        if fault and fault.kind == "reset":
            self._reset(request, fault)
            return
        if fault and fault.kind == "slow":
            time.sleep(fault.secs)
        response = self._at.store.answer(request, fault)
        if fault and fault.kind == "lost":
            self._reset(request, fault)
            return
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        if response.status != 204:
            self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        self.wfile.write(response.body)
        self.wfile.flush()

    do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = do_any  # noqa: N815

    def _body(self, at_most: int | None = None) -> bytes:
        body = bytearray()
        for piece in self._pieces():
            body += piece
            if at_most is not None and len(body) >= at_most:
                return bytes(body[:at_most])
        return bytes(body)

    def _pieces(self) -> Iterator[bytes]:
        # TensorFlow sends both headers; the encoding is what counts.
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self._line().partition(b";")[0], 16):
                yield self._read(size)
                self._line()
            self._line()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self._read(min(left, _PIECE))
            left -= len(piece)
            yield piece

    def _line(self) -> bytes:
        line = self.rfile.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError("the client left")
        return line

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionResetError("the client left")
        return data

    def _reset(self, request: Request, fault: Fault) -> None:
        self._at.store.log(request, 0, fault)
        no_goodbye = struct.pack("ii", 1, 0)
        self.connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, no_goodbye
        )
        self.close_connection = True


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, store: ObjectStore, tls: ssl.SSLContext, port: int
    ) -> None:
        self.store, self.tls = store, tls
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        del request, client_address
        # Clients are killed in the middle of what they say.
        if not isinstance(sys.exc_info()[1], OSError):
            self.store.broken.append(traceback.format_exc())


class ObjectStore:
    """A store that serves on a port of this host, until it is closed.

    Attributes:
        objects: what it holds.
        requests: what it was asked, in order.
        rate: share of the requests that fail at random.
        broken: tracebacks of the store's own mistakes.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        buckets: Sequence[str] = ("bucket",),
        port: int = 0,
        rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Starts to serve.

        Args:
            directory: where objects and the certificate are kept, so that
                another store may go on with them; None is memory.
            buckets: to make.
            port: to listen on; 0 is any that is free.
            rate: in [0, 1]; share of the requests that fail at random.
            seed: of that.
        """
        self._temporary = None if directory else tempfile.mkdtemp()
        home = pathlib.Path(directory or self._temporary or "")
        (home / "objects").mkdir(parents=True, exist_ok=True)
        self._certificate = _make_certificate(home)
        self._empty = home / "no_credentials"
        self._empty.mkdir(exist_ok=True)
        self.objects = Objects(home / "objects" if directory else None)
        for bucket in buckets:
            self.objects.make_bucket(bucket)
        self.requests: list[Answered] = []
        self.rate = rate
        self.broken: list[str] = []
        self._token = "token-of-the-emulator"
        self._service = Service(self.objects, self._token)
        self._random = random.Random(seed)
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self._certificate, home / "key.pem")
        self._server = _Server(self, tls, port)
        self.port: int = self._server.server_address[1]
        threading.Thread(
            target=self._server.serve_forever, args=(0.1,), daemon=True
        ).start()

    def __enter__(self) -> ObjectStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops; raises if the store made a mistake."""
        self._server.shutdown()
        self._server.server_close()
        if self._temporary:
            shutil.rmtree(self._temporary)
        if self.broken:
            raise RuntimeError(self.broken[0])

    def environment(self, credentials: str = "token") -> dict[str, str]:
        """Returns the variables by which a process uses this store.

        It retries as it does on Google's, only sooner.

        Args:
            credentials: "token" where the process is given one, "metadata"
                where it asks the server of a virtual machine, "none" where
                it has none.
        """
        proxy = f"http://127.0.0.1:{self.port}"
        variables = {
            "HTTPS_PROXY": proxy,
            "https_proxy": proxy,
            "NO_PROXY": "",
            "no_proxy": "",
            "CURL_CA_BUNDLE": str(self._certificate),
            "GCS_RETRY_CONFIG_INIT_DELAY_TIME_US": "20000",
            "GCS_RETRY_CONFIG_MAX_DELAY_TIME_US": "200000",
            # Whatever the user has is not for the emulator.
            "CLOUDSDK_CONFIG": str(self._empty),
            "GOOGLE_APPLICATION_CREDENTIALS": "",
            "NO_GCE_CHECK": "true",
        }
        if credentials == "token":
            variables["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = self._token
        elif credentials == "metadata":
            variables["GCE_METADATA_HOST"] = f"127.0.0.1:{self.port}"
            variables["NO_GCE_CHECK"] = ""
        return variables

    def inject(self, kind: str, pattern: str = "", **more: Any) -> Fault:
        """Makes requests fail, from the next one on.

        Args:
            kind: see `FAULTS`.
            pattern: see `Fault`.
            more: the other fields of a `Fault`.

        Returns:
            The rule; its `count` says how many are still to come.
        """
        fault = Fault(kind, pattern, **more)
        with self._lock:
            self._faults.append(fault)
        return fault

    def calm(self) -> None:
        """Lets nothing fail any more."""
        with self._lock:
            self._faults.clear()
            self.rate = 0.0

    def names(self, prefix: str = "", bucket: str = "bucket") -> list[str]:
        """Returns the sorted names of the objects."""
        with self._lock:
            held = self.objects.bucket(bucket)
            return sorted(name for name in held if name.startswith(prefix))

    def read(self, name: str, bucket: str = "bucket") -> bytes:
        """Returns the bytes of an object."""
        with self._lock:
            return self.objects.find(bucket, name).data

    def write(self, name: str, data: bytes, bucket: str = "bucket") -> None:
        """Stores an object."""
        with self._lock:
            self.objects.put(bucket, name, data)

    # What follows is for the connections.

    def draw(self, request: Request) -> Fault | None:
        """Chooses how a request fails; None if it does not."""
        line = f"{request.method} {request.target}"
        with self._lock:
            for fault in self._faults:
                if fault.hits(line):
                    return dataclasses.replace(fault)
            if not self.rate or self._random.random() >= self.rate:
                return None
            kinds = [kind for kind in FAULTS if _applies(kind, request)]
            return Fault(self._random.choice(kinds))

    def answer(self, request: Request, fault: Fault | None) -> Response:
        """Answers one request, and writes it to the log."""
        with self._lock:
            if fault and fault.kind.isdigit():
                response = Refused(int(fault.kind), "injected").response
            elif request.path.startswith("/computeMetadata/"):
                response = self._answer_metadata(request)
            else:
                lag = fault.lag if fault and fault.kind == "stale" else 0
                response = self._service.answer(request, lag)
        if not fault or fault.kind != "lost":
            self.log(request, response.status, fault)
        return response

    def receive_half(self, request: Request) -> None:
        """Takes what there is of a broken upload."""
        with self._lock:
            self._service.receive_half(request)

    def log(self, request: Request, status: int, fault: Fault | None) -> None:
        """Writes a line of the log."""
        line = f"{request.method} {request.target}"
        self.requests.append(
            Answered(line, status, fault.kind if fault else "")
        )

    def _answer_metadata(self, request: Request) -> Response:
        if request.headers.get("metadata-flavor") != "Google":
            return Refused(403, "Missing Metadata-Flavor:Google").response
        if not request.path.endswith("/service-accounts/default/token"):
            return Refused(404, request.path).response
        token = {"access_token": self._token, "expires_in": 3600}
        return Response(
            200,
            _json({**token, "token_type": "Bearer"}),
            {"Metadata-Flavor": "Google"},
        )


def _applies(kind: str, request: Request) -> bool:
    if kind == "half":
        return request.method == "PUT"
    if kind == "stale":
        return request.method == "GET" and request.path.endswith("/o")
    return True


def _make_certificate(home: pathlib.Path) -> pathlib.Path:
    """Makes a certificate that vouches for itself, unless there is one."""
    certificate, key = home / "certificate.pem", home / "key.pem"
    if certificate.exists():
        return certificate
    openssl = shutil.which("openssl")
    if openssl is None:
        requirement.missing("openssl is absent; apt-get install openssl")
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-nodes", "-days", "2"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-keyout", str(key), "-out", str(certificate)),
            *("-subj", "/CN=tests.object_store"),
            *("-addext", f"subjectAltName=DNS:{_API},DNS:{_MEDIA}"),
        ],
        check=True,
        capture_output=True,
    )
    return certificate


# A process that has TensorFlow, for TensorFlow reads the variables once.


class Raised(Exception):  # noqa: N818 - what was raised, there
    """What a function raised in the other process.

    Attributes:
        kind: name of its class.
        text: its text.
    """

    def __init__(self, kind: str, text: str, details: str) -> None:
        super().__init__(f"{kind}: {text}\n{details}")
        self.kind, self.text = kind, text


class Client:
    """A process in which functions of a test's module run.

    It imports TensorFlow once, for as many calls as there are.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Starts the process.

        Args:
            environment: of the process, all of it.
        """
        program = "from tests import object_store as s; s.answer_calls()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        timeout: float = 300.0,
    ) -> Any:
        """Runs a function there.

        Args:
            function: of a module that can be imported.
            arguments: as JSON has them.
            timeout: in seconds.

        Returns:
            What it returned, as JSON has it.

        Raises:
            Raised: it raised.
        """
        self.begin(function, *arguments)
        return self.end(timeout)

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Starts a call, for `end` to wait for."""
        call = [function.__module__, function.__qualname__, arguments]
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()

    def end(self, timeout: float = 300.0) -> Any:
        """Waits for what `begin` started; see `call`."""
        output = self.process.stdout
        if not select.select([output], [], [], timeout)[0]:
            raise TimeoutError(f"no answer in {timeout:g} s")
        line = output.readline()
        if not line:
            raise RuntimeError(f"the client ended: {self.process.wait()}")
        answer = json.loads(line)
        if "raised" in answer:
            raise Raised(*answer["raised"])
        return answer["returned"]


def answer_calls() -> None:
    """Runs what a `Client` asks for, in its process."""
    answers = os.fdopen(os.dup(1), "w")
    # What is printed is no answer.
    os.dup2(2, 1)
    for line in sys.stdin:
        module, name, arguments = json.loads(line)
        try:
            __import__(module)
            function = getattr(sys.modules[module], name)
            answer = {"returned": function(*arguments)}
        except Exception as error:  # noqa: BLE001 - the other side raises it
            kind = type(error).__name__
            answer = {"raised": [kind, str(error), traceback.format_exc()]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(
        description="Serves an emulator of Google Cloud Storage."
    )
    parser.add_argument("--directory", help="keeps the objects")
    parser.add_argument("--bucket", action="append", help="default: bucket")
    parser.add_argument("--port", type=int, default=0, help="default: any")
    parser.add_argument("--rate", type=float, default=0.0, help="of faults")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    flags = parser.parse_args()
    with (
        contextlib.suppress(KeyboardInterrupt),
        ObjectStore(
            flags.directory,
            buckets=flags.bucket or ("bucket",),
            port=flags.port,
            rate=flags.rate,
            seed=flags.seed,
        ) as store,
    ):
        # In one piece, for whoever interrupts this after the first line.
        lines = (
            f"export {name}={shlex.quote(value)}\n"
            for name, value in store.environment().items()
        )
        print("".join(lines), end="", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
