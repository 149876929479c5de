"""What a run says: one JSON object per logged step in log.jsonl, a progress bar, TensorBoard. Only rank 0 speaks."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import distributed
from zoo.errors import DiskFull, MissingPackage, TrainingDiverged

logger = logging.getLogger("zoo.training")

PATIENCE = 20  # updates in a row without a finite loss and gradient; fp16's loss scale needs some at the start


class Meter:
    """Sums since the last logged step, kept on the device: adding to them does not wait for it.

    `loss` is the mean over all micro-batches of all ranks and updates since the last logged step; updates whose loss or
    gradient is not finite were left out by the engine, and are left out here.
    """

    def __init__(self, device: torch.device):
        self.update = torch.zeros((), device=device)  # loss of the micro-batches of the update under way
        self.micro = 0
        self.sums = torch.zeros(4, device=device)  # loss, updates, updates left out, left out in a row

    def add(self, loss: Tensor) -> None:
        """A micro-batch's loss."""
        self.update += loss.detach().float()
        self.micro += 1

    def close(self, grad_norm: Tensor) -> None:
        """An update was made of the micro-batches since the last one."""
        good = (torch.isfinite(self.update) & torch.isfinite(grad_norm)).float()
        loss = torch.nan_to_num(self.update / self.micro, 0.0, 0.0, 0.0) * good
        row = (self.sums[3] + 1) * (1 - good)
        self.sums += torch.stack([loss, good, 1 - good, row - self.sums[3]])
        self.update.zero_()
        self.micro = 0

    def read(self, step: int) -> dict[str, Any]:
        """The numbers since the last reading, which waits for the device. Raises TrainingDiverged."""
        self.check(step)
        rows = distributed.gather(self.sums[None]).tolist()
        loss, good, left_out, _ = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        self.sums[:3] = 0
        line = {"loss": loss / good if good else None}
        return line | {"left_out": round(left_out)} if left_out else line

    def check(self, step: int) -> None:
        """Raises TrainingDiverged, on every rank alike, if the last updates were all left out."""
        in_a_row = distributed.gather(self.sums[None])[:, 3].max().item()
        if in_a_row >= PATIENCE:
            raise TrainingDiverged(
                f"step {step}: {in_a_row:.0f} updates in a row were left out, for the loss or its gradient was not "
                "finite, or stood out (on_spike). Lower lr, lengthen warm_up, set clip_grad, or use precision='bf16' "
                "or 'fp32'; the checkpoints are of before"
            )

    def restart(self) -> None:
        """Forgets what was summed up."""
        self.update.zero_()
        self.sums.zero_()
        self.micro = 0

    def state(self) -> list[float]:
        return self.sums.tolist()

    def load(self, state: list[float]) -> None:
        self.restart()
        self.sums.copy_(torch.tensor(state))


class Clock:
    """Seconds of the run; of training since the last line, without pauses; and of that, of waiting for data."""

    def __init__(self) -> None:
        self.earlier, self.start = 0.0, time.perf_counter()
        self.restart()

    def go_on(self, seconds: float) -> None:
        """The run is again where it was after so many seconds."""
        self.earlier, self.start = seconds, time.perf_counter()

    def restart(self) -> None:
        self.since, self.waited, self.paused, self.samples, self.updates = time.perf_counter(), 0.0, 0.0, 0, 0

    def seconds(self) -> float:
        """Since the start of the run, without the time between an interruption and going on."""
        return self.earlier + time.perf_counter() - self.start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside is not training: evaluating, writing."""
        before = time.perf_counter()
        yield
        self.paused += time.perf_counter() - before

    def waiting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; the time it takes to get them is noted."""
        iterator, end = iter(batches), object()
        while True:
            before = time.perf_counter()
            batch = next(iterator, end)
            self.waited += time.perf_counter() - before
            if batch is end:
                return
            yield batch

    def read(self, comm_s: float | None = None) -> dict[str, float]:
        """The times since the last reading. `comm_s`: seconds per update that this rank waited for others.

        Leaves `rate`, samples per second of this rank, and `working_rate`, that without the waiting: the rank that all
        wait for has the lowest.
        """
        passed = max(time.perf_counter() - self.since - self.paused, 1e-9)
        communicated = min(passed, (comm_s or 0.0) * self.updates)
        self.rate = self.samples / passed
        self.working_rate = round(self.samples / max(passed - communicated, 1e-9), 3)
        line = {
            "samples_per_s": round(self.rate * distributed.world_size(), 3),
            "data_wait": round(self.waited / passed, 4),
            "seconds": round(self.seconds(), 3),
        }
        if comm_s is not None:
            line["comm"] = round(communicated / passed, 4)
        self.restart()
        return line


class Log:
    """Writes lines to where they are wanted; on the other ranks, nowhere."""

    def __init__(
        self, file: Path | None, total: int, done: int, *, progress: bool, tensorboard: bool, wandb: str | None = None
    ):
        speaks = distributed.rank() == 0
        self.file = self.board = self.bar = self.wandb = None
        if file is not None and speaks:
            keep_lines(file, done)
            self.file = file.open("ab", buffering=0)  # no line waits where a kill or a full disk loses it
            if tensorboard:
                self.board = _open_board(file.parent / "tensorboard", done)
            if wandb:
                self.wandb = _open_wandb(wandb, file.parent)
        if progress and speaks:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", disable=None, dynamic_ncols=True)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in (self.file, self.board, self.bar):
            if sink is not None:
                sink.close()
        if self.wandb is not None:
            self.wandb.finish()

    def tick(self) -> None:
        """An update is done."""
        if self.bar is not None:
            self.bar.update()

    def cut(self, step: int) -> None:
        """The run went back to this step: what was logged after it is taken out."""
        if self.file is not None:
            keep_lines(Path(self.file.name), step)
            self.file.seek(0, os.SEEK_END)
        if self.bar is not None:
            self.bar.n = step
            self.bar.refresh()

    def write(self, line: dict[str, Any]) -> None:
        """One logged step. Raises DiskFull."""
        if self.file is not None:
            text = memoryview((json.dumps(line) + "\n").encode())
            with self._room():
                while text:
                    text = text[self.file.write(text) :]
        if self.board is not None:
            for name, value in (line | {f"eval/{k}": v for k, v in line.get("eval", {}).items()}).items():
                if name != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, line["step"])
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in line.items() if v is not None}, step=line["step"])
        if self.bar is not None:
            shown = {k: line[k] for k in ("loss", "lr", "samples_per_s", "data_wait") if line.get(k) is not None}
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()})
        if distributed.rank() == 0:
            logger.info("%s", line)

    def sync(self) -> None:
        """Puts the lines so far on the disk: a checkpoint must not know of lines that are not. Raises DiskFull."""
        if self.file is not None:
            with self._room():
                os.fsync(self.file.fileno())

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskFull(f"no room left to write {self.file.name}: free some and run the same command") from error


def keep_lines(file: Path, last: int) -> None:
    """Cuts off the lines of steps after `last`, which a run wrote after its last checkpoint and will write again."""
    if not file.exists():
        return
    end = 0
    with file.open("r+b") as lines:
        for line in lines:
            try:
                step = json.loads(line)["step"] if line.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError):
                step = None
            if step is None or step > last:
                break
            end += len(line)
        lines.truncate(end)


def _open_board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingPackage("tensorboard=True needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=done + 1 if done else None)


def _open_wandb(project: str, folder: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingPackage("wandb=True needs the package wandb: pip install wandb") from error
    own = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()  # the same when it goes on
    return wandb.init(project=project, name=folder.name, id=own, dir=str(folder), resume="allow")
