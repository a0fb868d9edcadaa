from __future__ import annotations

import random

import pytest

from ha_core.errors import ConfigError
from ha_core.ids import HostName
from ha_core.machines.failover.records import Host, Name
from ha_core.machines.names import Entry, Place, correct_hosts, entries_of, format_ft_hosts, parse_ft_hosts

H1 = Entry("h1.example", (Place("10.0.0.1", "a", 7400), Place("10.1.0.1", "b", 7400)))
H2 = Entry("h2.example", (Place("10.0.0.2", "a", 7400),))
CENTER = Entry("center.example", (Place("10.0.0.9"),), ("vcenter",))
TABLE = (CENTER, H1, H2)


def test_the_table_lists_hosts_with_links_and_other_managed_names() -> None:
    hosts = {HostName("h1.example"): Host(HostName("h1.example"), (("a", "10.0.0.1:7400"), ("six", "[fd00::1]:7401")))}
    names = {"center.example": Name("center.example", ("10.0.0.9",), ("vcenter",))}

    table = entries_of(hosts, names)

    assert [entry.fqdn for entry in table] == ["center.example", "h1.example"]
    assert table[1].places == (Place("10.0.0.1", "a", 7400), Place("fd00::1", "six", 7401))


def test_what_is_no_address_or_no_name_is_not_in_the_table() -> None:
    """A link may be configured by a host's name, and one wrong line would spoil the whole file."""
    hosts = {HostName("h1.example"): Host(HostName("h1.example"), (("a", "h1-a.example:7400"), ("b", "10.1.0.1:7400")))}
    names = {
        "far.example": Name("far.example", ("nowhere",)),
        "two\nlines": Name("two\nlines", ("10.0.0.7",)),
        "x.example": Name("x.example", ("10.0.0.8",), ("x", "a b", "#")),
    }

    table = entries_of(hosts, names)

    assert table == (
        Entry("far.example", ()),
        Entry("h1.example", (Place("10.1.0.1", "b", 7400),)),
        Entry("x.example", (Place("10.0.0.8"),), ("x",)),
    )
    assert correct_hosts(b"127.0.0.1 h1.example\n", table).text == b"10.1.0.1 h1.example h1\n"


def test_the_table_survives_its_text() -> None:
    assert parse_ft_hosts(format_ft_hosts(TABLE)) == TABLE


def test_a_line_of_another_form_is_named() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        parse_ft_hosts("# fine\nnot-an-address name\n")


GOOD = b"""# my hosts
127.0.0.1\tlocalhost localhost.localdomain   # do not touch

10.0.0.1   h1.example h1
10.0.0.77  printer.example printer
"""


def test_a_file_that_is_right_stays_as_it_is() -> None:
    correction = correct_hosts(GOOD, TABLE)

    assert correction.text is GOOD
    assert correction.changes == ()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"10.0.0.1  h1.exmaple h1\n", b"10.0.0.1  h1.example h1\n", "misspelt"),
        (b"10.0.0.1\th1.example\r\n", b"10.0.0.1\th1.example h1\r\n", "short name"),
        (b"10.0.0.3 h2.example h2 # old\n", b"10.0.0.2 h2.example h2 # old\n", "it has 10.0.0.2"),
        (b"10.0.0.3 vcenter center.example center", b"10.0.0.9 vcenter center.example center", "10.0.0.9"),
        (b"10.0.0.1 h1.example h1\n9.9.9.9 H1.example h1", b"10.0.0.1 h1.example h1\n10.1.0.1 H1.example h1", "10.1.0.1"),
        (
            b"127.0.0.1 localhost h1.example h1\n",
            b"127.0.0.1 localhost\n10.0.0.1 h1.example h1\n",
            "did not belong to 127.0.0.1",
        ),
        (b"10.0.0.2 h2.example h2 h1\n", b"10.0.0.2 h2.example h2\n10.0.0.1 h1.example h1\n", "did not belong"),
        (b"127.0.1.1 h2.example", b"10.0.0.2 h2.example h2", "127.0.1.1"),
    ],
)
def test_a_managed_name_is_put_right_and_nothing_else_changes(old: bytes, new: bytes, said: str) -> None:
    head, tail = b"# \xff not UTF-8\n\n1.2.3.4 other  names\n", b"\n#10.9.9.9 h1.example\n::1 ip6-localhost\n"
    ending = b"" if old.endswith(b"\n") else b"\n"
    if new.count(b"\n") > old.count(b"\n"):
        line, _, added = new.partition(b"\n")
        wanted = head + line + b"\n" + tail + added
    else:
        wanted = head + new + ending + tail

    correction = correct_hosts(head + old + ending + tail, TABLE)

    assert correction.text == wanted
    assert said in " ".join(correction.changes)
    assert correct_hosts(correction.text, TABLE).changes == ()


@pytest.mark.parametrize(
    "untouched",
    [
        b"10.0.0.50 h1.exmaple h1x\n",  # misspelt, but not beside our address: somebody else's
        b"10.0.0.1 h1.example h1 www.shop.example\n",
        b"10.0.0.1 h1.example h1 web h11\n",
        b"not-an-address h1.example\n",
        b"10.0.0.1\n",
        b"h1.example\n",
        b"",
    ],
)
def test_what_is_not_ours_is_left_alone(untouched: bytes) -> None:
    assert correct_hosts(untouched, TABLE).text is untouched


def test_a_short_name_of_two_hosts_is_nobodys() -> None:
    other = Entry("h1.elsewhere", (Place("10.9.0.1"),))

    correction = correct_hosts(b"10.0.0.1 h1.example\n10.9.0.1 h1.elsewhere\n", (H1, other))

    assert correction.changes == ()


def test_only_managed_lines_change_whatever_the_file_holds(request: pytest.FixtureRequest) -> None:
    """I51, with lines drawn at random."""
    rng = random.Random(request.config.getoption("--seed"))
    words = ["10.0.0.1", "10.0.0.3", "::1", "h1.example", "h1", "h2.exmple", "other.example", "127.0.0.1"]
    pieces = [*words, "#", "  ", "\t", "x", "é", "\x0c"]
    for _ in range(300):
        lines = ["".join(rng.choice(["", " ", "\t"]) + rng.choice(pieces) for _ in range(rng.randrange(6))) for _ in range(5)]
        old = rng.choice(["\n", "\r\n"]).join(lines).encode()

        correction = correct_hosts(old, TABLE)

        assert correct_hosts(correction.text, TABLE).changes == ()
        before, after = old.split(b"\n"), correction.text.split(b"\n")
        numbers = {int(change.split()[1].rstrip(":")) for change in correction.changes}
        for number, line in enumerate(before, 1):
            if number not in numbers and (line or number < len(before)):
                assert after[number - 1].rstrip(b"\r") == line.rstrip(b"\r")
