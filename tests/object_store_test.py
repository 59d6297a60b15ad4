"""The emulator of Google Cloud Storage is one to TensorFlow's own client."""

from __future__ import annotations

import http.client
import json
import pathlib
import re
import shlex
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import tensorflow as tf

from tests import object_store, runs
from tests.object_store import Request

BLOCK = 256 * 1024
API, MEDIA = "www.googleapis.com", "storage.googleapis.com"
TOKEN = "secret"


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[object_store.ObjectStore, object_store.Client]]:
    with (
        object_store.ObjectStore() as store,
        object_store.Client(
            runs.environment(
                **store.environment(), GCS_RETRY_CONFIG_MAX_RETRIES="4"
            )
        ) as client,
    ):
        yield store, client


@pytest.fixture
def store(
    shared: tuple[object_store.ObjectStore, object_store.Client],
) -> Iterator[object_store.ObjectStore]:
    yield shared[0]
    shared[0].calm()


@pytest.fixture
def client(
    shared: tuple[object_store.ObjectStore, object_store.Client],
) -> object_store.Client:
    return shared[1]


@pytest.fixture
def root(request: pytest.FixtureRequest) -> str:
    """A directory of the test's own."""
    name = re.sub(r"\W+", "-", request.node.name).strip("-")
    return f"gs://bucket/{name}"


def path_of(root: str) -> str:
    return root.removeprefix("gs://bucket/")


# What it answers, without a network.


def make_service() -> object_store.Service:
    objects = object_store.Objects(None)
    objects.make_bucket("bucket")
    for name in ("a/1", "a/2", "a/b/3", "c"):
        objects.put("bucket", name, b"0123456789")
    return object_store.Service(objects, TOKEN)


def request(
    method: str,
    target: str,
    body: bytes = b"",
    *,
    host: str = API,
    **headers: str,
) -> Request:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named.setdefault("authorization", f"Bearer {TOKEN}")
    return Request(method, host, target, named, body)


def read(target: str, **headers: str) -> Request:
    return request("GET", target, host=MEDIA, **headers)


UPLOADS = "/upload/storage/v1/b/bucket/o"
OBJECTS = "/storage/v1/b/bucket/o"


@pytest.mark.parametrize(
    ("status", "asked"),
    [
        (200, request("GET", f"{OBJECTS}/a%2F1")),
        (401, request("GET", f"{OBJECTS}/a%2F1", authorization="")),
        (401, request("GET", f"{OBJECTS}/a%2F1", authorization="Bearer x")),
        (401, read("/bucket/c", authorization="")),
        (404, request("GET", f"{OBJECTS}/a%2F1", host=MEDIA)),
        (404, request("GET", f"{OBJECTS}/a%2F9")),
        (404, request("GET", "/storage/v1/b/other/o")),
        (404, request("GET", "/storage/v2/b/bucket/o")),
        (405, request("PATCH", f"{OBJECTS}/c")),
        (400, request("GET", f"{OBJECTS}?maxResults=0")),
        (404, request("DELETE", f"{OBJECTS}/a%2F9")),
        (404, request("POST", f"{OBJECTS}/x/rewriteTo/b/bucket/o/y")),
        (404, request("POST", f"{OBJECTS}/c/rewriteTo/b/other/o/y")),
        (404, read("/bucket/nothing")),
        (400, read("/bucket/c", range="bytes=-3")),
        (416, read("/bucket/c", range="bytes=10-12")),
        (416, read("/bucket/c", range="bytes=5-3")),
        (206, read("/bucket/c", range="bytes=5-30")),
        (400, request("POST", f"{UPLOADS}?uploadType=resumable&name=")),
        (400, request("POST", f"{UPLOADS}?uploadType=multipart&name=x")),
        (400, request("POST", f"{UPLOADS}?uploadType=media&name=x%0Ay")),
        (
            412,
            request(
                "POST", f"{UPLOADS}?uploadType=media&name=c&ifGenerationMatch=0"
            ),
        ),
        (404, request("PUT", f"{UPLOADS}?upload_id=unknown", b"x")),
        (404, request("PUT", UPLOADS, b"x")),
    ],
)
def test_status_of_an_answer(status: int, asked: Request) -> None:
    assert make_service().answer(asked).status == status


def test_range_of_an_object() -> None:
    answer = make_service().answer(read("/bucket/c", range="bytes=5-30"))
    assert answer.body == b"56789"
    assert answer.headers["Content-Range"] == "bytes 5-9/10"


