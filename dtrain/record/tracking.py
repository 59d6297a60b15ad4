"""Sends what TensorBoard is shown to a tracking server: `--track=mlflow:URI`.

A run is one run there, however often it was killed: it is found again by the id
that config.json has. The server costs the training nothing: a thread imports
the client and speaks to it; what the server does not take waits in memory, and
of that the oldest goes when it is too much.
"""

from __future__ import annotations

import collections
import importlib
import importlib.util
import math
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from dtrain.config import Config
from dtrain.errors import UserError

_PREFIX = "mlflow:"
_EXPERIMENT = "dtrain"
_TAG = "dtrain.run_id"
_MOST_ROWS = 10_000
# What a server takes in one call.
_MOST_METRICS = 1000
_MOST_PARAMETERS = 100
_MOST_CHARACTERS = 500
# Between two calls, and after one that failed.
_EVERY_SECS = 1.0
_RETRY_SECS = 10.0
# How long the end of a process waits for the server.
_LAST_SECS = 5.0
# Of the client itself, which would try for minutes.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class _Row(NamedTuple):
    step: int
    milliseconds: int
    values: Mapping[str, float]


class Tracker:
    """Sends nothing: what a run without `--track` has."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends values soon; never waits, and never fails.

        Args:
            step: the steps that are done.
            values: by name; those that are not finite are left out.
        """

    def news(self) -> str:
        """Says that the server has stopped to answer, or does so again."""
        return ""

    def close(self, step: int) -> None:
        """Sends what is left, for a few seconds, and how the process ended.

        Args:
            step: the steps that are done.
        """


def make(config: Config, run_id: str) -> Tracker:
    """Makes what `--track` asks for.

    Args:
        config: of the run.
        run_id: by which the run is found again.

    Raises:
        UserError: the client is not installed.
    """
    if not config.track:
        return Tracker()
    if importlib.util.find_spec("mlflow") is None:
        raise UserError(
            f"track ({config.track}) needs the client of MLflow; install it "
            "with python -m pip install mlflow-skinny"
        )
    return MlflowTracker(
        config.track.removeprefix(_PREFIX), config.to_dict(), run_id
    )


class MlflowTracker(Tracker):
    """Sends to a server of MLflow, from a thread of its own."""

    def __init__(
        self, uri: str, settings: Mapping[str, Any], run_id: str
    ) -> None:
        """Starts the thread, and does not wait for it.

        Args:
            uri: of the server.
            settings: of the run; sent when it is new there.
            run_id: see `make`.
        """
        self._uri = uri
        self._settings = settings
        self._run_id = run_id
        self._rows: collections.deque[_Row] = collections.deque(
            maxlen=_MOST_ROWS
        )
        self._failure = self._told = ""
        self._status = ""
        self._wake = threading.Event()
        self._thread = threading.Thread(
            target=self._work, name="dtrain-tracking", daemon=True
        )
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends values soon; see `Tracker.write`."""
        self._rows.append(_Row(step, int(time.time() * 1000), values))

    def news(self) -> str:
        """Says it once; see `Tracker.news`."""
        failure = self._failure
        if failure == self._told:
            return ""
        self._told = failure
        if failure:
            return (
                f"the tracking server {self._uri} does not answer: {failure}; "
                "training goes on, and it is tried again"
            )
        return f"the tracking server {self._uri} answers again"

    def close(self, step: int) -> None:
        """Sends what is left; see `Tracker.close`."""
        is_finished = step >= self._settings["num_steps"]
        # KILLED is what MLflow calls a run that was told to end.
        self._status = "FINISHED" if is_finished else "KILLED"
        self._wake.set()
        self._thread.join(_LAST_SECS)
        if self._rows or self._thread.is_alive():
            print(
                f"the tracking server {self._uri} does not have all: "
                f"{self._failure or 'it is slow'}",
                file=sys.stderr,
                flush=True,
            )

    def _work(self) -> None:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        # A second or two, in which the training has begun.
        mlflow = _mlflow()
        run: _Run | None = None
        while True:
            secs = _RETRY_SECS if self._failure else _EVERY_SECS
            self._wake.wait(secs)
            is_last = bool(self._status)
            try:
                run = run or _Run(self._uri, self._settings, self._run_id)
                while self._rows:
                    run.send(self._rows)
                if is_last:
                    run.end(self._status)
                self._failure = ""
            # Those of requests, which it uses, are OSErrors.
            except (mlflow.MlflowException, OSError) as error:
                self._failure = " ".join(str(error).split())[:200]
            if is_last:
                return


class _Run:
    """A run on a server; every call may fail."""

    def __init__(
        self, uri: str, settings: Mapping[str, Any], run_id: str
    ) -> None:
        mlflow = _mlflow()
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = self._experiment()
        there = self._client.search_runs(
            [experiment], f"tags.`{_TAG}` = '{run_id}'", max_results=1
        )
        if there:
            self._id = there[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.path.basename(str(settings["run_dir"]))
        made = self._client.create_run(
            experiment, run_name=name, tags={_TAG: run_id}
        )
        self._id = made.info.run_id
        parameters = [
            mlflow.entities.Param(name, str(value)[:_MOST_CHARACTERS])
            for name, value in settings.items()
        ]
        for start in range(0, len(parameters), _MOST_PARAMETERS):
            part = parameters[start : start + _MOST_PARAMETERS]
            self._client.log_batch(self._id, params=part)

    def _experiment(self) -> str:
        known = self._client.get_experiment_by_name(_EXPERIMENT)
        if known is None:
            try:
                return self._client.create_experiment(_EXPERIMENT)
            except _mlflow().MlflowException:
                # Another run has made it just now; or else this fails, too.
                known = self._client.get_experiment_by_name(_EXPERIMENT)
                if known is None:
                    raise
        return known.experiment_id

    def send(self, rows: collections.deque[_Row]) -> None:
        """Sends the oldest rows, and takes them off when they are there."""
        make_metric = _mlflow().entities.Metric
        metrics: list[Any] = []
        taken: list[_Row] = []
        for row in list(rows):
            new = [
                make_metric(_name(name), value, row.milliseconds, row.step)
                for name, value in row.values.items()
                if math.isfinite(value)
            ]
            if taken and len(metrics) + len(new) > _MOST_METRICS:
                break
            metrics += new
            taken.append(row)
        self._client.log_batch(self._id, metrics=metrics[:_MOST_METRICS])
        for row in taken:
            # The oldest may have made room meanwhile.
            if rows and rows[0] is row:
                rows.popleft()

    def end(self, status: str) -> None:
        """Says how the process ended."""
        self._client.set_terminated(self._id, status=status)


def _mlflow() -> Any:
    """Returns the client, which need not be installed."""
    return importlib.import_module("mlflow")


def _name(name: str) -> str:
    """Returns a name that the server takes."""
    return re.sub(r"[^\w\-. /:]", "_", name, flags=re.ASCII)[:250]
