"""Planted bugs of the flash store (S1-S8, R42), caught by the tests on the simulated NAND."""

from __future__ import annotations

from tests.mutants.harness import Mutant

LOG, FORMAT, RECOVERY = "storage/flash_log.py", "storage/flash_format.py", "storage/flash_recovery.py"
TEST = "tests/storage/test_flash.py::"
CUTS = TEST + "test_every_program_and_erase_cut_once_loses_nothing_acknowledged"

MUTANTS: list[Mutant] = [
    Mutant(
        name="S1 a torn tail is accepted",
        file=FORMAT,
        old="    if zlib.crc32(sealed, seed) != crc:\n",
        new="    if len(sealed) != size - FRAGMENT_HEADER_BYTES:\n",
        invariant="I52",
        test=TEST + "test_store_goes_on_after_a_cut_anywhere_for_several_lives",
    ),
    Mutant(
        name="S2 a record of another store or place is accepted",
        file=FORMAT,
        old="_SEED.pack(self.store, self.segment, self.offset)",
        new='_SEED.pack(b"", self.segment, 0)',
        invariant="I53",
        test="tests/storage/test_flash_format.py::test_fragment_of_another_store_segment_or_place_is_none",
    ),
    Mutant(
        name="S3 a segment is used again without an erase",
        file=LOG,
        old="                self._device.erase(block)\n",
        new="                self._device.read(block, 0, 1)\n",
        invariant="I55",
        test=TEST + "test_store_goes_on_after_a_cut_anywhere_for_several_lives",
    ),
    Mutant(
        name="S4 an erase that was cut is trusted because the block reads blank",
        file=LOG,
        old="                self._device.erase(block)\n",
        new='                if self._device.read(block, 0, self._geometry.erase_bytes).strip(b"\\xff"):\n'
        "                    self._device.erase(block)\n",
        invariant="I55",
        test=CUTS,
    ),
    Mutant(
        name="S5 a checkpoint is switched to before it was read back",
        file=LOG,
        old="damaged = self._first_damaged(self._chain[start:])",
        new="damaged = self._first_damaged([])",
        invariant="I52",
        test=TEST + "test_checkpoint_that_does_not_read_back_is_written_elsewhere",
    ),
    Mutant(
        name="S6 the lowest block is always taken",
        file=LOG,
        old="return block in self._avoid, self._erase_counts[block], (block - self._ring_at - 1) % count",
        new="return block in self._avoid, 0, block % count",
        invariant="I56",
        test=TEST + "test_wear_is_even",
    ),
    Mutant(
        name="S7 a bad block is tried again and again",
        file=LOG,
        old="        self._bad.add(block)\n",
        new="",
        invariant="I54",
        test=TEST + "test_bad_blocks_are_skipped_and_nothing_is_lost",
    ),
    Mutant(
        name="S8 what is before a checkpoint is never freed",
        file=LOG,
        old="            del self._chain[:start]\n",
        new="",
        invariant="I54",
        test=TEST + "test_full_device_refuses_without_loss_and_a_checkpoint_makes_room",
    ),
    Mutant(
        name="R42 corruption is taken for a torn tail",
        file=RECOVERY,
        old="            if fragment is not None and fragment.first:\n",
        new="            if fragment is not None and not fragment.size:\n",
        invariant="I53",
        test=TEST + "test_torn_tail_is_dropped_but_damage_before_it_is_corruption",
    ),
]
