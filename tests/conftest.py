"""Settings of every test run, by make, by pytest alone or by Bazel."""

from __future__ import annotations

import functools
import gc
import os
import pathlib
import random
import signal
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from tests import runs

NUM_LOGICAL_CPUS = 4

# Minutes each, so they come first: the last of them would run alone.
SLOW = (
    *("chaos_test", "slurm_test", "resume_test", "report_test"),
    *("recoveries_test", "remote_run_test", "hangs_test", "signals_test"),
    *("stop_test", "gan_test", "callbacks_test", "divergence_test"),
    *("init_from_test", "kill_points_test", "retention_test", "docs_test"),
    *("fashion_mnist_test", "bad_inputs_test", "reduction_test"),
    *("claim_test", "streams_test", "verbs_test"),
)
# Each of their tests goes to the process that is free. Those of any other file
# stay together, with what they share.
SPLIT = (
    *("chaos_test", "resume_test", "recoveries_test", "remote_run_test"),
    *("hangs_test", "signals_test", "stop_test", "callbacks_test"),
    *("divergence_test", "kill_points_test", "retention_test", "docs_test"),
    *("fashion_mnist_test", "released_test", "node_test"),
    *("hostile_files_test", "metrics_test", "claim_test", "streams_test"),
)

# CI tries the same examples each time: a failure there is the change's own.
hypothesis.settings.register_profile(
    "dtrain", deadline=None, derandomize=os.environ.get("CI") == "true"
)
hypothesis.settings.load_profile("dtrain")


# Of all that tests do at random; .ci/run sets it to the commit.
SEED = "DTRAIN_TEST_SEED"


def pytest_configure() -> None:
    """Draws the seed, before other processes are started that need it too."""
    os.environ.setdefault(SEED, str(random.randrange(2**32)))
    # A shell ignores the first in what runs in its background, and nohup the
    # other, and so would all that the tests start and tell to end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_report_header() -> str:
    """Tells how to do the same again."""
    return f"random instants: {SEED}={os.environ[SEED]}"


@pytest.fixture(scope="module", autouse=True)
def no_garbage_from_other_modules() -> None:
    """Keeps what is alive from being looked at by each collection.

    Keras collects in `clear_session`, and there are two gigabytes at the end.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """A generator that follows from the seed and the name of the test."""
    print(f"random instants: {SEED}={os.environ[SEED]}")
    return random.Random(f"{os.environ[SEED]} {request.node.nodeid}")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> runs.Whole:
    """Trains to the end, once for all tests that ask for the same run.

    `whole(module, *flags)` returns the directory of a run with these flags,
    that nothing has happened to and that nobody may change.
    """
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Where the other processes of these tests look, too.
        place = place.parent
    return functools.partial(runs.train_once, place / "whole")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slow files first."""
    places = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOW)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Distributes the tests by `SPLIT`, in their order, as pytest -n N runs.

    Marks of groups would do it, but those of pytest-xdist 3.8 are lost in
    pytest 9.
    """
    from xdist import scheduler

    class Scheduler(scheduler.LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if pathlib.Path(file).stem in SPLIT else file

    return Scheduler(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Splits the CPU, for the tests of several replicas in one process.

    TensorFlow wants it before its first operation. It is imported by now, or
    no collected test needs it.
    """
    del session
    tf = sys.modules.get("tensorflow")
    if tf is None or tf.config.list_physical_devices("GPU"):
        return
    [cpu] = tf.config.list_physical_devices("CPU")
    logical = tf.config.LogicalDeviceConfiguration()
    try:
        tf.config.set_logical_device_configuration(
            cpu, [logical] * NUM_LOGICAL_CPUS
        )
    except RuntimeError as error:
        raise pytest.UsageError(
            "a test module runs a TensorFlow operation while it is imported; "
            "move it into a fixture or a test"
        ) from error


@pytest.fixture
def sums_as_written() -> Iterator[None]:
    """What `cluster.strategy` sets for --reduction=ordered."""
    import tensorflow as tf

    options = tf.config.optimizer
    options.set_experimental_options({"arithmetic_optimization": False})
    yield
    options.set_experimental_options({"arithmetic_optimization": True})
