"""The processes of a run, as plain functions. One process needs no launcher; several come from `deepspeed` or `torchrun`.

Objects that cross processes are small (rollouts, verdicts, texts); tensors of the model never go this way.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from fst_fast.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """This process's number: from torch.distributed once it is up, from the launcher's environment before."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """The device of this process: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def init(timeout_s: float = 1800.0) -> None:
    """Start torch.distributed (nccl with GPUs, gloo without); a lone process becomes a world of one.

    timeout_s: the longest a process waits for the others in a collective; then it raises what `is_lost_peer` knows."""
    if dist.is_initialized():
        return
    where = device()
    backend = "nccl" if where.type == "cuda" else "gloo"
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if "RANK" not in os.environ:  # no launcher: no port is opened, and no child process inherits a rank
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    import deepspeed  # imported late: it is slow to load and probes the machine
    import deepspeed.ops

    # On a CPU DeepSpeed would compile a shared-memory all-reduce the first time: a compiler is needed, and a build killed half-way leaves a
    # lock for which every later run waits without end. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=backend, verbose=False, timeout=datetime.timedelta(seconds=timeout_s)
    )


def limit_waiting(timeout_s: float) -> None:
    """The same limit for the groups that DeepSpeed has made since, which take a default of their own."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether this error means that another process has ended or does not answer."""
    if not isinstance(error, RuntimeError) or world_size() == 1:
        return False
    signs = ("gloo", "NCCL", "TCPStore", "Connection closed by peer", "Connection reset", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def all_gather(value: T) -> list[T]:
    """Every process's `value`, in rank order, on every process."""
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def from_rank_zero(value: T | None) -> T:
    """Rank 0's `value` on every process. A UserError raised on rank 0 can be passed as the value: it is then raised everywhere."""
    box: list[Any] = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]  # type: ignore[no-any-return]


def on_rank_zero(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its result there, None elsewhere. A UserError is raised on every process."""
    result = error = None
    if rank() == 0:
        try:
            result = action()
        except UserError as bad:
            error = bad
    from_rank_zero(error)
    return result


def on_rank_zero_everywhere(action: Callable[[], Any]) -> Any:
    """Like `on_rank_zero`, the result (small, picklable) on every process."""
    return from_rank_zero(on_rank_zero(action))


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Elementwise sum over the processes, added in rank order (so it is the same number everywhere)."""
    rows = all_gather([float(v) for v in values])
    return [sum(column) for column in zip(*rows, strict=True)]


def maximum(value: int) -> int:
    return max(all_gather(value))


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def shut_down() -> None:
    """The end of a run that ended well, for all of its processes: without it threads of torch.distributed are cut off at exit, and a process
    whose work is done may end with an error. A lone process stays as it is, able to run again."""
    if world_size() == 1:
        return
    try:
        dist.barrier()
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        return  # the others are gone; this one's work is done
    dist.destroy_process_group()


def share(items: Sequence[T]) -> list[T]:
    """The share of this process: a run of neighbours, as long as any other process's by one at most. Waves stand in the order of the prompt
    tree, so samples of one prompt stay together and no prompt but those at the seams is computed twice. Undone by `join_shares`."""
    here, world = rank(), world_size()
    return list(items[len(items) * here // world : len(items) * (here + 1) // world])


def share_by_cost(items: Sequence[T], costs: Sequence[int]) -> list[T]:
    """The share of this process where every process holds all items and some cost more than others: in their order, see `assign`."""
    homes = assign([costs, *[[]] * (world_size() - 1)])[0]
    return [item for item, home in zip(items, homes, strict=True) if home == rank()]


def join_shares(shares: Sequence[Sequence[T]]) -> list[T]:
    """Put the processes' shares (see `share`) back into the original order."""
    return [item for share in shares for item in share]


def rebalance(items: Sequence[T], costs: Sequence[int]) -> list[T]:
    """The items of all processes dealt anew, so that no process has much more to do than the others; in one order whoever had them before.

    costs: of each item, in any unit. Only items that move travel (pickled). All processes must call it.
    """
    if world_size() == 1:
        return list(items)
    homes = assign(all_gather([int(cost) for cost in costs]))
    here = rank()
    leaving = [
        (home, at, item)
        for at, (home, item) in enumerate(zip(homes[here], items, strict=True))
        if home != here
    ]
    arriving = [
        (origin, at, item)
        for origin, parcel in enumerate(all_gather(leaving))
        for home, at, item in parcel
        if home == here
    ]
    staying = [(here, at, item) for at, item in enumerate(items) if homes[here][at] == here]
    return [item for _, _, item in sorted(arriving + staying, key=lambda entry: entry[:2])]


def assign(costs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Where each item of each process goes, its costs given: the dearest first, each to whoever has least so far. All stay where they are
    if the longest load gets no shorter by it."""
    load = [0] * len(costs)
    homes = [[0] * len(own) for own in costs]
    order = sorted(
        ((cost, at, origin) for origin, own in enumerate(costs) for at, cost in enumerate(own)),
        key=lambda entry: (-entry[0], *entry[1:]),
    )
    for cost, at, origin in order:
        home = origin if load[origin] == min(load) else load.index(min(load))
        load[home] += cost
        homes[origin][at] = home
    if max(map(sum, costs)) <= max(load):
        return [[origin] * len(own) for origin, own in enumerate(costs)]
    return homes
