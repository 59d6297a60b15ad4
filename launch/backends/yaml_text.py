"""The documents of a Kubernetes job: how they are written, and checked.

An API server refuses a field of the wrong type. What it takes, and what would
nevertheless not do what it should, is found by `check`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from dtrain import errors
from dtrain.errors import UserError

Document = Mapping[str, Any]

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_QUALIFIED = re.compile(
    rf"({_SUBDOMAIN.pattern}/)?[A-Za-z0-9]([-\w.]{{0,61}}[A-Za-z0-9])?",
    re.ASCII,
)
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?", re.ASCII)

# What Linux gives to one argument, or to one variable with its name.
_MAX_TEXT_BYTES = 128 << 10
# What an operator of JobSets adds to the name of a pod.
_SUFFIX = "-abcde"

# What no parser of YAML takes for anything but text: 1e3 is text to Python's,
# and a number to that of Kubernetes.
_PLAIN = re.compile(r"[A-Za-z/][-\w./]+", re.ASCII)
_TEXT = "tag:yaml.org,2002:str"


class _Dumper(yaml.SafeDumper):
    """Writes text so that every parser reads it as the same text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Writes what occurs twice, twice."""
        del data
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Such as no and true.
    is_word = dumper.resolve(yaml.ScalarNode, text, (True, False)) == _TEXT
    style = None if is_word and _PLAIN.fullmatch(text) else '"'
    return dumper.represent_scalar(_TEXT, text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(documents: Sequence[Document]) -> str:
    """Returns documents as YAML.

    Args:
        documents: what `check` has nothing against.
    """
    return yaml.dump_all(
        documents,
        Dumper=_Dumper,
        sort_keys=False,
        explicit_start=True,
        allow_unicode=True,
        width=float("inf"),
    )


def check(documents: Sequence[Document]) -> None:
    """Checks what schemas cannot see.

    Args:
        documents: a Job with its Service, or a JobSet.

    Raises:
        UserError: they would be refused, or would not do what they should.
    """
    for path, text in _texts(documents, ""):
        _check_text(path, text)
    services = [each for each in documents if each["kind"] == "Service"]
    for document in documents:
        metadata = document["metadata"]
        _check_name("name", metadata["name"], _LABEL)
        _check_name("namespace", metadata.get("namespace", "x"), _LABEL)
        if document["kind"] == "Job":
            _check_job(document["spec"], metadata["name"], services)
        elif document["kind"] == "JobSet":
            _check_job_set(document)


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yields all text of a document, keys included, and where it is."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield f"a key of {path}", key
            yield from _texts(each, key)
    elif isinstance(value, Sequence):
        for each in value:
            yield from _texts(each, path)


def _check_text(path: str, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path} ({text[:80]!r}) must be UTF-8, which is all that "
            "Kubernetes hands on"
        ) from error
    if size >= _MAX_TEXT_BYTES:
        raise UserError(
            f"{path} ({text[:40]!r} ...) has {size:,} bytes, and Linux starts "
            f"no program with {_MAX_TEXT_BYTES:,} or more; take fewer nodes or "
            "shorter flags"
        )


def _check_job_set(document: Document) -> None:
    name, spec = document["metadata"]["name"], document["spec"]
    network = spec.get("network", {})
    for each in spec["replicatedJobs"]:
        host = f"{name}-{each['name']}-0"
        job = each["template"]["spec"]
        last = f"{host}-{job['completions'] - 1}{_SUFFIX}"
        _check_name("the name of a pod", last, _LABEL)
        _check_policy(job)
        _check_pod(job["template"]["spec"])
        _check_network(job, host, network.get("subdomain", ""))
        if _workers(job) and not network.get("publishNotReadyAddresses"):
            raise UserError(
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
        raise UserError(
            "failurePolicy must have a rule FailJobSet on PodFailurePolicy: a "
            "user's mistake would be started again"
        )


def _check_job(spec: Document, name: str, services: Sequence[Document]) -> None:
    _check_name(
        "the name of a pod", f"{name}-{spec['completions'] - 1}", _LABEL
    )
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
        raise UserError(f"subdomain ({subdomain}) must be a Service's name")
    _check_service(service["spec"], template["metadata"]["labels"])


def _check_service(spec: Document, labels: Mapping[str, str]) -> None:
    if spec.get("clusterIP") != "None":
        raise UserError(
            f"clusterIP ({spec.get('clusterIP')}) must be None: another "
            "Service gives its pods no names"
        )
    if not spec.get("publishNotReadyAddresses"):
        raise UserError(
            "publishNotReadyAddresses must be true: the workers meet before "
            "they are ready"
        )
    selector = spec.get("selector", {})
    if not selector or not selector.items() <= labels.items():
        raise UserError(
            f"selector ({selector}) must name labels of the pods ({labels})"
        )


def _check_network(spec: Document, host: str, subdomain: str) -> None:
    """Checks that the workers find each other under the names of the pods.

    Raises:
        UserError: they do not.
    """
    count = spec["completions"]
    if spec.get("completionMode") != "Indexed" or spec["parallelism"] != count:
        raise UserError(
            f"completions ({count}) must be Indexed, and all of them run at "
            f"the same time; parallelism is {spec['parallelism']}"
        )
    workers = _workers(spec)
    if not workers and count == 1:
        return
    names = [address.rpartition(":")[0] for address in workers]
    expected = [f"{host}-{index}.{subdomain}" for index in range(count)]
    if names != expected:
        raise UserError(
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
        UserError: it is not as the exit codes of `launch.node` mean it.
    """
    pod = spec["template"]["spec"]
    if pod["restartPolicy"] != "Never":
        raise UserError(
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
            raise UserError(
                f"containerName ({codes['containerName']}) must be one of "
                f"{', '.join(names)}"
            )
        if values != sorted(set(values)) or 0 in values:
            raise UserError(
                f"values ({values}) must be in order, without 0, which is no "
                "failure"
            )
        actions += [(rule["action"], value) for value in values]
    mistake = ("FailJob", errors.USER_ERROR)
    # A pod that is taken away may nevertheless have told of a mistake.
    if actions[:1] != [mistake]:
        raise UserError(
            f"the first rule must be FailJob on {errors.USER_ERROR}: a user's "
            "mistake would be started again"
        )
    for what in ("DisruptionTarget", errors.RUN_AGAIN):
        if ("Ignore", what) not in actions:
            raise UserError(
                f"a rule must Ignore {what}: preemptions would count"
            )


def _check_pod(pod: Document) -> None:
    [container] = pod["containers"]
    account = pod.get("serviceAccountName", "x")
    _check_name("service_account", account, _SUBDOMAIN)
    for label, value in pod.get("nodeSelector", {}).items():
        if not _QUALIFIED.fullmatch(label) or not _LABEL_VALUE.fullmatch(value):
            raise UserError(
                f"node_selector ({label}={value}) must be a label of "
                "Kubernetes: letters, digits, -, _ and ., 63 at most, and a "
                "domain with / in front of its name if it has one"
            )
    _check_grace(pod, container)
    _check_mounts(pod, container)
    _check_security(pod, container)


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
        raise UserError(
            f"terminationGracePeriodSeconds ({grace_secs}) must be more than "
            f"the grace_secs of the supervisor ({told[-1:]}), which has to "
            "end its worker before it is killed itself"
        )


def _check_mounts(pod: Document, container: Document) -> None:
    volumes = [each["name"] for each in pod["volumes"]]
    for each in pod["volumes"]:
        claim = each.get("persistentVolumeClaim", {}).get("claimName", "x")
        _check_name("volume_claim", claim, _SUBDOMAIN)
    seen: set[str] = set()
    for each in container["volumeMounts"]:
        path = each["mountPath"]
        if not path.startswith("/") or path == "/" or ":" in path:
            raise UserError(
                f"volume_claim: {path!r} must be an absolute path, not / and "
                "without a colon"
            )
        if path in seen:
            raise UserError(
                f"volume_claim: {path} is mounted twice; /tmp and /dev/shm are "
                "taken"
            )
        seen.add(path)
        if each["name"] not in volumes:
            raise UserError(f"{path} mounts {each['name']}, which is no volume")


def _check_security(pod: Document, container: Document) -> None:
    user = pod["securityContext"]
    if not user.get("runAsNonRoot") or not user.get("runAsUser"):
        raise UserError(
            f"securityContext ({user}) must name a user that is not root"
        )
    rights = container["securityContext"]
    if not rights.get("readOnlyRootFilesystem") or rights.get(
        "allowPrivilegeEscalation", True
    ):
        raise UserError(
            f"securityContext ({rights}) must have a read-only root file "
            "system and no way to more rights"
        )


def _check_name(what: str, name: str, rule: re.Pattern[str]) -> None:
    if not rule.fullmatch(name):
        raise UserError(
            f"{what} ({name}) must be of a-z, 0-9 and -, with a letter or "
            "digit at both ends, and have at most 63 of them"
        )
