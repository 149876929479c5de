"""Training an autoencoder against a discriminator: a second loop, with two optimizers (Esser et al. 2021, 3.1).

    trainer = AdversarialTrainer(discriminator=PatchDiscriminator(), perceptual=lpips, steps=100_000, batch_size=8)
    trainer.train(vqgan, train_dataset=pictures, collate_fn=collate_fn)

Settings, run folder, checkpoints, resume and logs are the Trainer's. Engines: pytorch and pytorchDDP. There is none on
DeepSpeed: ZeRO shares out one model and one optimizer, and here are two of each, small ones; env_type="auto" is DDP
under its launcher too.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import distributed
from zoo.errors import SettingsError

from .batches import length
from .engines import Engine, find_engine
from .engines.base import DTYPES
from .engines.pair import Pair
from .log import logger
from .run import Run
from .settings import Settings
from .trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """What joins the model's own loss, and when. Raises SettingsError.

    `perceptual`: weight of the distance that is learnt of pictures, which is taken of the first pictures of a batch, a
    `perceptual_share` of them: less time, the same gradient on average. `adversarial`: that of the discriminator's
    verdict, times the adaptive weight, which is at most `cap`. The discriminator learns from step `start` on, and
    counts from `warm_up` steps later: one that knows nothing yet would only blur (taming-transformers, issue 93). Both
    are parts of all steps below 1. `rest`: it does not learn from updates in which its loss is below this, for it tells
    all pictures apart as it is; 0: it always learns. `lr_ratio`: its rate over the generator's.
    """

    perceptual: float = 1.0
    perceptual_share: float = 1.0
    adversarial: float = 0.8
    cap: float = 1e4
    start: float = 0.0
    warm_up: float = 0.05
    rest: float = 0.05
    lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < float("inf"):
                raise SettingsError(f"{name}={value!r} of the Adversary: give 0 or more")
        if not 0 < self.perceptual_share <= 1:
            raise SettingsError(f"perceptual_share={self.perceptual_share!r} of the Adversary: give a part, up to 1")


class AdversarialTrainer(Trainer):
    """A Trainer of a model that draws pictures again, against a `discriminator`: pictures (B, 3, H, W) -> logits of any
    shape, high for real ones.

    The model's forward gives "loss", its own, which is logged as the run's together with the perceptual part; "image",
    what it drew, (B, 3, H, W) of -1..1, and "target", what it should have; it has a `last_layer`, the weight that the
    picture comes out of. What else is in it and has no dimension is logged. `perceptual`: two batches of pictures of
    0..1 -> distances (B,), or None. The discriminator is kept in checkpoints, not in the model.safetensors.
    """

    def __init__(
        self,
        *,
        discriminator: nn.Module,
        perceptual: nn.Module | None = None,
        adversary: Adversary | None = None,
        **settings: Any,
    ):
        self.adversary = adversary or Adversary()
        about = {**settings.pop("about", {}), **{f"adversary_{k}": v for k, v in asdict(self.adversary).items()}}
        super().__init__(about=about | {"adversary_has_perceptual": perceptual is not None}, **settings)
        self.discriminator, self.perceptual = discriminator, perceptual
        self.resting = self.told = False
        if self.settings.precision == "fp16" or self.settings.compile:
            raise SettingsError(
                "precision='fp16' and compile=True do not go with a discriminator, whose gradients are weighed one by "
                "one: use precision='bf16' or 'fp32', and compile=False"
            )
        self.engine_type()

    def engine_type(self) -> type[Engine]:
        return find_engine(self.settings.env_type, replicated=True)

    def open_engine(self, engine_type: type[Engine], model: nn.Module, optimizer: Any, settings: Settings) -> Pair:
        if not hasattr(model, "last_layer"):
            raise SettingsError(f"{type(model).__name__} has no last_layer: the weight that its picture comes out of")
        generator = engine_type(model, optimizer, settings, self.forward_step)
        theirs = replace(settings, lr=generator.group_lrs[0] * self.adversary.lr_ratio)
        discriminator = engine_type(self.discriminator, None, theirs, verdict_loss)
        if self.perceptual is not None:
            self.perceptual.to(generator.device).requires_grad_(False).eval()
        return Pair(generator, discriminator)

    def _loop(self, run: Run) -> dict[str, Any]:
        """The loop. One turn is one micro-batch of both; `updated` comes once per update of the weights."""
        pair: Pair = run.engine
        if run.step >= run.total:
            return run.finished()
        pair.model.train()
        self.discriminator.train()
        start, counts = self._stages()
        with run.open_stop() as stop, run.open_log(), run.saver:
            for epoch, batch in run.micro_batches():
                self.step = run.step
                with run.costs.counting(length(batch), possible=True):
                    found = pair.forward(batch)
                loss = self._generator_loss(pair, found, self.step >= counts)
                pair.backward(run.guard.pass_on(loss))
                if self.step >= start:
                    first = pair.generator.micro == 1
                    pair.discriminate(found["target"], found["image"], self._learns if first else self._as_before)
                run.meter.add(loss)
                run.clock.samples += length(batch)
                lrs = run.schedule(run.step)
                run.look_at_layers()
                if pair.step(lrs):
                    self.updated(run, stop, epoch, lrs[0])
        return run.line

    def _stages(self) -> tuple[int, int]:
        """The steps from which the discriminator learns, and counts."""
        start, warm_up = (
            round(n * self.total) if n < 1 else round(n) for n in (self.adversary.start, self.adversary.warm_up)
        )
        return start, start + warm_up

    def _generator_loss(self, pair: Pair, found: Mapping[str, Tensor], counts: bool) -> Tensor:
        """A number that is the model's own loss and the perceptual one, and whose gradient is the verdict's too.

        Every part's gradient is found at the picture, once, and from there goes through the model together; that at
        the last layer, which the adaptive weight asks for, is one product more.
        """
        own, image, target = found["loss"], found["image"], found["target"]
        noted = {name: value for name, value in found.items() if value.dim() == 0 and name != "loss"}
        picture = image.detach().requires_grad_()
        loss, gradient = own.detach().float(), torch.zeros_like(picture)
        with self._precision(pair.device):
            if self.perceptual is not None and self.adversary.perceptual:
                few = max(1, round(self.adversary.perceptual_share * len(picture)))
                distance = self.perceptual((target[:few] + 1) / 2, (picture[:few] + 1) / 2).mean()
                gradient = self.adversary.perceptual * torch.autograd.grad(distance, picture)[0]
                loss = loss + self.adversary.perceptual * distance.detach().float()
                noted["perceptual"] = distance
            if counts and self.adversary.adversarial:
                verdict = -self.discriminator(picture).float().mean()
                (pushed,) = torch.autograd.grad(verdict, picture)
                (pulled,) = torch.autograd.grad(own, image, retain_graph=True)
                at_last = [
                    torch.autograd.grad(image, pair.model.last_layer, part, retain_graph=True)[0]
                    for part in (pulled + gradient, pushed)
                ]
                weight = adaptive_weight(*at_last, self.adversary.cap)
                gradient = gradient + self.adversary.adversarial * weight * pushed
                noted |= {"adversarial": verdict, "adaptive_weight": weight}
        pair.note(noted)
        through = own + (image * gradient).sum()
        return loss + (through - through.detach())

    def _precision(self, device: torch.device) -> Any:
        dtype = DTYPES[self.settings.precision]
        return torch.autocast(device.type, dtype) if dtype else nullcontext()

    def _learns(self, loss: Tensor) -> bool:
        """Whether the discriminator learns in an update that begins with this loss of it."""
        if not self.adversary.rest:
            return True
        self.resting = float(loss) < self.adversary.rest
        if self.resting and not self.told and distributed.rank() == 0:
            logger.warning(
                "step %d: the discriminator tells nearly all pictures apart (loss %.3f), and rests until it no longer "
                "does; the log says how often. If it is most of the time, lower adversarial, lr_ratio, or its size",
                *(self.step, float(loss)),
            )
        self.told |= self.resting
        return not self.resting

    def _as_before(self, loss: Tensor) -> bool:
        return not self.resting


def verdict_loss(batch: Mapping[str, Tensor], discriminator: nn.Module) -> dict[str, Tensor]:
    """Real and drawn pictures (B, 3, H, W) -> the hinge loss, and the mean logits of both (Lim and Ye 2017)."""
    real, drawn = (discriminator(batch[name]).float() for name in ("target", "image"))
    return {
        "loss": (F.relu(1 - real).mean() + F.relu(1 + drawn).mean()) / 2,
        "real": real.mean(),
        "drawn": drawn.mean(),
    }


def adaptive_weight(reconstruction: Tensor, verdict: Tensor, cap: float) -> Tensor:
    """How often the verdict's gradient at the last layer goes into that of the reconstruction, both averaged over the
    ranks first; at most `cap` (Esser et al. 2021, equation 7, with taming's 1e-4)."""
    ours, theirs = (distributed.average(part.float()).norm() for part in (reconstruction, verdict))
    return (ours / (theirs + 1e-4)).clamp(0, cap)
