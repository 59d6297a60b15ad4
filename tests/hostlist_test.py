"""Lists of hosts, as Slurm itself reads them."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrain.cluster import hostlist
from dtrain.errors import UserError
from tests import requirement

names = st.text("ab01-.", min_size=1, max_size=4)


@st.composite
def ranges(draw: st.DrawFn) -> str:
    """One range in brackets, with zeros in front of either end or without."""
    first = draw(st.integers(0, 120))
    last = first + draw(st.integers(0, 3))
    begin = str(first).zfill(draw(st.integers(1, 4)))
    if first == last and draw(st.booleans()):
        return begin
    return f"{begin}-{str(last).zfill(draw(st.integers(1, 4)))}"


brackets = st.lists(ranges(), min_size=1, max_size=3).map(
    lambda parts: f"[{','.join(parts)}]"
)
# A term ends with its last brackets: Slurm knows no other.
terms = names | st.lists(
    st.tuples(st.text("ab01-.", max_size=3), brackets), min_size=1, max_size=4
).map(lambda pieces: "".join(map("".join, pieces)))


@pytest.fixture
def slurm_conf(tmp_path: pathlib.Path) -> str:
    if shutil.which("scontrol") is None:
        requirement.missing("no scontrol; apt-get install slurm-wlm")
    path = tmp_path / "slurm.conf"
    path.write_text(
        "ClusterName=c\nSlurmctldHost=localhost\nNodeName=n\n"
        "PartitionName=p Nodes=n\n"
    )
    return str(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(terms, min_size=1, max_size=20).map(",".join))
def test_the_hosts_are_those_that_slurm_names(
    slurm_conf: str, text: str
) -> None:
    done = subprocess.run(
        # A list that begins with a dash would be a flag.
        ["scontrol", "show", "hostnames", f"first,{text}"],
        env={**os.environ, "SLURM_CONF": slurm_conf},
        check=True,
        capture_output=True,
        text=True,
    )
    assert ("first", *hostlist.hosts(text)) == tuple(done.stdout.split())


@pytest.mark.parametrize(
    "text",
    [
        *("a[", "a]", "a[1", "a[]", "a[1-2]b[]", "a[3-1]", "a[1,,2]", "a[x]"),
        *("a[1-2-3]", "a[1x-2]", "a[[1]]", "a[1-2,a]", "a[1-65537]"),
        "a[1-60000],b[1-60000]",
        "a[1-300][1-300]",
        # What scontrol forgives, and no step is told.
        *("", "a,", ",a", "a,,b", "a b", "a[ 1]", "a[1-]", "a\n", "a[\u0661]"),
    ],
)
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(UserError, match="node list "):
        hostlist.hosts(text)


@given(st.text() | st.text("a1[]-, "))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(UserError):
        found = hostlist.hosts(text)
        assert 0 < len(found) <= 65536
        assert all(host and host.split() == [host] for host in found)


@given(st.lists(st.integers(1, 9), min_size=1))
def test_counts(values: list[int]) -> None:
    parts = []
    for value in values:
        if parts and parts[-1][0] == value:
            parts[-1][1] += 1
        else:
            parts.append([value, 1])
    text = ",".join(
        f"{value}(x{times})" if times > 1 else str(value)
        for value, times in parts
    )
    assert hostlist.counts(text) == tuple(values)


@pytest.mark.parametrize(
    "text", ["", "a", "1,", "1()", "1(x)", "1(2)", "1(x70000)", "1 ", "\u0661"]
)
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(UserError, match="tasks per node "):
        hostlist.counts(text)


@given(st.text() | st.text("12(x),"))
def test_any_count_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(UserError):
        assert 0 < len(hostlist.counts(text)) <= 65536
