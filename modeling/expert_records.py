"""How one expert lies in memory and on disk: weights first, then the optimizer's state, then a header.

    | weights | float32 copy of the weights, first moment, second moment | header |
    |<------- memory_bytes: what moves between the tiers ------>|

The copy in float32 is there for weights of another type only. All parts are multiples of a block, so that each can be
read on its own: an expert that only computes needs its weights and nothing else.
"""

import hashlib
import json
import struct
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch

from .block_io import BLOCK, as_memory, round_up

try:
    from xxhash import xxh3_64_intdigest as checksum

    CHECKSUM = "xxh3_64"
except ImportError:
    from zlib import crc32 as checksum

    CHECKSUM = "crc32"

MAGIC = b"mxexpert"
# magic, layout, layer, expert, version, step, last step, checksum of the weights, of the state, of this header
HEADER = struct.Struct("<8sQIIQQQQQQ")
# What grouped products ask of the address of a matrix, with room to spare.
ALIGNMENT = 64


class RecordError(RuntimeError):
    """A record is not what was written: torn, flipped or of another place. The message names it."""


@dataclass(frozen=True)
class RecordInfo:
    """
    What is known of a record without reading it.

    Args:
        version (`int`): Counts the writes of the record.
        step (`int`): Updates that the expert has had. At 0 its optimizer state is zero and not on disk.
        last_step (`int`): The update of the whole model that was the expert's last.
        weights_checksum, state_checksum (`int`): Of the parts of the record.
    """

    version: int = 0
    step: int = 0
    last_step: int = 0
    weights_checksum: int = 0
    state_checksum: int = 0

    def updated(self, step: int) -> "RecordInfo":
        """The same after one more update, which is number `step` of the whole model."""
        return replace(self, step=self.step + 1, last_step=step)


@dataclass(frozen=True)
class RecordLayout:
    """
    Where the parts of an expert lie in its record.

    Args:
        parameters (`tuple[tuple[str, tuple[int, ...]], ...]`): Name and shape of each parameter of one expert.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Type of the weights. The optimizer's state is
            in float32, with a copy of the weights in float32 if they are not.
        training (`bool`, *optional*, defaults to `True`): Whether the optimizer's state is held in memory.
    """

    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: torch.dtype = torch.float32
    training: bool = True

    @cached_property
    def sections(self) -> tuple[str, ...]:
        """The parts of the optimizer's state."""
        master = () if self.dtype == torch.float32 else ("master",)
        return (*master, "exp_avg", "exp_avg_sq")

    @cached_property
    def weights_bytes(self) -> int:
        """Size of the weights."""
        return round_up(self._section_bytes(self.dtype))

    @cached_property
    def state_bytes(self) -> int:
        """Size of the optimizer's state."""
        return round_up(len(self.sections) * self._section_bytes(torch.float32))

    @property
    def memory_bytes(self) -> int:
        """Size of a record in memory."""
        return self.weights_bytes + (self.state_bytes if self.training else 0)

    @property
    def disk_bytes(self) -> int:
        """Size of a record on disk."""
        return self.weights_bytes + self.state_bytes + BLOCK

    @cached_property
    def fingerprint(self) -> int:
        """A number that records of another layout do not have."""
        text = json.dumps([self.parameters, str(self.dtype), CHECKSUM])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    def describe(self) -> dict:
        """The layout in words that JSON can hold."""
        shapes = {name: list(shape) for name, shape in self.parameters}
        return {"parameters": shapes, "dtype": str(self.dtype).removeprefix("torch."), "checksum": CHECKSUM}

    def weights(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of the weights in uint8 `memory` `(..., memory_bytes)`: by name, each `(..., *shape)`."""
        return self._views(memory, 0, self.dtype)

    def state(self, memory: torch.Tensor, section: str) -> dict[str, torch.Tensor]:
        """Views of one of the [`~RecordLayout.sections`], as those of the weights."""
        start = self.weights_bytes + self.sections.index(section) * self._section_bytes(torch.float32)
        return self._views(memory, start, torch.float32)

    def master(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of what the optimizer updates: the weights, or their copy in float32."""
        return self.state(memory, "master") if "master" in self.sections else self.weights(memory)

    def reset_state(self, memory: torch.Tensor) -> None:
        """Brings the state of one record to that of an expert that was never updated."""
        if self.training:
            memory[self.weights_bytes :].zero_()
            if "master" in self.sections:
                weights = self.weights(memory)
                for name, master in self.state(memory, "master").items():
                    master.copy_(weights[name])

    def sealed(self, memory: torch.Tensor, info: RecordInfo) -> RecordInfo:
        """`info` with the next version and the checksums of `memory`, which is on the host."""
        state_checksum = checksum(as_memory(memory[self.weights_bytes :])) if info.step > 0 else 0
        weights_checksum = checksum(as_memory(memory[: self.weights_bytes]))
        return replace(
            info, version=info.version + 1, weights_checksum=weights_checksum, state_checksum=state_checksum
        )

    def verify(self, memory: torch.Tensor, info: RecordInfo, name: str) -> None:
        """Raises [`RecordError`] if `memory`, on the host, is not what `info` says."""
        wrong = checksum(as_memory(memory[: self.weights_bytes])) != info.weights_checksum
        if not wrong and self.training and info.step > 0:
            wrong = checksum(as_memory(memory[self.weights_bytes :])) != info.state_checksum
        if wrong:
            raise RecordError(f"The record of {name}, version {info.version}, is damaged: its checksum is wrong.")

    def pack_header(self, layer: int, expert: int, info: RecordInfo) -> bytes:
        """The header of a record, a block."""
        fields = (MAGIC, self.fingerprint, layer, expert, info.version, info.step, info.last_step)
        packed = HEADER.pack(*fields, info.weights_checksum, info.state_checksum, 0)[:-8]
        return (packed + struct.pack("<Q", checksum(packed))).ljust(BLOCK, b"\0")

    def unpack_header(self, block: bytes, layer: int, expert: int) -> RecordInfo | None:
        """What a header says, or `None` if it is not one of this expert."""
        fields = HEADER.unpack_from(block)
        if fields[:4] != (MAGIC, self.fingerprint, layer, expert) or fields[-1] != checksum(block[: HEADER.size - 8]):
            return None
        return RecordInfo(*fields[4:9])

    def _section_bytes(self, dtype: torch.dtype) -> int:
        return sum(round_up(prod(shape) * dtype.itemsize, ALIGNMENT) for _, shape in self.parameters)

    def _views(self, memory: torch.Tensor, start: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        views = {}
        for name, shape in self.parameters:
            size = prod(shape) * dtype.itemsize
            views[name] = memory[..., start : start + size].view(dtype).unflatten(-1, shape)
            start += round_up(size, ALIGNMENT)
        return views
