"""Files of features, written batch by batch: parquet and safetensors."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from torch import Tensor

from ..files import write_tensors
from ..runtime.errors import DataError

FEATURES, ROW, ROWS, FILE_NAME, FILE_NAMES = "features", "row", "rows", "file_name", "file_names"
"""Names of the features, of the rows of the data set that they belong to, and of the files; plural in safetensors."""

Write = Callable[[Tensor, list[int], list[str | None], pa.Table | None], None]
"""Adds float32 features `(B, ...)`, the rows they belong to, their files, and what else the data set says of those."""


def check_columns(columns: Dataset, ending: str) -> None:
    """Refuses, before any work, columns that have our names, or that a file of this kind cannot keep as they are.

    Raises:
        DataError: names the column and a way out.
    """
    if taken := {FEATURES, ROW, ROWS, FILE_NAME} & set(columns.column_names):
        raise DataError(f"The data set has a column {taken.pop()!r} already; rename it with dataset.rename_column.")
    for name in _numbers(columns.features) if ending == ".safetensors" else ():
        if columns.features[name].dtype.startswith("float"):
            continue
        if any(table[name].null_count for table in columns.select_columns([name]).iter(batch_size=100_000)):
            raise DataError(
                f"Column {name!r} lacks a whole number in some rows, which no tensor can say; write .parquet, or fill "
                "or remove the column."
            )


def _numbers(kinds: Features) -> list[str]:
    """Columns of one number per row."""
    numbers = ("int", "uint", "float")
    return [
        name
        for name, kind in kinds.items()
        if isinstance(kind, (Value, ClassLabel)) and kind.dtype.startswith(numbers)
    ]


@contextmanager
def parquet_features(path: Path, kinds: Features) -> Iterator[Write]:
    """A column of features, as lists of one length, beside the data set's other columns of the types `kinds`."""
    with ExitStack() as opened:
        writer: Any = None

        def write(features: Tensor, rows: list[int], files: list[str | None], columns: pa.Table | None) -> None:
            nonlocal writer
            length = features[0].numel()
            values = pa.FixedSizeListArray.from_arrays(pa.array(features.flatten().numpy()), length)
            ours = {ROW: pa.array(rows), FILE_NAME: pa.array(files, pa.string()), FEATURES: values}
            known = {} if columns is None else {name: columns[name] for name in columns.column_names}
            our_kinds = (Value("int64"), Value("string"), Sequence(Value("float32"), length=length))
            all_kinds = Features({**kinds, **dict(zip(ours, our_kinds, strict=True))})
            table = pa.table({**known, **ours}).cast(all_kinds.arrow_schema)
            writer = writer or opened.enter_context(pq.ParquetWriter(path, table.schema))
            writer.write_table(table)

        yield write


@contextmanager
def safetensors_features(path: Path, kinds: Features) -> Iterator[Write]:
    """A tensor of features `(N, ...)`, one of their rows, and one for each column of numbers.

    The header, which comes first, holds the length: so the features wait in a file of their own.
    """
    numbers, waiting, shape = _numbers(kinds), Path(f"{path}.waiting"), torch.Size()
    all_rows, all_files, tables = list[int](), list[str | None](), list[pa.Table]()

    def write(features: Tensor, rows: list[int], files: list[str | None], columns: pa.Table | None) -> None:
        nonlocal shape
        features.numpy().tofile(file)
        shape = features.shape[1:]
        all_rows.extend(rows)
        all_files.extend(files)
        if columns is not None:
            tables.append(columns.select(numbers))

    try:
        with waiting.open("wb") as file:
            yield write
        if all_rows:
            tensors = {ROWS: torch.tensor(all_rows)}
            if tables:
                table = pa.concat_tables(tables)
                tensors |= {name: torch.tensor(table[name].to_numpy()) for name in numbers}
            shape = torch.Size((len(all_rows), *shape))
            tensors[FEATURES] = torch.from_file(str(waiting), size=shape.numel(), dtype=torch.float32).view(shape)
            write_tensors(path, tensors, {FILE_NAMES: json.dumps(all_files)})
    finally:
        waiting.unlink()


FEATURE_FILES: dict[str, Callable[[Path, Features], AbstractContextManager[Write]]] = {
    ".parquet": parquet_features,
    ".safetensors": safetensors_features,
}
"""By the ending of their names: files that are whole when their `with` block ends without an error."""
