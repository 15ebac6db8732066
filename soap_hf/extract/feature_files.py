"""Files of features, written batch by batch: parquet and safetensors."""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Features, Sequence, Value
from torch import Tensor

from ..files import write_tensors
from ..runtime.errors import DataError
from .features import PATCHES, Columns

ROW, ROWS, SOURCE, FILE_NAME, FILE_NAMES = "row", "rows", "source", "file_name", "file_names"
"""Names of the rows of the data set that features belong to, of the file of a stream, and of the images' files."""

METADATA = "soap_hf"
"""Where a file says what made its features, in JSON."""

ROW_GROUP = 8_000_000
"""Bytes that are written at once to a parquet file, and read at once."""


@dataclass(frozen=True)
class Table:
    """What is known of a file of features before its first row.

    Args:
        shapes: of one image's features, by column.
        dtype: in which they are kept.
        numbered: whether images have different patches, which have a column of numbers.
        others: types of the data set's other columns.
        by_source: whether rows are counted within the files of a stream.
        about: what made the features.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    numbered: bool
    others: Features
    by_source: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def own(self) -> list[str]:
        """Names of the columns that are ours."""
        return [
            *([SOURCE] if self.by_source else []),
            ROW,
            FILE_NAME,
            *([PATCHES] if self.numbered else []),
            *self.shapes,
        ]

    def refuse_taken_names(self) -> None:
        """Refuses, before any work, a column of the data set with one of our names; a `DataError` names it."""
        if taken := {*self.own, ROWS} & set(self.others):
            name = sorted(taken)[0]
            raise DataError(f"The data set has a column {name!r} already; rename it with dataset.rename_column.")

    @property
    def kinds(self) -> Features:
        """Types of all columns, as `datasets` has them."""
        kinds: dict[str, Any] = dict(self.others)
        ours = {SOURCE: Value("int32"), ROW: Value("int64"), FILE_NAME: Value("string")}
        ours[PATCHES] = Sequence(Value("int32"))
        number = Value(str(self.dtype).removeprefix("torch."))
        for name, shape in self.shapes.items():
            ours[name] = Sequence(number, length=shape[-1])
            if len(shape) > 1:
                ours[name] = Sequence(ours[name])
        return Features({**kinds, **{name: ours[name] for name in self.own}})


@dataclass(frozen=True)
class FeatureBatch:
    """A batch to be written: features, rows, file names, and the data set's other columns, all of one length."""

    features: Columns
    rows: list[int]
    files: list[str | None]
    others: pa.Table | None
    source: int = 0


Write = Callable[[FeatureBatch], None]


class ParquetFeatures:
    """A parquet file in the making; `datasets` reads its columns with their types."""

    def __init__(self, path: Path, table: Table):
        self.kinds, self.by_source, self.count = table.kinds, table.by_source, 0
        schema = self.kinds.arrow_schema
        about = {**(schema.metadata or {}), METADATA: json.dumps(dict(table.about))}
        self.schema = schema.with_metadata(about)
        self._writer = pq.ParquetWriter(path, self.schema, **_encodings(schema, set(table.shapes)))
        self._waiting: list[pa.Table] = []
        self._thread = ThreadPoolExecutor(1)  # writes while the model works: pyarrow lets go of the interpreter
        self._written: Future[None] | None = None

    def __call__(self, batch: FeatureBatch) -> None:
        """Adds a batch."""
        columns: dict[str, Any] = {
            ROW: pa.array(batch.rows, pa.int64()),
            FILE_NAME: pa.array(batch.files, pa.string()),
            SOURCE: pa.array([batch.source] * len(batch.rows), pa.int32()),
            **{name: _arrow(values) for name, values in batch.features.items()},
        }
        if batch.others is not None:
            columns |= {name: batch.others[name] for name in batch.others.column_names}
        table = pa.table({name: columns[name] for name in self.kinds})
        self._wait(table.cast(self.schema))
        self.count += len(batch.rows)
        if sum(one.nbytes for one in self._waiting) > ROW_GROUP:
            self._flush()

    def _wait(self, table: pa.Table) -> None:
        """Keeps rows in few large pieces: thousands of small ones would scatter the memory of the process."""
        while self._waiting and self._waiting[-1].num_rows <= table.num_rows:
            table = pa.concat_tables([self._waiting.pop(), table]).combine_chunks()
        self._waiting.append(table)

    def _flush(self) -> None:
        """Begins to write the rows that wait, when those before them are written."""
        self._finish()
        tables, self._waiting = self._waiting, []
        if tables:
            self._written = self._thread.submit(lambda: self._writer.write_table(pa.concat_tables(tables)))

    def _finish(self) -> None:
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self, about: Mapping[str, Any] | None = None) -> None:
        """Completes the file; `about` is what is only known now."""
        self._flush()
        self._thread.shutdown()
        self._finish()
        if about:
            self._writer.add_key_value_metadata(
                {f"{METADATA}_{name}": json.dumps(value) for name, value in about.items()}
            )
        self._writer.close()

    def abandon(self) -> None:
        """Closes what is left of a file that is not wanted."""
        self._waiting = []
        self._thread.shutdown()
        self._writer.close()