def test_listing_in_pages() -> None:
    service, token, seen = make_service(), "", []
    while token is not None:
        target = f"{OBJECTS}?prefix=a/&delimiter=/&maxResults=1"
        target += f"&pageToken={token}" if token else ""
        page = json.loads(service.answer(request("GET", target)).body)
        seen += [item["name"] for item in page.get("items", ())]
        seen += page.get("prefixes", ())
        token = page.get("nextPageToken")
    assert seen == ["a/1", "a/2", "a/b/"]


def test_listing_of_what_there_was() -> None:
    service = make_service()
    service.answer(request("DELETE", f"{OBJECTS}/c"))
    for lag, names in (
        (0, ["a/1", "a/2", "a/b/3"]),
        (1, ["a/1", "a/2", "a/b/3", "c"]),
        (3, ["a/1", "a/2"]),
        (99, None),
    ):
        answer = service.answer(request("GET", OBJECTS), lag)
        items = json.loads(answer.body).get("items")
        assert names == (items and [item["name"] for item in items])


def begin(service: object_store.Service, size: int) -> str:
    target = f"{UPLOADS}?uploadType=resumable&name=new"
    answer = service.answer(
        request("POST", target, x_upload_content_length=str(size))
    )
    return answer.headers["Location"].removeprefix(f"https://{API}")


def test_upload_in_parts() -> None:
    service = make_service()
    data = bytes(range(256)) * 3 * 1024
    target = begin(service, len(data))
    parts = (
        ("bytes */786432", b"", 308, None),
        ("bytes 0-262143/786432", data[:BLOCK], 308, "bytes=0-262143"),
        # Sent again from an earlier byte, what is there stays.
        ("bytes 0-524287/786432", data[: 2 * BLOCK], 308, "bytes=0-524287"),
        ("bytes */786432", b"", 308, "bytes=0-524287"),
        ("bytes 524288-786431/786432", data[2 * BLOCK :], 200, None),
        ("bytes */786432", b"", 200, None),
    )
    for content_range, body, status, kept in parts:
        answer = service.answer(
            request("PUT", target, body, content_range=content_range)
        )
        assert answer.status == status
        assert answer.headers.get("Range") == kept
    assert service.objects.find("bucket", "new").data == data


@pytest.mark.parametrize(
    ("content_range", "size"),
    [
        ("bytes 0-9/10", 9),
        ("bytes 0-9", 10),
        ("bytes 5-9/10", 5),
        ("bytes 0-8/10", 9),
        ("bytes 0-9/11", 10),
        ("bytes 0-9/9", 10),
        ("bytes */10", 10),
    ],
)
def test_parts_of_an_upload_that_do_not_fit(
    content_range: str, size: int
) -> None:
    service = make_service()
    target = begin(service, 10)
    answer = service.answer(
        request("PUT", target, b"x" * size, content_range=content_range)
    )
    assert answer.status == 400
    assert "new" not in service.objects.bucket("bucket")


def test_unknown_fault() -> None:
    with pytest.raises(ValueError, match="kind"):
        object_store.Fault("reset by peer")


# What TensorFlow makes of it.


def write_file(path: str, data: str, mode: str = "w") -> None:
    with tf.io.gfile.GFile(path, mode) as file:
        file.write(data)


def read_file(path: str) -> str:
    with tf.io.gfile.GFile(path) as file:
        return file.read()


def use_files(root: str) -> dict:
    """Does with a directory what one does with one."""
    gfile, seen = tf.io.gfile, {}
    seen["exists"] = [gfile.exists(f"{root}/d/x")]
    gfile.makedirs(f"{root}/d/e")
    seen["isdir"] = [
        gfile.isdir(f"{root}/{name}") for name in ("d", "d/e", "none")
    ]
    write_file(f"{root}/d/x", "hello")
    write_file(f"{root}/d/empty", "")
    seen["exists"].append(gfile.exists(f"{root}/d/x"))
    seen["read"] = [read_file(f"{root}/d/{name}") for name in ("x", "empty")]
    seen["stat"] = gfile.stat(f"{root}/d/x").length
    gfile.rename(f"{root}/d/x", f"{root}/d/y")
    write_file(f"{root}/d/y", ", world", "a")
    seen["append"] = read_file(f"{root}/d/y")
    gfile.copy(f"{root}/d/y", f"{root}/d/e/z")
    seen["listdir"] = sorted(gfile.listdir(f"{root}/d"))
    seen["glob"] = sorted(gfile.glob(f"{root}/d/*/*"))
    gfile.rename(f"{root}/d", f"{root}/f")
    seen["walk"] = [[names, files] for _, names, files in gfile.walk(root)]
    gfile.remove(f"{root}/f/y")
    gfile.rmtree(f"{root}/f")
    seen["exists"].append(gfile.exists(f"{root}/f"))
    return seen


