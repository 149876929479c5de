"""Is a replacement equal, and is it faster? Both are asked of the model itself, which comes back as it was."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zoo.optimization.replacements import Undo

ROUNDS = 7  # pairs of timings
SHORTEST = 0.02  # seconds: a timing repeats the step until it takes as long
# What two correct kernels may differ by, relative to the largest number of a tensor and at least to 1.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
EXACT_TOLERANCE = 1e-5


class Measure:
    """A model and an example batch: what the plain model gave, against which replacements are held."""

    def __init__(self, model: nn.Module, batch: object):
        self.model = model
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.batch = each_tensor(batch, lambda tensor: tensor.to(self.device))
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        with untouched(model, self.device):
            self.as_trained = model.training and self._is_repeatable()
        self.plain = self._observe()
        self.tolerance = self._tolerance()
        self._plain_in_double: list[Tensor] | None = None

    def run(self) -> object:
        """The model on the batch: keywords, positions, or the one argument."""
        if isinstance(self.batch, Mapping):
            return self.model(**self.batch)
        if isinstance(self.batch, list | tuple):
            return self.model(*self.batch)
        return self.model(self.batch)

    def probe(self) -> object:
        """One run that leaves no trace."""
        with untouched(self.model, self.device):
            return self.run()

    def distance(self, make: Callable[[], Undo]) -> float:
        """The largest difference of outputs and gradients that the replacement makes. It is taken back.

        Gradients that differ in float32 are compared in float64. A ReLU's jumps where its input is zero, so rounding
        alone moves those of a plain convolutional net by 1e-2 of their size: no two float32 kernels agree on them.
        """
        with made(make):
            outputs, gradients = self._observe()
        far = furthest(self.plain[0], outputs)
        slopes = furthest(self.plain[1], gradients)
        if slopes > self.tolerance == EXACT_TOLERANCE >= far:
            with in_double(self):
                if self._plain_in_double is None:
                    self._plain_in_double = self._observe()[1]
                with made(make):
                    slopes = furthest(self._plain_in_double, self._observe()[1])
        return max(far, slopes)

    def gain(self, make: Callable[[], Undo]) -> float:
        """Time before / time after, in turns: the median of the pairs or the ratio of the fastest, whichever is less.
        The replacement is taken back."""
        times = []
        with untouched(self.model, self.device):
            with made(make):
                self._step()
            self._step()
            repeats = max(1, round(SHORTEST / self._seconds(1)))
            for _ in range(ROUNDS):
                before = self._seconds(repeats)
                with made(make):
                    times.append((before, self._seconds(repeats)))
        before, after = zip(*times, strict=True)
        return min(statistics.median(a / b for a, b in times), min(before) / min(after))

    def _seconds(self, repeats: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(repeats):
            self._step()
        self._wait()
        return (time.perf_counter() - start) / repeats

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _step(self) -> None:
        """What is timed: forward and backward in training, else forward."""
        if self.model.training and self.trainable:
            self._gradients(self.run())
        else:
            with torch.no_grad():
                self.run()

    def _is_repeatable(self) -> bool:
        """Whether training mode draws nothing at random, such as dropout, that a replacement may draw otherwise."""
        runs = []
        with torch.no_grad():
            for seed in (0, 1):
                torch.manual_seed(seed)
                runs.append(tensors(self.run()))
        return furthest(*runs) == 0

    def _observe(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs without gradients and with, then gradients; in eval mode if training mode is random."""
        with untouched(self.model, self.device), exact_products():
            if not self.as_trained:
                self.model.eval()
            torch.manual_seed(0)
            with torch.no_grad():
                seen, gradients = tensors(self.run()), []
            if self.trainable:
                torch.manual_seed(0)
                with torch.enable_grad():
                    outputs = self.run()
                    seen += [t.detach() for t in tensors(outputs)]
                    gradients = self._gradients(outputs)
            return seen, gradients

    def _gradients(self, outputs: object) -> list[Tensor]:
        """Of the loss if there is one, else of a fixed random direction of all outputs. No `.grad` is written."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        targets = [t for t in ([loss] if loss is not None else tensors(outputs)) if t.requires_grad]
        if not targets:
            return []
        fixed = torch.Generator().manual_seed(0)
        directions = [
            (torch.randn(t.shape, generator=fixed) / max(t.numel(), 1) ** 0.5).to(t) if t.dim() else torch.ones_like(t)
            for t in targets
        ]
        found = torch.autograd.grad(targets, self.trainable, directions, allow_unused=True)
        return [torch.zeros((), device=self.device) if g is None else g for g in found]

    def _tolerance(self) -> float:
        dtypes = {t.dtype for seen in self.plain for t in seen}
        if torch.is_autocast_enabled(self.device.type):
            dtypes.add(torch.get_autocast_dtype(self.device.type))
        return max(TOLERANCE.get(dtype, EXACT_TOLERANCE) for dtype in dtypes or {torch.float32})


@contextmanager
def made(make: Callable[[], Undo]) -> Iterator[None]:
    """The replacement, inside only."""
    undo = make()
    try:
        yield
    finally:
        undo()


@contextmanager
def in_double(measure: Measure) -> Iterator[None]:
    """The model and the batch in float64. The parameters stay the same objects and get their own numbers back."""
    parameters, batch = [(p, p.data) for p in measure.model.parameters()], measure.batch
    with untouched(measure.model, measure.device):
        try:
            for p, data in parameters:
                p.data = doubled(data)
            for module in measure.model.modules():
                module._buffers.update({name: doubled(b) for name, b in module._buffers.items()})
            measure.batch = each_tensor(batch, doubled)
            yield
        finally:
            measure.batch = batch
            for p, data in parameters:
                p.data = data


def doubled(value: Tensor | None) -> Tensor | None:
    """In float64, if it is of real numbers."""
    return value.double() if value is not None and value.is_floating_point() else value


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards, random numbers, buffers and training modes are what they were."""
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    modes = [(m, m.training) for m in model.modules()]
    with torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
            for module, training in modes:
                module.training = training


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products and convolutions in whole float32: TF32 differs from itself by more than the tolerance."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def each_tensor(batch: object, change: Callable[[Tensor], Tensor]) -> object:
    """The batch with every tensor changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: each_tensor(value, change) for name, value in batch.items()}
    return type(batch)(each_tensor(value, change) for value in batch) if isinstance(batch, list | tuple) else batch


def tensors(outputs: object) -> list[Tensor]:
    """All tensors of nested mappings and sequences, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [t for value in values for t in tensors(value)] if isinstance(outputs, Mapping | list | tuple) else []


def furthest(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor and at least to 1; inf if shapes differ."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return float("inf")
    largest = 0.0
    for a, b in zip(before, after, strict=True):
        a, b = a.double(), b.double()
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            return float("inf")
        a, b = a[finite], b[finite]
        if a.numel():
            largest = max(largest, ((a - b).abs().max() / a.abs().max().clamp(min=1)).item())
    return largest
