"""Collectives over the processes of a run. A single process needs no launcher; several are started by `deepspeed` or `torchrun`.

Only small objects (rollouts, verdicts, texts) are exchanged here, pickled. Model tensors are communicated by DeepSpeed.

With rollout.sampler_ranks the last processes of a run only sample. Then the default group of torch, which DeepSpeed takes for the world, is the process's own
part (trainers or samplers), and a gloo group beside it joins all of them. Which processes a call here means is said by its scope: all of the run, or inside
`part()` those of the same part, or inside `alone()` this one (a thread that samples while its process trains).
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fst_fast.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """The processes of a run in two parts, the samplers last. whole: gloo group of all of them. link: gloo group of the first trainer (rank 0 in it) and the
    samplers; None on other trainers."""

    samplers: int
    whole: Any
    link: Any

    @property
    def samples(self) -> bool:
        """Whether this process is a sampler."""
        return bool(self.whole.rank() >= self.whole.size() - self.samplers)


_split: Split | None = None
_scope: ContextVar[Literal["run", "part", "alone"]] = ContextVar("scope", default="run")


def split() -> Split | None:
    """The parts of the run; None where every process does everything."""
    return _split


@contextmanager
def _inside(scope: Literal["part", "alone"]) -> Iterator[None]:
    token = _scope.set(scope)
    try:
        yield
    finally:
        _scope.reset(token)


def part() -> AbstractContextManager[None]:
    """Inside, the functions of this module are about the processes of this part only. Without parts nothing changes."""
    return _inside("part")


def alone() -> AbstractContextManager[None]:
    """Inside, the functions of this module are about this process only. Holds for the thread that enters it."""
    return _inside("alone")


def _joined() -> Any:
    """The gloo group of the whole run where that is not torch's default group and is meant here."""
    return _split.whole if _split is not None and _scope.get() == "run" else None