def test_files_and_directories(
    store: object_store.ObjectStore, client: object_store.Client, root: str
) -> None:
    assert client.call(use_files, root) == {
        "exists": [False, True, False],
        "isdir": [True, True, False],
        "read": ["hello", ""],
        "stat": 5,
        "append": "hello, world",
        "listdir": ["e/", "empty", "y"],
        # The directory is a marker, an object whose name ends in a slash.
        "glob": [f"{root}/d/e/", f"{root}/d/e/z"],
        "walk": [
            [["f/"], []],
            [["e/"], ["empty", "y"]],
            [[], ["z"]],
        ],
    }
    assert store.names(path_of(root)) == [f"{path_of(root)}/"]


def use(name: str, path: str) -> None:
    getattr(tf.io.gfile, name)(path)


@pytest.mark.parametrize("name", ["listdir", "remove", "rmtree", "stat"])
def test_what_is_missing(name: str, client: object_store.Client) -> None:
    for path in ("gs://bucket/nothing", "gs://no-bucket/nothing"):
        with pytest.raises(object_store.Raised) as caught:
            client.call(use, name, path)
        assert caught.value.kind == "NotFoundError"


def save_and_restore(root: str, num_saves: int) -> list:
    variable = tf.Variable(tf.zeros([1000]))
    checkpoint = tf.train.Checkpoint(variable=variable)
    manager = tf.train.CheckpointManager(checkpoint, root, max_to_keep=2)
    for number in range(num_saves):
        variable.assign(tf.fill([1000], float(number)))
        manager.save()
    variable.assign(tf.zeros([1000]))
    newest = tf.train.latest_checkpoint(root)
    checkpoint.restore(newest).assert_consumed()
    return [manager.checkpoints, newest, variable.numpy()[-1].item()]


def test_stock_checkpoint_manager(
    store: object_store.ObjectStore, client: object_store.Client, root: str
) -> None:
    kept, newest, value = client.call(save_and_restore, root, 4)
    assert kept == [f"{root}/ckpt-3", f"{root}/ckpt-4"]
    assert newest == kept[-1]
    assert value == 3.0
    assert store.names(f"{path_of(root)}/ckpt") == [
        f"{path_of(root)}/ckpt-{step}.{part}"
        for step in (3, 4)
        for part in ("data-00000-of-00001", "index")
    ]


# Faults.


