"""Manifests of Kubernetes: what they say, and who takes them.

There is no cluster here. What a manifest says is compared with a file,
validated by the schemas of several Kubernetes releases and by the model of
JobSet's own API, and read by the real kubectl, which also makes the requests.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from dtrain import errors
from dtrain.errors import UserError
from launch import main
from launch.backends import kubernetes, manifest_patch, yaml_text
from launch.job import FAILED, FINISHED, QUEUED, RUNNING, UNKNOWN, Job, Plan
from launch.submission import Submission
from tests import build_files, kubernetes_workload, plans, runs, typed
from tests.kubernetes_api import KubernetesApi
from tests.requirement import missing

SECS = plans.SECS
UNIQUE = f"{SECS}-{plans.MARK}"
# The first that has all fields on by default, and the newest of the schemas.
RELEASES = ("1.31", "1.34", "1.37")

STORE, CLAIM, ON_CLAIM = plans.STORE, plans.CLAIM, plans.ON_CLAIM
FLAGS = plans.KUBERNETES


def make_job(*flags: str) -> Job:
    """A job as the command line makes it, but with an image and a clock."""
    return plans.make_job("--backend=kubernetes", *plans.IMAGE, *flags)


def make_plan(*flags: str) -> Plan:
    plan = kubernetes.plan(make_job(*flags))
    kubernetes_workload.check(documents(plan))
    return plan


def documents(plan: Plan) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(plan.files[plan.stdin]))


def job_spec(document: dict[str, Any]) -> dict[str, Any]:
    """The spec of a Job, or of the one in a JobSet."""
    spec = document["spec"]
    if document["kind"] == "JobSet":
        [only] = spec["replicatedJobs"]
        spec = only["template"]["spec"]
    return spec


def pod_spec(document: dict[str, Any]) -> dict[str, Any]:
    return job_spec(document)["template"]["spec"]


def container(document: dict[str, Any]) -> dict[str, Any]:
    [only] = pod_spec(document)["containers"]
    return only


@pytest.fixture(scope="module", autouse=True)
def _programs() -> Iterator[None]:
    """What `make` installs is found, also where its bin is not on PATH."""
    with pytest.MonkeyPatch.context() as patch:
        place = os.path.dirname(sys.executable)
        patch.setenv("PATH", place, prepend=os.pathsep)
        yield


def check_program(name: str) -> None:
    if not shutil.which(name):
        missing(f"{name}: make test installs it")


def validate(document: dict[str, Any], release: str) -> None:
    try:
        import kubernetes_validate
    except ImportError:
        missing("kubernetes-validate: make test installs it")
    kubernetes_validate.validate(document, release, strict=True)


def validate_job_set(document: dict[str, Any]) -> None:
    try:
        from kubeflow_trainer_api import models
    except ImportError:
        missing("kubeflow-trainer-api: make test installs it")
    document = copy.deepcopy(document)
    # Its generator made a class of what is a number or text.
    for amounts in container(document)["resources"].values():
        for name, amount in amounts.items():
            quantity = models.IoK8sApimachineryPkgApiResourceQuantity(amount)
            amounts[name] = quantity
    models.JobsetV1alpha2JobSet.model_validate(document, extra="forbid")


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", FLAGS)
def test_the_schemas_take_it(name: str, release: str) -> None:
    for document in documents(make_plan(*FLAGS[name])):
        if document["kind"] != "JobSet":
            validate(document, release)
            continue
        validate_job_set(document)
        spec = {"metadata": {"name": "inner"}, "spec": job_spec(document)}
        validate({"apiVersion": "batch/v1", "kind": "Job", **spec}, release)


def test_the_schemas_would_find_a_mistake() -> None:
    """The strictness is not for show."""
    [job] = documents(make_plan(*STORE))
    pod_spec(job)["terminationGracePeriodSecs"] = 1
    with pytest.raises(Exception, match="terminationGracePeriodSecs"):
        validate(job, RELEASES[0])
    [job_set] = documents(make_plan("--gang=jobset", *STORE))
    job_set["spec"]["network"]["publishNotReady"] = True
    with pytest.raises(Exception, match="publishNotReady"):
        validate_job_set(job_set)


def kubectl(*arguments: str, stdin: str) -> list[dict[str, Any]]:
    """Runs the real one, without a server; returns what it prints."""
    check_program("kubectl")
    done = subprocess.run(
        ["kubectl", *arguments, "--local", "--filename=-", "--output=json"],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    decoder, text, found = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:].strip()
    return found


@pytest.mark.parametrize("name", FLAGS)
def test_kubectl_reads_the_same(name: str) -> None:
    """Its parser of YAML is another one than Python's."""
    plan = make_plan(*FLAGS[name])
    label = ("label", "app.kubernetes.io/name=dtrain", "--overwrite")
    assert kubectl(*label, stdin=plan.files[plan.stdin]) == documents(plan)


