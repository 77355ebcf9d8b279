"""The records of all experts on disk: where each lies, what a checkpoint keeps, and what a crash leaves behind.

A folder has one file per layer with two places per expert. One place holds the record of the last checkpoint and is
not written before the next one, the other takes what is written in between. Whatever happens while it is written, the
manifest of the last checkpoint still names records that are whole.
"""

import copy
import errno
import fcntl
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from .block_io import BLOCK, DEMAND, PREFETCH, WRITE_BACK, BlockEngine, aligned_buffer, as_memory
from .expert_records import RecordError, RecordInfo, RecordLayout

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"


class Pending:
    """Operations under way, and what is left to do after them."""

    def __init__(self, futures: list[Future], finish: Callable[[], None]):
        self._futures = futures
        self._finish = finish

    def result(self) -> None:
        """Waits for all of them, whatever interrupts it; raises that, or what the first one that failed has raised."""
        interruption = None
        while not all(future.done() for future in self._futures):
            # Until then the disk uses the memory, which whoever hears of the interruption takes for free.
            try:
                wait(self._futures)
            except BaseException as error:
                interruption = error
        if interruption is not None:
            raise interruption
        for future in self._futures:
            # A copy, because what is raised keeps every frame that it passes through, with all that a model saves for
            # its backward pass, and the original lives as long as its future.
            if (error := future.exception()) is not None:
                raise copy.copy(error) from error
        self._finish()


