"""Clean features of a data set, in a file or in a folder of shards: batch by batch, whatever its size."""

import hashlib
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from ..data.arguments import parse_bytes
from ..data.blocks import Block, BlockBatch, ImageBlocks
from ..data.data_sets import open_dataset, public_name
from ..files import replacing
from ..heads.model import SOAPModelWrapper
from ..heads.opening import refuse_missing_head
from ..heads.running import head_preprocessor
from ..processes import ended_by, find_device, from_main_alone, join_processes, note_signals, sum_over_processes
from ..runtime.errors import DataError, OutputError, SOAPError
from ..runtime.head_files import commit_of
from ..runtime.vision_backbone import weight_digests
from ..version import package_versions
from .arguments import ExtractArguments
from .feature_files import FEATURE_FILES, FeatureBatch, Table, numbers_in, refuse_missing_numbers
from .features import Columns, Kept, column_names
from .folder import FeatureFolder, Shard

WAIT = timedelta(days=30)
"""How long processes wait for each other at the end: one may have much more to do."""

ROWS_OF_SHARED_STREAM = 10_000
"""Rows of a shard at most where processes share a stream of unknown length, so that each has its part of it."""


class ExtractionInterrupted(SOAPError):
    """A signal ended an extraction, whose complete shards stay."""


def extract_features(
    head: str | os.PathLike | SOAPModelWrapper,
    dataset: str | os.PathLike | Dataset | IterableDataset | DatasetDict | IterableDatasetDict,
    output: str | os.PathLike,
    **arguments: Any,
) -> int:
    """Writes the clean features of every image of a data set, in its order and in constant memory.

    Unreadable images are left out and named. Under `accelerate launch` or `torchrun` the processes share the shards of
    a folder; call it in each of them. What they write does not depend on how many there are.

    Args:
        head (`str` or [`SOAPModelWrapper`]): folder, hub id or live model.
        dataset: hub id, folder of images, parquet file, tar files of webdataset, or a `datasets` object, streamed or
            not.
        output (`str` or `os.PathLike`):

            - a folder: `shards/part-*.parquet`, each of which is whole or not there, `manifest.json` and a card;
            - a `.parquet` file;
            - a `.safetensors` file with `features` `(N, ...)`, `rows` `(N,)`, the columns of numbers, and `file_names`
              as JSON in its metadata.

            Parquet has the data set's other columns, `row` in the data set, `file_name` (below the folder if it is
            one; empty for an image that is no file) and `features`: of an image a list of `D` numbers, or for patch
            tokens a list of those. `patches` are their numbers in raster order, where some are left out. `source` is
            the file of a stream in which `row` counts.
        arguments: the fields of [`ExtractArguments`]: `pooling="mean"`, `patches=False`, `every=1`, `inside=None`,
            `layer=None`, `stored_as=None`, `normalize=False`, `with_raw=False`, `image_column="image"`, `split=None`,
            `config_name=None`, `streaming=False`, `num_images=None`, `image_size=None`, `batch_size=32`,
            `num_workers=None`, `shard_size="512MB"`, `resume=False`, `overwrite=False`, `max_bad_fraction=0.01`,
            `dtype=None`, `device=None`, `revision=None`, `token=None`, `trust_remote_code=False`, `progress=True`.

    Returns:
        `int`: how many images there are features of.

    Raises:
        DataError: the data set cannot be read, repeats itself for ever, or holds too many unreadable images.
        HeadError, BackboneError: the head cannot be loaded.
        OutputError: the output has another ending, cannot be written, or holds something else.
        ExtractionInterrupted: SIGINT or SIGTERM came; the shards that are there stay.
        TypeError: there is no such argument.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from transformers import ViTConfig, ViTModel
        >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        ...                          image_size=32, patch_size=8))
        >>> images = Dataset.from_dict({"image": [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(6)]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = SOAPModelWrapper.from_backbone(vit, None)
        ...     count = extract_features(model, images, f"{folder}/features", shard_size=2, progress=False)
        ...     shards = sorted(path.name for path in Path(folder, "features/shards").iterdir())
        >>> count, shards[0]
        (6, 'part-00000-of-00003.parquet')
    """
    chosen, target = ExtractArguments.of("extract_features", arguments), Path(output)
    state = join_processes(chosen.device, timeout=WAIT)
    if target.suffix and target.suffix not in FEATURE_FILES:
        raise OutputError(
            f"Features go into a folder, or a file that ends in {' or '.join(FEATURE_FILES)}, not {target.name!r}."
        )
    if target.suffix and state.num_processes > 1:
        raise OutputError(f"{state.num_processes} processes write features into a folder, not into {target.name}.")
    if target.suffix and chosen.resume:
        raise OutputError(f"{target.name} is there when it is complete, so none is resumed; extract into a folder.")
    source = {"split": chosen.split, "config_name": chosen.config_name, "streaming": chosen.streaming}
    opened = open_dataset(dataset, **source, token=chosen.token)  # type: ignore[arg-type]
    limits: dict[str, Any] = {"mask_column": chosen.inside, "num_images": chosen.num_images}
    blocks = ImageBlocks(opened, chosen.image_column, **limits, by_files=not target.suffix)
    run = Extraction(head, dataset, opened, blocks, chosen)
    try:
        return run.into_file(target) if target.suffix else run.into_folder(target)
    except SOAPError as error:
        if state.num_processes == 1:
            raise
        raise type(error)(f"Process {state.process_index} of {state.num_processes}: {error}") from error