def is_within(part: Any, whole: Any) -> bool:
    """Tells whether a document lost nothing; there may be more in it."""
    if isinstance(part, dict):
        return all(
            key in whole and is_within(each, whole[key])
            for key, each in part.items()
        )
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(is_within, part, whole))
    # Numbers of a resource come back as text.
    return part == whole or str(part) == whole


@pytest.mark.parametrize("name", ["gpus", "limits", "claims", "awkward"])
def test_kubectl_knows_every_field_of_a_job(name: str) -> None:
    """It drops what the types of its own release do not have."""
    plan = make_plan(*FLAGS[name])
    job = documents(plan)[-1]
    text = yaml_text.dump([job])
    [typed] = kubectl("set", "image", "worker=another", stdin=text)
    container(job)["image"] = "another"
    assert is_within(job, typed)


TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"))


def expand(text: str, variables: dict[str, str]) -> str:
    """The rule of Kubernetes for arguments, byte by byte as it is applied.

    A $(NAME) becomes what the variable holds, or stays where there is none;
    $$ becomes $; of a $ before any other byte, that byte is a character.
    """
    data, out, place = text.encode(), bytearray(), 0
    while place < len(data):
        here = data[place : place + 1]
        following = data[place + 1 : place + 2]
        place += 1
        if here != b"$" or not following:
            out += here
        elif following == b"$":
            out += b"$"
            place += 1
        elif following == b"(" and b")" in data[place:]:
            end = data.index(b")", place)
            name = data[place + 1 : end].decode()
            out += variables.get(name, f"$({name})").encode()
            place = end + 1
        else:
            out += b"$" + following.decode("latin-1").encode()
            place += 1
    return out.decode(errors="surrogateescape")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(A)", "1"),
        ("$(B) $(", "$(B) $("),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("a$", "a$"),
        ("$é", "$Ã\udca9"),
    ],
)
def test_the_rule_of_kubernetes(text: str, expected: str) -> None:
    assert expand(text, {"A": "1"}) == expected


DOLLARS = st.lists(
    st.sampled_from(["$", "(", ")", "HOME", "$(HOME)", "é"])
).map("".join)


@given(st.lists(TEXT | DOLLARS, max_size=4))
@example([typed.ALL.replace("\udcff", "")])
def test_arguments_arrive_as_they_were_typed(typed: list[str]) -> None:
    job = dataclasses.replace(make_job(*STORE), arguments=tuple(typed))
    options = dataclasses.replace(
        job.options,
        env=tuple(f"TYPED_{n}={each}" for n, each in enumerate(typed)),
    )
    job = dataclasses.replace(job, options=options)
    [document] = documents(kubernetes.plan(job))
    environment = [
        expand(each["value"], {"HOME": "/tmp"})
        for each in container(document)["env"]
        if each["name"].startswith("TYPED_")
    ]
    assert environment == typed
    args = [
        expand(each, {"HOME": "/tmp"}) for each in container(document)["args"]
    ]
    end = args.index("--") + 1
    assert args[end : end + len(typed)] == typed
    assert args[end + len(typed) :] == ["--grace_secs=60"]


@given(st.lists(TEXT, min_size=1, max_size=4))
def test_text_is_written_as_text(texts: list[str]) -> None:
    [found] = yaml.safe_load_all(yaml_text.dump([{"x": texts}]))
    assert found == {"x": texts}


def test_kubectl_takes_no_text_for_a_number() -> None:
    texts = ["1e3", "0x1f", "0o17", "017", "1_0", "12:30", "y", "no", "null"]
    texts += ["~", "", "- a", "a: b", "#", "&a", "*a", "!a", "%a", "@a", "`"]
    texts += [".inf", "=", "<<", "{}", "[", "2027-01-15", "\t", " ", "\x7f"]
    texts += ["\x85", "\u2028", "\ufeff", "\ufffe", "\U0001f600", "a\nb\n"]
    annotations = {f"a{index}": text for index, text in enumerate(texts)}
    document = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x", "annotations": annotations},
    }
    [found] = kubectl("label", "a=b", stdin=yaml_text.dump([document]))
    assert found["metadata"]["annotations"] == annotations


