"""Names without DNS: the table FT_HOSTS, and the correction of a hosts file.

FT_HOSTS has one line an address, in the form of a hosts file, with link and port behind ``#``::

    10.0.0.1  h1.example h1  # link=a port=7400

The correction of a hosts file touches managed names only (I51): a line that gives a managed name a wrong address gets the right
one, a misspelt managed name beside its own address is spelt right, a missing short name is put behind its full name. Every
other byte stays as it is: comments, blanks, line ends, names that are not ours, even on the same line.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import attrs

from ha_core.errors import ConfigError
from ha_core.ids import HostName
from ha_core.machines.failover.records import Host, Name
from ha_core.machines.failover.shapes import is_host_name

HEAD: Final = "# FT_HOSTS: names of the cluster, written from its database; changes made here are overwritten.\n"


@attrs.frozen
class Place:
    """One address of a name; hosts have a link and a port, other managed names neither."""

    address: str
    link: str = ""
    port: int = 0


@attrs.frozen
class Entry:
    fqdn: str
    places: tuple[Place, ...]
    aliases: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        return self.fqdn.partition(".")[0]

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(place.address for place in self.places))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.fqdn, self.short, *self.aliases)))


def entries_of(hosts: Mapping[HostName, Host], names: Mapping[str, Name]) -> tuple[Entry, ...]:
    """The table of all hosts and other managed names, by name. What is no IP address (a link may be configured by a host's
    name) and what is no name is left out: a hosts file is not for it."""
    found = {str(host.name): _entry(host.name, [_place(*address) for address in host.addresses], ()) for host in hosts.values()}
    for name in names.values():
        found[name.fqdn] = _entry(name.fqdn, [Place(address) for address in name.addresses], name.aliases)
    return tuple(found[fqdn] for fqdn in sorted(found) if is_host_name(fqdn))


def _entry(fqdn: str, places: Iterable[Place], aliases: Iterable[str]) -> Entry:
    return Entry(fqdn, tuple(one for one in places if _is_address(one.address)), tuple(filter(is_host_name, aliases)))


def _place(link: str, address: str) -> Place:
    host, _, port = address.rpartition(":")
    return Place(host.strip("[]"), link, int(port) if port.isdecimal() else 0)


def format_ft_hosts(entries: Iterable[Entry]) -> str:
    lines = [HEAD]
    for entry in entries:
        for place in entry.places:
            note = f"  # link={place.link} port={place.port}" if place.link else ""
            lines.append(f"{place.address}  {' '.join(entry.names)}{note}\n")
    return "".join(lines)


_NOTE = re.compile(r"link=(\S+) port=(\d{1,5})")


def parse_ft_hosts(text: str) -> tuple[Entry, ...]:
    """The table back from its text.

    Raises:
        ConfigError: a line has another form; the text says which.
    """
    found: dict[str, Entry] = {}
    for number, line in enumerate(text.splitlines(), 1):
        body, _, comment = line.partition("#")
        words = body.split()
        if not words:
            continue
        if len(words) < 2 or not _is_address(words[0]):
            raise ConfigError(f"FT_HOSTS line {number}: expected an address and names, found {line[:80]!r}", field="FT_HOSTS")
        note = _NOTE.search(comment)
        place = Place(words[0], note.group(1), int(note.group(2))) if note else Place(words[0])
        fqdn = words[1]
        known = found.get(fqdn, Entry(fqdn, ()))
        aliases = tuple(name for name in words[2:] if name != known.short)
        found[fqdn] = Entry(fqdn, (*known.places, place), aliases)
    return tuple(found.values())


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


# -- the hosts file --


@attrs.frozen
class Correction:
    """The file as it should be, and what was changed, one sentence each; none: ``text`` is what came in."""

    text: bytes
    changes: tuple[str, ...] = ()


@attrs.define
class _Line:
    """A line in pieces that add up to it: words and what is between them, then comment and line end."""

    number: int
    gaps: list[str]
    words: list[str]
    rest: str
    removed: bool = False

    @classmethod
    def of(cls, number: int, line: str) -> _Line:
        content = line.rstrip("\r\n")
        body, mark, comment = content.partition("#")
        pieces = re.split(r"([^ \t]+)", body)
        rest = pieces[-1] + mark + comment + line[len(content) :]
        return cls(number, pieces[0:-1:2], pieces[1::2], rest)

    def text(self) -> str:
        if self.removed:
            return ""
        return "".join(gap + word for gap, word in zip(self.gaps, self.words, strict=True)) + self.rest

    @property
    def address(self) -> str:
        return self.words[0] if len(self.words) > 1 and _is_address(self.words[0]) else ""

    @property
    def names(self) -> list[str]:
        return [word.lower() for word in self.words[1:]]

    def remove_word(self, at: int) -> None:
        del self.words[at], self.gaps[at]

    def insert_word(self, at: int, word: str) -> None:
        self.words.insert(at, word)
        self.gaps.insert(at, " ")


def correct_hosts(old: bytes, entries: Sequence[Entry]) -> Correction:
    """The hosts file ``old`` with managed names put right. Correcting twice changes nothing more."""
    text = old.decode("utf-8", "surrogateescape")
    lines = [_Line.of(number, line) for number, line in enumerate(re.findall(r"[^\n]*\n|[^\n]+", text), 1)]
    corrector = _Corrector(lines, entries)
    corrector.run()
    if not corrector.changes:
        return Correction(old)
    new = "".join(line.text() for line in lines) + corrector.appended
    return Correction(new.encode("utf-8", "surrogateescape"), tuple(corrector.changes))


class _Corrector:
    def __init__(self, lines: Sequence[_Line], entries: Sequence[Entry]) -> None:
        self.lines = lines
        self.entries = [entry for entry in entries if entry.places]
        self.changes: list[str] = []
        self.appended = ""
        self._owner = _owners(self.entries)

    def run(self) -> None:
        for line in self.lines:
            if line.address:
                self._spell(line)
        for entry in self.entries:
            self._place(entry)
        for entry in self.entries:
            self._add_short(entry)

    def _spell(self, line: _Line) -> None:
        """A word that is almost the full name of the line's own address is that name."""
        for entry in self.entries:
            if not _same(line.address, entry.addresses) or entry.fqdn.lower() in line.names:
                continue
            for at, word in enumerate(line.words[1:], 1):
                name = word.lower()
                if name not in self._owner and "." in name and _is_near(name, entry.fqdn.lower()):
                    line.words[at] = entry.fqdn
                    self.changes.append(f"line {line.number}: {word} was a misspelt {entry.fqdn}")
                    break

    def _place(self, entry: Entry) -> None:
        """Every line that names the entry has one of its addresses."""
        for line in self.lines:
            if not line.address or _same(line.address, entry.addresses):
                continue
            mine = [at for at, word in enumerate(line.words) if at and self._owner.get(word.lower()) is entry]
            if not mine:
                continue
            right = self._best_address(entry, line)
            if len(mine) == len(line.words) - 1:
                self.changes.append(f"line {line.number}: {entry.fqdn} had the address {line.words[0]}, it has {right}")
                line.words[0] = right
            else:
                self._take_out(entry, line, mine, right)

    def _best_address(self, entry: Entry, line: _Line) -> str:
        """An address of the line's family that the file does not have yet; else the first."""
        family = ipaddress.ip_address(line.address).version
        present = [other.address for other in self.lines if other.address and entry.fqdn.lower() in other.names]
        ranked = sorted(
            entry.addresses,
            key=lambda address: (ipaddress.ip_address(address).version != family, _same(address, present)),
        )  # fmt: skip
        return ranked[0]

    def _take_out(self, entry: Entry, line: _Line, mine: Sequence[int], right: str) -> None:
        """The line's other names stay where they are; ours leave it, and get a line of their own if they have none."""
        names = " ".join(line.words[at] for at in mine)
        for at in reversed(mine):
            line.remove_word(at)
        self.changes.append(f"line {line.number}: {names} did not belong to {line.words[0]}, {entry.fqdn} has {right}")
        if not any(other.address and entry.fqdn.lower() in other.names for other in self.lines):
            ending = "\r\n" if self.lines[0].rest.endswith("\r\n") else "\n"
            begin = "" if self.lines[-1].rest.endswith("\n") or self.appended else ending
            self.appended += f"{begin}{right} {' '.join(entry.names)}{ending}"

    def _add_short(self, entry: Entry) -> None:
        short = entry.short.lower()
        if self._owner.get(short) is not entry:
            return
        for line in self.lines:
            if line.address and entry.fqdn.lower() in line.names and short not in line.names:
                line.insert_word(line.names.index(entry.fqdn.lower()) + 2, entry.short)
                self.changes.append(f"line {line.number}: {entry.fqdn} was without its short name {entry.short}")


def _owners(entries: Sequence[Entry]) -> dict[str, Entry]:
    """Managed name -> its entry; a short name or alias that two entries share is nobody's."""
    owners: dict[str, Entry | None] = {}
    for entry in entries:
        for name in entry.names:
            known = owners.get(name.lower(), entry)
            owners[name.lower()] = entry if known is entry else None
    for entry in entries:
        owners[entry.fqdn.lower()] = entry
    return {name: entry for name, entry in owners.items() if entry is not None and name != "localhost"}


def _same(address: str, addresses: Iterable[str]) -> bool:
    wanted = ipaddress.ip_address(address)
    return any(ipaddress.ip_address(other) == wanted for other in addresses)


def _is_near(word: str, name: str) -> bool:
    """At most two letters wrong, missing, too many or swapped, and fewer than a quarter of the name."""
    return 0 < _distance(word, name, 2) <= min(2, len(name) // 4)


def _distance(one: str, other: str, limit: int) -> int:
    """Edits (insert, delete, replace, swap of neighbours) from one to the other; ``limit`` + 1 if there are more."""
    if abs(len(one) - len(other)) > limit:
        return limit + 1
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, target in enumerate(other, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != target))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == target:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return min(last[-1], limit + 1)
