"""JSON that notices when a bit of it has changed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.storage import sealed

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=8,
)
BODIES = st.dictionaries(
    st.text(max_size=5).filter(lambda name: name != "sha256"),
    VALUES,
    max_size=4,
)


@given(BODIES)
def test_reads_what_it_wrote(body: dict[str, object]) -> None:
    read = sealed.loads(sealed.dumps(body))
    assert len(read.pop("sha256")) == 64
    assert read == body


@settings(max_examples=300)
@given(BODIES, st.data())
def test_notices_any_change(
    body: dict[str, object], data: st.DataObject
) -> None:
    content = bytearray(sealed.dumps(body))
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "add"]))
    if kind == "flip":
        content[place] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[place:]
    else:
        content.insert(place, data.draw(st.integers(0, 255)))
        if bytes(content) == sealed.dumps(body):
            return
    with pytest.raises(sealed.DamagedError):
        sealed.loads(bytes(content))


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"\xff", b"[" * 9999])
def test_what_is_nothing_of_ours(text: bytes) -> None:
    with pytest.raises(sealed.DamagedError):
        sealed.loads(text)
