from __future__ import annotations

import pytest

from tests import requirement


@pytest.mark.parametrize("value", [None, "", "false"])
def test_missing_skips_on_a_persons_machine(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv("CI", raising=False)
    else:
        monkeypatch.setenv("CI", value)
    with pytest.raises(pytest.skip.Exception, match="no bazel"):
        requirement.missing("no bazel")


def test_missing_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no bazel"):
        requirement.missing("no bazel")