def rank() -> int:
    """This process's rank: from torch.distributed once it is initialised, before that from the launcher's environment."""
    if _scope.get() == "alone":
        return 0
    if (group := _joined()) is not None:
        return int(group.rank())
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    if _scope.get() == "alone":
        return 1
    if (group := _joined()) is not None:
        return int(group.size())
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """This process's device: its own GPU (LOCAL_RANK) if the machine has one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def init(timeout_s: float = 1800.0, *, samplers: int = 0) -> None:
    """Initialise torch.distributed: nccl with GPUs, gloo without; a single process becomes a world of one.

    timeout_s: how long a collective waits for the other processes before it raises an error that `is_lost_peer` recognises. samplers: how many processes, the
    last ones, only sample. Raises UserError where the packages for training are not installed, and where nobody is left to train."""
    if world_size() <= samplers:
        raise UserError(
            f"rollout.sampler_ranks={samplers} leaves no process to train: the run has {world_size()}; start it with deepspeed or torchrun on "
            f"{samplers + 1} or more"
        )
    if dist.is_initialized():
        if samplers != (0 if _split is None else _split.samplers):
            raise UserError(
                f"rollout.sampler_ranks={samplers}, but the processes of this program are already divided otherwise; start it anew"
            )
        return
    missing = [name for name in ("deepspeed", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"training and fst eval need the package {missing[0]}: pip install --no-build-isolation 'fst-fast[train]', after torch (docs/install.md)"
        )
    where = device()
    backend = "nccl" if where.type == "cuda" else "gloo"
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if "RANK" not in os.environ:  # no launcher: no port is opened, and no child process inherits a rank
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    elif samplers:
        _init_parts(backend, samplers, datetime.timedelta(seconds=timeout_s))
    import deepspeed  # imported late: it is slow to load and probes the machine
    import deepspeed.ops

    # On a CPU DeepSpeed compiles a shared-memory all-reduce at first use. That needs a compiler, and a build that is
    # killed leaves a lock on which every later run hangs. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=backend, verbose=False, timeout=datetime.timedelta(seconds=timeout_s)
    )


def _init_parts(backend: str, samplers: int, timeout: datetime.timedelta) -> None:
    """Initialise the default group for this process's part, and the groups that join the parts."""
    global _split
    store, me, world = next(iter(rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    trainers = world - samplers
    samples = me >= trainers
    dist.init_process_group(
        backend,
        store=PrefixStore("samplers" if samples else "trainers", store),
        rank=me - trainers if samples else me,
        world_size=samplers if samples else trainers,
        timeout=timeout,
    )

    def gloo(name: str, rank: int, size: int) -> Any:
        return dist.ProcessGroupGloo(PrefixStore(name, store), rank, size, timeout)

    whole = gloo("whole", me, world)
    link = gloo("link", me - trainers + 1 if samples else 0, 1 + samplers) if samples or me == 0 else None
    _split = Split(samplers, whole, link)


def set_collective_timeout(timeout_s: float) -> None:
    """Set this timeout on every process group, also those that DeepSpeed created with its own default."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether this error means that another process has died or does not respond."""
    if not isinstance(error, RuntimeError) or (world_size() == 1 and _split is None):
        return False
    signs = ("gloo", "NCCL", "TCPStore", "Connection closed by peer", "Connection reset", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def all_gather(value: T) -> list[T]:
    """Gather every process's `value`, in rank order, on every process."""
    if world_size() == 1:
        return [value]
    if (group := _joined()) is not None:
        return [pickle.loads(data) for data in _gather_bytes(group, pickle.dumps(value))]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def broadcast(value: T | None) -> T:
    """Send rank 0's `value` to every process. If rank 0 passes a UserError as the value, every process raises it."""
    box: list[Any] = [value]
    if (group := _joined()) is not None:
        box = [pickle.loads(_gather_bytes(group, pickle.dumps(value) if group.rank() == 0 else b"")[0])]
    elif world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]  # type: ignore[no-any-return]


def _gather_bytes(group: Any, data: bytes) -> list[bytes]:
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    group.allgather([sizes], [torch.tensor([len(data)])]).wait()
    lengths = [int(size) for size in sizes]
    parts = [torch.zeros(max(lengths), dtype=torch.uint8) for _ in lengths]
    mine = torch.zeros(max(lengths), dtype=torch.uint8)
    mine[: len(data)] = as_tensor(data)
    group.allgather([parts], [mine]).wait()
    return [as_bytes(part[:length]) for part, length in zip(parts, lengths, strict=True)]


def as_tensor(data: bytes) -> Tensor:
    """uint8 [len(data)]; a copy."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    """Undo `as_tensor`."""
    return tensor.numpy().tobytes()


def on_rank_zero(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 only. Returns its result there and None elsewhere. Every process raises rank 0's UserError."""
    result = error = None
    if rank() == 0:
        try:
            result = action()
        except UserError as bad:
            error = bad
    broadcast(error)
    return result


def broadcast_result(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its result (small, picklable) on every process."""
    return broadcast(on_rank_zero(action))


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Elementwise sum over the processes, added in rank order, so every process gets the same bits."""
    rows = all_gather([float(v) for v in values])
    return [sum(column) for column in zip(*rows, strict=True)]


def all_reduce_max(value: int) -> int:
    """The largest `value` of any process."""
    return max(all_gather(value))


def agree(action: Callable[[], T]) -> T:
    """Run `action` on every process and return its result; where it raises UserError on one, all raise the first. All processes call it."""
    result = error = None
    try:
        result = action()
    except UserError as bad:
        error = bad
    for said in all_gather(None if error is None else str(error)):
        if said is not None:
            raise UserError(said) from error
    return result  # type: ignore[return-value]


def barrier() -> None:
    if (group := _joined()) is not None:
        group.barrier().wait()
    elif world_size() > 1:
        dist.barrier()


def shut_down() -> None:
    """Leave the process group after a successful run.

    Without it the threads of torch.distributed are cut off at exit and a process that has finished its work may exit
    with an error. A single process keeps its group, so that it can run again."""
    global _split
    if world_size() == 1:
        return
    try:
        barrier()
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        return  # the other processes have exited; this one's work is done
    _split = None
    dist.destroy_process_group()


def local_shard(items: Sequence[T]) -> list[T]:
    """This process's contiguous shard of `items`; shards differ in length by at most one. `concat_shards` is the inverse.

    Rollout requests come in the order of the prompt tree. A contiguous shard keeps the samples of a prompt together, so
    only the prompts at shard boundaries are computed twice."""
    here, world = rank(), world_size()
    return list(items[len(items) * here // world : len(items) * (here + 1) // world])


def contiguous_shard_by_cost(items: Sequence[T], costs: Sequence[int]) -> list[T]:
    """Like `local_shard`, with shards of about equal total cost: an item goes to the process in whose share of the costs its middle lies."""
    here, world, total = rank(), world_size(), sum(costs)
    if world == 1 or not total:
        return local_shard(items)
    mine, before = [], 0
    for item, cost in zip(items, costs, strict=True):
        if min(world - 1, (2 * before + cost) * world // (2 * total)) == here:
            mine.append(item)
        before += cost
    return mine


def local_shard_by_cost(items: Sequence[T], costs: Sequence[int]) -> list[T]:
    """This process's shard of `items`, which every process holds, balanced by cost (see `assign_ranks`); order is kept."""
    ranks = assign_ranks([costs, *[[]] * (world_size() - 1)])[0]
    return [item for item, owner in zip(items, ranks, strict=True) if owner == rank()]


def concat_shards(shards: Sequence[Sequence[T]]) -> list[T]:
    """Join the shards of all processes (see `local_shard`) in their original order."""
    return [item for shard in shards for item in shard]


def rebalance(items: Sequence[T], costs: Sequence[int]) -> list[T]:
    """Redistribute the items of all processes so that every process gets about the same total cost.

    costs: of each of this process's items, in any unit. Only items that change ranks are pickled and sent. The
    resulting order does not depend on who held an item before. All processes must call it."""
    if world_size() == 1:
        return list(items)
    owners = assign_ranks(all_gather([int(cost) for cost in costs]))
    here = rank()
    leaving = [
        (owner, at, item)
        for at, (owner, item) in enumerate(zip(owners[here], items, strict=True))
        if owner != here
    ]
    arriving = [
        (origin, at, item)
        for origin, sent in enumerate(all_gather(leaving))
        for owner, at, item in sent
        if owner == here
    ]
    staying = [(here, at, item) for at, item in enumerate(items) if owners[here][at] == here]
    return [item for _, _, item in sorted(arriving + staying, key=lambda entry: entry[:2])]


def assign_ranks(costs: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rank that should process each item: greedy longest-processing-time scheduling.

    costs: one list per process, of its own items. Items are assigned in order of falling cost to the process with the
    smallest load so far. If that does not lower the largest load, every item stays where it is."""
    load = [0] * len(costs)
    owners = [[0] * len(own) for own in costs]
    order = sorted(
        ((cost, at, origin) for origin, own in enumerate(costs) for at, cost in enumerate(own)),
        key=lambda entry: (-entry[0], *entry[1:]),
    )
    for cost, at, origin in order:
        owner = origin if load[origin] == min(load) else load.index(min(load))
        load[owner] += cost
        owners[origin][at] = owner
    if max(map(sum, costs)) <= max(load):
        return [[origin] * len(own) for origin, own in enumerate(costs)]
    return owners
