"""Reading a flash device back: which segments live, what they hold, and whether a bad byte is a torn tail or corruption.

A segment counts only if it holds an intact fragment: one that was cut before its first is as if it had never been begun. The
live chain goes backwards from the newest that counts, by ``previous``, to a checkpoint or the first segment; of every segment
but the last, the bytes up to the end that its successor declares must be intact, and nothing behind that end is looked at. In
the last one the first bad fragment is the torn tail, unless

* a group begins intact behind it (it was acknowledged before that one was begun), or
* it is a single flipped bit away from intact (it was programmed to its end), or
* a later header declares that the segment was longer:

then it is corruption. A checkpoint without its commit is as if it had never been begun.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import attrs

from ha_core.errors import CorruptRecordError, StorageError
from ha_core.storage.flash_device import FlashDevice
from ha_core.storage.flash_format import (
    STARTS_CHECKPOINT,
    Fragment,
    Kind,
    Place,
    SegmentHeader,
    decode_commit,
    decode_fragment,
    decode_header,
    decode_records,
    header_bytes,
    is_blank,
    is_rotten,
    rotten_header,
    segment_hint,
)


@attrs.define(eq=False)
class Segment:
    """One erase block of the chain; ``end`` and ``crc`` are where its valid bytes end and the running CRC up to there."""

    block: int
    header: SegmentHeader
    end: int
    crc: int = 0


@attrs.frozen
class Found:
    """A fragment, and where it stands: in which segment of the chain, at which offset, after which running CRC."""

    fragment: Fragment
    at: int
    offset: int
    crc_before: int


@attrs.frozen
class Scan:
    """The headers of a device."""

    segments: Sequence[Segment]
    """Newest first."""
    damaged: Sequence[int]
    """Blocks with neither a header nor a blank where it should be."""


@attrs.define(eq=False)
class Image:
    """What a device holds."""

    chain: list[Segment]
    checkpoint: bytes | None = None
    records: list[bytes] = attrs.field(factory=list)
    bad_blocks: list[int] = attrs.field(factory=list)
    last: Found | None = None
    """The last fragment of the last whole group: the one program whose end no later one proves."""
    log_bytes: int = 0


@attrs.define
class _Bound:
    """A later header says: the valid bytes of this segment reach to ``end`` at least."""

    end: int
    crc: int


def extend_crc(running: int, fragment_crc: int) -> int:
    return zlib.crc32(struct.pack(">I", fragment_crc), running)


def scan(device: FlashDevice) -> Scan:
    """Read the header of every block."""
    unit = device.geometry.program_bytes
    size = header_bytes(unit)
    segments, damaged = [], []
    for block in range(device.geometry.block_count):
        data = device.read(block, 0, size)
        header = decode_header(data, block)
        if header is not None:
            segments.append(Segment(block, header, size))
        elif not is_blank(data):
            damaged.append(block)
    segments.sort(key=lambda segment: segment.header.number, reverse=True)
    return Scan(segments, damaged)


class Reader:
    def __init__(self, device: FlashDevice, name: str, found: Scan) -> None:
        self._device = device
        self._name = name
        self._scan = found
        self._unit = device.geometry.program_bytes
        self._size = header_bytes(self._unit)
        self._bounds: dict[int, _Bound] = {}

    def check_owner(self) -> None:
        """Raises StorageError unless all segments are of one store with this geometry, and the device is ours to begin on."""
        geometry = self._device.geometry
        for segment in self._scan.segments:
            header = segment.header
            made = (header.erase_bytes, header.program_bytes, header.block_count)
            if made != (geometry.erase_bytes, geometry.program_bytes, geometry.block_count):
                raise StorageError(
                    f"flash store {self._name}: made with erase_bytes, program_bytes, block count = {made}, "
                    f"opened with {attrs.astuple(geometry)}; open it as it was made"
                )
            if header.store != self._scan.segments[0].header.store:
                raise StorageError(f"flash store {self._name}: it has segments of two stores; erase the device to begin anew")
        if self._scan.segments:
            return
        for block in self._scan.damaged:
            if rotten_header(self._device.read(block, 0, self._size), block) is not None:
                raise self._corrupt(block, 0, "a bit of a segment's header has flipped")
        if not self._may_begin():
            raise StorageError(
                f"flash store {self._name}: it holds data but no flash store, or one damaged beyond recognition; "
                "erase the device (fill it with zeros) to begin anew"
            )

    def _may_begin(self) -> bool:
        """Blank, but for one block: a first segment whose making was cut. A finished store has two segments from the start."""
        size = self._device.geometry.erase_bytes
        blocks = range(self._device.geometry.block_count)
        return sum(not is_blank(self._device.read(block, 0, size)) for block in blocks) <= 1

    def read(self) -> Image:
        """Raises CorruptRecordError."""
        segments = self._scan.segments
        self._check_lost_headers()
        by_number = {segment.header.number: segment for segment in segments}
        newest = segments[0].header.number if segments else 0
        for segment in segments:
            header = segment.header
            if header.number > newest:
                continue
            if self._fragments(segment, 0, None):
                try:
                    image = self._read_chain(segment, by_number)
                except (ValueError, struct.error) as exc:
                    raise self._corrupt(segment.block, 0, f"a group is intact but makes no sense ({exc})") from exc
                if image.checkpoint is not None or not image.chain[0].header.flags & STARTS_CHECKPOINT:
                    return image
                header = image.chain[0].header
            self._declare(header)
            if header.flags & STARTS_CHECKPOINT:
                newest = header.previous
        return Image([])

    def _declare(self, header: SegmentHeader) -> None:
        bound = self._bounds.get(header.previous)
        if bound is None or bound.end < header.previous_end:
            self._bounds[header.previous] = _Bound(header.previous_end, header.previous_crc)

    def _read_chain(self, newest: Segment, by_number: dict[int, Segment]) -> Image:
        """What the chain that ends at ``newest`` holds: no checkpoint and no records if it begins with one never committed."""
        chain = [newest]
        while chain[0].header.previous and not chain[0].header.flags & STARTS_CHECKPOINT:
            previous = by_number.get(chain[0].header.previous)
            if previous is None:
                raise self._corrupt(chain[0].block, 0, f"segment {chain[0].header.previous} before it is missing")
            chain.insert(0, previous)
        found: list[Found] = []
        for at, segment in enumerate(chain):
            found += self._fragments(segment, at, chain[at + 1].header if at + 1 < len(chain) else None)
        image = Image(chain)
        groups = self._groups(image, found)
        if chain[0].header.flags & STARTS_CHECKPOINT:
            if len(groups) < 2:
                return image
            self._read_checkpoint(image, groups)
            groups = groups[2:]
        for kind, body in groups:
            if kind != Kind.RECORDS:
                raise self._corrupt(chain[0].block, 0, f"a {kind.name} stands among the records")
            image.records += decode_records(body)
        return image

    def _read_checkpoint(self, image: Image, groups: Sequence[tuple[Kind, bytes]]) -> None:
        (first, body), (second, commit) = groups[:2]
        block = image.chain[0].block
        if first != Kind.CHECKPOINT or second != Kind.COMMIT:
            raise self._corrupt(block, 0, "a checkpoint does not begin as one")
        crc, length, image.bad_blocks = decode_commit(commit)
        if (crc, length) != (zlib.crc32(body), len(body)):
            raise self._corrupt(
                block, 0, "the checkpoint is not the one that was committed", expected=crc, actual=zlib.crc32(body)
            )
        (size,) = struct.unpack_from(">I", body)
        image.checkpoint = body[4 : 4 + size]
        image.records = decode_records(body[4 + size :])

    def _groups(self, image: Image, found: Sequence[Found]) -> list[tuple[Kind, bytes]]:
        """Whole groups; sets the image's last fragment. An unfinished group at the end is left out."""
        groups: list[tuple[Kind, bytes]] = []
        parts: list[bytes] = []
        for item in found:
            fragment = item.fragment
            if fragment.first is bool(parts):
                raise self._corrupt(image.chain[item.at].block, item.offset, "a fragment is missing")
            parts.append(fragment.body)
            if fragment.last:
                groups.append((fragment.kind, b"".join(parts)))
                parts = []
                image.last = item
            if len(groups) > 2 or not image.chain[0].header.flags & STARTS_CHECKPOINT:
                image.log_bytes += fragment.size
        return groups

    def _fragments(self, segment: Segment, at: int, successor: SegmentHeader | None) -> list[Found]:
        """The fragments of one segment; sets its end. Without a successor, up to the torn tail."""
        data = memoryview(self._device.read(segment.block, 0, self._device.geometry.erase_bytes))
        bound = self._bounds.get(segment.header.number) if successor is None else None
        limit = len(data) if successor is None else successor.previous_end
        found: list[Found] = []
        offset, crc = self._size, 0
        passed = bound is None or bound.end == offset
        while offset < limit:
            fragment = decode_fragment(
                Place(segment.header.store, segment.header.number, offset), data[offset:limit], self._unit
            )
            if fragment is None:
                break
            found.append(Found(fragment, at, offset, crc))
            offset, crc = offset + fragment.size, extend_crc(crc, fragment.crc)
            if bound is not None and offset == bound.end and crc == bound.crc:
                passed = True
        if successor is not None:
            if (offset, crc) != (limit, successor.previous_crc):
                raise self._corrupt(segment.block, offset, f"segment {segment.header.number} ends early")
        else:
            if not passed:
                raise self._corrupt(segment.block, offset, f"segment {segment.header.number} ends early")
            self._judge_tail(segment, data, offset)
        segment.end, segment.crc = offset, crc
        return found

    def _judge_tail(self, segment: Segment, data: memoryview, offset: int) -> None:
        """Raises CorruptRecordError if the bytes from ``offset`` on are no torn tail."""
        store, number = segment.header.store, segment.header.number
        for at in range(offset + self._unit, len(data), self._unit):
            fragment = decode_fragment(Place(store, number, at), data[at:], self._unit)
            if fragment is not None and fragment.first:
                raise self._corrupt(segment.block, offset, "a fragment is damaged, and an intact group follows it")
        if is_rotten(Place(store, number, offset), data[offset:], self._unit):
            raise self._corrupt(segment.block, offset, "a bit of a fragment has flipped")

    def _check_lost_headers(self) -> None:
        """A segment newer than all others whose header is damaged would be silently left out."""
        if not self._scan.segments:
            return
        newest = self._scan.segments[0].header
        for block in self._scan.damaged:
            data = self._device.read(block, 0, self._device.geometry.erase_bytes)
            header = rotten_header(data[: self._size], block)
            if header is not None and header.store == newest.store and header.number > newest.number:
                raise self._corrupt(block, 0, "a bit of a segment's header has flipped")
            number = newest.number & ~0xFFFFFF | segment_hint(data[self._size :])
            number += (number <= newest.number) << 24
            place = Place(newest.store, number, self._size)
            if decode_fragment(place, memoryview(data)[self._size :], self._unit) is not None:
                raise self._corrupt(block, 0, f"segment {number} has lost its header")

    def _corrupt(self, block: int, offset: int, what: str, *, expected: int = 0, actual: int = 0) -> CorruptRecordError:
        at = block * self._device.geometry.erase_bytes + offset
        return CorruptRecordError(
            f"flash store {self._name}: corrupt at byte {at} (block {block}): {what}; "
            "keep the device for inspection and let the node join again with a new one",
            offset=at,
            expected_crc=expected,
            actual_crc=actual,
        )
