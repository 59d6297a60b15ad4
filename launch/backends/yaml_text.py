"""The documents of a Kubernetes job: how they are written, and checked.

An API server refuses a field of the wrong type. What users have chosen, and
would be refused late or do something else, is found by `check`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import yaml

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
    """Checks what users have chosen, where no API server is asked first.

    Args:
        documents: a Job with its Service, or a JobSet.

    Raises:
        UserError: they would be refused, or would not do what they should.
    """
    check_texts(documents)
    for document in documents:
        metadata = document["metadata"]
        _check_name("namespace", metadata.get("namespace", "x"), _LABEL)
        _check_labels("label", metadata["labels"])
        for key in metadata.get("annotations", {}):
            _check_key("annotation", key, key)
    for pod in _pods(documents):
        _check_pod(pod)


def check_texts(documents: Sequence[Document]) -> None:
    """Checks that all text can be handed on.

    Args:
        documents: whatever is in them.

    Raises:
        UserError: some is no UTF-8, or too long.
    """
    for path, text in _texts(documents, ""):
        _check_text(path, text)


def _pods(documents: Sequence[Document]) -> Iterator[Document]:
    """Yields what each Job says of its pods."""
    for document in documents:
        spec = document["spec"]
        if document["kind"] == "JobSet":
            [member] = spec["replicatedJobs"]
            spec = member["template"]["spec"]
        if document["kind"] != "Service":
            yield spec["template"]["spec"]


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yields all text of a document, keys included, and where it is."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"a key of {path}", key
            yield from _texts(item, key)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item, path)


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


def _check_pod(pod: Document) -> None:
    [container] = pod["containers"]
    account = pod.get("serviceAccountName", "x")
    _check_name("service_account", account, _SUBDOMAIN)
    _check_labels("node_selector", pod.get("nodeSelector", {}))
    _check_name("priority_class", pod.get("priorityClassName", "x"), _SUBDOMAIN)
    for secret in pod.get("imagePullSecrets", ()):
        _check_name("image_pull_secret", secret["name"], _SUBDOMAIN)
    for source in container.get("envFrom", ()):
        _check_name("env_secret", source["secretRef"]["name"], _SUBDOMAIN)
    for taint in pod.get("tolerations", ()):
        label = {taint["key"]: taint.get("value", "")}
        _check_labels("toleration", label)
    for name, count in container["resources"].get("limits", {}).items():
        _check_key("extra_resource", name, f"{name}={count}")
    _check_mounts(pod, container)


def _check_labels(flag: str, labels: Mapping[str, str]) -> None:
    for label, value in labels.items():
        _check_key(flag, label, f"{label}={value}")
        if not _LABEL_VALUE.fullmatch(value):
            _refuse_label(flag, f"{label}={value}")


def _check_key(flag: str, key: str, shown: str) -> None:
    if not _QUALIFIED.fullmatch(key):
        _refuse_label(flag, shown)


def _refuse_label(flag: str, shown: str) -> NoReturn:
    raise UserError(
        f"{flag} ({shown}) must be a label of Kubernetes: letters, digits, -, "
        "_ and ., 63 at most, and a domain with / in front of its name if it "
        "has one"
    )


def _check_mounts(pod: Document, container: Document) -> None:
    for volume in pod["volumes"]:
        claim = volume.get("persistentVolumeClaim", {}).get("claimName", "x")
        _check_name("volume_claim", claim, _SUBDOMAIN)
    seen: set[str] = set()
    for mount in container["volumeMounts"]:
        path = mount["mountPath"]
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


def _check_name(what: str, name: str, rule: re.Pattern[str]) -> None:
    if not rule.fullmatch(name):
        raise UserError(
            f"{what} ({name}) must be of a-z, 0-9 and -, with a letter or "
            "digit at both ends, and have at most 63 of them"
        )
