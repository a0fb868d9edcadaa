"""A piece of Python that runs on exactly one host of a cluster, and on another one when that host is gone."""

from pathlib import Path
from tempfile import TemporaryDirectory

import trio

from ha_core import Config, FencingToken, open_node

LINKS = {f"job@h{n}.example": {"a": f"127.0.0.1:{7430 + n}", "b": f"127.0.0.2:{7430 + n}"} for n in (1, 2, 3)}


def config(node: str, folder: Path) -> Config:
    return Config(
        node=node,
        cluster="example",
        data_dir=folder / node,
        links=LINKS[node],
        bootstrap=LINKS,
        key_file=folder / "cluster.key",
    )


async def compete(node: str, folder: Path, runs: list[tuple[str, int]], ends: dict[str, trio.CancelScope]) -> None:
    async def job(token: FencingToken) -> None:
        runs.append((node, token))  # whatever the job changes should check the token: a newer one exists once it has lost
        await trio.sleep_forever()

    with trio.CancelScope() as ends[node]:
        async with open_node(config(node, folder)) as here:
            await here.run_on_one_host("nightly-report", job)


async def main(folder: Path) -> None:
    (folder / "cluster.key").write_bytes(bytes(32))  # the same secret on every host
    (folder / "cluster.key").chmod(0o600)
    runs: list[tuple[str, int]] = []
    ends: dict[str, trio.CancelScope] = {}
    async with trio.open_nursery() as nursery:
        for node in LINKS:
            nursery.start_soon(compete, node, folder, runs, ends)
        while len(runs) < 1:
            await trio.sleep(0.01)
        ends[runs[0][0]].cancel()  # that host is gone
        while len(runs) < 2:
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    (first, old), (second, new) = runs
    assert first != second
    assert old < new
    print(f"ran on {first} with token {old}, then on {second} with token {new}")


with TemporaryDirectory() as name:
    trio.run(main, Path(name))