class Extraction:
    """One run: a head, a data set, and what is kept."""

    def __init__(self, head: Any, dataset: Any, opened: Any, blocks: ImageBlocks, chosen: ExtractArguments):
        self.head, self.dataset, self.opened, self.blocks, self.chosen = head, dataset, opened, blocks, chosen
        self.root = dataset if isinstance(dataset, (str, os.PathLike)) and os.path.isdir(dataset) else None

    def into_file(self, target: Path) -> int:
        """One file of all features."""
        kind = "safetensors" if target.suffix == ".safetensors" else "parquet"
        self._refuse(kind)
        with replacing(target) as temporary:  # before anything long: can it be written?
            kept, table = self._prepared()
            everything = max(1, self.blocks.num_rows or 2**62)
            count = 0
            with FEATURE_FILES[target.suffix](temporary, table) as write:
                for part, columns in self._features(kept, everything, lambda block: True):
                    if columns is not None:
                        write(self._rows(part, columns))
                        count += len(part.batch.positions)
                if not count:
                    raise DataError("The data set holds no readable image.")
        return count

    def into_folder(self, target: Path) -> int:
        """Shards of which this process writes its share, and a manifest. Collective."""
        self._refuse("parquet")
        kept, table = self._prepared()
        state, chosen = PartialState(), self.chosen
        folder = FeatureFolder(target, self._identity(table), self.blocks.num_rows)
        ways: dict[str, Any] = {"resume": chosen.resume, "overwrite": chosen.overwrite}
        begun = from_main_alone(folder.begin, self._rows_per_shard(kept), **ways)
        try:
            if begun.rows is not None:
                return begun.rows
            rank, others, by_source = state.process_index, state.num_processes, self.blocks.num_sources
            by_files = by_source >= others and by_source > 1

            def mine(block: Block) -> bool:
                turn = block.source if by_files else block.number
                return turn % others == rank and block not in begun.done

            def open_here(source: int) -> bool:
                return source not in begun.ended and (not by_files or source % others == rank)

            self._write_shards(folder, kept, table, begun.rows_per_shard, mine, open_here)
            sum_over_processes(torch.tensor(1))  # all have come to their end
            return from_main_alone(folder.finish, begun.rows_per_shard, chosen.max_bad_fraction)
        finally:
            folder.release()

    def _write_shards(self, folder: FeatureFolder, kept: Kept, table: Table, size: int, mine: Any, here: Any) -> None:
        shard: Shard | None = None
        signals: list[str] = []
        try:
            with note_signals(signals, wanted=True):
                for part, columns in self._features(kept, size, mine, here):
                    if signals:
                        told = f"complete shards are in {folder.path}; go on with --resume."
                        raise ended_by(signals, ExtractionInterrupted(f"Interrupted by {signals[0]}: {told}"))
                    if shard is not None and shard.block != part.block:
                        shard.close()
                        shard = None
                    shard = shard or Shard(folder, part.block, size, table)
                    if columns is not None:
                        shard.add(self._rows(part, columns))
                    shard.bad_images += part.batch.bad
                    shard.ends = part.ends
                if shard is not None:
                    shard.close()
        except BaseException as error:
            if shard is not None:
                shard.abandon(error)
            raise

    def _features(
        self, kept: Kept, size: int, mine: Any, here: Any = lambda source: True
    ) -> Iterator[tuple[BlockBatch, Columns | None]]:
        """Each batch, and its features unless no image of it can be read; the model is one batch ahead."""
        chosen = self.chosen
        how: dict[str, Any] = {"max_bad_fraction": chosen.max_bad_fraction, "phase": "features"}
        progress = chosen.progress and PartialState().is_main_process
        parts = self.blocks.read(
            kept.prepare, int(chosen.batch_size), chosen.num_workers, size=size, wanted=mine, sources=here, **how,
            progress=progress,
        )  # fmt: skip
        before = None
        for part in parts:
            begun = kept.begin(part.batch.values) if part.batch.positions else None
            if before is not None:
                yield before[0], before[1] and before[1]()
            before = part, begun
        if before is not None:
            yield before[0], before[1] and before[1]()

    def _rows(self, part: BlockBatch, columns: Columns) -> FeatureBatch:
        names = [path and self._below(path) for path in part.batch.paths]
        return FeatureBatch(columns, part.batch.positions, names, part.columns, part.block.source)

    def _below(self, path: str) -> str:
        """A file's name as others may read it: below its folder, or else without any."""
        if self.root is not None and Path(whole := os.path.abspath(path)).is_relative_to(os.path.abspath(self.root)):
            return Path(os.path.relpath(whole, self.root)).as_posix()
        return Path(os.path.basename(path) if os.path.isabs(path) else path).as_posix()

    def _refuse(self, kind: str) -> None:
        """Refuses, before the model is loaded, what could not be written after its work."""
        if kind == "parquet" and self.chosen.kept_as == "bfloat16":
            raise DataError("Parquet has no bfloat16; store float16 or float32, or write .safetensors.")
        if kind == "safetensors":
            if self.chosen.inside:
                raise DataError("Images have different numbers of patches inside their masks; write parquet.")
            for table in self.blocks.tables(numbers_in(self.blocks.columns)):
                refuse_missing_numbers(table)
        names = column_names(self.chosen.layers or (-1,), self.chosen.with_raw)
        self._table(dict.fromkeys(chain(*names.values()), (1,))).refuse_taken_names()

    def _table(self, shapes: dict[str, Any], about: Any = None) -> Table:
        chosen = self.chosen
        by_source = self.blocks.num_sources > 1
        dtype = getattr(torch, chosen.kept_as)
        return Table(shapes, dtype, chosen.numbers_patches, self.blocks.columns, by_source, about or {})

    def _prepared(self) -> tuple[Kept, Table]:
        """The model, ready to run, and the table of what it will give."""
        self.model = _load(self.head, self.chosen)
        kept = Kept.of(self.model, head_preprocessor(self.model, self.chosen.image_size), self.chosen)
        return kept, self._table(kept.shapes, self._about(kept))

    def _about(self, kept: Kept) -> dict[str, Any]:
        """What made the features, in words."""
        config, chosen, opened = self.model.config, self.chosen, self.opened
        name = str(self.head) if isinstance(self.head, (str, os.PathLike)) else config.name_or_path or None
        return {
            "head": name and public_name(name),
            "head's commit": None if name is None else commit_of(name, chosen.revision),
            "digest of the head": _digest_of_head(self.model),
            "backbone": config.backbone_name_or_path and public_name(config.backbone_name_or_path),
            "backbone's revision": config.backbone_revision,
            "layers": list(kept.layers),
            "kept": f"patch tokens on {_grid(kept)}" if kept.pooling is None else kept.pooling,
            "every": kept.every,
            "inside": chosen.inside,
            "normalized": kept.normalize,
            "stored as": chosen.kept_as,
            "with raw": kept.with_raw,
            "dtype of the backbone": str(self.model.dtype).removeprefix("torch."),
            "image size": list(kept.preprocess.size),
            "data set": public_name(self.dataset, opened),
            "split": str(opened.split) if opened.split else None,
            "config": chosen.config_name,
            "versions": package_versions(),
        }

    def _identity(self, table: Table) -> dict[str, Any]:
        """What names a run, so that another one does not go on with its shards."""
        blocks = self.blocks
        return {
            **{name: value for name, value in table.about.items() if name != "versions"},
            "other columns": {name: str(kind) for name, kind in blocks.columns.items()},
            "number of rows": blocks.num_rows,
            "images asked for": self.chosen.num_images,
            "files of the stream": blocks.num_sources,
            "digest of the first image": blocks.digest_of_first(),
            "size of a shard": self.chosen.shard_size,
        }

    def _rows_per_shard(self, kept: Kept) -> int:
        """Rows of a shard, so that all processes have as many shards to write."""
        size, blocks, processes = self.chosen.shard_size, self.blocks, PartialState().num_processes
        if isinstance(size, int):
            return size
        rows = max(1, int(parse_bytes(size) / (kept.bytes_per_row + blocks.bytes_per_row())))
        if blocks.num_rows is None:
            return rows if blocks.num_sources >= processes else min(rows, ROWS_OF_SHARED_STREAM)
        shards = max(1, -(-blocks.num_rows // rows))
        shards = -(-shards // processes) * processes
        return max(1, -(-blocks.num_rows // shards))


def _grid(kept: Kept) -> str:
    return " and ".join(sorted({" x ".join(map(str, shape[:-1])) for shape in kept.shapes.values()}))


def _digest_of_head(model: SOAPModelWrapper) -> str:
    """Of the projections, and of the backbone's weights."""
    digest = hashlib.sha256(json.dumps(weight_digests(model.backbone), sort_keys=True).encode())
    for name, tensor in sorted(model.projections.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _load(head: Any, chosen: ExtractArguments) -> SOAPModelWrapper:
    if isinstance(head, SOAPModelWrapper):
        return head
    refuse_missing_head(head)
    target = find_device(chosen.device)
    dtype: dict[str, Any] = {"dtype": chosen.dtype} if chosen.dtype else {}
    return SOAPModelWrapper.from_pretrained(head, **dtype, **chosen.hub_kwargs).to(target)
