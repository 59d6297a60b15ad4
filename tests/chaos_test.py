"""A short form of `python -m tests.chaos`; the long one has no end.

DTRAIN_CHAOS_MINUTES is how long each run is broken.
"""

from __future__ import annotations

import os
import random
import shutil

from tests import chaos, requirement

MINUTES = float(os.environ.get("DTRAIN_CHAOS_MINUTES", "1.0"))
# The short form does not wait long for the next fault, so that as many come.
MEAN_SECS = 12.0 if "DTRAIN_CHAOS_MINUTES" in os.environ else 6.0


def options(chance: random.Random, **fields: object) -> chaos.Options:
    seed = chance.randrange(2**31)
    print(f"seed {seed}")
    return chaos.Options(seed=seed, mean_secs=MEAN_SECS, **fields)


def test_anything_may_happen_to_a_run(chance: random.Random) -> None:
    chaos.run(options(chance, minutes=MINUTES))


def test_a_cable_is_pulled_between_two_hosts(chance: random.Random) -> None:
    if os.geteuid() or not shutil.which("ip"):
        requirement.missing("root and iproute2, for hosts that can be cut off")
    faults = "link,kill,stop,stuck"
    chaos.run(
        options(chance, minutes=max(0.6, MINUTES / 2), hosts=2, faults=faults)
    )
