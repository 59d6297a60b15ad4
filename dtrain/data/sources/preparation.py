"""Finds TFDS data sets on disk, and prepares them where that is allowed."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import glob
import io
import itertools
import os
import pathlib
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from google.protobuf.json_format import ParseError
from tensorflow_datasets.core import constants
from tensorflow_datasets.core.utils import file_utils

from dtrain import flags
from dtrain.config import DataSettings
from dtrain.data.digits import builder as digits_builder
from dtrain.data.sources import source
from dtrain.errors import UserError
from dtrain.storage import files, locks, temporary

_EMBEDDED = digits_builder.Digits.name
_OFFLINE = (
    "without a network there are --dataset=digits, folder:/path, zip:/path, "
    "idx:/path and npz:/path"
)
# Keeps the directory of digits that could be prepared nowhere else.
_TEMPORARY = contextlib.ExitStack()
atexit.register(_TEMPORARY.close)


def prepared_builder(config: DataSettings, name: str) -> Any:
    """Returns the TFDS builder of a data set that is prepared on disk.

    The embedded digits are prepared if they are not, another set only with
    --download. Workers that start together on one disk wait for the first.

    Args:
        config: `dataset`, `data_dir`, `manual_dir` and `download` count.
        name: as TFDS writes it: name[/config][:version].

    Raises:
        UserError: TFDS knows no such set, it is not prepared and may not be,
            or preparing it failed.
    """
    data_dir = flags.expand_home(config.data_dir) or None
    if data_dir and "[" in data_dir:
        raise UserError(
            f"data_dir ({data_dir}): TFDS takes '[' for a pattern and would "
            "find nothing there; name another directory"
        )
    builder = _make_builder(config, name, data_dir)
    with _silence():
        is_prepared = builder.is_prepared()
    if is_prepared or is_mocked(builder):
        return builder
    if builder.name == _EMBEDDED:
        return _prepared_digits(config, builder)
    if not config.download:
        raise UserError(
            f"{config.dataset} is not prepared in {_root(builder)}: name its "
            "place by --data_dir, or fetch it with --download; " + _OFFLINE
        )
    _check_can_fetch(config, builder)
    try:
        return _prepare(config, builder)
    # The code of a data set is somebody else's and may raise anything.
    except Exception as error:
        raise UserError(
            f"{config.dataset} could not be prepared in {_root(builder)}: "
            f"{type(error).__name__}: {source.reason(error)}; {_OFFLINE}"
        ) from error


def is_mocked(builder: Any) -> bool:
    """Tells whether TFDS makes images up, by `tfds.testing.mock_data`.

    Args:
        builder: of TFDS.
    """
    prepare = type(builder).download_and_prepare
    return prepare.__module__ == "tensorflow_datasets.testing.mocking"


def _check_features(name: str, data_dir: str | None) -> None:
    """Refuses a prepared set whose features are not TFDS's own.

    TFDS imports the classes that features.json names, and the directory may
    be anybody's.

    Raises:
        UserError: it names others, or is damaged.
    """
    name = re.match(r"\w*", name)[0]  # type: ignore[index]
    roots = file_utils.list_data_dirs(given_data_dir=data_dir)
    for root, below in itertools.product(roots, ("*", "*/*")):
        pattern = f"{glob.escape(str(root))}/{name}/{below}/features.json"
        for path in tf.io.gfile.glob(pattern) if name else []:
            text = (files.read(path) or b"").decode(errors="replace")
            for found in re.finditer(r'"pythonClassName":\s*"(.*?)"', text):
                if not found[1].startswith("tensorflow_datasets."):
                    raise UserError(
                        f"{path} names {found[1][:80]}, which would be "
                        "imported and its code run; prepare the set again "
                        "with features of TFDS"
                    )


def _make_builder(config: DataSettings, name: str, data_dir: str | None) -> Any:
    with files.storage_errors(data_dir or constants.DATA_DIR):
        _check_features(name, data_dir)
    try:
        with _silence():
            return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = [*tfds.list_builders(), _EMBEDDED]
        near = difflib.get_close_matches(name.partition("/")[0], known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        where = data_dir or constants.DATA_DIR
        others = _others_on_disk(name, data_dir)
        if others:
            raise UserError(
                f"dataset ({config.dataset}) is not among the configurations "
                f"and versions that are in {where}: {', '.join(others)}"
            ) from error
        raise UserError(
            f"dataset ({config.dataset}) is not known to TFDS{hint} and not "
            f"prepared in {where}; {_OFFLINE}"
        ) from error
    except ImportError as error:
        raise UserError(
            f"dataset ({config.dataset}) needs the Python package "
            f"{error.name}; install it"
        ) from error
    except (ValueError, AssertionError, KeyError, ParseError) as error:
        # TFDS writes its arguments before the reason.
        text = source.reason(error).rpartition('}": ')[2]
        raise UserError(
            f"dataset ({config.dataset}): {text}{_configs(name)}"
        ) from error


def _others_on_disk(name: str, data_dir: str | None) -> list[str]:
    """Lists what there is of a set that is prepared, and has no code."""
    base = re.match(r"\w*", name)[0]  # type: ignore[index]
    found = set()
    for root in file_utils.list_data_dirs(given_data_dir=data_dir):
        for below in ("*", "*/*"):
            pattern = f"{glob.escape(str(root))}/{base}/{below}/features.json"
            for path in tf.io.gfile.glob(pattern) if base else []:
                found.add(path.split("/")[-below.count("/") - 2])
    return sorted(found)


def _configs(name: str) -> str:
    """Lists the configurations of a set, to choose from."""
    try:
        known = list(tfds.builder_cls(name.partition("/")[0]).builder_configs)
    except (ValueError, ImportError):
        return ""
    if not known or "/" not in name:
        return ""
    more = ", ..." if len(known) > 10 else ""
    return f"; its configurations are {', '.join(known[:10])}{more}"


def _prepared_digits(config: DataSettings, builder: Any) -> Any:
    try:
        with _silence():
            return _prepare(config, builder)
    except OSError as error:
        # Without --data_dir, a directory for this run alone will do.
        if config.data_dir:
            raise UserError(
                f"data_dir ({config.data_dir}) cannot be written to: "
                f"{error.strerror or error}"
            ) from error
    directory = _TEMPORARY.enter_context(temporary.directory("digits"))
    with _silence():
        builder = tfds.builder(_EMBEDDED, data_dir=directory)
        return _prepare(config, builder)


def _prepare(config: DataSettings, builder: Any) -> Any:
    """Prepares a set as ArrayRecord, unless another process has just done so.

    TFDS writes into another directory and renames it at the end: if it is
    killed, nothing is left that looks prepared.
    """
    arguments = {"data_dir": _root(builder), "version": str(builder.version)}
    if builder.builder_config is not None:
        arguments["config"] = builder.builder_config.name

    def fresh() -> Any:
        return type(builder)(**arguments)

    with _alone(_root(builder)):
        builder = fresh()
        if not builder.is_prepared():
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(
                    manual_dir=flags.expand_home(config.manual_dir) or None,
                    try_download_gcs=False,
                ),
                file_format="array_record",
            )
    return fresh()


@contextlib.contextmanager
def _alone(directory: str) -> Iterator[None]:
    """Lets in one process of this disk at a time; a killed one lets go."""
    if files.is_remote(directory):
        yield
        return
    files.make_directory(directory)
    path = os.path.join(directory, ".dtrain.lock")
    # On a disk without locks they prepare it at once, and one rename wins.
    with locks.held(path, os.O_WRONLY | os.O_CREAT, wait=True):
        yield


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hides TFDS's talk of downloading where nothing is downloaded."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _check_can_fetch(config: DataSettings, builder: Any) -> None:
    # Without a network TFDS would try for minutes before it says so.
    instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if instructions and not config.manual_dir:
        text = " ".join(instructions.split())
        raise UserError(
            f"{config.dataset} must be fetched by hand; name the directory by "
            f"--manual_dir. TFDS says: {text}"
        )
    urls = list(builder.url_infos or ())
    hosts = {urllib.parse.urlsplit(url).hostname or "" for url in urls} - {""}
    if (
        not hosts
        or urllib.request.getproxies()
        or any(_resolves(host) for host in hosts)
        or _has_downloads(builder)
    ):
        return
    raise UserError(
        f"{config.dataset} cannot be downloaded: no network, as "
        f"{', '.join(sorted(hosts))} cannot be found; {_OFFLINE}"
    )


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _has_downloads(builder: Any) -> bool:
    """Tells whether somebody has put the archives there already."""
    downloads = pathlib.Path(_root(builder), "downloads")
    return any(
        path.is_file() and ".tmp." not in path.name
        for path in downloads.rglob("*")
    )


def _root(builder: Any) -> str:
    return os.path.expanduser(builder.data_dir_root)
