"""A folder of features in the making: shards that are whole or not there, and a manifest that says what is in it."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from filelock import FileLock, Timeout
from huggingface_hub import DatasetCard, DatasetCardData
from transformers.utils import logging

from ..data.blocks import Block
from ..data.image_files import BadImage, stop_if_too_many_bad
from ..files import replacing, writing
from ..runtime.errors import DataError, OutputError, first_sentence
from .feature_files import FeatureBatch, ParquetFeatures, Table, about_file

logger = logging.get_logger(__name__)

SHARDS, MANIFEST, CARD, LOCK = "shards", "manifest.json", "README.md", ".lock"
"""What lies in a folder of features: the shards, what is in them, a card for the Hub, and what a run holds."""

PARTS = "part-*.parquet"

LOCK_SECONDS = 10
"""Decoding processes of a run that was killed may hold its lock for a few seconds more."""

TEMPLATE = Path(__file__).parent / "templates" / "features_card.md"


class Begun(NamedTuple):
    """Where a run stands: rows of a shard, shards that are there, sources that are done, and rows, if all is done."""

    rows_per_shard: int
    done: frozenset[Block]
    ended: frozenset[int]
    rows: int | None


class FeatureFolder:
    """The folder that a run writes; `identity` names the run: another one's shards are not taken for its own.

    Args:
        path (`str` or `os.PathLike`): the folder.
        identity: what names the run, in words; values as JSON has them.
        num_rows (`int`, *optional*): rows of the data set, unless it is a stream.
    """

    def __init__(self, path: Any, identity: Mapping[str, Any], num_rows: int | None):
        self.path, self.identity, self.num_rows = Path(path), dict(identity), num_rows
        self.run = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self._lock = FileLock(self.path / LOCK, timeout=LOCK_SECONDS)

    def begin(self, rows_per_shard: int, *, resume: bool, overwrite: bool) -> Begun:
        """Takes the folder for this run, and tells what is there of it already.

        Raises:
            OutputError: it cannot be written, holds other files or another run's, or another run is at work in it.
        """
        with writing(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise OutputError(f"{self.path} is a file; choose a folder.")
            self._refuse_foreign_files()
            (self.path / SHARDS).mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise OutputError(
                    f"Another run is writing into {self.path}; wait for it or choose another."
                ) from error
            try:
                return self._begin(rows_per_shard, resume, overwrite)
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Lets others write."""
        self._lock.release()

    def _refuse_foreign_files(self) -> None:
        if not self.path.exists():
            return
        own = {self.path / name for name in (SHARDS, MANIFEST, CARD)} | set((self.path / SHARDS).glob(PARTS))
        there = [*self.path.iterdir(), *((self.path / SHARDS).iterdir() if (self.path / SHARDS).is_dir() else ())]
        foreign = sorted(str(at.relative_to(self.path)) for at in there if at not in own and at.name[0] != ".")
        if foreign:
            raise OutputError(f"{self.path} holds other files ({', '.join(foreign[:5])}); choose a folder of its own.")

    def _begin(self, rows_per_shard: int, resume: bool, overwrite: bool) -> Begun:
        manifest, parts = self.path / MANIFEST, sorted((self.path / SHARDS).glob(PARTS))
        for leftover in (self.path / SHARDS).glob(f".{PARTS}.*"):  # of a run that was killed
            leftover.unlink()
        if overwrite:
            for at in (*parts, manifest, self.path / CARD):
                at.unlink(missing_ok=True)
            parts = []
        if (manifest.exists() or parts) and not resume:
            raise OutputError(f"{self.path} holds features already; pass --resume to go on, or --overwrite.")
        if not manifest.exists():
            if parts:
                raise OutputError(f"{self.path} holds shards without a {MANIFEST}; pass --overwrite to start again.")
            if resume:
                logger.warning(f"There is nothing of a run in {self.path}: this one starts from the beginning.")
            self._write_manifest({"complete": False, "rows_per_shard": rows_per_shard, "made_by": self.identity})
            return Begun(rows_per_shard, frozenset(), frozenset(), None)
        return self._resumed()

    def _resumed(self) -> Begun:
        told = read_manifest(self.path)
        before, rows_per_shard = told["made_by"], told["rows_per_shard"]
        if different := ", ".join(
            f"{name} was {json.dumps(before.get(name))} and is {json.dumps(self.identity.get(name))}"
            for name in {**before, **self.identity}
            if before.get(name) != self.identity.get(name)
        ):
            raise OutputError(
                f"The features in {self.path} are of another run: {different}; choose another folder, or pass "
                "--overwrite."
            )
        shards = self.shards(rows_per_shard)
        last = {block.source: block.number for block, about in shards.items() if about["ends"]}
        ended = {
            source
            for source, number in last.items()
            if all(Block(source, earlier) in shards for earlier in range(number))
        }
        rows = int(told["rows"]) if told.get("complete") else None
        return Begun(rows_per_shard, frozenset(shards), frozenset(ended), rows)

    def shards(self, rows_per_shard: int) -> dict[Block, dict[str, Any]]:
        """The shards of this run, in order, with what they say of themselves, their file and its rows and bytes."""
        found = {}
        for path in sorted((self.path / SHARDS).glob(PARTS)):
            try:
                about, rows = about_file(path)
            except (OSError, pa.ArrowInvalid, ValueError):  # not ours, or damaged: it is written again
                about, rows = {}, 0
            if about.get("run") == self.run:
                block = Block(*about["block"])
                if path == self.shard_path(block, rows_per_shard):
                    found[block] = {
                        **about,
                        "file": f"{SHARDS}/{path.name}",
                        "rows": rows,
                        "bytes": path.stat().st_size,
                    }
        return found

    def shard_path(self, block: Block, rows_per_shard: int) -> Path:
        """Where the shard of a block lies; the names sort as the data set does."""
        if self.num_rows is None:
            name = f"part-{block.source:05d}-{block.number:05d}.parquet"
        else:
            name = f"part-{block.number:05d}-of-{-(-self.num_rows // rows_per_shard):05d}.parquet"
        return self.path / SHARDS / name

    def finish(self, rows_per_shard: int, max_bad_fraction: float) -> int:
        """Completes the manifest and writes the card; how many rows there are.

        Raises:
            DataError: too many images could not be read, or none could.
            OutputError: a shard is not there any more.
        """
        shards = self.shards(rows_per_shard)
        if self.num_rows is not None and len(shards) < -(-self.num_rows // rows_per_shard):
            raise OutputError(f"Shards have gone from {self.path / SHARDS}; pass --resume to write them again.")
        rows = sum(shard["rows"] for shard in shards.values())
        bad = [BadImage(*one) for shard in shards.values() for one in shard["bad_images"]]
        stop_if_too_many_bad(bad, max_bad_fraction, rows + len(bad), rows + len(bad))
        if rows == 0:
            raise DataError(f"The data set holds no readable image; there are no features in {self.path}.")
        listed, first = [], 0
        for block, shard in shards.items():
            listed.append({"file": shard["file"], "source": block.source, "rows": shard["rows"], "first": first})
            listed[-1]["bytes"] = shard["bytes"]
            first += shard["rows"]
        content = {"complete": True, "rows_per_shard": rows_per_shard, "made_by": self.identity, "rows": rows}
        unreadable = [{"name": image.name, "reason": image.reason} for image in bad]
        self._write_card(content, shards)
        self._write_manifest({**content, "unreadable": unreadable, "shards": listed})
        return rows

    def _write_manifest(self, content: dict[str, Any]) -> None:
        with replacing(self.path / MANIFEST) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _write_card(self, content: dict[str, Any], shards: Mapping[Block, Any]) -> None:
        data = DatasetCardData(
            pretty_name=f"Features of {self.identity['data set']}",
            configs=[{"config_name": "default", "data_files": [{"split": "train", "path": f"{SHARDS}/*.parquet"}]}],
            tags=["soap", "soap-hf", "features"],
        )
        options = {
            "template_path": str(TEMPLATE),
            "made_by": self.identity,
            "rows": content["rows"],
            "shards": len(shards),
            "megabytes": round(sum(shard["bytes"] for shard in shards.values()) / 1e6, 1),
        }
        with replacing(self.path / CARD) as temporary:
            DatasetCard.from_template(data, **options).save(temporary)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder of features says.

    Raises:
        OutputError: there is none, or it is damaged.
    """
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {**told, "made_by": dict(told["made_by"]), "rows_per_shard": int(told["rows_per_shard"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{folder / MANIFEST} cannot be read ({first_sentence(error)}); pass --overwrite to extract again."
        ) from error


class Shard:
    """The shard of one block while it is written; it appears when it is complete."""

    def __init__(self, folder: FeatureFolder, block: Block, rows_per_shard: int, table: Table):
        self.block, self.bad_images, self.ends = block, list[BadImage](), False
        self._open, self._about = ExitStack(), {"run": folder.run, "block": list(block)}
        temporary = self._open.enter_context(replacing(folder.shard_path(block, rows_per_shard)))
        self._file = ParquetFeatures(temporary, table)

    def add(self, rows: FeatureBatch) -> None:
        """Adds a batch."""
        self._file(rows)

    def close(self) -> None:
        """Completes the file."""
        bad = [(image.name, image.reason) for image in self.bad_images]
        with self._open:
            self._file.close({**self._about, "bad_images": bad, "ends": self.ends})

    def abandon(self, error: BaseException) -> None:
        """Removes what is there of it."""
        self._file.abandon()
        self._open.__exit__(type(error), error, error.__traceback__)