def write_and_read(path: str, size: int) -> bool:
    data = "0123456789abcdef" * (size // 16)
    write_file(path, data)
    return read_file(path) == data


@pytest.mark.parametrize("on", ["POST", "PUT", "GET /bucket"])
@pytest.mark.parametrize("kind", ["429", "503", "reset", "lost", "slow"])
def test_fault_that_passes(
    kind: str,
    on: str,
    store: object_store.ObjectStore,
    client: object_store.Client,
    root: str,
) -> None:
    fault = store.inject(kind, on, count=1 if kind == "slow" else 2)
    assert client.call(write_and_read, f"{root}/x", 1_000_000)
    assert fault.count == 0
    assert len(store.read(f"{path_of(root)}/x")) == 1_000_000


def test_half_finished_upload_goes_on_where_it_broke(
    store: object_store.ObjectStore, client: object_store.Client, root: str
) -> None:
    size = 4 * BLOCK
    fault = store.inject("half", "PUT")
    assert client.call(write_and_read, f"{root}/x", size)
    assert fault.count == 0
    assert len(store.read(f"{path_of(root)}/x")) == size
    uploads = [each for each in store.requests if each.line.startswith("PUT")]
    # Half of it, then the question how much there is, then the rest.
    assert [each.status for each in uploads[-3:]] == [0, 308, 200]


@pytest.mark.parametrize("kind", ["503", "half"])
def test_upload_that_never_succeeds_leaves_nothing(
    kind: str,
    store: object_store.ObjectStore,
    client: object_store.Client,
    root: str,
) -> None:
    store.inject(kind, "PUT", count=1000)
    with pytest.raises(object_store.Raised) as caught:
        client.call(write_file, f"{root}/x", "data")
    assert caught.value.kind in ("AbortedError", "UnavailableError")
    assert store.names(path_of(root)) == []


@pytest.mark.parametrize("status", ["401", "403"])
def test_refused_credentials_are_not_tried_again(
    status: str,
    store: object_store.ObjectStore,
    client: object_store.Client,
    root: str,
) -> None:
    fault = store.inject(status, "", count=1000)
    with pytest.raises(object_store.Raised) as caught:
        client.call(read_file, f"{root}/x")
    assert caught.value.kind == "PermissionDeniedError"
    assert fault.count >= 997


def write_and_list(root: str) -> list[str]:
    for number in range(4):
        write_file(f"{root}/{number}", "x")
    return sorted(tf.io.gfile.listdir(root))


def test_stale_listing(
    store: object_store.ObjectStore, client: object_store.Client, root: str
) -> None:
    store.inject("stale", "delimiter", lag=2)
    assert client.call(write_and_list, root) == ["0", "1"]
    assert client.call(write_and_list, root) == ["0", "1", "2", "3"]


def test_a_tenth_of_all_requests_fails(
    store: object_store.ObjectStore, client: object_store.Client, root: str
) -> None:
    before = len(store.requests)
    store.rate = 0.1
    for number in range(40):
        assert client.call(write_and_read, f"{root}/{number}", BLOCK * 2)
    answered = store.requests[before:]
    failed = [each for each in answered if each.fault]
    assert 0.04 * len(answered) < len(failed) < 0.2 * len(answered)
    assert len({each.fault for each in failed}) >= 3


def test_rate_is_a_function_of_the_seed() -> None:
    drawn = []
    for seed in (1, 1, 2):
        with object_store.ObjectStore(rate=0.5, seed=seed) as store:
            faults = [store.draw(read("/bucket/c")) for _ in range(50)]
        drawn.append([fault and fault.kind for fault in faults])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("said", [b"", b"4\r\nab", b"4\r\nabcd", b"4"])
def test_client_that_is_killed_while_it_sends(said: bytes) -> None:
    """It is no mistake of the store, which goes on."""
    others = set(threading.enumerate())
    with object_store.ObjectStore() as store:
        certificate = store.environment()["CURL_CA_BUNDLE"]
        connection = http.client.HTTPSConnection(
            "127.0.0.1",
            store.port,
            context=ssl.create_default_context(cafile=certificate),
        )
        connection.set_tunnel(API, 443)
        connection.putrequest("POST", "/upload/storage/v1/b/bucket/o")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders(said)
        connection.close()
        for thread in set(threading.enumerate()) - others:
            if "process_request" in thread.name:
                thread.join(30)
        assert not store.broken
        assert not store.names()


# Where it lives.


def test_objects_outlive_the_store(
    tmp_path: pathlib.Path, client: object_store.Client
) -> None:
    del client
    with object_store.ObjectStore(tmp_path) as store:
        store.write("a/b c%2F", b"1")
        store.write("a/b", b"2")
        port, environment = store.port, store.environment()
    with object_store.ObjectStore(tmp_path, port=port) as store:
        assert store.environment() == environment
        assert store.names() == ["a/b", "a/b c%2F"]
        assert store.read("a/b c%2F") == b"1"
        with object_store.Client(runs.environment(**environment)) as another:
            assert another.call(read_file, "gs://bucket/a/b") == "2"


def test_token_of_a_virtual_machine() -> None:
    with (
        object_store.ObjectStore() as store,
        object_store.Client(
            runs.environment(**store.environment("metadata"))
        ) as client,
    ):
        client.call(write_file, "gs://bucket/x", "data")
        assert store.read("x") == b"data"
        assert "computeMetadata" in store.requests[0].line


def test_command_prints_the_environment(tmp_path: pathlib.Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.object_store", f"--directory={tmp_path}"],
        cwd=runs.ROOT,
        env=runs.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    name, _, value = line.removeprefix("export ").partition("=")
    assert name == "HTTPS_PROXY"
    assert value.startswith("http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    output = process.stdout.read()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    exported = [shlex.split(line)[1] for line in output.splitlines()]
    assert any(each.startswith("CURL_CA_BUNDLE=") for each in exported)
