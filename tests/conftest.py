"""Settings of every test run, by make, by pytest alone or by Bazel."""

from __future__ import annotations

import os
import random
import sys

import hypothesis
import pytest

NUM_LOGICAL_CPUS = 4

# Minutes each, so they come first: the last of them would run alone.
SLOW = (
    *("resume_test", "recoveries_test", "hangs_test", "signals_test"),
    *("remote_run_test", "slurm_test", "callbacks_test", "gan_test"),
    *("divergence_test", "docs_test", "chaos_test", "reduction_test"),
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


def pytest_report_header() -> str:
    """Tells how to do the same again."""
    return f"random instants: {SEED}={os.environ[SEED]}"


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """A generator that follows from the seed and the name of the test."""
    # Without the group that pytest-xdist adds.
    name = request.node.nodeid.partition("@")[0]
    print(f"random instants: {SEED}={os.environ[SEED]}")
    return random.Random(f"{os.environ[SEED]} {name}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slow files first."""
    places = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOW)))


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
