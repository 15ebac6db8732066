"""Files of features, written batch by batch: parquet and safetensors."""

from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features, Sequence, Value
from torch import Tensor

from ..files import write_tensors

FEATURES, ROWS = "features", "rows"
"""Names of the features, and in safetensors of the rows of the data set that they belong to."""


class FeatureFile(Protocol):
    """A file that is whole when its `with` block ends without an error."""

    def __init__(self, path: Path, kinds: Features): ...

    def __enter__(self) -> Any: ...

    def __exit__(self, error: Any, *_: Any) -> None: ...

    def write(self, features: Tensor, rows: list[int], columns: pa.Table | None) -> None:
        """Adds float32 features `(B, ...)`, the rows they belong to, and what else the data set says of those."""


class ParquetFeatures:
    """A column of features, as lists of one length, beside the data set's other columns of the types `kinds`."""

    def __init__(self, path: Path, kinds: Features):
        self._path, self._kinds = path, kinds
        self._writer: Any = None

    def __enter__(self) -> "ParquetFeatures":
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, features: Tensor, rows: list[int], columns: pa.Table | None) -> None:
        length = features[0].numel()
        values = pa.FixedSizeListArray.from_arrays(pa.array(features.flatten().numpy()), length)
        table = pa.table({FEATURES: values}) if columns is None else columns.append_column(FEATURES, values)
        kinds = Features({**self._kinds, FEATURES: Sequence(Value("float32"), length=length)})
        table = table.cast(kinds.arrow_schema)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)


class SafetensorsFeatures:
    """A tensor of features `(N, ...)`, one of their rows, and one for each column of numbers.

    The header, which comes first, holds the length: so the features wait in a file of their own.
    """

    def __init__(self, path: Path, kinds: Features):
        self._path, self._waiting = path, Path(f"{path}.waiting")
        self._numbers = [name for name, kind in kinds.items() if _is_number(kind)]
        self._shape, self._rows, self._columns = torch.Size(), list[int](), list[pa.Table]()

    def __enter__(self) -> "SafetensorsFeatures":
        self._file = self._waiting.open("wb")
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        self._file.close()
        try:
            if error is None and self._rows:
                self._finish()
        finally:
            self._waiting.unlink()

    def write(self, features: Tensor, rows: list[int], columns: pa.Table | None) -> None:
        features.numpy().tofile(self._file)
        self._shape = features.shape[1:]
        self._rows += rows
        if columns is not None:
            self._columns.append(columns.select(self._numbers))

    def _finish(self) -> None:
        shape = torch.Size((len(self._rows), *self._shape))
        tensors = {ROWS: torch.tensor(self._rows)}
        if self._columns:
            table = pa.concat_tables(self._columns)
            tensors |= {name: torch.tensor(table[name].to_numpy()) for name in self._numbers}
        tensors[FEATURES] = torch.from_file(str(self._waiting), size=shape.numel(), dtype=torch.float32).view(shape)
        write_tensors(self._path, tensors, {})


def _is_number(kind: Any) -> bool:
    return getattr(kind, "dtype", "").startswith(("int", "uint", "float"))


FEATURE_FILES: dict[str, type[FeatureFile]] = {".parquet": ParquetFeatures, ".safetensors": SafetensorsFeatures}
"""By the ending of their names."""
