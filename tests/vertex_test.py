"""What is submitted to Vertex AI, and what its client library makes of it."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dtrain import config, errors
from dtrain.errors import UserError
from launch import job as jobs
from launch import node, submission
from launch.backends import vertex
from launch.job import Job
from launch.keep import supervisor
from launch.options import Options
from tests import clients, plans, typed

NAME = "projects/12/locations/europe-west4/customJobs/345"


def job(*arguments: str, **options: object) -> Job:
    needed = {
        "project": "my-project",
        "region": "europe-west4",
        "machine_type": "n1-standard-8",
        "image": "europe-docker.pkg.dev/my-project/images/dtrain:1",
    }
    arguments = ("--run_dir=gs://bucket/faces", *arguments)
    return Job(
        options=Options(backend="vertex", **{**needed, **options}),
        arguments=arguments,
        parsed=config.parse(["dtrain.main", *arguments]),
        directory="gs://bucket/faces/launch/1",
        workdir="/home/me/code",
        python="/home/me/venv/bin/python",
        submitted_secs=plans.SECS,
        mark=plans.MARK,
    )


JOBS = plans.make_jobs("vertex")


def run_node(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int = 0
) -> tuple[int, list[str]]:
    """Runs a node but for its worker; returns the code, and its flags."""
    found: list[str] = []

    def run(_: supervisor.Options, plan: supervisor.Plan) -> int:
        [process] = plan((0,))
        found.extend(process.command[3:])
        return code

    with monkeypatch.context() as patch:
        patch.setattr(supervisor, "run", run)
        return node.run(["launch.node", *arguments], {}), found


def arguments_of(made: Job) -> list[str]:
    """What the container of the chief is started with."""
    written = json.loads(vertex.plan(made).files["job.json"])
    [pool] = written["jobSpec"]["workerPoolSpecs"]
    container = pool["containerSpec"]
    assert container["command"] == ["python", "-m", "launch.node"]
    return container["args"]


@given(st.lists(typed.words, max_size=3))
@example([typed.ALL])
def test_a_worker_gets_what_was_typed(typed_words: list[str]) -> None:
    flags = [f"--data_dir={word}" for word in typed_words]
    sent = arguments_of(job(*flags))
    # Nothing that is replaced anywhere on the way, and nothing that is not
    # text.
    assert all(each.isascii() and each.isprintable() for each in sent)
    assert not any("$" in each for each in sent)
    with pytest.MonkeyPatch.context() as monkeypatch:
        code, flags_of_worker = run_node(monkeypatch, sent)
    assert code == errors.FINISHED
    assert flags_of_worker == ["--run_dir=gs://bucket/faces", *flags]


@pytest.mark.parametrize(
    ("code", "to_vertex"),
    [(0, 0), (75, 134), (76, 134), (78, 78), (70, 70), (74, 74), (1, 1)],
)
def test_the_service_starts_a_job_again_after_134(
    code: int, to_vertex: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_node(monkeypatch, arguments_of(job()), code)[0] == to_vertex
    assert run_node(monkeypatch, [], code)[0] == code


def test_a_short_limit_is_one() -> None:
    """0 s would be none, and the job would end after a week."""
    made = job(max_hours=1e-5)
    written = json.loads(vertex.plan(made).files["job.json"])
    assert written["jobSpec"]["scheduling"]["timeout"] == "1s"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.cloud.aiplatform_v1", None)
    with pytest.raises(UserError, match="pip install google-cloud-aipl"):
        vertex.submit(job(), vertex.plan(job()))


STRICT = """
import json, sys
from launch.backends import vertex
from dtrain.errors import UserError

def parse(text):
    try:
        found = vertex.parse(text)
    except UserError as error:
        return str(error)
    return json.loads(type(found).to_json(found, use_integers_for_enums=False))

print(json.dumps([parse(text) for text in json.load(sys.stdin)]))
"""


def test_the_library_takes_every_plan_and_no_other(
    tmp_path: pathlib.Path,
) -> None:
    plans = [vertex.plan(made).files["job.json"] for made in JOBS.values()]
    broken = [
        plans[0].replace('"imageUri"', '"image"'),
        plans[0].replace('"SPOT"', '"CHEAP"'),
        plans[0].replace('"replicaCount": 1', '"replicaCount": "one"'),
        vertex.plan(job(gpus_per_node=1, gpu_type="A100")).files["job.json"],
        vertex.plan(job()).files["job.json"][:-3],
    ]
    *read, a, b, c, d, e = clients.run(
        "vertex", STRICT, [*plans, *broken], tmp_path
    )
    for text, found in zip(plans, read, strict=True):
        assert _is_part(json.loads(text), found)
    assert 'no field named "image"' in a
    assert "CHEAP" in b
    assert "replicaCount" in c
    assert "Invalid enum value A100" in d
    assert e.startswith("Vertex AI knows no such job: ")


def _is_part(part: Any, whole: Any) -> bool:
    """Whether all that was written was read; numbers of 64 bits are strings."""
    if isinstance(part, dict):
        return all(_is_part(part[key], whole[key]) for key in part)
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(_is_part, part, whole))
    return part == whole or str(part) == whole


# A service on this machine, of which the real library asks.
SERVICE = """
import concurrent.futures, functools, json, sys
import grpc
from google.cloud import aiplatform_v1 as api
from google.cloud.aiplatform_v1.services.job_service import transports
from google.protobuf import empty_pb2
from dtrain import config
from dtrain.errors import UserError
from launch.backends import vertex
from launch.job import Job
from launch.options import Options
from launch.submission import Submission

