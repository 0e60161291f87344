"""The target's features on disk, for training several epochs without running the target again.

A folder of safetensors shards, each holding consecutive rows as the drafter reads them: compressed, in the target's dtype.
`cache.json` says what they were made from; anything else is refused. A shard gets its name when it is complete, so that an
interrupted build goes on where it stopped. The processes of a run share the shards out; of several runs one builds, and the
others wait for it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.plain import as_python
from ..drafters.dream.compression import DrafterText
from ..regeneration.journal import write_whole
from .atomic_checkpoints import is_full_disk
from .target_features import DrafterBatch

logger = logging.get_logger(__name__)

ROWS_PER_SHARD = 64
ROWS_TO_MEASURE = 8
PER_TOKEN = ("embeds", "features", "positions", "token_ids", "predicts")

Row = dict[str, Tensor]
MakeRow = Callable[[int], Row | None]


class FeatureCache(Dataset[Row]):
    """
    Rows of features in a folder.

    Args:
        folder (`Path`): Where the shards are, or will be.
        fingerprint (`dict`): Everything that the features depend on.
        num_rows (`int`): Rows of the data.
        max_gb (`float`): Most disk space that they may take, in 10^9 bytes.

    Raises:
        ValueError: The folder holds features of something else.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], num_rows: int, max_gb: float):
        self.folder, self.num_rows, self.max_bytes = folder, num_rows, max_gb * 1e9
        self.places: list[tuple[int, int]] = []  # shard and row of every usable row
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.note = folder / "cache.json"
        self._check_note()

    @property
    def num_shards(self) -> int:
        """Shards of the whole data."""
        return -(-self.num_rows // ROWS_PER_SHARD)

    def build(self, make_row: MakeRow, rank: int, world_size: int, barrier: Callable[[], None]) -> None:
        """Make what is missing, each process its share of the shards.

        Args:
            make_row (`Callable`): Row number -> its tensors, or None if it cannot be used.
            rank, world_size (`int`): Which process this is, of how many.
            barrier (`Callable`): Waits for all processes.

        Raises:
            ValueError: The features would take, or take, more space than allowed.
            OSError: The disk is full; what is there can be gone on with.
        """
        if self._missing():
            self._check_size(make_row)
        with self._claimed(rank):
            barrier()
            self._check_note()
            missing = self._missing()
            barrier()  # nobody writes before everybody has seen what there is
            for shard in tqdm(missing[rank::world_size], desc="Caching features", disable=rank != 0 or not missing):
                rows = range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, self.num_rows))
                self._write(shard, [row for row in map(make_row, rows) if row is not None])
            barrier()
        self.places = [
            (shard, row) for shard in range(self.num_shards) for row in range(_count_rows(self._path(shard)))
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        shard, row = self.places[index]
        path = self._path(shard)
        file = _open(str(path), path.stat().st_mtime_ns)
        prefix = f"{row}."
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def _staging(self, shard: int) -> Path:
        return self.folder / f"incomplete-{shard:05d}"

    def _missing(self) -> list[int]:
        return [shard for shard in range(self.num_shards) if not self._path(shard).is_file()]

    @contextmanager
    def _claimed(self, rank: int) -> Iterator[None]:
        """While in the block no other run builds here; the first process claims the folder, and says what it will hold."""
        if rank != 0 or (self.note.is_file() and not self._missing()):
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "build.lock"):
            if not self.note.is_file():
                write_whole(self.note, json.dumps(self.fingerprint, indent=2).encode())
            yield

    def _check_note(self) -> None:
        """Refuse a folder of features that were made from something else."""
        if not self.note.is_file():
            return
        found = json.loads(self.note.read_text(encoding="utf-8"))
        differing = [name for name in self.fingerprint if found.get(name) != self.fingerprint[name]]
        if differing or found.keys() != self.fingerprint.keys():
            raise ValueError(
                f"`feature_cache_dir` ({str(self.folder)!r}) holds features made with another {' and '.join(differing)}. "
                "Give another folder, or delete this one."
            )

    def _bytes_taken(self) -> int:
        """Space that shards take by now. Others are renamed meanwhile: one that is no longer incomplete is complete."""
        taken = 0
        for shard in range(self.num_shards):
            for path in (self._staging(shard), self._path(shard)):
                try:
                    taken += path.stat().st_size
                    break
                except FileNotFoundError:
                    continue
        return taken

    def _check_size(self, make_row: MakeRow) -> None:
        """Say how much space the features will take, from the first rows; refuse what is too much."""
        rows = [row for row in map(make_row, range(min(ROWS_TO_MEASURE, self.num_rows))) if row is not None]
        per_row = sum(value.nbytes for row in rows for value in row.values()) / max(len(rows), 1)
        estimate = per_row * self.num_rows
        logger.warning(
            f"Features of {self.num_rows} rows will take about {estimate / 1e9:.3g} GB in {str(self.folder)!r} "
            f"(`feature_cache_max_gb`: {self.max_bytes / 1e9:g})."
        )
        if estimate > self.max_bytes:
            raise ValueError(
                f"`feature_cache_max_gb` ({self.max_bytes / 1e9:g}) is less than the {estimate / 1e9:.3g} GB that features of "
                f"{self.num_rows} rows are estimated to take. Raise it, or train without `feature_cache_dir`."
            )

    def _write(self, shard: int, rows: Sequence[Row]) -> None:
        tensors = {f"{index}.{name}": value for index, row in enumerate(rows) for name, value in row.items()}
        staging = self._staging(shard)
        try:
            save_file(tensors, staging, metadata={"rows": str(len(rows))})
        except Exception as error:
            staging.unlink(missing_ok=True)
            if is_full_disk(error):
                raise OSError(
                    f"There is no space left for features in {str(self.folder)!r}. Free some and start again."
                ) from error
            raise
        if self._bytes_taken() > self.max_bytes:
            staging.unlink()
            raise ValueError(
                f"`feature_cache_max_gb` ({self.max_bytes / 1e9:g}) is used up at shard {shard} of {self.num_shards}. Raise it "
                "and start again: what is there is kept."
            )
        os.replace(staging, self._path(shard))


