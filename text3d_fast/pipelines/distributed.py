"""Several processes on one run, started by `torchrun`: who has which particles and views, what they tell each other.

Particles are dealt out; where there are more processes than particles, those of one particle share the views of its
batch and average its gradients. All have the same settings and draw the same numbers, so the result is that of one
process but for rounding. The first process alone prints, reads and writes. In one process everything here does nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from text3d_fast.errors import ProcessLost

TIMEOUT = "TEXT3D_DISTRIBUTED_TIMEOUT"  # seconds after which a process that does not answer counts as lost
Value = TypeVar("Value")


@dataclass
class _Job:
    """rank, size: this process and how many there are; failed: it, or another one, can't go on."""

    rank: int
    size: int
    store: dist.Store
    timeout: timedelta
    failed: bool = False
    groups: dict[int, Any] = field(default_factory=dict)
    loud: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # closed, it prints again


_job: _Job | None = None


@contextlib.contextmanager
def join() -> Iterator[None]:
    """Within the block, be one of the processes that `torchrun` started. Without torchrun this does nothing.

    Gloo carries CPU tensors and objects, NCCL CUDA tensors. Each process takes the GPU of its number on its machine.
    """
    global _job
    if _job is not None or not started():
        yield
        return
    timeout = timedelta(seconds=float(os.environ.get(TIMEOUT, 600)))
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    cuda = torch.cuda.is_available()
    if cuda and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.PrefixStore("text3d", store),
                            rank=rank, world_size=size, timeout=timeout)
    _job = job = _Job(rank, size, store, timeout)
    with contextlib.ExitStack() as stack:
        stack.enter_context(job.loud)
        if rank > 0:
            silence = job.loud.enter_context(open(os.devnull, "w"))
            job.loud.enter_context(contextlib.redirect_stdout(silence))
            job.loud.enter_context(contextlib.redirect_stderr(silence))
        stack.enter_context(_termination(job))
        try:
            with giving_reasons():
                yield
        finally:
            _job = None
            with contextlib.suppress(RuntimeError):
                if rank == 0:
                    store.set("ended", "")
                elif job.failed:  # torchrun stops all when one has failed: let the first one say why
                    store.wait(["ended"], timedelta(seconds=1))
            if not job.failed:
                dist.destroy_process_group()


@contextlib.contextmanager
def _termination(job: _Job) -> Iterator[None]:
    """torchrun ends all processes by SIGTERM when one has failed; this one then says what it has to say."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number, frame) -> None:
        if not job.failed:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def giving_reasons() -> Iterator[None]:
    """An exception that leaves the block is what the other processes will say of this one."""
    try:
        yield
    except BaseException as error:
        if _job is not None and not _job.failed:
            _job.failed = True
            with contextlib.suppress(RuntimeError):
                _job.store.set(f"reason/{_job.rank}", f"{type(error).__name__}: {error}")
        raise


def speak_for_the_first() -> None:
    """After ProcessLost: if the first process is the one that was lost, one of the others prints in its place."""
    if _job is None or _job.rank == 0:
        return
    try:
        _job.store.wait(["ended"], timedelta(seconds=3))
    except RuntimeError:
        with contextlib.suppress(RuntimeError):
            if _job.store.add("speaker", 1) == 1:
                _job.loud.close()


def started() -> bool:
    """Whether `torchrun` (or its like) has started several processes, of which this is one."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


def size() -> int:
    """How many processes there are."""
    return 1 if _job is None else _job.size


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return _job is None or _job.rank == 0


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextlib.contextmanager
def _together() -> Iterator[_Job]:
    """Round everything that all processes do at once: raises ProcessLost when one of them does not."""
    job = _job
    try:
        yield job
    except RuntimeError as error:
        job.failed = True
        said = []
        with contextlib.suppress(RuntimeError):
            names = [(rank, f"reason/{rank}") for rank in range(job.size)]
            said = [f"process {rank}: {job.store.get(name).decode()}" for rank, name in names
                    if job.store.check([name])]
        reason = "; ".join(said) or "it gave no reason; torchrun's report below has its number and exit code"
        seconds = job.timeout.total_seconds()
        raise ProcessLost(f"one of the {job.size} processes has ended, or has not answered for {seconds:g} s "
                          f"({reason})") from error


