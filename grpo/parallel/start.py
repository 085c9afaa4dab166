"""Brings the ranks of a run together: starts their processes, or joins those of torchrun.

The first rank is the process of the command itself. It alone has composed the config, holds the
run's lock, writes its files and answers signals; the others wait for its config.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from grpo.errors import ConfigError, RunError
from grpo.parallel.interface import find_interface
from grpo.parallel.ranks import ONE_RANK, Ranks

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from grpo.parallel.process_group import ProcessGroup

RANK_MODULE = "grpo.cli.rank"
START_SECONDS = 300.0  # until all ranks have to be there
END_SECONDS = 30.0  # in which a rank ends by itself
INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def is_launched() -> bool:
    """Returns whether torchrun, or what sets the same variables, has started this process."""
    return all(name in os.environ for name in LAUNCHED)


def get_launched_index() -> int:
    """Returns the rank that torchrun gave this process; 0 without it."""
    return int(os.environ["RANK"]) if is_launched() else 0


def count_launched() -> int:
    """Returns how many processes torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


@contextmanager
def join_ranks(processes: int | None) -> Iterator[Ranks]:
    """Yields the ranks of a run as its first; at the end, all have ended.

    Args:
        processes: to start on this machine, this one included; None: torchrun has started them.

    Raises:
        ConfigError: MASTER_PORT can't be used.
        RunError: a rank could not be started.
    """
    if processes == 1:
        yield ONE_RANK
    elif processes is None:
        ranks = join_launched()
        with leaving(ranks):
            yield ranks
    else:
        with started_ranks(processes) as ranks, leaving(ranks):
            yield ranks


def join_launched() -> ProcessGroup:
    """Joins the ranks whose processes torchrun has started, as any of them."""
    from torch.distributed.rendezvous import rendezvous

    from grpo.parallel.process_group import Place, ProcessGroup
    from grpo.parallel.watch import Watch

    place = Place.read_environment()
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if INTERFACE_VARIABLE not in os.environ and (name := find_interface(host, int(port))):
        os.environ[INTERFACE_VARIABLE] = name
    try:
        timeout = timedelta(seconds=START_SECONDS)
        store, _, _ = next(rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"MASTER_ADDR:MASTER_PORT={host}:{port}: rank {place.index} can't use it "
            f"({str(error).splitlines()[0]}); is the port taken, or the first rank not there?"
        ) from error
    return ProcessGroup(place, store, Watch(store, place.index, place.size))


@contextmanager
def leaving(ranks: ProcessGroup) -> Iterator[None]:
    """Within it, an error is told to the other ranks; at its end, this rank leaves them."""
    try:
        yield
        ranks.gather(lambda: None)  # until all are done
    except BaseException as error:
        ranks.announce(error)
        raise
    finally:
        ranks.leave()


@contextmanager
def started_ranks(processes: int, module: str = RANK_MODULE) -> Iterator[ProcessGroup]:
    """Starts the other ranks' processes on this machine, and ends them with this one.

    Args:
        module: what they run; it calls `join_started`.
    """
    threads = share_threads(processes)
    from torch import set_num_threads
    from torch._C._distributed_c10d import TCPStore

    from grpo.parallel.process_group import Place, ProcessGroup
    from grpo.parallel.watch import Watch

    set_num_threads(threads)  # where torch was imported before, as in a sweep
    store = TCPStore("127.0.0.1", 0, processes, is_master=True, wait_for_workers=False)
    children: dict[int, subprocess.Popen[bytes]] = {}

    def find_dead() -> str:
        for rank, child in children.items():
            if child.poll() is not None:
                return f"rank {rank} ended {describe_exit(child.returncode)}"
        return ""

    def end_all() -> None:
        for child in children.values():
            child.kill()

    try:
        for rank in range(1, processes):
            place = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": store.port}
            children[rank] = start_rank(module, place, threads)
        wait_for_ranks(store, children)
        watch = Watch(store, 0, processes, find_dead, end_all)
        yield ProcessGroup(Place(0, processes, 0, processes), store, watch)
        wait_for_end(children)
    finally:
        end_all()
        for child in children.values():
            child.wait()


def share_threads(processes: int) -> int:
    """Divides the cores among the processes; a number in OMP_NUM_THREADS is kept."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // processes)))
    return int(threads.partition(",")[0])


def start_rank(module: str, place: Mapping[str, int], threads: int) -> subprocess.Popen[bytes]:
    """Starts a rank in a session of its own, so that a Ctrl-C only reaches the first one."""
    local = {"LOCAL_RANK": place["RANK"], "LOCAL_WORLD_SIZE": place["WORLD_SIZE"]}
    environment = {
        **os.environ,
        **{name: str(value) for name, value in {**place, **local}.items()},
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": str(threads),
        STARTED_VARIABLE: "1",
        # Without the warnings, with traces in C++, of a store that has gone with the first rank.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    return subprocess.Popen([sys.executable, "-m", module], env=environment, start_new_session=True)


STARTED_VARIABLE = "GRPO_STARTED_RANK"


def join_started() -> ProcessGroup:
    """Joins the first rank, whose process has started this one."""
    from torch._C._distributed_c10d import TCPStore

    from grpo.parallel.process_group import Place, ProcessGroup
    from grpo.parallel.watch import Watch

    place = Place.read_environment()
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), place.size)
    store.set(f"ready/{place.index}", "1")
    return ProcessGroup(place, store, Watch(store, place.index, place.size))


def wait_for_ranks(store: Store, children: Mapping[int, subprocess.Popen[bytes]]) -> None:
    """Waits until all ranks have reached the store.

    Raises:
        RunError: one ended, or took too long.
    """
    deadline = time.monotonic() + START_SECONDS
    for rank, child in children.items():
        while not store.check([f"ready/{rank}"]):
            if child.poll() is not None:
                raise RunError(f"rank {rank} ended {describe_exit(child.returncode)} at its start")
            if time.monotonic() > deadline:
                raise RunError(f"rank {rank} did not start within {START_SECONDS:g} s")
            time.sleep(0.05)


def wait_for_end(children: Mapping[int, subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + END_SECONDS
    for child in children.values():
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return  # it has nothing left to do, and is ended


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    return f"by {signal.Signals(-code).name}{' (out of memory?)' if code == -9 else ''}"
