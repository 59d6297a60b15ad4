"""Checks of a Kubernetes job that no user can make fail.

What a schema cannot see, and what would nevertheless not do what it should:
workers that do not find each other, exit codes that mean something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain import errors

Document = Mapping[str, Any]

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
# What an operator of JobSets adds to the name of a pod.
SUFFIX = "-abcde"


def check(documents: Sequence[Document]) -> None:
    """Checks a Job with its Service, or a JobSet.

    Raises:
        AssertionError: they would be refused, or would not do what they should.
    """
    services = [item for item in documents if item["kind"] == "Service"]
    for document in documents:
        name = document["metadata"]["name"]
        _check_label("name", name)
        if document["kind"] == "Job":
            _check_job(document["spec"], name, services)
        elif document["kind"] == "JobSet":
            _check_job_set(document)


def _check_job_set(document: Document) -> None:
    name, spec = document["metadata"]["name"], document["spec"]
    network = spec.get("network", {})
    for member in spec["replicatedJobs"]:
        host = f"{name}-{member['name']}-0"
        job = member["template"]["spec"]
        last = f"{host}-{job['completions'] - 1}{SUFFIX}"
        _check_label("the name of a pod", last)
        _check_policy(job)
        _check_pod(job["template"]["spec"])
        _check_network(job, host, network.get("subdomain", ""))
        if _workers(job) and not network.get("publishNotReadyAddresses"):
            raise AssertionError(
                "network.publishNotReadyAddresses must be true: the workers "
                "meet before they are ready"
            )
    failure = spec.get("failurePolicy", {})
    final = [
        rule
        for rule in failure.get("rules", [])
        if rule["action"] == "FailJobSet"
        and rule.get("onJobFailureReasons") == ["PodFailurePolicy"]
    ]
    if not final:
        raise AssertionError(
            "failurePolicy must have a rule FailJobSet on PodFailurePolicy: a "
            "user's mistake would be started again"
        )


def _check_job(spec: Document, name: str, services: Sequence[Document]) -> None:
    _check_label("the name of a pod", f"{name}-{spec['completions'] - 1}")
    _check_policy(spec)
    template = spec["template"]
    _check_pod(template["spec"])
    subdomain = template["spec"].get("subdomain", "")
    _check_network(spec, name, subdomain)
    if not subdomain:
        return
    service = next(
        (each for each in services if each["metadata"]["name"] == subdomain),
        None,
    )
    if service is None:
        raise AssertionError(
            f"subdomain ({subdomain}) must be a Service's name"
        )
    _check_service(service["spec"], template["metadata"]["labels"])


def _check_service(spec: Document, labels: Mapping[str, str]) -> None:
    if spec.get("clusterIP") != "None":
        raise AssertionError(
            f"clusterIP ({spec.get('clusterIP')}) must be None: another "
            "Service gives its pods no names"
        )
    if not spec.get("publishNotReadyAddresses"):
        raise AssertionError(
            "publishNotReadyAddresses must be true: the workers meet before "
            "they are ready"
        )
    selector = spec.get("selector", {})
    if not selector or not selector.items() <= labels.items():
        raise AssertionError(
            f"selector ({selector}) must name labels of the pods ({labels})"
        )


def _check_network(spec: Document, host: str, subdomain: str) -> None:
    """Checks that the workers find each other under the names of the pods.

    Raises:
        AssertionError: they do not.
    """
    count = spec["completions"]
    if spec.get("completionMode") != "Indexed" or spec["parallelism"] != count:
        raise AssertionError(
            f"completions ({count}) must be Indexed, and all of them run at "
            f"the same time; parallelism is {spec['parallelism']}"
        )
    workers = _workers(spec)
    if not workers and count == 1:
        return
    names = [address.rpartition(":")[0] for address in workers]
    expected = [f"{host}-{index}.{subdomain}" for index in range(count)]
    if names != expected:
        raise AssertionError(
            f"DTRAIN_WORKERS ({','.join(workers)[:200]}) must name the pods, "
            f"{expected[0]} to {expected[-1]}"
        )


def _workers(spec: Document) -> list[str]:
    [container] = spec["template"]["spec"]["containers"]
    found = [
        each["value"]
        for each in container["env"]
        if each["name"] == "DTRAIN_WORKERS"
    ]
    return found[0].split(",") if found else []


def _check_policy(spec: Document) -> None:
    """Checks which ends of a pod end the job, and which do not count.

    Raises:
        AssertionError: it is not as the exit codes of `launch.node` mean it.
    """
    pod = spec["template"]["spec"]
    if pod["restartPolicy"] != "Never":
        raise AssertionError(
            f"restartPolicy ({pod['restartPolicy']}) must be Never, without "
            "which no podFailurePolicy is allowed"
        )
    names = [each["name"] for each in pod["containers"]]
    actions: list[tuple[str, object]] = []
    for rule in spec["podFailurePolicy"]["rules"]:
        for each in rule.get("onPodConditions", ()):
            actions.append((rule["action"], each["type"]))
        if "onExitCodes" not in rule:
            continue
        codes = rule["onExitCodes"]
        values = codes["values"]
        if codes.get("containerName", names[0]) not in names:
            raise AssertionError(
                f"containerName ({codes['containerName']}) must be one of "
                f"{', '.join(names)}"
            )
        if values != sorted(set(values)) or 0 in values:
            raise AssertionError(
                f"values ({values}) must be in order, without 0, which is no "
                "failure"
            )
        actions += [(rule["action"], value) for value in values]
    mistake = ("FailJob", errors.USER_ERROR)
    # A pod that is taken away may nevertheless have told of a mistake.
    if actions[:1] != [mistake]:
        raise AssertionError(
            f"the first rule must be FailJob on {errors.USER_ERROR}: a user's "
            "mistake would be started again"
        )
    for what in ("DisruptionTarget", errors.RUN_AGAIN):
        if ("Ignore", what) not in actions:
            raise AssertionError(
                f"a rule must Ignore {what}: preemptions would count"
            )


def _check_grace(pod: Document, container: Document) -> None:
    arguments = container["args"]
    ours = arguments[: arguments.index("--")]
    told = [
        float(each.partition("=")[2])
        for each in ours
        if each.startswith("--grace_secs=")
    ]
    grace_secs = pod["terminationGracePeriodSeconds"]
    if not told or told[-1] >= grace_secs:
        raise AssertionError(
            f"terminationGracePeriodSeconds ({grace_secs}) must be more than "
            f"the grace_secs of the supervisor ({told[-1:]}), which has to "
            "end its worker before it is killed itself"
        )


def _check_security(pod: Document, container: Document) -> None:
    user = pod["securityContext"]
    if not user.get("runAsNonRoot") or not user.get("runAsUser"):
        raise AssertionError(
            f"securityContext ({user}) must name a user that is not root"
        )
    rights = container["securityContext"]
    if not rights.get("readOnlyRootFilesystem") or rights.get(
        "allowPrivilegeEscalation", True
    ):
        raise AssertionError(
            f"securityContext ({rights}) must have a read-only root file "
            "system and no way to more rights"
        )


def _check_mounts(pod: Document, container: Document) -> None:
    volumes = [volume["name"] for volume in pod["volumes"]]
    for mount in container["volumeMounts"]:
        if mount["name"] not in volumes:
            raise AssertionError(
                f"{mount['mountPath']} mounts {mount['name']}, which is no "
                "volume"
            )


def _check_pod(pod: Document) -> None:
    [container] = pod["containers"]
    _check_grace(pod, container)
    _check_mounts(pod, container)
    _check_security(pod, container)


def _check_label(what: str, name: str) -> None:
    if not LABEL.fullmatch(name):
        raise AssertionError(
            f"{what} ({name}) must be of a-z, 0-9 and -, with a letter or "
            "digit at both ends, and have at most 63 of them"
        )
