"""Where studies are kept: opened by several hosts at once, and errors in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.storages import RDBStorage
from sqlalchemy.exc import ProgrammingError

from cost_models.errors import ConfigError
from planner.search import storage


def test_hosts_that_make_the_tables_in_one_moment_both_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def beaten_once(url: str, **options: Any) -> RDBStorage:
        tries.append(url)
        if len(tries) == 1:
            raise ProgrammingError("CREATE TABLE studies", {}, Exception("already exists"))
        return RDBStorage(url, **options)

    monkeypatch.setattr(storage, "RDBStorage", beaten_once)
    monkeypatch.setattr(storage, "OPENING_WAIT_S", 0.0)
    opened = storage.open_storage(str(tmp_path / "plan.db"))
    assert tries == [f"sqlite:///{tmp_path}/plan.db"] * 2
    opened.engine.dispose()


@pytest.mark.parametrize("url", ["nonsense://x", "sqlite:////nowhere/at/all.db"])
def test_what_cannot_be_opened_is_one_line_that_names_the_option(url: str) -> None:
    with (
        pytest.raises(ConfigError, match=f"--storage {url}: ") as caught,
        storage.storage_errors("--storage", url),
    ):
        storage.open_storage(url)
    assert "\n" not in caught.value.message
    assert "sqlite:///" in caught.value.hint