def gather(value: Value, first_only: bool = False) -> list[Value]:
    """What each process has, by its number; with `first_only` the others get nothing. Tensors must be on the CPU."""
    if _job is None:
        return [value]
    with _together() as job:
        values: list[Any] = [None] * job.size
        if first_only:
            dist.gather_object(value, values if job.rank == 0 else None)
            return values if job.rank == 0 else []
        dist.all_gather_object(values, value)
        return values


def from_first(function: Callable[[], Value]) -> Value:
    """What function() returns or raises in the first process, in all of them."""
    if _job is None:
        return function()
    answer: list[Any] = [None]
    if _job.rank == 0:
        try:
            answer = [(function(), None)]
        except Exception as error:
            answer = [(None, error)]
    with _together():
        dist.broadcast_object_list(answer)
    value, error = answer[0]
    if error is not None:
        raise error
    return value


def any_of(flag: bool) -> bool:
    """Whether it is set in any process."""
    if _job is None:
        return flag
    with _together():
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def sum_gradients(parameters: Iterable[nn.Parameter], weight: float, group: Any = None) -> None:
    """Each gradient becomes the sum of `weight` times those of all processes (of the group); none counts as zero."""
    if _job is None:
        return
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]) * weight
    with _together():
        dist.all_reduce(flat, group=group)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.reshape(parameter.shape)


@dataclass(frozen=True)
class Share:
    """A process's part, `index` of `count` equal ones, of the views of one scene; `group` has the scene's gradients."""

    index: int = 0
    count: int = 1
    group: Any = None

    def rows(self, batch: int) -> slice:
        """Of a batch of views."""
        each = batch // self.count
        return slice(self.index * each, (self.index + 1) * each)

    def average(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients of means over the own views become those of the mean over all."""
        if self.count > 1:
            parameters = [parameter for entry in optimizer.param_groups for parameter in entry["params"]]
            sum_gradients(parameters, 1 / self.count, self.group)


def sharers(particles: int) -> int:
    """How many processes share the views of a particle. ValueError if the processes don't divide."""
    if size() <= particles:
        return 1
    if size() % particles:
        raise ValueError(f"particles: expected at least {size()}, the number of processes, or a divisor of it, "
                         f"got {particles}")
    return size() // particles


def dealt(particles: int) -> tuple[list[int], Share]:
    """The particles (from 1) of this process, and its share of their views. To be called by all processes at once."""
    if _job is None:
        return list(range(1, particles + 1)), Share()
    each = sharers(particles)
    mine, index = divmod(_job.rank, each)
    numbers = list(range(1 + mine, particles + 1, _job.size // each))
    if each not in _job.groups:
        with _together() as job:
            teams = range(0, job.size, each) if 1 < each < job.size else ()
            groups = [dist.new_group(list(range(first, first + each))) for first in teams]
            job.groups[each] = groups[mine] if groups else None
    return numbers, Share(index, each, _job.groups[each])


def check_alike(settings: dict[str, Any]) -> None:
    """ValueError in every process if one has another value than the first. To be called by all processes at once."""
    first, *others = gather(settings)
    for rank, other in enumerate(others, 1):
        for name in [*first, *(name for name in other if name not in first)]:
            there, here = (repr(one[name]) if name in one else "missing" for one in (first, other))
            if there != here:
                raise ValueError(f"{name}: expected the same in all {size()} processes, got {there} in process 0 and "
                                 f"{here} in process {rank}")


def check_batches(particles: int, batches: Sequence[tuple[str, int]], views: Sequence[int]) -> None:
    """ValueError, before anything is done, if the views of a stage can't be shared.

    batches: (setting, value) of each stage; views: of an object that the stage's prior wants together
    """
    each = sharers(particles)
    for (name, batch), together in zip(batches, views, strict=True):
        least = each * together
        if each > 1 and batch % least:
            groups = "" if together == 1 else f" times {together}, the prior's views of an object"
            raise ValueError(f"{name}: expected a multiple of {least}, the processes that share a particle's views"
                             f"{groups}, got {batch}; start fewer processes, or set {name}={least}")
