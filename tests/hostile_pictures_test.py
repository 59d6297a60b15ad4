"""No picture from outside is a crash, a hang or a lot of memory."""

from __future__ import annotations

import json
import os

from tests import runs

NUM_FUZZ = int(os.environ.get("DTRAIN_NUM_FUZZ", "150"))
# With all of TensorFlow, and with what it keeps of what it has freed.
MAX_MIB = 1024


def test_damage_in_little_memory() -> None:
    """In a process of its own: a decoder might end this one."""
    process = runs.start(
        "tests.hostile_pictures", str(NUM_FUZZ), "0", TF_CPP_MIN_LOG_LEVEL="3"
    )
    code, output = runs.finish(process, timeout=900)
    assert code == 0, output
    outcome = json.loads(output.splitlines()[-1])
    print(outcome)
    for kind, counts in outcome["of"].items():
        assert sum(counts.values()) == NUM_FUZZ, kind
        # Or what is changed is nothing that matters, or everything.
        assert min(counts.values()) > NUM_FUZZ / 50, kind
    assert outcome["peak_mib"] <= MAX_MIB
