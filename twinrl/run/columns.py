"""A run's log by columns: ``metrics.parquet`` beside ``log.jsonl``, written once, of which columns are read.

The log is the truth. The table says of which log it is made: its length, time of change and last bytes. If that is
another one, or the table is damaged, it is made anew; where the folder cannot be written it is not kept. In it null
means "not logged", and values that are not finite are values, as in the log. Imports neither torch nor, before a
table is read, numpy and pyarrow.
"""

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.run import runlog

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

MADE_OF = b"twinrl.log"
TAIL_BYTES = 4096
STEP, ITERATION = "step", "iteration"


@dataclass(frozen=True)
class Columns:
    """Some columns of a log; all arrays are over its rows, in order.

    Attributes:
        values: name → numbers, nan where nothing was logged. logged: name → whether something was.
        lasting: whether no rollback has taken the row back.
    """

    values: Mapping[str, "np.ndarray"]
    logged: Mapping[str, "np.ndarray"]
    lasting: "np.ndarray"

    @classmethod
    def of(cls, table: "pa.Table") -> "Columns":
        """The columns of a table that hold numbers; ``step`` is one of them."""
        import numpy as np

        numbers = {name: table[name] for name in table.column_names if _is_number(table[name].type)}
        logged = {name: column.is_valid().to_numpy() for name, column in numbers.items()}
        values = {name: column.to_numpy() for name, column in numbers.items()}
        step = values[STEP]
        ahead = np.minimum.accumulate(np.append(step[1:], np.inf)[::-1])[::-1]  # the least step of all later rows
        return cls(values, logged, step < ahead)

    @property
    def rollbacks(self) -> int:
        """As :func:`twinrl.run.runlog.rollbacks`."""
        return int((self.values[STEP][1:] <= self.values[STEP][:-1]).sum())

    def last(self, wanted: Callable[[str], bool]) -> dict[str, tuple[int, float]]:
        """The last lasting (step, value) of each series that is ``wanted``, in the order in which they begin."""
        found = []
        for name in filter(wanted, self.values):
            (at,) = (self.logged[name] & self.lasting).nonzero()
            if len(at):
                end = at[-1]
                found.append((at[0], name, (int(self.values[STEP][end]), float(self.values[name][end]))))
        return {name: value for _, name, value in sorted(found, key=lambda series: series[0])}

    def rows(self, chosen: "np.ndarray") -> Iterator[dict[str, Any]]:
        """The rows where ``chosen`` is true, as mappings of what was logged in them."""
        (at,) = chosen.nonzero()
        columns = {name: (self.values[name][at].tolist(), self.logged[name][at].tolist()) for name in self.values}
        for k in range(len(at)):
            yield {name: values[k] for name, (values, logged) in columns.items() if logged[k]}


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def read(log: Path, table: Path, wanted: Callable[[str], bool]) -> Columns:
    """The columns of ``log`` that are ``wanted``, and its steps.

    Arguments:
        table: where the whole log is kept as Parquet, for the next time.

    Raises:
        InputError: the log is missing or corrupted, or a column mixes what no table can.
    """
    made_of = _made_of(log)
    found = _kept(table, made_of, wanted)
    if found is None:
        whole = _keep(table, made_of, parsed(log, made_of["bytes"]))
        found = whole.select([name for name in whole.column_names if name == STEP or wanted(name)])
    return Columns.of(found)


def write(log: Path, table: Path) -> None:
    """Keep the log as Parquet, if it is not kept yet. Errors as for :func:`read`."""
    read(log, table, lambda name: False)


def _made_of(log: Path) -> dict[str, Any]:
    """What tells one state of a log from another."""
    try:
        with log.open("rb") as file:
            stat = os.fstat(file.fileno())
            tail = os.pread(file.fileno(), TAIL_BYTES, max(0, stat.st_size - TAIL_BYTES))
    except files.GONE as error:
        raise InputError(
            f"cannot read the run log {log}", got=error.strerror, fix="name a run directory that has one"
        ) from error
    digest = hashlib.blake2b(tail, digest_size=16).hexdigest()
    return {"bytes": stat.st_size, "modified": stat.st_mtime_ns, "tail": digest}


def _kept(table: Path, made_of: Mapping[str, Any], wanted: Callable[[str], bool]) -> "pa.Table | None":
    """The wanted columns of the Parquet file; None where it is of another log, damaged or not there."""
    import pyarrow as pa
    from pyarrow import parquet

    if not table.is_file():
        return None
    try:
        with table.open("rb") as kept, parquet.ParquetFile(kept, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            if json.loads((schema.metadata or {}).get(MADE_OF, b"{}")) != made_of:
                return None
            if file.metadata.num_rows > made_of["bytes"]:  # of a few bytes it can make any number
                raise ValueError(f"{file.metadata.num_rows:,} rows of a log of {made_of['bytes']:,} bytes")
            return file.read([name for name in schema.names if name == STEP or wanted(name)], use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        said = (str(error).splitlines() or ["it cannot be read"])[0]
        found = "may not be read" if isinstance(error, PermissionError) else "is damaged"
        print(f"{table} {found} and is made again from the log: {said:.100}", file=sys.stderr)
        return None


def _keep(table: Path, made_of: Mapping[str, Any], rows: "pa.Table") -> "pa.Table":
    """Write a log's table; it is the same where the folder takes no file."""
    from pyarrow import parquet

    named = rows.replace_schema_metadata({MADE_OF: json.dumps(made_of)})
    with suppress(OSError), files.publishing(table) as new, new.open("wb") as kept:  # it takes names of UTF-8 alone
        parquet.write_table(named, kept, use_dictionary=False, compression="zstd", write_page_checksum=True)
    return named


def parsed(log: Path, size: int) -> "pa.Table":
    """The rows in the first ``size`` bytes of a log as a table, columns in the order in which they begin."""
    import pyarrow as pa
    from pyarrow import json as arrow_json

    with log.open("rb") as file:
        content = file.read(size)
    content = content[: content.rfind(b"\n") + 1]
    whole = arrow_json.ReadOptions(use_threads=False, block_size=max(1, len(content)))
    with suppress(pa.ArrowException):  # what is not finite is text, which it takes for a column of another kind
        found = arrow_json.read_json(io.BytesIO(content), whole) if content else pa.table({})
        whole_lines = found.num_rows == content.count(b"\n")  # it also takes rows that go over several
        if whole_lines and all(
            _is_number(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind) for kind in found.schema.types
        ):
            return found
    return of_rows(list(runlog.rows(log, stop=size)), log)


def of_rows(rows: Sequence[Mapping[str, Any]], log: Path) -> "pa.Table":
    """Rows as a table. Raises InputError where a column mixes numbers and text."""
    import pyarrow as pa

    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            columns[name] = pa.array([row.get(name) for row in rows], from_pandas=False)
        except (pa.ArrowException, OverflowError) as error:
            got = str(error).splitlines()[0]
            raise InputError(f"{log}: the column {name} holds more than numbers", got=got) from error
    return pa.table(columns)
