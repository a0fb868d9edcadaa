"""Three nodes in one process share a replicated database: writes survive any one of them, a watch misses nothing."""

from pathlib import Path
from tempfile import TemporaryDirectory

import trio

from ha_core import Config, Node, open_node

LINKS = {f"db@h{n}.example": {"a": f"127.0.0.1:{7420 + n}", "b": f"127.0.0.2:{7420 + n}"} for n in (1, 2, 3)}


def config(node: str, folder: Path) -> Config:
    return Config(
        node=node,
        cluster="example",
        data_dir=folder / node,
        links=LINKS[node],
        bootstrap=LINKS,
        key_file=folder / "cluster.key",
    )


async def follow(node: Node, seen: list[bytes], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    async with node.database.watch(b"colour/") as watch:
        task_status.started()
        async for revision in watch:
            seen += [event.record.value for event in revision.events if event.record is not None]


async def main(folder: Path) -> None:
    (folder / "cluster.key").write_bytes(bytes(32))  # the same secret on every host
    (folder / "cluster.key").chmod(0o600)
    one, two, three = LINKS
    seen: list[bytes] = []
    async with (
        open_node(config(one, folder)) as first,
        open_node(config(two, folder)) as second,
        trio.open_nursery() as nursery,
    ):
        async with open_node(config(three, folder)) as third:
            await nursery.start(follow, second, seen)
            await first.database.put(b"colour/sky", b"blue")
            await third.database.put(b"colour/grass", b"green")
        await first.database.put(b"colour/rust", b"red")  # the third node is gone: two of three are a quorum
        page = await second.database.range(b"colour/")
        while len(seen) < 3:
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    print([record.value for record in page.records], seen)


with TemporaryDirectory() as name:
    trio.run(main, Path(name))
