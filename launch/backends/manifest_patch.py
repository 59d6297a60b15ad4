"""What a user's file adds to the objects of a Kubernetes job.

The file holds one document, of YAML or JSON, for each object that it adds to:

    kind: Pod
    spec:
      hostAliases: [{ip: 10.0.0.1, hostnames: [store]}]

`kind` is that of the object, or Pod for what the pods are made from. Mappings
are merged, key by key; so are lists whose items have names, item by item; any
other value takes the place of what was there, and null removes it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dtrain import flags
from dtrain.errors import UserError

_PLAIN = (str, bool, int, float, type(None))


def apply(
    path: str, documents: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns documents with what a file adds to them.

    Args:
        path: of the file.
        documents: a Job with its Service, or a JobSet.

    Raises:
        UserError: the file cannot be read, or is none, or names another
            object, or changes what dtrain knows the job by.
    """
    patched = copy.deepcopy([dict(document) for document in documents])
    targets = {document["kind"]: document for document in patched}
    targets["Pod"] = _pod_template(patched[-1])
    for patch in _read(path):
        kind = patch.get("kind")
        if not isinstance(kind, str) or kind not in targets:
            raise UserError(
                f"manifest_patch ({path}): kind ({kind}) must be one of "
                f"{', '.join(targets)}"
            )
        addition = {
            name: value
            for name, value in patch.items()
            if name not in ("kind", "apiVersion")
        }
        target = targets[kind]
        merged = merge(target, addition)
        target.clear()
        target.update(merged)
        targets["Pod"] = _pod_template(patched[-1], path)
    for before, after in zip(documents, patched, strict=True):
        _check_same(path, before, after)
    return patched


def merge(value: Any, patch: Any) -> Any:
    """Returns a value with what a patch adds; see the module."""
    if isinstance(value, Mapping) and isinstance(patch, Mapping):
        merged = dict(value)
        for name, item in patch.items():
            if item is None:
                merged.pop(name, None)
            else:
                # What is new loses its nulls, too.
                empty = {} if isinstance(item, Mapping) else None
                merged[name] = merge(merged.get(name, empty), item)
        return merged
    if _are_named(value) and _are_named(patch):
        by_name = {item["name"]: item for item in value}
        for item in patch:
            name = item["name"]
            by_name[name] = merge(by_name.get(name, {}), item)
        return list(by_name.values())
    return patch


def _are_named(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(item, Mapping) and isinstance(item.get("name"), str)
            for item in value
        )
    )


def _read(path: str) -> list[Mapping[str, Any]]:
    try:
        with open(flags.expand_home(path), encoding="utf-8") as file:
            found = [each for each in yaml.safe_load_all(file) if each]
    except OSError as error:
        raise UserError(
            f"manifest_patch ({path}) cannot be read: {error.strerror}"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"manifest_patch ({path}) is no YAML: {error}"
        ) from error
    if not found or not all(isinstance(each, Mapping) for each in found):
        raise UserError(
            f"manifest_patch ({path}) must hold mappings that begin with "
            "`kind:`, parted by ---"
        )
    for document in found:
        _check_plain(path, document, "")
    return found


def _check_plain(path: str, value: Any, place: str) -> None:
    """Checks that a value is one of JSON: YAML knows others, as dates.

    Raises:
        UserError: it is not.
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            where = f"{place}.{name}".lstrip(".")
            if not isinstance(name, str):
                raise UserError(
                    f"manifest_patch ({path}): the key {where} must be text; "
                    "put it in quotes"
                )
            _check_plain(path, item, where)
    elif isinstance(value, list):
        for item in value:
            _check_plain(path, item, place)
    elif not isinstance(value, _PLAIN):
        raise UserError(
            f"manifest_patch ({path}): {place} ({value}) must be text or a "
            "number; put it in quotes"
        )


def _pod_template(document: Mapping[str, Any], path: str = "") -> Any:
    """Returns what the pods of a Job or a JobSet are made from.

    Raises:
        UserError: there is no such thing in it any more.
    """
    try:
        spec = document["spec"]
        if document["kind"] == "JobSet":
            spec = spec["replicatedJobs"][0]["template"]["spec"]
        template = spec["template"]
        template["spec"]["containers"][0]["args"]
    except (LookupError, TypeError) as error:
        raise UserError(
            f"manifest_patch ({path}) leaves nothing to make pods from"
        ) from error
    return template


def _check_same(
    path: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    """Checks that the job can still be found.

    Raises:
        UserError: it cannot.
    """
    old = before["metadata"]
    new = after.get("metadata")
    labels = new.get("labels") if isinstance(new, Mapping) else None
    is_same = (
        isinstance(new, Mapping)
        and isinstance(labels, Mapping)
        and old["name"] == new.get("name")
        and old.get("namespace") == new.get("namespace")
        and old["labels"].items() <= labels.items()
    )
    if not is_same:
        raise UserError(
            f"manifest_patch ({path}) must leave name, namespace and labels of "
            f"the {before['kind']} as they are; use --name, --namespace and "
            "--label"
        )