def test_who_is_who() -> None:
    """The names are those that Kubernetes gives to the pods."""
    for gang, host in (("job", "faces-{}"), ("jobset", "faces-{}-worker-0")):
        name = f"faces-{UNIQUE}"
        *_, document = documents(
            make_plan(f"--gang={gang}", "--num_nodes=2", *STORE)
        )
        variables = {
            each["name"]: each["value"] for each in container(document)["env"]
        }
        host = host.format(UNIQUE)
        assert variables["DTRAIN_WORKERS"] == (
            f"{host}-0.{name}:2222,{host}-1.{name}:2222"
        )


def test_a_long_name_leaves_room_for_those_of_the_pods() -> None:
    plan = make_plan(
        *(f"--name={'a' * 24}-{'b' * 25}", "--gang=jobset"),
        *("--num_nodes=1000", *STORE),
    )
    [document] = documents(plan)
    name = document["metadata"]["name"]
    assert name == f"{'a' * 24}-{UNIQUE}"
    assert len(f"{name}-worker-0-9999-abcde") <= 63


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--image=", *STORE), "image is missing; build one with"),
        (("--", "--run_dir=runs/x"), "run_dir (runs/x) would be lost with its"),
        ((*CLAIM, "--", "--run_dir=/database/x"), "would be lost with its pod"),
        ((*CLAIM, "--", "--run_dir=/data/../x"), "would be lost with its pod"),
        (
            (*STORE, "--checkpoint_dir=/tmp/x"),
            "checkpoint_dir (/tmp/x) would be lost",
        ),
        (
            ("--volume_claim=runs:/data", *ON_CLAIM),
            "only the pods see; add --record_dir=DIR",
        ),
        (("--volume_claim=runs", *STORE), "must be of the form CLAIM:/PATH"),
        (("--volume_claim=runs:x", *STORE), "must be of the form CLAIM:/PATH"),
        (("--volume_claim=Runs:/x", *STORE), "volume_claim (Runs) must be of"),
        (("--volume_claim=runs:/", *STORE), "'/' must be an absolute path"),
        (("--volume_claim=runs:/tmp", *STORE), "/tmp is mounted twice"),
        (
            (*CLAIM, "--volume_claim=x:/data/", *ON_CLAIM),
            "/data is mounted twice",
        ),
        (("--node_selector=zone", *STORE), "must be of the form key=value"),
        (("--node_selector=a/b/c=d", *STORE), "node_selector (a/b/c=d) must"),
        (("--node_selector=zone=a b", *STORE), "node_selector (zone=a b) must"),
        (
            ("--node_selector=a=1", "--node_selector=a=2", *STORE),
            "node_selector (a) is given twice; leave one out",
        ),
        (("--label=a", *STORE), "label (a) must be of the form key=value"),
        (("--label=a=b c", *STORE), "label (a=b c) must be a label"),
        (("--label=a/b/c=d", *STORE), "label (a/b/c=d) must be a label"),
        (
            ("--label=app.kubernetes.io/name=x", *STORE),
            "label (app.kubernetes.io/name) is set by dtrain",
        ),
        (("--annotation=a b=c", *STORE), "annotation (a b) must be a label"),
        (("--toleration=:NoExecute", *STORE), "toleration (:NoExecute) must"),
        (("--toleration=a=b:Never", *STORE), "with an effect of NoSchedule"),
        (("--toleration=a b", *STORE), "toleration (a b=) must be a label"),
        (("--env_secret=A_B", *STORE), "env_secret (A_B) must be of a-z"),
        (("--image_pull_secret=A", *STORE), "image_pull_secret (A) must be"),
        (("--priority_class=A", *STORE), "priority_class (A) must be of a-z"),
        (("--extra_resource=cpu=3", *STORE), "extra_resource (cpu=3) must be"),
        (("--extra_resource=a/b=1G", *STORE), "(a/b=1G) must be of the form"),
        (
            (
                *("--gpus_per_node=1", "--extra_resource=nvidia.com/gpu=2"),
                *STORE,
            ),
            "extra_resource (nvidia.com/gpu=2) must be of the form",
        ),
        (
            ("--extra_resource=nvidia.com/gpu=2", *STORE),
            "extra_resource (nvidia.com/gpu=2) must be of the form",
        ),
        (
            (
                *("--volume_claim=runs:/data:ro", "--record_dir=/x", "--"),
                "--run_dir=/data/x",
            ),
            "run_dir (/data/x) would be lost with its pod",
        ),
        (("--manifest_patch=/none", *STORE), "(/none) cannot be read: No such"),
        (("--namespace=My", *STORE), "namespace (My) must be of a-z"),
        (("--service_account=a_b", *STORE), "service_account (a_b) must be of"),
        (("--gpu_type=nvidia-l4", *STORE), "gpu_type (nvidia-l4) needs"),
        (
            ("--max_hours=1", *STORE, "--stop_after_secs=60"),
            "max_hours (1) sets stop_after_secs (60)",
        ),
        (
            ("--grace_secs=30", *STORE, "--grace_secs=31"),
            "grace_secs (31) of dtrain.main must not be more than",
        ),
        ((*STORE, "--model=a:\udcff"), "must be UTF-8"),
        (("--num_nodes=9999", *STORE), "take fewer nodes or shorter flags"),
    ],
)
def test_flags_that_do_not_fit(flags: Sequence[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(*flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold mappings that begin with `kind:`"),
        ("- a", "must hold mappings that begin with `kind:`"),
        ("a: [", "is no YAML: while parsing"),
        ("\x1b[2J", "is no YAML: unacceptable character"),
        ("spec: {}", "kind (None) must be one of Service, Job, Pod"),
        ("kind: Deployment", "kind (Deployment) must be one of Service, Job"),
        ("kind: [Job]", "kind (['Job']) must be one of Service, Job, Pod"),
        ("{kind: Job, spec: {a: 2027-01-15}}", "spec.a (2027-01-15) must be"),
        ("{kind: Job, spec: {1: a}}", "the key spec.1 must be text"),
        ("{kind: Job, metadata: {name: x}}", "must leave name, namespace and"),
        ("{kind: Job, metadata: {namespace: x}}", "must leave name, namespace"),
        ("{kind: Job, metadata: {labels: null}}", "must leave name, namespace"),
        ("{kind: Service, metadata: 3}", "must leave name, namespace and"),
        ("{kind: Job, spec: 3}", "leaves nothing to make pods from"),
        ("{kind: Pod, spec: {containers: []}}", "leaves nothing to make pods"),
        ("{kind: Pod, spec: null}", "leaves nothing to make pods from"),
    ],
)
def test_patches_that_do_not_fit(
    text: str, message: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "patch.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        make_plan(f"--manifest_patch={path}", "--num_nodes=2", *STORE)
    assert str(caught.value).startswith(f"manifest_patch ({path})")
    assert message in str(caught.value)


def test_a_patch_is_merged() -> None:
    """Key by key; item by item where items have names; null removes."""
    before = {
        "a": {"b": 1, "c": [1, 2]},
        "d": [{"name": "x", "e": 1, "f": 2}, {"name": "y"}],
        "g": 1,
    }
    patch = {
        "a": {"c": [3]},
        "d": [{"name": "z"}, {"name": "x", "e": None, "f": 3}],
        "g": None,
        "h": {"i": None},
    }
    assert manifest_patch.merge(before, patch) == {
        "a": {"b": 1, "c": [3]},
        "d": [{"name": "x", "f": 3}, {"name": "y"}, {"name": "z"}],
        "h": {},
    }


Break = Callable[[Any, Any], object]


def rules(job: dict[str, Any]) -> list[dict[str, Any]]:
    return job["spec"]["podFailurePolicy"]["rules"]


BREAKS: dict[str, tuple[Break, str]] = {
    "restart": (
        lambda _, job: pod_spec(job).update(restartPolicy="OnFailure"),
        "restartPolicy (OnFailure) must be Never",
    ),
    "container": (
        lambda _, job: rules(job)[0]["onExitCodes"].update(containerName="x"),
        "containerName (x) must be one of worker",
    ),
    "order": (
        lambda _, job: rules(job)[2]["onExitCodes"].update(values=[75, 70]),
        "values ([75, 70]) must be in order",
    ),
    "zero": (
        lambda _, job: rules(job)[0]["onExitCodes"].update(values=[0, 78]),
        "values ([0, 78]) must be in order, without 0",
    ),
    "mistake": (
        lambda _, job: rules(job).reverse(),
        "the first rule must be FailJob on 78",
    ),
    "disruption": (
        lambda _, job: rules(job).pop(1),
        "a rule must Ignore DisruptionTarget",
    ),
    "again": (lambda _, job: rules(job).pop(), "a rule must Ignore 75"),
    "grace": (
        lambda _, job: pod_spec(job).update(terminationGracePeriodSeconds=60),
        "terminationGracePeriodSeconds (60) must be more than",
    ),
    "subdomain": (
        lambda _, job: pod_spec(job).update(subdomain="x"),
        "DTRAIN_WORKERS",
    ),
    "service": (
        lambda service, _: service["metadata"].update(name="x"),
        "must be a Service's name",
    ),
    "address": (
        lambda service, _: service["spec"].pop("clusterIP"),
        "clusterIP (None) must be None",
    ),
    "ready": (
        lambda service, _: service["spec"].pop("publishNotReadyAddresses"),
        "publishNotReadyAddresses must be true",
    ),
    "selector": (
        lambda service, _: service["spec"].update(selector={"a": "b"}),
        "must name labels of the pods",
    ),
    "indexed": (
        lambda _, job: job["spec"].pop("completionMode"),
        "completions (2) must be Indexed",
    ),
    "parallelism": (
        lambda _, job: job["spec"].update(parallelism=1),
        "parallelism is 1",
    ),
    "workers": (
        lambda _, job: container(job)["env"].pop(),
        "DTRAIN_WORKERS () must name the pods",
    ),
    "volume": (
        lambda _, job: pod_spec(job)["volumes"].pop(),
        "mounts shm, which is no volume",
    ),
    "root": (
        lambda _, job: pod_spec(job)["securityContext"].update(runAsUser=0),
        "must name a user that is not root",
    ),
    "writable": (
        lambda _, job: container(job)["securityContext"].pop(
            "readOnlyRootFilesystem"
        ),
        "must have a read-only root file system",
    ),
    "name": (
        lambda _, job: job["metadata"].update(name="a" * 62),
        "the name of a pod (aaa",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_manifests_that_would_not_do(name: str) -> None:
    [service, job] = documents(make_plan("--num_nodes=2", *STORE))
    kubernetes_workload.check([service, job])
    breaks, message = BREAKS[name]
    breaks(service, job)
    with pytest.raises(AssertionError) as caught:
        kubernetes_workload.check([service, job])
    assert message in str(caught.value)


def test_job_sets_that_would_not_do() -> None:
    [good] = documents(make_plan("--gang=jobset", "--num_nodes=2", *STORE))
    for breaks, message in (
        (
            lambda spec: spec["failurePolicy"].pop("rules"),
            "must have a rule FailJobSet on PodFailurePolicy",
        ),
        (
            lambda spec: spec["network"].pop("publishNotReadyAddresses"),
            "publishNotReadyAddresses must be true",
        ),
        (
            lambda spec: spec["replicatedJobs"][0].update(name="w" * 12),
            "the name of a pod",
        ),
        (
            lambda spec: spec["network"].update(subdomain="x"),
            "must name the pods",
        ),
    ):
        broken = copy.deepcopy(good)
        breaks(broken["spec"])
        if message == "the name of a pod":
            broken["metadata"]["name"] = "a" * 43
        with pytest.raises(AssertionError, match=message):
            kubernetes_workload.check([broken])


def submitted(**options: Any) -> Submission:
    return Submission(
        backend="kubernetes",
        job_id=f"research/faces-{SECS}",
        name="faces",
        run_dirs=["gs://bucket/faces"],
        directory="gs://bucket/faces/launch/20270115-080000",
        submitted_secs=SECS,
        options=options,
        arguments=[],
        submit=[],
        versions={},
    )


def condition(kind: str, **more: str) -> dict[str, str]:
    return {
        "type": kind,
        "status": "True",
        "lastProbeTime": "2027-01-15T08:10:00Z",
        "lastTransitionTime": "2027-01-15T08:10:00Z",
        **more,
    }


def made_job(**status: Any) -> dict[str, Any]:
    """A Job as an API server returns it."""
    document = documents(make_plan("--num_nodes=2", *STORE))[1]
    return {**document, "status": status}


def made_pod(index: int, **status: Any) -> dict[str, Any]:
    spec = pod_spec(documents(make_plan("--num_nodes=2", *STORE))[1])
    name = f"faces-{SECS}-{index}-x7k2p"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "research"},
        "spec": spec,
        "status": status,
    }


UNSCHEDULABLE = {
    "type": "PodScheduled",
    "status": "False",
    "lastProbeTime": None,
    "lastTransitionTime": "2027-01-15T08:00:00Z",
    "reason": "Unschedulable",
    "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
}
NO_IMAGE = {
    "name": "worker",
    "ready": False,
    "restartCount": 0,
    "image": "registry.example/dtrain:1",
    "imageID": "",
    "started": False,
    "state": {
        "waiting": {
            "reason": "ImagePullBackOff",
            "message": 'Back-off pulling image "registry.example/dtrain:1"',
        }
    },
}
MISTAKE = (
    f"Container worker for pod research/faces-{SECS}-0-x7k2p failed with exit "
    "code 78 matching FailJob rule at index 0"
)


@pytest.mark.parametrize(
    ("items", "phase", "words"),
    [
        ([], UNKNOWN, ["is not in the cluster"]),
        ([made_job()], QUEUED, ["0 of 2 pods run"]),
        (
            [
                made_job(active=2, ready=1),
                made_pod(0, phase="Running"),
                made_pod(1, phase="Pending", conditions=[UNSCHEDULABLE]),
                made_pod(1, phase="Failed"),
            ],
            RUNNING,
            [
                "1 of 2 pods run",
                "waits: Unschedulable 0/3 nodes are available",
                "1 ended before",
            ],
        ),
        (
            [
                made_job(active=2, ready=0),
                made_pod(0, phase="Pending", containerStatuses=[NO_IMAGE]),
                made_pod(1, phase="Pending"),
            ],
            QUEUED,
            ["waits: ImagePullBackOff Back-off pulling", "to be scheduled"],
        ),
        (
            [
                made_job(
                    succeeded=1,
                    conditions=[
                        condition("SuccessCriteriaMet"),
                        condition("Complete", reason="SuccessPolicy"),
                    ],
                )
            ],
            FINISHED,
            ["SuccessPolicy"],
        ),
        (
            [
                made_job(
                    failed=1,
                    conditions=[
                        condition("FailureTarget"),
                        condition(
                            "Failed", reason="PodFailurePolicy", message=MISTAKE
                        ),
                    ],
                )
            ],
            FAILED,
            ["PodFailurePolicy", "exit code 78"],
        ),
    ],
)
def test_how_a_job_is(
    items: list[dict[str, Any]],
    phase: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for item in items:
        # It is what an API server might say.
        validate(item, RELEASES[-1])
    asked: list[Sequence[str]] = []

    def answer(command: Sequence[str]) -> str:
        asked.append(command)
        return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})

    monkeypatch.setattr(kubernetes, "ask", answer)
    [state] = kubernetes.states(submitted(num_nodes=2))
    assert state.phase == phase
    assert all(word in state.details for word in words), state.details
    assert asked == [
        (
            *("kubectl", "get", "jobs.batch,pods", "--namespace=research"),
            f"--selector=app.kubernetes.io/instance=faces-{SECS}",
            "--output=json",
        )
    ]


def test_how_a_job_set_is(monkeypatch: pytest.MonkeyPatch) -> None:
    [document] = documents(make_plan("--gang=jobset", *STORE))
    counts = {"active": 0, "ready": 0, "suspended": 0}
    ended = {
        "conditions": [
            {
                "type": "Completed",
                "status": "True",
                "lastTransitionTime": "2027-01-15T09:00:00Z",
                "reason": "AllJobsCompleted",
                "message": "jobset completed successfully",
            }
        ],
        "replicatedJobsStatus": [
            {"name": "worker", "succeeded": 1, "failed": 0, **counts}
        ],
        "restarts": 2,
        "terminalState": "Completed",
    }
    document["status"] = ended
    validate_job_set(document)
    monkeypatch.setattr(
        kubernetes, "ask", lambda _: json.dumps({"items": [document]})
    )
    [state] = kubernetes.states(submitted(gang="jobset"))
    assert state.phase == FINISHED
    assert "AllJobsCompleted" in state.details


@pytest.fixture
def api(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KubernetesApi]:
    check_program("kubectl")
    with KubernetesApi() as found:
        found.write_config(tmp_path / "config")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        # It keeps what it learns of a server there.
        monkeypatch.setenv("HOME", str(tmp_path))
        yield found


def check_created(
    api: KubernetesApi, record_dir: pathlib.Path, job: dict[str, Any]
) -> None:
    """Checks that there is what the manifest says, and that it was asked for.

    Args:
        api: the server.
        record_dir: where the manifest is.
        job: what was created.
    """
    name = job["metadata"]["name"]
    [manifest_file] = record_dir.glob("launch/*/job.yaml")
    for document in yaml.safe_load_all(manifest_file.read_text()):
        made = api.objects[f"{document['kind'].lower()}s", name]
        assert made["spec"] == document["spec"]
        if document["kind"] == "Service":
            [owner] = made["metadata"]["ownerReferences"]
            assert owner["uid"] == job["metadata"]["uid"]
    posts = [url for method, url, _ in api.requests if method == "POST"]
    # All is asked for before anything is there.
    is_dry = ["dryRun=All" in url for url in posts]
    assert is_dry == sorted(is_dry, reverse=True)
    assert any(is_dry)


@pytest.mark.parametrize(
    ("gang", "resource"), [("job", "jobs"), ("jobset", "jobsets")]
)
def test_kubectl_takes_the_commands(
    gang: str,
    resource: str,
    api: KubernetesApi,
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    record_dir = tmp_path / "record"
    flags = (
        *("--backend=kubernetes", "--image=registry.example/dtrain:1"),
        *("--num_nodes=2", f"--gang={gang}", "--volume_claim=runs:/data"),
        *(f"--record_dir={record_dir}", "--", "--run_dir=/data/faces"),
    )
    assert main.run(["main", *flags]) == errors.FINISHED
    [name] = [name for kind, name in api.objects if kind == resource]
    check_created(api, record_dir, api.objects[resource, name])
    capfd.readouterr()

    labels = {"app.kubernetes.io/instance": name}
    for index, phase in enumerate(("Running", "Pending")):
        pod = made_pod(index, phase=phase)
        pod["metadata"]["labels"] = labels
        api.objects["pods", pod["metadata"]["name"]] = pod
        api.log[pod["metadata"]["name"]] = "[worker 0] step 10\n"
    where = f"--run_dir={record_dir}"
    assert main.run(["main", "status", where]) == errors.FINISHED
    assert "running  job research/faces-" in capfd.readouterr().out
    assert main.run(["main", "logs", where]) == errors.FINISHED
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("[pod/faces-")
    assert lines[0].endswith("/worker] [worker 0] step 10")
    with pytest.raises(UserError, match="has a job already, research/faces-"):
        main.run(["main", *flags])

    assert main.run(["main", "stop", where]) == errors.FINISHED
    assert (resource, name) not in api.objects
    assert "is not in the cluster" in capfd.readouterr().out
    [deletion] = [
        body for method, _, body in api.requests if method == "DELETE"
    ]
    assert deletion["propagationPolicy"] == "Foreground"


def test_what_is_refused_leaves_nothing(
    api: KubernetesApi, tmp_path: pathlib.Path
) -> None:
    api.refused["Job"] = "exceeded quota: gpus"
    record_dir = tmp_path / "record"
    with pytest.raises(UserError, match="exceeded quota: gpus"):
        main.run(
            [
                *("main", "--backend=kubernetes", "--image=x:1"),
                *("--num_nodes=2", f"--record_dir={record_dir}", *STORE),
            ]
        )
    assert not api.objects
    assert not record_dir.exists()


def test_logs_go_on_with_the_pod_that_takes_the_place(
    api: KubernetesApi, capfd: pytest.CaptureFixture[str]
) -> None:
    labels = {"app.kubernetes.io/instance": f"faces-{SECS}"}

    def start(name: str) -> None:
        pod = made_pod(0, phase="Running")
        pod["metadata"].update(name=name, labels=labels)
        api.objects["pods", name] = pod
        api.log[name] = f"this is {name}\n"

    looks: list[int] = []

    def is_over() -> bool:
        looks.append(0)
        if len(looks) == 2:
            start("second")
        return len(looks) == 3

    start("first")
    kubernetes.show_logs(submitted(), follow=True, is_over=is_over)
    assert sorted(capfd.readouterr().out.splitlines()) == [
        "[pod/first/worker] this is first",
        "[pod/second/worker] this is second",
    ]


# What a container's runtime does: the root file system cannot be written, the
# process is the first of its own, is not root and has no way back.
_CONTAINER = """\
set -e
code=$1 python=$2 base=$3 claim=$4 user=$5
shift 5
mount --make-rprivate /
case $base in
    /root/*)  # A Python that other users cannot reach.
        mount --bind "$base" /media
        mount -t tmpfs -o mode=755 tmpfs /root
        mkdir --parents "$base"
        mount --bind /media "$base" ;;
esac
mount --bind "$code" /mnt
mount --bind "$python" /opt
mount --bind "$claim" /srv
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
mount -o remount,bind,ro /
mount -o remount,bind,ro /mnt
cd /mnt
exec setpriv --reuid="$user" --regid="$user" --clear-groups --no-new-privs \\
    --inh-caps=-all --bounding-set=-all env --ignore-environment "$@"
"""


def start_pod(plan: Plan, claim: pathlib.Path) -> subprocess.Popen[str]:
    """Starts what a manifest says, with /srv as its claim."""
    [document] = documents(plan)
    what = container(document)
    variables = {each["name"]: each["value"] for each in what["env"]}
    image = {"PATH": "/opt/bin:/usr/bin:/bin", "PYTHONPATH": "/mnt"}
    pairs = {**image, **variables}.items()
    user = str(pod_spec(document)["securityContext"]["runAsUser"])
    return subprocess.Popen(
        [
            *("unshare", "--mount", "--pid", "--fork", "--mount-proc"),
            *("bash", "-c", _CONTAINER, "container"),
            *(str(build_files.ROOT), sys.prefix, sys.base_prefix),
            *(str(claim), user),
            *(f"{name}={value}" for name, value in pairs),
            *what["command"],
            *(expand(each, variables) for each in what["args"]),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_pod_survives_a_preemption(tmp_path: pathlib.Path) -> None:
    if os.geteuid() or not shutil.which("setpriv"):
        missing("root and util-linux, to make what a container is")
    claim = tmp_path / "claim"
    claim.mkdir(mode=0o777)
    claim.chmod(0o777)
    flags = (
        *("--volume_claim=runs:/srv", "--record_dir=x", "--", *runs.SMALL),
        *("--run_dir=/srv/run", "--checkpoint_every_secs=0"),
    )
    process = start_pod(make_plan(*flags, "--num_steps=1000000"), claim)
    lines = claim / "run" / "metrics.jsonl"
    while not (lines.exists() and len(lines.read_text().splitlines()) > 20):
        assert process.poll() is None, runs.finish(process)
        time.sleep(0.05)
    # What a kubelet sends, to the first process of the container.
    task = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    os.kill(int(task.read_text()), signal.SIGTERM)
    code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    step = int(runs.metrics(claim / "run")[-1]["step"])

    process = start_pod(make_plan(*flags, f"--num_steps={step + 5}"), claim)
    code, output = runs.finish(process)
    assert code == errors.FINISHED, output
    assert f"finished: step {step + 5:,}" in output
    steps = [line["step"] for line in runs.metrics(claim / "run")]
    assert steps == list(range(1, step + 6))


def run_hadolint(text: str) -> subprocess.CompletedProcess[str]:
    check_program("hadolint")
    return subprocess.run(
        ["hadolint", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_dockerfile() -> None:
    text = (build_files.ROOT / "launch" / "Dockerfile").read_text()
    done = run_hadolint(text)
    assert done.returncode == 0, done.stdout
    # It would find a mistake, also in the shell.
    done = run_hadolint(text.replace('case "$DEVICE"', "case $DEVICE; cd x"))
    assert done.returncode != 0
    # The user that the pods run as.
    [document] = documents(make_plan(*STORE))
    user = pod_spec(document)["securityContext"]
    assert f"USER {user['runAsUser']}:{user['runAsGroup']}\n" in text
    assert f"--uid={user['runAsUser']} " in text
    for name in ("requirements.lock", "dtrain", "launch"):
        assert f"\nCOPY {name} " in text
        assert (build_files.ROOT / name).exists()