class ExpertFiles:
    """
    The disk's tier of a store. Not safe for use by several threads at once, except for what is [`Pending`].

    Args:
        folder (`str` or `Path`): Its own folder, on a disk with room for every expert twice.
        layout ([`RecordLayout`]): Of every record.
        num_layers (`int`), num_experts (`int`): How many records there are.
        engine ([`BlockEngine`]): What moves the bytes.
        identity (`str`, *optional*, defaults to `""`): Of the model whose experts they are.

    Raises:
        BlockingIOError: If another process uses the folder.
        ValueError: If the folder belongs to another model, or to experts of another number, type or size.
        OSError: If there is no room, or no direct I/O.
    """

    def __init__(
        self,
        folder: str | Path,
        layout: RecordLayout,
        num_layers: int,
        num_experts: int,
        engine: BlockEngine,
        identity: str = "",
    ):
        self.folder = Path(folder)
        self.layout, self.engine = layout, engine
        self.num_layers, self.num_experts = num_layers, num_experts
        self.bytes_read = self.bytes_written = 0
        # Reads end in the threads that wait for them.
        self._counting = threading.Lock()
        self.infos: dict[tuple[int, int], RecordInfo] = {}
        self.metadata: dict[str, Any] = {}
        # What the folder was filled from, in words that JSON can hold; no checkpoint changes it.
        self.source: Any = None
        self._identity = identity
        # The place of each record's last write, and that of its last checkpoint.
        self._places: dict[tuple[int, int], int] = {}
        self._kept: dict[tuple[int, int], int] = {}
        self._snapshot: Path | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._lock_folder()
        try:
            self._load()
            size = num_experts * 2 * layout.disk_bytes
            self._descriptors = [
                engine.open(self.folder / f"layer_{layer:03}.records", size) for layer in range(num_layers)
            ]
        except BaseException:
            self._lock.close()
            raise

    def read(self, key: tuple[int, int], memory: torch.Tensor, priority: int = DEMAND) -> Pending:
        """
        Fills the uint8 `memory` `(layout.memory_bytes,)` on the host with the record of `key`, `(layer, expert)`.

        The result raises [`RecordError`] if the record is damaged, and the checkpoint has no copy of it.
        """
        info, layout = self.info(key), self.layout
        partial = info.step == 0 or not layout.training
        header = aligned_buffer(1, BLOCK)[0]
        parts = [memory[: layout.weights_bytes]] if partial else [memory, header]
        future = self.engine.read(*self._location(key, self._places[key]), list(map(as_memory, parts)), priority)

        def finish():
            with self._counting:
                self.bytes_read += sum(map(len, parts))
            try:
                if not partial and layout.unpack_header(header.numpy().tobytes(), *key) != info:
                    raise RecordError(f"The record of {name(key)}, version {info.version}, is not in its place.")
                layout.verify(memory, info, name(key))
            except RecordError as error:
                self._repair(key, memory, error)
            if info.step == 0:
                layout.reset_state(memory)

        return Pending([future], finish)

    def write(
        self, key: tuple[int, int], memory: torch.Tensor, info: RecordInfo, priority: int = WRITE_BACK
    ) -> Pending:
        """Writes `memory`, whose checksums are in `info`, to the place that no checkpoint needs."""
        place = 1 - self._kept[key] if key in self._kept else 0
        futures, size = self._write_at(key, place, memory, info, priority)

        def finish():
            self.bytes_written += size
            self.infos[key], self._places[key] = info, place

        return Pending(futures, finish)

    def info(self, key: tuple[int, int]) -> RecordInfo:
        """What is known of the last write of `key`; raises `KeyError` if there was none."""
        if key not in self.infos:
            raise KeyError(f"{self.folder} has no record of {name(key)}: it was never filled.")
        return self.infos[key]

    def commit(self, metadata: dict[str, Any]) -> None:
        """Makes what was written so far the checkpoint that the folder opens with, at once or not at all."""
        for descriptor in self._descriptors:
            self.engine.sync(descriptor)
        manifest = {**self._description(), "source": self.source, "metadata": metadata, "records": []}
        if self._snapshot is not None:
            manifest["snapshot"] = str(self._snapshot)
        for (layer, expert), info in sorted(self.infos.items()):
            manifest["records"].append([layer, expert, self._places[layer, expert], *astuple(info)])
        write_durably(self.folder / MANIFEST, json.dumps(manifest).encode())
        self._kept = dict(self._places)
        self.metadata = metadata

    def copy_checkpoint(self, path: str | Path) -> None:
        """
        Copies the last checkpoint to a folder, record by record; what has not changed since the last copy is linked.

        Nothing may be committed meanwhile, but records may be read and written. The folder appears once it is whole.
        """
        path = Path(path).absolute()
        if path.exists():
            raise FileExistsError(f"{path} is there already: a checkpoint is not overwritten.")
        partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            manifest = self._copy_records(partial)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                full = f"{path} could not be written as the disk is full; {self.folder} holds the same checkpoint"
                raise OSError(error.errno, full) from error
            raise
        partial.rename(path)
        _sync_folder(path.parent)
        self._note_copy(path, manifest)

    def copy_moved(self, path: str | Path) -> None:
        """Takes note of where the last copy is, if somebody has moved it: damaged records are repaired from it."""
        self._note_copy(Path(path).absolute(), json.loads((self.folder / MANIFEST).read_text()))

    def restore(self, path: str | Path) -> None:
        """
        Takes every record, and the checkpoint, from a folder of [`~ExpertFiles.copy_checkpoint`]. If that fails, the
        records are those of the last checkpoint of this folder.
        """
        path = Path(path).absolute()
        # What was written since the last checkpoint is about to be overwritten.
        self._load()
        manifest = read_manifest(path, self._description())
        infos, places = {}, {}
        for key, (_, info) in _records(manifest).items():
            record = self._read_copy(path, key, info)
            place = 1 - self._kept[key] if key in self._kept else 0
            self.engine.write(*self._location(key, place), [as_memory(record)]).result()
            self.bytes_written += len(record)
            infos[key], places[key] = info, place
        try:
            self.infos.update(infos)
            self._places.update(places)
            self._snapshot = path
            self.commit(manifest["metadata"])
        except BaseException:
            self._load()
            raise

    def close(self) -> None:
        """Finishes what is under way, and frees the folder."""
        self.engine.close()
        self._lock.close()

    def _write_at(self, key, place, memory, info, priority) -> tuple[list[Future], int]:
        layout = self.layout
        descriptor, offset = self._location(key, place)
        header = aligned_buffer(1, BLOCK)[0]
        header.numpy()[:] = memoryview(layout.pack_header(*key, info))
        if info.step > 0:
            parts = [memory, header]
            return [self.engine.write(descriptor, offset, list(map(as_memory, parts)), priority)], layout.disk_bytes
        weights = memory[: layout.weights_bytes]
        end = offset + layout.weights_bytes + layout.state_bytes
        futures = [
            self.engine.write(descriptor, start, [as_memory(part)], priority)
            for start, part in ((offset, weights), (end, header))
        ]
        return futures, layout.weights_bytes + BLOCK

    def _location(self, key: tuple[int, int], place: int) -> tuple[int, int]:
        layer, expert = key
        return self._descriptors[layer], (2 * expert + place) * self.layout.disk_bytes

    def _note_copy(self, path: Path, manifest: dict[str, Any]) -> None:
        self._snapshot = path
        write_durably(self.folder / MANIFEST, json.dumps({**manifest, "snapshot": str(path)}).encode())

    def _copy_records(self, target: Path) -> dict[str, Any]:
        manifest = json.loads((self.folder / MANIFEST).read_text())
        known = _records(read_manifest(self._snapshot)) if self._snapshot and self._snapshot.exists() else {}
        buffer = aligned_buffer(1, self.layout.disk_bytes)[0]
        for layer in range(self.num_layers):
            (target / f"layer_{layer:03}").mkdir()
        for key, (place, info) in _records(manifest).items():
            copy = record_path(target, key)
            if known.get(key, (None, None))[1] == info:
                _link(record_path(self._snapshot, key), copy)
                continue
            self.engine.read(*self._location(key, place), [as_memory(buffer)], PREFETCH).result()
            _check_copy(self.layout, buffer, key, info)
            with copy.open("wb") as file:
                file.write(as_memory(buffer))
                os.fsync(file.fileno())
        for folder in target.iterdir():
            _sync_folder(folder)
        write_durably(target / MANIFEST, json.dumps(manifest).encode())
        return manifest

    def _repair(self, key: tuple[int, int], memory: torch.Tensor, error: RecordError) -> None:
        info, layout = self.infos[key], self.layout
        if self._snapshot is None or not record_path(self._snapshot, key).exists():
            raise error
        try:
            record = self._read_copy(self._snapshot, key, info)
        except RecordError:
            raise error from None
        logger.warning("%s It was taken from %s.", error, self._snapshot)
        memory.copy_(record[: layout.memory_bytes])
        self.engine.write(*self._location(key, self._places[key]), [as_memory(record)], DEMAND).result()

    def _read_copy(self, path: Path, key: tuple[int, int], info: RecordInfo) -> torch.Tensor:
        record = aligned_buffer(1, self.layout.disk_bytes)[0]
        with record_path(path, key).open("rb") as file:
            if file.readinto(as_memory(record)) < len(record):
                raise RecordError(f"The copy of {name(key)} in {path} is cut off.")
        _check_copy(self.layout, record, key, info)
        return record

    def _description(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self._identity,
            "layers": self.num_layers,
            "experts": self.num_experts,
            **self.layout.describe(),
        }

    def _load(self) -> None:
        """Goes back to the last checkpoint, or to nothing."""
        manifest = {"metadata": {}, "records": []}
        if (self.folder / MANIFEST).exists():
            manifest = read_manifest(self.folder, self._description())
        records = _records(manifest)
        self.infos = {key: info for key, (_, info) in records.items()}
        self._places = {key: place for key, (place, _) in records.items()}
        self._kept = dict(self._places)
        self._snapshot = Path(manifest["snapshot"]) if "snapshot" in manifest else None
        self.metadata, self.source = manifest["metadata"], manifest.get("source")

    def _lock_folder(self):
        file = (self.folder / "lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise BlockingIOError(f"{self.folder} is in use by {owner}: a store has one user at a time.") from error
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        return file


def name(key: tuple[int, int]) -> str:
    """What messages call an expert."""
    return f"expert {key[1]} of layer {key[0]}"


def record_path(folder: Path, key: tuple[int, int]) -> Path:
    """The file of one record in a copy of a checkpoint."""
    return folder / f"layer_{key[0]:03}" / f"expert_{key[1]:04}.record"


def read_manifest(folder: Path, description: dict[str, Any] | None = None) -> dict[str, Any]:
    """Reads the manifest of a folder; raises `ValueError` if it is not of experts as in `description`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        shown = isinstance(manifest["metadata"], dict) and isinstance(manifest.get("snapshot", ""), str)
        rows = manifest["records"]
        shown = shown and all(len(row) == 8 and {type(number) for number in row} == {int} for row in rows)
        if not shown or any(min(row) < 0 or row[2] > 1 for row in rows):
            raise ValueError("it does not say which records there are")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error}.") from None
    for field, wanted in (description or {}).items():
        if manifest.get(field) != wanted:
            raise ValueError(
                f"{folder} holds experts with {field} {manifest.get(field)!r}, not {wanted!r}: use another folder."
            )
    if description and any(row[0] >= description["layers"] or row[1] >= description["experts"] for row in rows):
        raise ValueError(f"{folder / MANIFEST} is damaged: it has records of experts that there are none of.")
    return manifest


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Writes a file so that after a crash it has its old content or the new one."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _records(manifest: dict[str, Any]) -> dict[tuple[int, int], tuple[int, RecordInfo]]:
    return {(layer, expert): (place, RecordInfo(*fields)) for layer, expert, place, *fields in manifest["records"]}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    # Another disk, or a file system without links.
    except OSError:
        shutil.copyfile(source, target)


def _check_copy(layout: RecordLayout, record: torch.Tensor, key: tuple[int, int], info: RecordInfo) -> None:
    header = record[layout.weights_bytes + layout.state_bytes :].numpy().tobytes()
    if layout.unpack_header(header, *key) != info:
        raise RecordError(f"The record of {name(key)}, version {info.version}, is not in its place.")
    layout.verify(record[: layout.memory_bytes], info, name(key))
