"""The log-structured store on a flash device: synchronous, one caller at a time (storage/flash.py is its face to trio).

Segments are taken by lowest erase count, in ring order among equals, and are erased right before they are used, whatever they
seem to hold. Static data moves with every checkpoint, so wear is even by construction. A checkpoint is written into fresh
segments, read back, and only then committed; what was before it is free after the commit has been read back too.

On open, the last program before a power cut may read well and still be weak: its fragment is written again elsewhere before
anybody is told of it, and the segment that it stood in is not programmed any further.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import attrs

from ha_core.errors import LocalProtocolError, StorageError, StorageFullError
from ha_core.interfaces import Recovered, StoreStats
from ha_core.storage.flash_device import BadBlockError, FlashDevice
from ha_core.storage.flash_format import (
    FIRST,
    FRAGMENT_HEADER_BYTES,
    LAST,
    SEAL,
    STARTS_CHECKPOINT,
    Kind,
    Place,
    SegmentHeader,
    decode_fragment,
    encode_commit,
    encode_fragment,
    encode_header,
    encode_records,
    fragment_room,
    header_bytes,
    padded,
)
from ha_core.storage.flash_recovery import Image, Reader, Segment, extend_crc, scan

logger = logging.getLogger(__name__)

_LARGEST_FRAGMENT = 64 * 1024  # bounds what is searched for a flipped bit, and what is written again on open
_SMALLEST_BODY = 16
_CHECKPOINT_ATTEMPTS = 3
_DAY_NS = 86_400 * 10**9


@attrs.frozen
class FlashStats(StoreStats):
    erases: int = 0
    wear_min: int = 0
    """Erase counts of the least and the most worn block."""
    wear_max: int = 0
    bad_blocks: int = 0
    free_blocks: int = 0
    today_bytes: int = 0
    """Programmed since the store was opened, or in the running day of its life."""
    daily_budget_bytes: int = 0
    """0: no budget."""


class FlashLog:
    def __init__(
        self,
        device: FlashDevice,
        name: str,
        *,
        incarnation: bytes,
        clock_ns: Callable[[], int],
        checkpoint_factor: float = 8.0,
        daily_budget_bytes: int = 0,
    ) -> None:
        """Read the headers; ``incarnation`` is that of the store if one is made now.

        Raises:
            StorageError: the device holds something else, or a store of another geometry.
        """
        self._device = device
        self._name = name
        self._geometry = device.geometry
        self._unit = device.geometry.program_bytes
        self._head = header_bytes(self._unit)
        self._clock_ns = clock_ns
        self._factor = checkpoint_factor
        self._budget = daily_budget_bytes
        self._day = (clock_ns(), 0, False)
        found = scan(device)
        self._reader = Reader(device, name, found)
        self._reader.check_owner()
        headers = [segment.header for segment in found.segments]
        self.incarnation = headers[0].store if headers else incarnation
        self._generation = max((header.generation for header in headers), default=0) + 1
        self._newest = headers[0].number if headers else 0
        counts = {segment.block: segment.header.erase_count for segment in found.segments}
        usual = sum(counts.values()) // len(counts) if counts else 0
        self._erase_counts = [counts.get(block, usual) for block in range(self._geometry.block_count)]
        self._numbers = {segment.block: segment.header.number for segment in found.segments}
        self._ring_at = found.segments[0].block if headers else -1
        self._chain: list[Segment] = []
        self._bad: set[int] = set()
        self._avoid: set[int] = set()
        """Blocks that look newer than the chain: erased, if possible, only once a newer header stands elsewhere."""
        self._kept: set[int] = set()
        """Blocks outside the chain that hold the only copy of something."""
        self._sealed = True
        self._dirty = False
        self._refusal = f"flash store {name}: call recover first"
        self._recovered = False
        self._state_bytes = 0
        self._log_bytes = 0
        self._appended_bytes = 0
        self._programmed_bytes = 0
        self._flushes = 0
        self._checkpoints = 0
        self._erases = 0

    # -- the store --

    def recover(self) -> Recovered:
        if self._recovered:
            raise LocalProtocolError(f"flash store {self._name}: recover is called once, first")
        self._recovered = True
        try:
            image = self._reader.read()
        except OSError as exc:
            raise StorageError(f"flash store {self._name}: the device cannot be read: {exc}") from exc
        self._refusal = ""
        self._bad |= set(image.bad_blocks)
        self._state_bytes, self._log_bytes = len(image.checkpoint or b""), image.log_bytes
        with self._writing():
            self._settle(image)
        return Recovered(image.checkpoint, tuple(image.records))

    def append(self, records: Sequence[bytes]) -> None:
        body = encode_records(records)
        if not records:
            return
        with self._writing():
            needed = self._blocks_for(len(body), self._space())
            if self._free_count() - needed < self._reserve():
                raise self._full(f"no room for {len(body)} bytes")
            self._put(Kind.RECORDS, body)
            self._sync()
            self._appended_bytes += sum(map(len, records))

    def checkpoint(self, state: bytes, records: Sequence[bytes]) -> None:
        body = b"".join((struct.pack(">I", len(state)), state, encode_records(records)))
        with self._writing():
            if self._blocks_for(len(body), 0) + 1 > self._free_count():
                raise self._full(f"no room for a checkpoint of {len(body)} bytes beside the last one")
            start = self._write_checkpoint(body)
            before = self._log_bytes
            self._put(Kind.COMMIT, encode_commit(body, sorted(self._bad)))
            self._sync()
            if self._first_damaged(self._chain[-1:]) is not None:
                raise StorageError(f"flash store {self._name}: the commit of a checkpoint does not read back")
            del self._chain[:start]
            self._state_bytes, self._log_bytes = len(state), self._log_bytes - before
            self._checkpoints += 1

    def stats(self) -> FlashStats:
        counts = [count for block, count in enumerate(self._erase_counts) if block not in self._bad]
        return FlashStats(
            appended_bytes=self._appended_bytes, programmed_bytes=self._programmed_bytes, flushes=self._flushes,
            checkpoints=self._checkpoints, size_bytes=len(self._chain) * self._geometry.erase_bytes,
            checkpoint_due=self._checkpoint_due(), erases=self._erases, wear_min=min(counts), wear_max=max(counts),
            bad_blocks=len(self._bad), free_blocks=self._free_count(), today_bytes=self._day[1],
            daily_budget_bytes=self._budget,
        )  # fmt: skip

    def close(self) -> None:
        if not self._refusal.endswith("closed"):
            self._refusal = f"flash store {self._name}: it is closed"
            self._device.close()

    # -- recovery --

    def _settle(self, image: Image) -> None:
        """Begin a new segment with the fragment that was programmed last; what followed it was never acknowledged."""
        last = image.last
        if last is None:  # a new store; what is acknowledged from now on stands in a second segment (Reader._may_begin)
            self._put(Kind.RECORDS, b"")
            self._sealed = True
        else:
            self._chain = image.chain[: last.at + 1]
            self._chain[-1].end, self._chain[-1].crc = last.offset, last.crc_before
            self._kept = {image.chain[last.at].block}
            while self._chain and self._chain[-1].end == self._head:
                self._chain.pop()
            newest = self._chain[-1].header.number if self._chain else 0
            self._avoid = {block for block, number in self._numbers.items() if number > newest}
            ends = (FIRST if last.fragment.first else 0) | (LAST if last.fragment.last else 0)
            self._put(last.fragment.kind, last.fragment.body, ends)
        self._sync()
        self._kept.clear()

    # -- groups --

    def _put(self, kind: Kind, body: bytes, ends: int = FIRST | LAST, flags: int = 0) -> None:
        """Program a group, or with other ``ends`` a part of one; ``flags`` are those of the first segment begun for it."""
        rest = memoryview(body)
        first = True
        while first or rest:
            room = fragment_room(min(self._space(), max(_LARGEST_FRAGMENT, self._unit)), self._unit)
            if room < min(len(rest), _SMALLEST_BODY):
                self._begin_segment(flags)
                flags = 0
                continue
            size = min(room, len(rest))
            marks = (ends & FIRST if first else 0) | (ends & LAST if size == len(rest) else 0)
            unfinished = self._program(kind, marks, rest[:size])
            if unfinished is not None:
                flags |= unfinished
                continue
            rest, first = rest[size:], False

    def _program(self, kind: Kind, marks: int, body: memoryview) -> int | None:
        """Program one fragment; None if it stands. Else its block went bad: the flags that the next segment takes over."""
        segment = self._chain[-1]
        place = Place(self.incarnation, segment.header.number, segment.end)
        data = encode_fragment(place, kind, marks, body, self._unit)
        self._dirty = True
        try:
            self._device.program(segment.block, segment.end, data)
        except BadBlockError as exc:
            self._retire(segment.block, exc)
            self._sealed = True
            if segment.end > self._head:
                return 0
            self._chain.pop()
            return segment.header.flags
        segment.end += len(data)
        segment.crc = extend_crc(segment.crc, int.from_bytes(data[:4], "big"))
        self._log_bytes += len(data)
        self._count(len(data))
        return None

    def _space(self) -> int:
        return 0 if self._sealed else self._geometry.erase_bytes - self._chain[-1].end

    def _begin_segment(self, flags: int) -> None:
        """Erase a block and make it the end of the chain; everything before it is durable then, and it is too."""
        self._sync_if_dirty()
        last = self._chain[-1] if self._chain else None
        while True:
            block = self._allocate()
            self._newest += 1
            self._ring_at = block
            try:
                self._device.erase(block)
                self._erase_counts[block] += 1
                self._erases += 1
                header = SegmentHeader(
                    store=self.incarnation, generation=self._generation, number=self._newest,
                    previous=last.header.number if last else 0, previous_end=last.end if last else 0,
                    previous_crc=last.crc if last else 0, erase_count=self._erase_counts[block],
                    erase_bytes=self._geometry.erase_bytes, program_bytes=self._unit,
                    block_count=self._geometry.block_count, flags=flags,
                )  # fmt: skip
                self._device.program(block, 0, encode_header(header, block))
            except BadBlockError as exc:
                self._retire(block, exc)
                continue
            break
        self._count(self._head)
        self._device.sync()
        self._avoid.clear()
        self._chain.append(Segment(block, header, self._head))
        self._sealed = False

    def _allocate(self) -> int:
        free = self._free()
        if not free:
            raise StorageError(f"flash store {self._name}: no good block is left")
        count = self._geometry.block_count

        def rank(block: int) -> tuple[bool, int, int]:
            return block in self._avoid, self._erase_counts[block], (block - self._ring_at - 1) % count

        return min(free, key=rank)

    def _retire(self, block: int, exc: BadBlockError) -> None:
        self._bad.add(block)
        logger.warning("flash store %s: %s; it is not used any more (%d bad blocks)", self._name, exc, len(self._bad))

    # -- checkpoints --

    def _write_checkpoint(self, body: bytes) -> int:
        """Write and verify it in fresh segments; returns where in the chain it begins."""
        start = len(self._chain)
        for _ in range(_CHECKPOINT_ATTEMPTS):
            self._sealed = True
            self._put(Kind.CHECKPOINT, body, flags=STARTS_CHECKPOINT)
            self._sync_if_dirty()
            damaged = self._first_damaged(self._chain[start:])
            if damaged is None:
                return start
            self._retire(damaged, BadBlockError(f"block {damaged} does not read back what was programmed"))
            self._avoid |= {segment.block for segment in self._chain[start:]}
            del self._chain[start:]
            if self._blocks_for(len(body), 0) + 1 > self._free_count():
                break
        raise StorageError(f"flash store {self._name}: a checkpoint does not read back; the device is failing")

    def _first_damaged(self, segments: Sequence[Segment]) -> int | None:
        """Read back; the first block whose fragments are not what was programmed."""
        for segment in segments:
            data = memoryview(self._device.read(segment.block, 0, segment.end))
            offset, crc = self._head, 0
            while offset < segment.end:
                fragment = decode_fragment(Place(self.incarnation, segment.header.number, offset), data[offset:], self._unit)
                if fragment is None:
                    break
                offset, crc = offset + fragment.size, extend_crc(crc, fragment.crc)
            if (offset, crc) != (segment.end, segment.crc):
                return segment.block
        return None

    # -- room --

    def _free(self) -> list[int]:
        taken = self._bad | self._kept | {segment.block for segment in self._chain}
        return [block for block in range(self._geometry.block_count) if block not in taken]

    def _free_count(self) -> int:
        return len(self._free()) if self._bad or self._kept else self._geometry.block_count - len(self._chain)

    def _capacity(self, space: int) -> int:
        """Bytes of body that fragments in ``space`` bytes can hold."""
        largest = padded(max(_LARGEST_FRAGMENT - self._unit + 1, 1), self._unit)
        whole, rest = divmod(space // self._unit * self._unit, largest)
        last = fragment_room(rest, self._unit)
        return whole * (largest - FRAGMENT_HEADER_BYTES - SEAL) + (last if last >= _SMALLEST_BODY else 0)

    def _blocks_for(self, size: int, space: int) -> int:
        """Fresh blocks that a group of ``size`` bytes needs if ``space`` bytes are left in the last one."""
        left = size - self._capacity(space)
        if left <= 0 and space:
            return int(fragment_room(space, self._unit) < min(size, _SMALLEST_BODY))
        return max(1, -(-left // self._capacity(self._geometry.erase_bytes - self._head)))

    def _reserve(self) -> int:
        """Blocks that appends leave alone: room for the next checkpoint beside all that lives, and for one open before it."""
        return self._blocks_for(self._state_bytes + self._state_bytes // 8, 0) + 2

    def _checkpoint_due(self) -> bool:
        if self._log_bytes > self._factor * max(self._state_bytes, self._geometry.erase_bytes):
            return True
        return self._free_count() <= self._reserve() + self._geometry.block_count // 16

    def _full(self, what: str) -> StorageFullError:
        return StorageFullError(
            f"flash store {self._name}: {what}: {self._free_count()} of {self._geometry.block_count} blocks are free, "
            f"{self._reserve()} are kept for the next checkpoint; nothing was written; write a checkpoint or use a larger one"
        )

    # -- writes and their accounts --

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if self._refusal:
            raise StorageError(self._refusal)
        try:
            yield
        except StorageFullError:
            raise
        except (OSError, StorageError) as exc:
            self._refusal = f"flash store {self._name}: a write failed ({exc}); open it again to learn what is durable"
            raise StorageError(self._refusal) from exc

    def _sync(self) -> None:
        self._device.sync()
        self._dirty = False
        self._flushes += 1

    def _sync_if_dirty(self) -> None:
        if self._dirty:
            self._device.sync()
            self._dirty = False

    def _count(self, size: int) -> None:
        self._programmed_bytes += size
        began, today, warned = self._day
        now = self._clock_ns()
        if now - began >= _DAY_NS:
            began, today, warned = now, 0, False
        today += size
        if self._budget and today > self._budget and not warned:
            warned = True
            logger.warning(
                "flash store %s: %d bytes programmed today, more than its daily budget of %d: the device wears out early; "
                "write less, or raise daily_budget_bytes", self._name, today, self._budget,
            )  # fmt: skip
        self._day = (began, today, warned)
