"""Files of features, written batch by batch: parquet and safetensors."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features, Sequence, Value
from torch import Tensor

from ..files import write_tensors

FEATURES, ROWS = "features", "rows"
"""Names of the features, and in safetensors of the rows of the data set that they belong to."""

Write = Callable[[Tensor, list[int], pa.Table | None], None]
"""Adds float32 features `(B, ...)`, the rows they belong to, and what else the data set says of those."""


@contextmanager
def parquet_features(path: Path, kinds: Features) -> Iterator[Write]:
    """A column of features, as lists of one length, beside the data set's other columns of the types `kinds`."""
    with ExitStack() as opened:
        writer: Any = None

        def write(features: Tensor, rows: list[int], columns: pa.Table | None) -> None:
            nonlocal writer
            length = features[0].numel()
            values = pa.FixedSizeListArray.from_arrays(pa.array(features.flatten().numpy()), length)
            table = pa.table({FEATURES: values}) if columns is None else columns.append_column(FEATURES, values)
            all_kinds = Features({**kinds, FEATURES: Sequence(Value("float32"), length=length)})
            table = table.cast(all_kinds.arrow_schema)
            writer = writer or opened.enter_context(pq.ParquetWriter(path, table.schema))
            writer.write_table(table)

        yield write


@contextmanager
def safetensors_features(path: Path, kinds: Features) -> Iterator[Write]:
    """A tensor of features `(N, ...)`, one of their rows, and one for each column of numbers.

    The header, which comes first, holds the length: so the features wait in a file of their own.
    """
    numbers = [name for name, kind in kinds.items() if getattr(kind, "dtype", "").startswith(("int", "uint", "float"))]
    waiting, shape, all_rows, tables = Path(f"{path}.waiting"), torch.Size(), list[int](), list[pa.Table]()

    def write(features: Tensor, rows: list[int], columns: pa.Table | None) -> None:
        nonlocal shape
        features.numpy().tofile(file)
        shape = features.shape[1:]
        all_rows.extend(rows)
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
            write_tensors(path, tensors, {})
    finally:
        waiting.unlink()


FEATURE_FILES: dict[str, Callable[[Path, Features], AbstractContextManager[Write]]] = {
    ".parquet": parquet_features,
    ".safetensors": safetensors_features,
}
"""By the ending of their names: files that are whole when their `with` block ends without an error."""
