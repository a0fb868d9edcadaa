"""Plays the stories in interactions/*.txt and compares what the replicas told; ``--rewrite`` writes it anew.

A file is blocks of commands, a line ``----`` and what happened since the block before. Commands:

    nodes VOTERS [SPARES]              the group; first
    run MS | elect                     let time pass; until there is a leader
    propose NODE WORD...               one batch
    read NODE REQUEST
    add-learner NODE LEARNER | promote NODE LEARNER | remove NODE MEMBER     asked of NODE
    transfer NODE TO
    checkpoint NODE STATE
    partition NODE... | NODE...        heal
    crash NODE                         restart NODE, wipe NODE
    freeze-disk NODE                   thaw-disk NODE, fail-disk NODE
    cut-streams NODE                   its appends and snapshots are lost, datagrams pass; heal-streams
    status                             a line a node
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ha_core.machines.raft.types import Lane, Limits, Promote, Remove, TransferLeadership
from tests.machines.raft.group import Group, node_id, short

FILES = sorted((Path(__file__).parent / "interactions").glob("*.txt"))
LIMITS = Limits(tail_entries=3, snapshot_chunk_bytes=100)


class Player:
    def __init__(self) -> None:
        self.group = Group(1)
        self.told = 0

    def play(self, line: str) -> list[str]:
        """Carry out a command; what it says by itself."""
        command, *words = line.split()
        group = self.group
        match command, words:
            case "nodes", [voters, *spares]:
                self.group = Group(int(voters), int(spares[0]) if spares else 0, limits=LIMITS)
                self.told = len(self.group.story)
            case "run", [duration]:
                group.run(float(duration))
            case "elect", []:
                group.elect()
            case "propose", [node, *data]:
                group.propose(node, *[word.encode() for word in data])
            case "read", [node, request]:
                group.read(node, int(request))
            case "checkpoint", [node, state]:
                group.checkpoint(node, state.encode())
            case "partition", _:
                group.partition(*[side.split() for side in line.removeprefix("partition").split("|")])
            case "status", []:
                return [self._status(name) for name in group.nodes]
            case _:
                self._play_fault(command, words)
        return []

    def _play_fault(self, command: str, words: list[str]) -> None:
        group = self.group
        match command, words:
            case "heal", []:
                group.heal()
            case "crash" | "restart" | "wipe", [node]:
                getattr(group, command)(node)
            case "freeze-disk", [node]:
                group.freeze_disk(node)
            case "thaw-disk", [node]:
                group.thaw_disk(node)
            case "fail-disk", [node]:
                group[node].disk.error = "input/output error"
            case "cut-streams", [node]:
                group.drop = lambda sent: sent.sender == node and sent.lane is not Lane.DATAGRAM
            case "heal-streams", []:
                group.drop = lambda sent: False
            case _:
                self._play_change(command, words)

    def _play_change(self, command: str, words: list[str]) -> None:
        group = self.group
        match command, words:
            case "add-learner", [node, learner]:
                group.add_learner(node, learner)
            case "promote", [node, learner]:
                group.change(node, Promote(node_id(learner)))
            case "remove", [node, member]:
                group.change(node, Remove(node_id(member)))
            case "transfer", [node, to]:
                group[node].step(TransferLeadership(node_id(to)))
            case _:
                raise ValueError(f"no such command: {command} {' '.join(words)}")

    def _status(self, name: str) -> str:
        node = self.group[name]
        if node.raft is None:
            return f"{name} down"
        status = node.machine.status()
        log = " ".join(f"{index}/{term}" for index, term in node.log())
        return f"{name} {status.role.value} term={status.term} leader={short(status.leader)} commit={status.commit} log: {log}"

    def take_story(self) -> list[str]:
        story = self.group.story[self.told :]
        self.told = len(self.group.story)
        return story


def play(text: str) -> str:
    """The file as it should read."""
    player = Player()
    blocks = []
    for block in text.strip().split("\n\n"):
        commands, _, _ = block.partition("\n----")
        out: list[str] = []
        for line in commands.splitlines():
            if not line.startswith("#"):
                said = player.play(line)
                out += player.take_story() + said
        blocks.append("\n".join([commands.removesuffix("\n----"), "----", *(out or ["ok"])]))
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_story_goes_as_told(path: Path, rewrite: bool) -> None:
    text = path.read_text()

    played = play(text)

    if rewrite:
        path.write_text(played)
    assert played == path.read_text()


def test_there_are_stories() -> None:
    assert len(FILES) >= 10
