"""Which samples make micro-batch number m of a run: a pure function of (seed, m), so any position can be returned to.

Micro-batches are numbered through the whole run, across epochs. All chance in a sample or in collating comes from a
seed of its own, (seed, epoch, sample): the batches are the same with any number of workers and after resuming, and the
model's random numbers (dropout) are not touched.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from zoo import distributed
from zoo.devices import find_device
from zoo.errors import EmptyDataset, SettingsError

from . import rng
from .log import logger
from .settings import Settings

Collate = Callable[[list[Any]], Any]
_EVALUATION = -1  # stands where a training epoch's number stands, so that evaluation draws other numbers


class EpochSampler:
    """The sample numbers of this rank's micro-batches.

    The order of an epoch is drawn from (seed, epoch). An update takes batch_size * world_size * micro samples in a row
    of it, each of its micro-batches batch_size * world_size of these, and a rank its slice: two ranks with batches of 4
    see together what one sees with 8, and an update of the same size sees the same samples however it is cut. What an
    epoch has left for no whole update is left out, unless it is all there is: then micro-batches and ranks share it
    equally, with the first samples repeated if it does not divide.

    `groups` (samples,) are numbers of what can be batched together, such as pictures of one size: then a micro-batch of
    all ranks is of one group, and what a group has left for no whole one is left out, other samples in each epoch.
    `never_full`: groups that have fewer samples than one, and how many.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        micro: int = 1,
        groups: torch.Tensor | None = None,
    ):
        self.seed, self.rank, self.world_size, self.micro = seed, rank, world_size, micro
        self.row, self.groups = batch_size * world_size, groups
        counts = groups.bincount().tolist() if groups is not None else []
        self.never_full = {group: count for group, count in enumerate(counts) if 0 < count < self.row}
        if groups is not None:
            samples = sum(count // self.row * self.row for count in counts)
            if not samples:
                raise EmptyDataset(
                    f"no group has the {self.row} samples of a batch: lower batch_size, or use one group"
                )
        self.samples = samples
        self.updates_per_epoch = max(1, samples // (batch_size * world_size * micro))
        self.per_epoch = self.updates_per_epoch * micro
        self.batch_size = min(batch_size, math.ceil(samples / (world_size * micro)))

    def order(self, epoch: int) -> torch.Tensor:
        """The sample numbers in the order of this epoch."""
        generator = torch.Generator().manual_seed(rng.seed_from(self.seed, epoch))
        if self.groups is None:
            return torch.randperm(self.samples, generator=generator)
        rows = []
        for group in range(int(self.groups.max()) + 1):
            members = (self.groups == group).nonzero()[:, 0]
            members = members[torch.randperm(len(members), generator=generator)]
            rows.append(members[: len(members) // self.row * self.row].view(-1, self.row))
        rows = torch.cat(rows)
        return rows[torch.randperm(len(rows), generator=generator)].flatten()

    def between(self, start: int, stop: int) -> Iterator[tuple[int, list[int]]]:
        """(epoch, sample numbers) of the micro-batches from `start` to before `stop`."""
        at = None
        for number in range(start, stop):
            epoch, batch = divmod(number, self.per_epoch)
            if epoch != at:
                order, at = self.order(epoch), epoch
            first = (batch * self.world_size + self.rank) * self.batch_size
            chosen = torch.arange(first, first + self.batch_size) % self.samples
            yield epoch, order[chosen].tolist()


def even_batches(
    samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[int, list[int]]]:
    """(-1, sample numbers) in order, in batches whose sizes differ by one at most: none is left with a single pair.

    With several ranks each takes an equal slice of every batch, so that they can compute together; the last samples,
    fewer than there are ranks, are left out.
    """
    rows = max(1, samples // world_size)  # each is one sample for every rank
    count = math.ceil(rows / batch_size)
    for batch in range(count):
        first, last = (rows * b // count for b in (batch, batch + 1))
        start = first * world_size + rank * (last - first)
        yield _EVALUATION, [i % samples for i in range(start, start + last - first)]


class _BatchDataset(Dataset):
    """(epoch, sample numbers) -> the collated batch. Samples and collating draw from their own seeds."""

    def __init__(self, samples: Dataset, seed: int, collate: Collate):
        self.samples, self.seed, self.collate = samples, seed, collate

    def __getitem__(self, key: tuple[int, list[int]]) -> tuple[int, Any]:
        epoch, numbers = key
        batch = []
        with rng.kept():
            for number in numbers:
                rng.seed_cpu(self.seed, epoch, number)
                batch.append(self.samples[number])
            rng.seed_cpu(self.seed, epoch, numbers[0], len(numbers))
            return epoch, self.collate(batch)


def _as_it_is(batch: Any) -> Any:
    return batch


def _prepare_worker(number: int) -> None:
    # Ctrl-C reaches the whole group of processes, and a scheduler's signal may; the trainer alone decides when to stop.
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _load(dataset: Dataset, numbers: Iterator, settings: Settings, collate: Collate | None) -> DataLoader:
    return DataLoader(
        _BatchDataset(dataset, settings.seed, collate or default_collate),
        sampler=numbers,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=settings.num_workers,
        pin_memory=find_device(settings.pytorch_device).type == "cuda",
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # else the loader draws its workers' seed from the model's random numbers
    )


class DatasetBatches:
    """The micro-batches of a data set with a length, and `groups` if it has some, see EpochSampler, with their
    `group_names`. Samples that were seen before `start` are not read again."""

    def __init__(self, dataset: Dataset, settings: Settings, collate: Collate | None):
        self.dataset, self.settings, self.collate, self.samples = dataset, settings, collate, len(dataset)
        if self.samples == 0:
            raise EmptyDataset("the training data set has no sample: check its path, split and filters")
        rank, world_size = distributed.rank(), distributed.world_size()
        if self.samples < world_size:
            raise EmptyDataset(f"the training data set has {self.samples} samples for {world_size} processes")
        sampler = EpochSampler(
            self.samples,
            settings.batch_size,
            settings.seed,
            rank=rank,
            world_size=world_size,
            micro=settings.gradient_accumulation_steps,
            groups=getattr(dataset, "groups", None),
        )
        self.sampler, self.per_epoch = sampler, sampler.per_epoch
        if sampler.never_full and rank == 0:
            names = getattr(dataset, "group_names", range(self.samples))
            told = ", ".join(f"{count} of {names[group]}" for group, count in sampler.never_full.items())
            left, what = sum(sampler.never_full.values()), "are never seen, since a batch is of one group and has"
            logger.warning("%d samples %s %d: %s; lower batch_size, or use fewer groups", left, what, sampler.row, told)

    def between(self, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """(epoch, batch) of the micro-batches from `start` to before `stop`."""
        return iter(_load(self.dataset, self.sampler.between(start, stop), self.settings, self.collate))


class LoaderBatches:
    """The micro-batches of a client's DataLoader, whose batch size and order are its own.

    Ranks take its batches in turn, unless its sampler shares the samples between them itself, as DistributedSampler
    does. A position is returned to by reading and dropping the batches before it, which is slower. Chance is seeded per
    epoch and batch, so the order comes again; augmentation does too, except in persistent workers.
    """

    samples = None

    def __init__(self, loader: DataLoader, seed: int):
        self.loader, self.seed = loader, seed
        shares = hasattr(loader.sampler, "num_replicas")
        self.rank, self.stride = (0, 1) if shares else (distributed.rank(), distributed.world_size())
        try:
            batches = len(loader)
        except TypeError:  # an iterable data set without a length
            self.per_epoch = None
            return
        self.per_epoch = batches // self.stride
        if self.per_epoch == 0:
            raise EmptyDataset(
                f"the DataLoader has {batches} batches for {self.stride} processes: check its data set, and drop_last "
                "with the batch size"
            )

    def between(self, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """(epoch, batch) of the micro-batches from `start` to before `stop`."""
        epoch = start // self.per_epoch if self.per_epoch else 0
        number = epoch * self.per_epoch if self.per_epoch else 0
        while number < stop:
            before = number
            for batch in self._share(epoch):
                if number >= start:
                    yield epoch, batch
                number += 1
                if number == stop:
                    return
            if number == before:
                raise EmptyDataset(
                    f"the DataLoader gave no batch in epoch {epoch}: it must be possible to read it again"
                )
            epoch += 1

    def _share(self, epoch: int) -> Iterator[Any]:
        """This rank's batches of an epoch, as many as every other rank has."""
        row: list[Any] = []
        for batch in self._epoch(epoch):
            row.append(batch if len(row) == self.rank else None)
            if len(row) == self.stride:
                yield row[self.rank]
                row = []

    def _epoch(self, epoch: int) -> Iterator[Any]:
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(epoch)
        with rng.kept():
            rng.seed_cpu(self.seed, epoch)
            iterator = iter(self.loader)
        number, end = 0, object()
        while True:
            with rng.kept():
                rng.seed_cpu(self.seed, epoch, number)
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch
            number += 1


def open_batches(data: Any, settings: Settings, collate: Collate | None) -> DatasetBatches | LoaderBatches:
    """A data set with a length, an iterable one, or a ready DataLoader -> its micro-batches. Raises SettingsError."""
    if isinstance(data, DataLoader):
        return LoaderBatches(data, settings.seed)
    if isinstance(data, IterableDataset):
        loader = DataLoader(data, settings.batch_size, collate_fn=collate, num_workers=settings.num_workers)
        return LoaderBatches(loader, settings.seed)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise SettingsError(f"train_dataset is a {type(data).__name__}: give a data set with a length, or a DataLoader")
    return DatasetBatches(data, settings, collate)


def evaluation_batches(data: Any, settings: Settings, collate: Collate | None) -> Iterator[Any]:
    """The batches of a data set or DataLoader, each sample once, in order, with the same chance every time."""
    if isinstance(data, IterableDataset):
        data = DataLoader(data, settings.batch_size, collate_fn=collate)
    if isinstance(data, DataLoader):
        yield from _own_batches(data)
        return
    if len(data) == 0:
        raise EmptyDataset("the validation data set has no sample: check its path, split and filters")
    rank, world_size = distributed.rank(), distributed.world_size()
    numbers = even_batches(len(data), settings.batch_size, rank=rank, world_size=world_size)
    for _, batch in _load(data, numbers, settings, collate):
        yield batch


def _own_batches(loader: DataLoader) -> Iterator[Any]:
    """This rank's of a DataLoader's batches, which ranks take in turn; the last ones, if these are not equal, are left
    out, for ranks compute together."""
    rank, stride = (0, 1) if hasattr(loader.sampler, "num_replicas") else (distributed.rank(), distributed.world_size())
    row: list[Any] = []
    for batch in loader:
        row.append(batch)
        if len(row) == stride:
            if len({length(batch) for batch in row}) == 1:
                yield row[rank]
            row = []


def length(batch: Any) -> int:
    """How many samples a batch holds: the first dimension of its first tensor; 1 if it holds none."""
    members = batch if isinstance(batch, (list, tuple)) else [batch]
    for value in batch.values() if isinstance(batch, Mapping) else members:
        if isinstance(value, torch.Tensor) and value.dim():
            return len(value)
    return 1
