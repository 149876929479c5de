"""One rank of the jobs of test_engines.py: python worker.py JOBS.json, with RANK, WORLD_SIZE, ... in the environment.

A job is {"folder", "model", "settings", ...}; they are done one after the other, so that the imports are paid once.
What a job leaves is its run folder; what it raises is written to its folder's `error-RANK.json`.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from zoo import weights
from zoo.blocks.transformer import Transformer
from zoo.errors import Suspended
from zoo.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from zoo.models.dalle_transformer import DalleTransformer, TransformerConfig
from zoo.training import Trainer

VOCAB, TOKENS = 64, 8


class Language(nn.Module):
    """Tokens (B, T) -> the loss of the next token, of a small causal transformer. `frozen`: its embedding."""

    def __init__(self, frozen: bool = False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 36).requires_grad_(not frozen)
        self.positions = nn.Parameter(0.1 * torch.randn(TOKENS, 36))
        self.transformer = Transformer(width=36, depth=2, heads=2, causal=True)
        self.register_buffer("seen", torch.zeros(()))
        self.out = nn.Linear(36, VOCAB)
        self.config = {"frozen": frozen}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.transformer.checkpointing = enable

    def forward(self, text: Tensor, image: Tensor | None = None) -> dict[str, Tensor]:
        self.seen += self.training
        x = self.embed(text) + self.positions  # (B, T, D)
        if image is not None:  # a picture that is not numbers spoils its row
            x = x + 0 * image.mean((1, 2, 3))[:, None, None]
        x = self.transformer(x)
        logits = self.out(x[:, :-1])  # (B, T - 1, V)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()), "logits": logits}


def build(name: str, part: Callable[[Callable[[], nn.Module]], nn.Module] = lambda make: make()) -> nn.Module:
    """The same weights for the same name. `part` builds what of "parts" is built by itself."""
    torch.manual_seed(0)
    if name == "parts":
        return Parts(part(partial(build, "dalle")))
    if name == "clip":
        image = VitConfig(size=16, patch=8, width=36, depth=2, heads=2)
        text = TextConfig(context=TOKENS, vocab=VOCAB, width=36, depth=2, heads=2)
        return Clip(ClipConfig(embed=20, image=image, text=text))
    if name == "linear":  # its parts under two ranks are not equal
        return Linear()
    if name.startswith("dalle"):
        return Drawing(large=name == "dalle-large")
    if name == "written":
        return Written()
    if name == "loaded":
        return loaded()
    return Language(frozen=name == "frozen")


class Drawing(DalleTransformer):
    """A DALL-E's transformer over the pairs: the captions are their own pictures."""

    def __init__(self, large: bool):
        width, depth = (512, 24) if large else (36, 4)
        sizes = dict(text_length=TOKENS, vocab=VOCAB, grid=2, heads=2, kernel=3, width=width, depth=depth)
        super().__init__(TransformerConfig(text_vocab=VOCAB, **sizes))

    def forward(self, text: Tensor, image: Tensor) -> dict[str, Tensor]:
        return super().forward(text, text[:, :4] if image.dim() == 4 else image[:, 0])


class Parts(nn.Module):
    """A frozen part that makes the codes, with a buffer, and one that is trained."""

    def __init__(self, body: Drawing):
        super().__init__()
        self.eyes, self.body = nn.Linear(3, VOCAB).requires_grad_(False), body
        self.register_buffer("turn", torch.tensor([3]))

    def forward(self, text: Tensor, image: Tensor) -> dict[str, Tensor]:
        codes = self.eyes(image.mean((2, 3))).argmax(1)[:, None] + self.turn * torch.arange(4, device=text.device)
        return self.body(text, codes[:, None] % VOCAB)


class Written(Language):
    """Writes to its parts' weights in every way: some are shared, scaled, cut off, copied, filled by row."""

    def __init__(self):
        super().__init__()
        first, second = self.transformer.blocks
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.out.weight = self.embed.weight
        nn.init.trunc_normal_(self.embed.weight, std=0.1)
        first.mlp.down.weight.data.mul_(0.3)
        with torch.no_grad():
            first.attention.qkv.weight[2:4] = 0.5
            second.attention.qkv.weight.copy_(first.attention.qkv.weight)
            second.mlp.up.weight *= first.mlp.up.weight.std() / self.positions.std()
        self.transformer.apply(lambda module: nn.init.constant_(module.bias, 0.1) if hasattr(module, "bias") else None)

    def forward(self, text: Tensor, image: Tensor | None = None) -> dict[str, Tensor]:
        found = super().forward(text, image)
        return found | {"loss": self.scale * found["loss"]}


