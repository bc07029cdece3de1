"""Where measured runs are kept: each with all its requests, in the moment that it ends.

Two tables in any database that SQLAlchemy speaks; SQLite by default. A run that the database
does not take is put into a file beside it and is taken in when the store is next opened.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Engine,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    func,
    insert,
    select,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
    SQLAlchemyError,
)

from cost_models.errors import ConfigError, MeasurementError
from executor.records import MeasuredRequest, RunRecord

SCHEMA_VERSION = 1

DEFAULT_URL = "sqlite:///planner-runs.db"

LOCK_WAIT_S = 10.0
"""How long SQLite waits for another writer."""

_METADATA = MetaData()

_META = Table("planner_meta", _METADATA, Column("schema_version", Integer, primary_key=True))

_RUNS = Table(
    "planner_runs",
    _METADATA,
    Column("run_id", String(200), primary_key=True),
    Column("key", String(64), nullable=False, index=True),
    Column("status", String(40), nullable=False),
    Column("stored_at_s", Float, nullable=False),
    Column("record", Text, nullable=False),
    Column("requests_gz", LargeBinary, nullable=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """A run as it was stored."""

    run_id: str
    key: str
    """Same configuration, workload and backend: same key."""
    status: str
    stored_at_s: float
    """Seconds since 1970."""
    record: Mapping[str, Any]
    """A line of a runs file."""
    requests_gz: bytes
    """The lines of its requests file, compressed."""

    def requests(self) -> list[dict[str, Any]]:
        """Return its requests in the form of a requests file."""
        return [json.loads(line) for line in gzip.decompress(self.requests_gz).splitlines()]


class RunStore:
    """Measured runs in a database.

    Args:
        url: `sqlite:///FILE`, `postgresql://...`, or the path of an SQLite file.
        must_exist: Whether to refuse an SQLite file that is not there instead of making it.

    Raises:
        ConfigError: The URL is wrong, its driver is missing, or the schema is another one.
        MeasurementError: The database cannot be opened.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        must_exist: bool = False,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        self._url = database_url(url)
        if must_exist:
            _check_is_there(self._url)
        self._engine = _engine(self._url, lock_wait_s)
        with self._errors():
            self._make_tables()
            self._check_schema()
        self._take_in_spilled()

    def _make_tables(self) -> None:
        try:
            _METADATA.create_all(self._engine)
        except (IntegrityError, ProgrammingError):
            # Another host made them in the same moment; what is really wrong fails again.
            _METADATA.create_all(self._engine)

    @property
    def spill_path(self) -> Path:
        """The file for runs that the database does not take."""
        if self._url.drivername.startswith("sqlite") and self._url.database:
            return Path(f"{self._url.database}.spilled.jsonl")
        return Path("planner-runs.spilled.jsonl")

    def save(self, run: RunRecord, requests: Sequence[MeasuredRequest], *, key: str) -> RunRecord:
        """Store a run with all its requests; on return it is safe.

        Returns:
            The run as it is stored: where another host took its id meanwhile, it has the next.

        Raises:
            MeasurementError: The database did not take it; says where the run is instead.
        """
        row = _row(run, requests, key)
        try:
            with self._errors():
                row = self._insert(row)
        except MeasurementError as error:
            path = self._spill(row)
            raise MeasurementError(
                f"{error.message}; run {run.run_id} is in {path}",
                hint=f"{error.hint}; the next use of this store takes it in",
            ) from error
        return replace(run, run_id=row["run_id"])

    def finished(self, key: str) -> list[StoredRun]:
        """Return the runs of a key that ended well, oldest first."""
        return [run for run in self._select(_RUNS.c.key == key) if run.status == "ok"]

    def runs(self) -> list[StoredRun]:
        """Return all runs, oldest first."""
        return self._select()

    def run(self, run_id: str) -> StoredRun:
        """Return a run by id, or by the beginning of its id where that is unambiguous.

        Raises:
            ConfigError: There is none, or there are several.
        """
        found = self._select(_RUNS.c.run_id.startswith(run_id, autoescape=True))
        exact = [run for run in found if run.run_id == run_id]
        if len(exact or found) != 1:
            raise ConfigError(
                f"{len(found)} runs are called {run_id}...", hint="`planner runs list` shows them"
            )
        return (exact or found)[0]

    def count(self, stem: str) -> int:
        """Return how many runs have ids that begin so, to number the next ones."""
        with self._errors(), self._engine.connect() as connection:
            pattern = _RUNS.c.run_id.startswith(f"{stem}-", autoescape=True)
            return int(
                connection.execute(
                    select(func.count()).select_from(_RUNS).where(pattern)
                ).scalar_one()
            )

    def close(self) -> None:
        """Release the connections."""
        self._engine.dispose()

    def _insert(self, row: dict[str, Any]) -> dict[str, Any]:
        """Store a row, under the next free id where another run took its own, and return it.

        A row that is there already, from a spilled file that was taken in before, stays once.
        """
        while True:
            try:
                with self._engine.begin() as connection:
                    connection.execute(insert(_RUNS).values(**row))
            except IntegrityError:
                found = self._select(_RUNS.c.run_id == row["run_id"])
                if not found:
                    raise
                if (found[0].key, found[0].stored_at_s) != (row["key"], row["stored_at_s"]):
                    row = _renumbered(row)
                    continue
            return row

    def _select(self, *conditions: Any) -> list[StoredRun]:
        query = select(_RUNS).where(*conditions).order_by(_RUNS.c.stored_at_s, _RUNS.c.run_id)
        with self._errors(), self._engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [StoredRun(**{**row, "record": json.loads(row["record"])}) for row in rows]

    def _check_schema(self) -> None:
        with self._engine.begin() as connection:
            found = connection.execute(select(_META.c.schema_version)).scalar_one_or_none()
            if found is None:
                connection.execute(insert(_META).values(schema_version=SCHEMA_VERSION))
            elif found != SCHEMA_VERSION:
                raise ConfigError(
                    f"store {self._shown}: schema version {found}, this program knows "
                    f"{SCHEMA_VERSION}",
                    hint="use another store, or the version that wrote it",
                )

    def _spill(self, row: Mapping[str, Any]) -> Path:
        """Write a row beside the database or, where that disk takes nothing, to the temporary."""
        text = {**row, "requests_gz": base64.b64encode(row["requests_gz"]).decode()}
        line = json.dumps(text) + "\n"
        for path in (self.spill_path, Path(tempfile.gettempdir()) / self.spill_path.name):
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(line)
                    file.flush()
            except OSError:
                continue
            return path
        raise MeasurementError(
            f"store {self._shown} and {self.spill_path} take nothing", hint="free disk space"
        )

    def _take_in_spilled(self) -> None:
        for path in (self.spill_path, Path(tempfile.gettempdir()) / self.spill_path.name):
            if not path.is_file():
                continue
            for line in path.read_text(encoding="utf-8").splitlines():
                self._take_in(line)
            path.unlink()

    def _take_in(self, line: str) -> None:
        try:
            row = json.loads(line)
            row["requests_gz"] = base64.b64decode(row["requests_gz"])
        except ValueError:
            return  # cut off while it was written
        with self._errors():
            self._insert(row)

    @property
    def _shown(self) -> str:
        return self._url.render_as_string(hide_password=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the database's errors into one line with the way out."""
        try:
            yield
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise MeasurementError(
                f"store {self._shown}: {reason}", hint=_way_out(reason)
            ) from error


def resume_key(*parts: Mapping[str, Any] | str) -> str:
    """Return the hash of configuration, workload and backend under which runs are found again."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _row(run: RunRecord, requests: Sequence[MeasuredRequest], key: str) -> dict[str, Any]:
    lines = "".join(json.dumps(request.to_json()) + "\n" for request in requests)
    return {
        "run_id": run.run_id,
        "key": key,
        "status": run.status,
        "stored_at_s": time.time(),
        "record": json.dumps(run.to_json()),
        "requests_gz": gzip.compress(lines.encode(), mtime=0),
    }


def _renumbered(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the next number in its id."""
    stem, _, number = row["run_id"].rpartition("-")
    run_id = f"{stem}-{int(number) + 1}"
    record = json.dumps({**json.loads(row["record"]), "run_id": run_id})
    return {**row, "run_id": run_id, "record": record}


def database_url(url: str) -> URL:
    """Return a store's URL as SQLAlchemy takes it: a path is an SQLite file.

    Raises:
        ConfigError: It is no URL.
    """
    text = url if "://" in url else f"sqlite:///{url}"
    try:
        parsed = make_url(text)
    except ArgumentError:
        raise ConfigError(f"store {url!r} is not a database URL") from None
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed


def _check_is_there(url: URL) -> None:
    file = url.database if url.drivername.startswith("sqlite") else None
    if file and not Path(file).exists():
        raise ConfigError(f"store {file}: no such file", hint="planner measure makes one")


def _engine(url: URL, lock_wait_s: float) -> Engine:
    is_sqlite = url.drivername.startswith("sqlite")
    try:
        return create_engine(url, connect_args={"timeout": lock_wait_s} if is_sqlite else {})
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigError(
            f"store {url.drivername}: {error}", hint="pip install 'trtllm-planner[postgresql]'"
        ) from None


def _way_out(reason: str) -> str:
    """Return what to do about a database's complaint."""
    hints = {
        "locked": "another program writes to it: end it, or give another --store",
        "full": "free disk space",
        "disk I/O": "free disk space, or check the disk",
        "unable to open": "check that its folder exists and may be written to",
        "readonly": "it may not be written to: check its permissions",
        "not a database": "name another file with --store",
    }
    return next((hint for word, hint in hints.items() if word in reason), "check --store")