def _encodings(schema: pa.Schema, features: set[str]) -> dict[str, Any]:
    """How parquet writes columns: features, whose numbers hardly repeat, as they are, and the others as it likes."""
    about = io.BytesIO()
    pq.write_metadata(schema, about)
    paths = pq.read_metadata(about).schema
    others = [path for path in (paths.column(i).path for i in range(len(paths))) if path.split(".")[0] not in features]
    compression = dict.fromkeys(others, "snappy")
    return {"use_dictionary": others, "write_statistics": others, "compression": compression or "none"}


def about_file(path: Path) -> tuple[dict[str, Any], int]:
    """What a parquet file of features says of itself (`about`, and what was only known in the end), and its rows."""
    metadata = pq.read_metadata(path)
    pairs = (metadata.metadata or {}).items()
    told = {name.decode(): json.loads(value) for name, value in pairs if name.startswith(METADATA.encode())}
    found = told.pop(METADATA, {})
    return {**found, **{name.removeprefix(f"{METADATA}_"): value for name, value in told.items()}}, metadata.num_rows


def _arrow(values: Tensor | list[Tensor]) -> pa.Array:
    """Lists of one length, lists of those, or lists of numbers."""
    if isinstance(values, Tensor) and values.ndim == 2:
        return _vectors(values)
    if isinstance(values, Tensor):
        offsets, together = torch.arange(len(values) + 1) * values[0, ..., 0].numel(), values.flatten(0, -2)
    else:
        images = [image.flatten(0, -2) if image.ndim > 1 else image for image in values]
        offsets, together = torch.tensor([0, *map(len, images)]).cumsum(0), torch.cat(images)
    return pa.ListArray.from_arrays(
        _numbers(offsets.int()), _numbers(together) if together.ndim == 1 else _vectors(together)
    )


def _vectors(values: Tensor) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(_numbers(values.flatten()), values.shape[-1])


def _numbers(values: Tensor) -> pa.Array:
    """A column of the tensor's numbers, in pyarrow's memory: small tensors that wait would scatter that of torch.

    `pa.array` would convert 16-bit floats one by one.
    """
    array = values.contiguous().numpy()
    buffer = pa.allocate_buffer(array.nbytes)
    np.frombuffer(buffer, array.dtype)[:] = array
    return pa.Array.from_buffers(pa.from_numpy_dtype(array.dtype), array.size, [None, buffer])


@contextmanager
def parquet_features(path: Path, table: Table) -> Iterator[Write]:
    """A parquet file that is complete when the block ends without an error."""
    file = ParquetFeatures(path, table)
    try:
        yield file
    except BaseException:
        file.abandon()
        raise
    file.close()


@contextmanager
def safetensors_features(path: Path, table: Table) -> Iterator[Write]:
    """A tensor of features `(N, ...)` for each column, one of their rows, and one for each column of numbers.

    The header, which comes first, holds the length: so the features wait in files of their own.
    """
    numbers = numbers_in(table.others)
    waiting = {name: Path(f"{path}.{name}.waiting") for name in table.shapes}
    shapes: dict[str, torch.Size] = {}
    written: list[FeatureBatch] = []
    files: dict[str, BinaryIO] = {}

    def write(batch: FeatureBatch) -> None:
        for name, values in batch.features.items():
            whole = values if isinstance(values, Tensor) else torch.stack(values)
            if name == PATCHES:  # alike in all images
                patches[:] = [whole[0]]
                continue
            whole.contiguous().view(torch.uint8).numpy().tofile(files[name])
            shapes[name] = whole.shape[1:]
        others = None if batch.others is None else batch.others.select(numbers)
        written.append(FeatureBatch({}, batch.rows, batch.files, others))
        if others is not None:
            refuse_missing_numbers(others)

    patches: list[Tensor] = []
    try:
        with ExitStack() as opened:
            files.update({name: opened.enter_context(at.open("wb")) for name, at in waiting.items()})
            yield write
        rows = [row for batch in written for row in batch.rows]
        if rows:
            tensors = {ROWS: torch.tensor(rows), **dict(zip([PATCHES], patches, strict=False))}
            if numbers:
                others = pa.concat_tables(batch.others for batch in written)
                tensors |= {name: torch.tensor(others[name].to_numpy()) for name in numbers}
            for name, shape in shapes.items():
                whole = torch.Size((len(rows), *shape))
                kept = torch.from_file(str(waiting[name]), size=whole.numel(), dtype=table.dtype)
                tensors[name] = kept.view(whole)
            names = json.dumps([file for batch in written for file in batch.files])
            write_tensors(path, tensors, {FILE_NAMES: names, METADATA: json.dumps(dict(table.about))})
    finally:
        for at in waiting.values():
            at.unlink(missing_ok=True)


def refuse_missing_numbers(table: pa.Table) -> None:
    """Refuses columns of whole numbers that lack some, which no tensor can say; a `DataError` names one."""
    for name in table.column_names:
        if table[name].null_count and pa.types.is_integer(table[name].type):
            raise DataError(
                f"Column {name!r} lacks a whole number in some rows, which no tensor can say; write .parquet, or fill "
                "or remove the column."
            )


def numbers_in(kinds: Features) -> list[str]:
    """Columns of one number per row."""
    numbers = ("int", "uint", "float")
    return [
        name
        for name, kind in kinds.items()
        if isinstance(kind, (Value, ClassLabel)) and kind.dtype.startswith(numbers)
    ]


FEATURE_FILES: dict[str, Callable[[Path, Table], AbstractContextManager[Write]]] = {
    ".parquet": parquet_features,
    ".safetensors": safetensors_features,
}
"""By the ending of their names: files that are whole when their `with` block ends without an error."""