def loaded() -> nn.Module:
    """As a published checkpoint is: built blank, then filled by `weights.load`."""
    given = {name: tensor.clone() for name, tensor in Language().state_dict().items()}
    with weights.blank():
        model = Language()
    return weights.load(model, given)


class Linear(nn.Module):
    """x (B, 8) -> the mean square of a linear map of it."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(8, 3)

    def forward(self, text: Tensor, image: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.map(text.float() / VOCAB) - 1).square().mean()}


class Paced(Trainer):
    """Takes `seconds` longer for each micro-batch, so that a test can meet it at one."""

    seconds = 0.0

    def forward_step(self, data, model, mems=None):
        time.sleep(self.seconds)
        return super().forward_step(data, model, mems)


class Pairs(Dataset):
    """Sample i: a picture (3, 16, 16) and a caption (T,), always the same; `bad` are samples that are not numbers."""

    def __init__(self, count: int = 40, bad: tuple[int, ...] = ()):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 3, 16, 16, generator=generator)
        self.tokens = torch.randint(1, VOCAB, (count, TOKENS), generator=generator)
        self.images[list(bad)] = float("nan")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"image": self.images[i], "text": self.tokens[i]}


def settings(job: dict) -> dict:
    usual = dict(
        steps=4, batch_size=2, gradient_accumulation_steps=2, lr=1e-2, eps=1e-4, log_interval=1, save_interval=2
    )
    return usual | dict(run_folder=job["folder"], progress=False, pytorch_device="cpu") | job["settings"]


RANK = int(os.environ.get("RANK", "0"))


def do(job: dict) -> None:
    """`in_pieces`: built by the trainer, or only "a part"; `full`: at that step there is no room on the disk of the
    last rank; `pace`: seconds more per micro-batch; `own_optimizer`: the client's SGD."""
    trainer, call = Paced(**settings(job)), dict(job.get("call", {}))
    trainer.seconds = job.get("pace", 0.0)
    model = weighed(trainer, job) if job.get("in_pieces") else build(job["model"])
    if call.pop("own_optimizer", False):
        call["optimizer"] = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    if "valid" in call:
        call["valid_dataset"] = Pairs(call.pop("valid"))
    if call.pop("as_loader", False):
        one_more = Subset(call["valid_dataset"], [0])
        call["valid_dataset"] = DataLoader(ConcatDataset([call["valid_dataset"], one_more]), 2)
    if "kept" in job:
        call["state"] = kept = dict(job["kept"])
    with no_room(job["full"]) if "full" in job else nullcontext():
        trainer.train(model, train_dataset=Pairs(**job.get("data", {})), **call)
    if "kept" in job:
        (Path(job["folder"]) / f"kept-{RANK}.json").write_text(json.dumps(kept))


def weighed(trainer: Trainer, job: dict) -> nn.Module:
    """The model, and in built-RANK.json the bytes that building it took at most, and that it has."""
    trainer.build(partial(nn.Linear, 1, 1))  # what the engine imports and starts is not the model's
    before, done = held(), threading.Event()
    peaks = [before]
    watch = threading.Thread(target=lambda: [peaks.append(held()) for _ in iter(lambda: done.wait(0.002), True)])
    watch.start()
    if job["in_pieces"] == "a part":
        model = build(job["model"], trainer.build)
    else:
        model = trainer.build(partial(build, job["model"]))
    done.set()
    watch.join()
    size = 4 * sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    numbers = {"took": max(peaks) - before, "size": size}
    (Path(job["folder"]) / f"built-{RANK}.json").write_text(json.dumps(numbers))
    return model


def held() -> int:
    """Bytes of memory that are this process's own. (The peak that getrusage gives counts those of libraries too, which
    the system takes and gives back as it likes.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@contextmanager
def no_room(step: int):
    write = weights.write

    def limited(state, path, **words):
        if f"step-{step:08d}" in str(path) and RANK == int(os.environ["WORLD_SIZE"]) - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(state, path, **words)

    weights.write = limited
    try:
        yield
    finally:
        weights.write = write


def main(jobs: Path) -> None:
    for job in json.loads(jobs.read_text()):
        try:
            do(job)
        except (Exception, Suspended) as error:
            Path(job["folder"]).mkdir(parents=True, exist_ok=True)
            what = {"kind": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
            (Path(job["folder"]) / f"error-{RANK}.json").write_text(json.dumps(what))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
