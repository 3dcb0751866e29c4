"""The rows of a table of any length, CSV or parquet, in a stream."""

import codecs
import contextlib
import csv
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from common import storage
from common.errors import DataError
from common.logs import RateLimited
from datasets_prep.sources.annotations import CP1252

log = logging.getLogger(__name__)
BATCH = 4096
# A row of Panda-70M has all clips of a long video; the csv module's own limit for one value is 128 kB.
MAX_VALUE = 1 << 27


def read_rows(
    url: str, wanted: list[str], way_out: str = "is it the right file?"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of one table as the columns asked for, and what an error calls each; commas or tabs, as its header has.

    Args:
        way_out: what to do about a column that is missing.

    Raises:
        DataError: a column is missing, or it is no table.
        StorageError: it can't be read.
    """
    with _local(url) as path:
        read = _parquet if url.endswith(".parquet") else _csv
        yield from read(url, path, wanted, way_out)


def _csv(url: str, path: Path, wanted: list[str], way_out: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(MAX_VALUE)
    with open(path, "rb") as file:
        header = file.readline()
        file.seek(len(codecs.BOM_UTF8) if header.startswith(codecs.BOM_UTF8) else 0)
        reader = csv.reader(_decoded(url, file), delimiter="\t" if b"\t" in header else ",")
        try:
            names = next(reader, [])
            _check_columns(url, wanted, names, way_out)
            places = [(name, names.index(name)) for name in wanted]
            for row in reader:
                if len(row) == len(names):
                    yield f"{url}, line {reader.line_num}", {name: row[place] for name, place in places}
                elif row:
                    raise DataError(
                        f"{url}, line {reader.line_num}: {len(row)} values for {len(names)} columns: correct it"
                    )
        except csv.Error as error:
            raise DataError(f"{url}, line {reader.line_num}: not valid CSV ({error}): correct it") from None


def _decoded(url: str, lines: Iterable[bytes]) -> Iterator[str]:
    odd = RateLimited(log)
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode()
        except UnicodeDecodeError:
            odd.warning(f"{url}, line {number} is not UTF-8: read such bytes as cp1252")
            text = line.decode(errors=CP1252)
        yield text


def _parquet(url: str, path: Path, wanted: list[str], way_out: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(url, wanted, file.schema_arrow.names, way_out)
            number = 0
            for batch in file.iter_batches(BATCH, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{url}, row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{url} is not a parquet file ({str(error).splitlines()[0]}): give a table") from None


def _check_columns(url: str, wanted: list[str], names: list[str], way_out: str) -> None:
    for name in wanted:
        if name not in names:
            raise DataError(f"{url} has no column {name!r}, only {', '.join(names) or 'none'}: {way_out}")


@contextlib.contextmanager
def _local(url: str) -> Iterator[Path]:
    """A path of the table: parquet is not read in order, and a connection does not last for hours."""
    if not storage.is_s3(url):
        with storage.open_stream(url):  # for its errors
            pass
        yield Path(url.removeprefix("file://")).expanduser()
        return
    with tempfile.TemporaryDirectory(prefix="table-") as folder:
        path = Path(folder) / "table"
        storage.download(url, path)
        yield path
