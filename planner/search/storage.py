"""Where studies are kept: a database, opened so that several hosts may make it together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from optuna.storages import RDBStorage
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from cost_models.errors import ConfigError
from executor.store import database_url

OPENING_ATTEMPTS, OPENING_WAIT_S = 5, 0.5
"""Hosts that start together make the tables together, and all but one fail at it."""

MISSED_HEARTBEATS = 4
"""A trial is given out again when its host has missed so many."""


def open_storage(url: str, *, heartbeat_s: int | None = None) -> RDBStorage:
    """Return the storage of a database.

    Args:
        url: `sqlite:///FILE`, `postgresql://...`, or the path of an SQLite file.
        heartbeat_s: How often a host says that it lives; None: a trial is nobody's but its host's.
    """
    grace_s = MISSED_HEARTBEATS * heartbeat_s if heartbeat_s else None
    spelled = database_url(url).render_as_string(hide_password=False)

    def opened() -> RDBStorage:
        return RDBStorage(spelled, heartbeat_interval=heartbeat_s, grace_period=grace_s)

    for _ in range(OPENING_ATTEMPTS - 1):
        try:
            return opened()
        except (IntegrityError, ProgrammingError):
            time.sleep(OPENING_WAIT_S)
    return opened()


@contextmanager
def storage_errors(option: str, url: str) -> Iterator[None]:
    """Turn what a database complains of into one line that names the option.

    Raises:
        ConfigError: The URL is wrong, its driver is missing, or the database does not answer.
    """
    try:
        yield
    except (SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise ConfigError(
            f"{option} {url}: {reason}", hint="give a URL such as sqlite:///plan.db"
        ) from None