def to_row(batch: DrafterBatch) -> Row | None:
    """The tensors of a batch of one row; None if it predicts nothing."""
    if not batch.predicts.any():
        return None
    values = {"embeds": batch.text.embeds, "features": batch.text.features, "positions": batch.text.positions}
    values |= {"token_ids": batch.token_ids, "predicts": batch.predicts}
    row = {name: value[0].cpu().contiguous() for name, value in values.items()}
    return row if batch.mid is None else {**row, "mid": batch.mid.cpu().contiguous()}


def collate_rows(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows padded to one length; intermediate features one after the other, as they are in a batch."""
    batch = {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in PER_TOKEN}
    batch["counts"] = torch.tensor([len(row["token_ids"]) for row in rows], device=batch["token_ids"].device)
    if "mid" in rows[0]:
        batch["mid"] = torch.cat([row["mid"] for row in rows])
    return batch


def to_batch(cached: Mapping[str, Tensor]) -> DrafterBatch:
    """What `collate_rows` returned, as the batch it was made from."""
    columns = torch.arange(cached["token_ids"].shape[1], device=cached["token_ids"].device).expand_as(
        cached["token_ids"]
    )
    text = DrafterText(cached["embeds"], cached["features"], cached["positions"], columns, cached["counts"])
    return DrafterBatch(text, cached["token_ids"], cached["predicts"], cached.get("mid"))


def fingerprint_rows(rows: Any, num_rows: int) -> str:
    """A digest of raw rows: text and bytes as they are, pictures by their pixels, files by name, size and time."""
    digest = hashlib.blake2b(digest_size=16)
    for index in range(num_rows):
        for part in _parts(rows[index]):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def fingerprint_weights(model: torch.nn.Module) -> str:
    """A digest of a model's weights: of each the name, the shape and a few values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.named_parameters():
        some = weight.detach().flatten()[:: max(1, weight.numel() // 16)][:16].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {some.tolist()}".encode())
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    value = as_python(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        yield str(len(value)).encode()
        for item in value:
            yield from _parts(item)
    elif isinstance(value, bytes):
        yield value
    elif callable(getattr(value, "tobytes", None)):
        yield f"{getattr(value, 'size', '')} {getattr(value, 'mode', '')}".encode()
        yield repr(value.getpalette() if getattr(value, "mode", "") == "P" else None).encode()
        yield value.tobytes()
    else:
        yield repr(value).encode()
        if isinstance(value, str | Path) and len(str(value)) < 1024 and os.path.isfile(value):
            found = os.stat(value)
            yield f"{found.st_size} {found.st_mtime_ns}".encode()


def _count_rows(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["rows"])


@lru_cache(maxsize=64)
def _open(path: str, changed: int) -> Any:
    """A shard, opened once; `changed` tells a file from its successor."""
    return safe_open(path, framework="pt")