given = json.load(sys.stdin)
sent, said = [], []
state = None

def create(request, context):
    sent.append([request.parent, request.custom_job.display_name])
    return api.CustomJob(name=given["name"])

def get(request, context):
    if state.startswith("JOB_STATE_"):
        job = api.CustomJob(name=request.name, state=state)
        if state == "JOB_STATE_FAILED":
            job.error = {"code": 3, "message": "replica 0\\n exited with 78"}
        return job
    context.abort(getattr(grpc.StatusCode, state), "no\\n such job")

def cancel(request, context):
    sent.append(["cancel", request.name])
    return empty_pb2.Empty()

def handler(call, request, serialize=api.CustomJob.serialize):
    return grpc.unary_unary_rpc_method_handler(
        call, request.deserialize, serialize)

server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(
    "google.cloud.aiplatform.v1.JobService",
    {
        "CreateCustomJob": handler(create, api.CreateCustomJobRequest),
        "GetCustomJob": handler(get, api.GetCustomJobRequest),
        "CancelCustomJob": handler(
            cancel,
            api.CancelCustomJobRequest,
            empty_pb2.Empty.SerializeToString,
        ),
    })])
port = server.add_insecure_port("127.0.0.1:0")
server.start()

def try_(call):
    try:
        said.append(call())
    except UserError as error:
        said.append(str(error))

arguments = ("--run_dir=gs://bucket/faces",)
job = Job(
    options=Options(backend="vertex", **given["options"]),
    arguments=arguments,
    parsed=config.parse(["dtrain.main", *arguments]),
    directory="gs://bucket/faces/launch/1",
    workdir="/",
    python="python",
    submitted_secs=1,
    mark="5ca1ab",
)
plan = vertex.plan(job)
# Nobody is logged in.
try_(lambda: vertex.submit(job, plan))
api.JobServiceClient = functools.partial(
    api.JobServiceClient,
    transport=transports.JobServiceGrpcTransport(
        channel=grpc.insecure_channel(f"127.0.0.1:{port}")),
)
try_(lambda: vertex.submit(job, plan))
made = Submission("vertex", given["name"], *[None] * 8)
for state in given["states"]:
    try_(lambda: vertex.states(made))
try_(lambda: vertex.cancel(made))
print(json.dumps([sent, said]))
"""


def test_a_job_from_its_submission_to_its_end(tmp_path: pathlib.Path) -> None:
    options = job().options
    names = ("project", "region", "machine_type", "image")
    sent, said = clients.run(
        "vertex",
        SERVICE,
        {
            "name": NAME,
            "options": {name: getattr(options, name) for name in names},
            "states": [
                "JOB_STATE_PENDING",
                "JOB_STATE_RUNNING",
                "JOB_STATE_SUCCEEDED",
                "JOB_STATE_FAILED",
                "NOT_FOUND",
                "PERMISSION_DENIED",
            ],
        },
        tmp_path,
    )
    parent = "projects/my-project/locations/europe-west4"
    assert sent == [[parent, "faces"], ["cancel", NAME]]
    nobody, name, pending, running, finished, failed, gone, denied, _ = said
    endpoint = "Vertex AI at europe-west4-aiplatform.googleapis.com: "
    assert nobody.startswith(f"{endpoint}Your default credentials were not")
    assert name == NAME
    assert pending == [[jobs.QUEUED, "job 345, JOB_STATE_PENDING"]]
    assert running == [[jobs.RUNNING, "job 345, JOB_STATE_RUNNING"]]
    assert finished == [[jobs.FINISHED, "job 345, JOB_STATE_SUCCEEDED"]]
    words = "job 345, JOB_STATE_FAILED, replica 0 exited with 78"
    assert failed == [[jobs.FAILED, words]]
    assert gone == [[jobs.UNKNOWN, f"Vertex AI has forgotten {NAME}"]]
    assert denied == f"{endpoint}403 no such job"


@pytest.mark.parametrize("follow", [False, True])
def test_logs(
    follow: bool,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    plan = vertex.plan(job())
    made = submission.make(job(), plan, NAME, {})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="it comes with the Google Cloud CLI"):
        vertex.show_logs(made, follow, lambda: True)
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))"
    )
    gcloud.chmod(0o755)
    vertex.show_logs(made, follow, lambda: True)
    asked = json.loads(capfd.readouterr().out)
    assert "--project=my-project" in asked
    if follow:
        assert asked[:4] == ["ai", "custom-jobs", "stream-logs", "345"]
        assert "--region=europe-west4" in asked
    else:
        assert 'resource.labels.job_id="345"' in asked[-1]
