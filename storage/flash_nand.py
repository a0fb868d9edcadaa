"""A simulated NAND flash with strict rules, for tests and for anybody who wants to see what a store does to his flash.

Breaking a rule of NAND (programming a unit twice, out of order, or in a block whose erase was interrupted) raises
InvariantError: it is a bug of the store. The power can be cut after any number of operations, in several ugly ways.
"""

from __future__ import annotations

import random
from typing import Literal

import attrs

from ha_core.errors import InvariantError, invariant
from ha_core.storage.flash_device import BadBlockError, Geometry

Tear = Literal["nothing", "prefix", "garbage", "partial", "all"]
"""What the operation that was cut leaves: the old bytes; the first half; random bytes; a random part of the bits done; all of
it done, but unreliably (an erase that looks complete, a program that reads back but was never confirmed)."""
TEARS: tuple[Tear, ...] = ("nothing", "prefix", "garbage", "partial", "all")


class PowerCutError(OSError):
    """The power is off."""


@attrs.define(eq=False)
class Block:
    data: bytearray
    next_offset: int = 0
    """Where the next unit may be programmed."""
    erases: int = 0
    reliable: bool = True
    """False after an interrupted erase or program: not to be programmed before the next erase."""
    bad: bool = False


class SimulatedNand:
    """A FlashDevice in memory. ``blocks`` shows its state; ``programmed_bytes`` and ``erases`` count its wear."""

    blocks_thread = False

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        self.geometry = geometry
        self.blocks = [Block(bytearray(b"\xff" * geometry.erase_bytes)) for _ in range(geometry.block_count)]
        self.programmed_bytes = 0
        self.erases = 0
        self.failing = False
        """Every program and erase fails (a device that died), until it is set back."""
        self._rng = random.Random(seed)
        self._left: int | None = None
        self._tear: Tear = "nothing"
        self._dark = False
        self._weak: list[tuple[Block, int, int]] = []

    # -- faults --

    def cut_after(self, operations: int, tear: Tear = "nothing") -> None:
        """Cut the power in the operation (one unit programmed, one block erased) after so many further ones."""
        self._left, self._tear = operations, tear

    def restore_power(self) -> None:
        self._left, self._dark = None, False

    def decay(self) -> None:
        """What a cut program seemed to hold turns out random: nobody may have trusted it where it is."""
        for state, start, end in self._weak:
            state.data[start:end] = self._rng.randbytes(end - start)
        self._weak = []

    def wear_out(self, block: int) -> None:
        """From now on this block refuses to be erased or programmed; what it holds can still be read."""
        self.blocks[block].bad = True

    def flip(self, block: int, bit: int) -> None:
        self.blocks[block].data[bit // 8] ^= 1 << bit % 8

    # -- the device --

    def read(self, block: int, offset: int, size: int) -> bytes:
        self._lit()
        invariant(
            offset >= 0 and offset + size <= self.geometry.erase_bytes, "a read crosses a block", block=block, offset=offset
        )
        return bytes(self.blocks[block].data[offset : offset + size])

    def program(self, block: int, offset: int, data: bytes) -> None:
        unit = self.geometry.program_bytes
        state = self.blocks[block]
        invariant(
            offset % unit == 0 and len(data) % unit == 0 and data, "not whole program units", offset=offset, size=len(data)
        )
        invariant(offset + len(data) <= self.geometry.erase_bytes, "a program crosses a block", offset=offset, size=len(data))
        for at in range(0, len(data), unit):
            if state.bad or self.failing:
                self._fail(block)
            self._program_unit(state, offset + at, data[at : at + unit])

    def _program_unit(self, state: Block, offset: int, unit: bytes) -> None:
        if offset < state.next_offset:
            raise InvariantError(f"a unit is programmed twice or out of order (offset={offset})")
        invariant(state.reliable, "a block is programmed whose last erase or program was interrupted", offset=offset)
        end = offset + len(unit)
        invariant(state.data[offset:end].count(0xFF) == len(unit), "a unit is programmed that is not erased", offset=offset)
        if self._cut():
            state.data[offset:end] = self._torn(bytes(state.data[offset:end]), unit)
            state.reliable = False
            self._weak.append((state, offset, end))
            raise PowerCutError("the power was cut while programming")
        state.data[offset:end] = unit
        state.next_offset = end
        self.programmed_bytes += len(unit)

    def erase(self, block: int) -> None:
        state = self.blocks[block]
        if state.bad or self.failing:
            self._fail(block)
        blank = b"\xff" * self.geometry.erase_bytes
        if self._cut():
            state.data[:] = self._torn(bytes(state.data), blank)
            state.reliable = False
            raise PowerCutError("the power was cut while erasing")
        self._weak = [weak for weak in self._weak if weak[0] is not state]
        state.data[:] = blank
        state.next_offset, state.reliable = 0, True
        state.erases += 1
        self.erases += 1

    def sync(self) -> None:
        self._lit()

    def close(self) -> None:
        pass

    def _lit(self) -> None:
        if self._dark:
            raise PowerCutError("the power is off")

    def _fail(self, block: int) -> None:
        self._lit()
        if self.failing:
            raise OSError("the device does not answer")
        raise BadBlockError(f"block {block} is worn out")

    def _cut(self) -> bool:
        """Count one operation; True if the power goes in the midst of it."""
        self._lit()
        if self._left is None:
            return False
        self._left -= 1
        self._dark = self._left < 0
        return self._dark

    def _torn(self, old: bytes, new: bytes) -> bytes:
        size = len(old)
        match self._tear:
            case "nothing":
                return old
            case "prefix":
                return new[: size // 2] + old[size // 2 :]
            case "garbage":
                return self._rng.randbytes(size)
            case "partial":
                done = int.from_bytes(self._rng.randbytes(size), "big") | int.from_bytes(self._rng.randbytes(size), "big")
                before, after = int.from_bytes(old, "big"), int.from_bytes(new, "big")
                return ((after & done) | (before & ~done)).to_bytes(size, "big")
            case "all":
                return new
