"""No checkpoint from outside is a crash, a hang or a lot of memory."""

from __future__ import annotations

import json
import os

import pytest

from tests import hostile_checkpoints, runs

NUM_FUZZ = int(os.environ.get("DTRAIN_NUM_FUZZ", "150"))
# With all of TensorFlow, and with what it keeps of what it has freed.
MAX_MIB = 1024


@pytest.mark.parametrize("kind", ["index", "data", "manifest", "v1", "yaml"])
def test_lies_and_damage_in_little_memory(kind: str) -> None:
    """In a process of its own: TensorFlow would end this one by a CHECK."""
    process = runs.start(
        "tests.hostile_checkpoints",
        *(kind, str(NUM_FUZZ), "0"),
        TF_CPP_MIN_LOG_LEVEL="3",
    )
    code, output = runs.finish(process)
    assert code == 0, output
    outcome = json.loads(output.splitlines()[-1])
    assert outcome["read"] + outcome["refused"] == NUM_FUZZ
    assert outcome["refused"] > NUM_FUZZ / 2
    assert outcome["peak_mib"] <= MAX_MIB
    lies = {
        "index": hostile_checkpoints.LIES,
        "v1": hostile_checkpoints.V1_LIES,
        "yaml": hostile_checkpoints.YAML_LIES,
    }.get(kind, {})
    assert outcome["lies"].keys() == lies.keys()
    assert all(outcome["lies"].values()), outcome["lies"]
