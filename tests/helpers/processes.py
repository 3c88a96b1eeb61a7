"""Two processes of one run, each started by itself as on two machines; forks import nothing twice."""

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from launching import Launch, launch


def start_two(
    script: str, options: dict[str, Any], log: Path, hook: Callable[[], None] = int
) -> list[Launch]:
    """Start both; their outputs go to files that are called after `log`. `hook` runs in each before it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        launch(script, options, log.with_name(f"{log.name}-{rank}"), partial(_become, rank, port, hook))
        for rank in (0, 1)
    ]


def run_two(script: str, options: dict[str, Any], log: Path, hook: Callable[[], None] = int) -> str:
    """Run both to their end; what the first one said."""
    both = start_two(script, options, log, hook)
    for launched in both:
        assert launched.wait(300) == 0, launched.text()
    return both[0].text()


def _become(rank: int, port: int, hook: Callable[[], None]) -> None:
    """What a launcher tells one of two processes."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")
    hook()


def shard(environment: dict[str, str]) -> None:
    """A hook: FSDP2 on CPUs, with what accelerate's launcher puts into the environment.

    accelerate shards over GPUs alone, though torch shards over gloo as well. Here it is told that CPUs do;
    all that follows, from `fully_shard` to the checkpoints, is what GPUs run.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    from prefopt.config import PreferenceConfig

    begin = AcceleratorState.__init__

    def begin_sharded(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        plugin = options.get("fsdp_plugin")
        if plugin is None or self.distributed_type != DistributedType.MULTI_CPU:
            return
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = begin_sharded
    PreferenceConfig.check_shards = lambda self: None  # which refuses FSDP on CPUs
    os.environ.update(environment)
