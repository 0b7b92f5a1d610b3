"""Rows of tables: CSV and Parquet files, and Hugging Face data sets (package datasets, extra `tasks`). jsonl.py reads JSONL.

A reader yields (number, place, row). The place names the row in refusals: `data.csv:17` is line 17 of the file, `data.parquet[16]` and
`hf:NAME train[16]` are the row with index 16, counted from 0 as in `datasets`.
"""

from __future__ import annotations

import csv
import importlib
import io
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from fst_fast.errors import UserError
from fst_fast.tasks.jsonl import read_bytes, read_jsonl

Rows = Iterator[tuple[int, str, Mapping[str, Any]]]
FILES = (".jsonl", ".csv", ".tsv", ".parquet")
HUB = "hf:"
MAX_CELL = 1 << 24  # characters of one cell of a CSV file


def read_file(path: Path) -> Rows:
    """The rows of a file, by its ending. Raises UserError."""
    match path.suffix:
        case ".jsonl":
            return read_jsonl(path)
        case ".parquet":
            return _read_parquet(path)
        case suffix:
            return _read_csv(path, "\t" if suffix == ".tsv" else ",")


def _read_csv(path: Path, delimiter: str) -> Rows:
    """Every cell is a text. The first line names the columns."""
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8; save the file as UTF-8") from None
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        for name in names:
            if not name.strip() or names.count(name) > 1:
                raise UserError(f"{path}:1: the column name {name!r:.80} is empty or given twice")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise UserError(
                    f"{path}:{reader.line_num}: has {len(cells)} cells; the first line names {len(names)} columns"
                )
            yield reader.line_num, f"{path}:{reader.line_num}", dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: is not CSV: {error}") from None


def _read_parquet(path: Path) -> Rows:
    pyarrow, parquet = (
        import_package(name, f"task={path}", "tasks") for name in ("pyarrow", "pyarrow.parquet")
    )
    try:
        with parquet.ParquetFile(path.expanduser()) as table:
            index = 0
            for batch in table.iter_batches():
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    yield index, f"{path}[{index}]", row
                    index += 1
    except OSError as error:
        raise UserError(f"task={path} cannot be read: {error.strerror or said(error)}") from None
    except (pyarrow.ArrowException, UnicodeDecodeError, KeyError) as error:
        raise UserError(f"task={path} is not a Parquet file that can be read: {said(error)}") from None


def read_hub(
    name: str, *, config: str | None, split: str, revision: str | None, streaming: int | None
) -> Rows:
    """The rows of one split of a data set on the Hub or in a local folder. streaming: read at most so many, without fetching all.

    Without a network the newest copy in the cache of `datasets` is read. Raises UserError."""
    datasets = import_package("datasets", f"task={HUB}{name}", "tasks")
    try:
        data = datasets.load_dataset(
            name, config, split=split, revision=revision, streaming=streaming is not None
        )
        _check_revision(data, name, revision)
        for index, row in enumerate(islice(data, streaming)):
            yield index, f"{HUB}{name} {split}[{index}]", row
    except ConnectionError:
        raise UserError(
            f"task={HUB}{name}: the data set is not in the cache of `datasets` and the Hub cannot be reached; load it once with a "
            f"network, or give a folder that holds it: {HUB}FOLDER"
        ) from None
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - its loaders raise errors of a dozen packages
        raise UserError(f"task={HUB}{name}, split {split}: {said(error)}") from None


def _check_revision(data: Any, name: str, revision: str | None) -> None:
    """Without a network `datasets` takes the newest copy of its cache, whatever revision is asked for."""
    files = [file["filename"] for file in getattr(data, "cache_files", [])]
    if (
        revision
        and re.fullmatch("[0-9a-f]{40}", revision)
        and files
        and not all(revision in file for file in files)
    ):
        raise UserError(
            f"task={HUB}{name}: the cache holds another revision than task_args.revision={revision}, and the Hub cannot be reached"
        )


def import_package(name: str, where: str, extra: str) -> Any:
    """The module, or UserError with the extra that brings it. where: what needs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0].replace("_", "-")
        raise UserError(
            f"{where} needs the package {package}; install it with: pip install 'fst-fast[{extra}]'"
        ) from None


def said(error: BaseException) -> str:
    """What an error says, as one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
