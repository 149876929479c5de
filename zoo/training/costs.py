"""What a run costs: memory at its peak, the floating-point work of a sample, and how much of the device that uses."""

from __future__ import annotations

import re
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Dense bf16 and fp16 operations per second, of the makers' data sheets.
_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
_BACKWARD = 2  # a backward pass costs twice its forward; recomputed activations are not counted


class Costs:
    """Counts the operations of the first forward; reads the peak of the memory since the last reading."""

    def __init__(self, device: torch.device):
        self.device, self.per_sample = device, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def counting(self, samples: int, possible: bool) -> Iterator[None]:
        """Inside, the first time, a forward over so many samples is counted. Compiled code cannot be counted."""
        if self.per_sample is not None or not possible or threading.current_thread() is not threading.main_thread():
            yield
            return
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            yield
        self.per_sample = counter.get_total_flops() * (1 + _BACKWARD) / samples

    def read(self, samples_per_s: float, precision: str) -> dict[str, float]:
        """Peak memory of this process in GB; model TFLOP/s of one device, and of that its share of the possible (MFU),
        for the devices and precisions whose peak is known (Chowdhery et al. 2022, PaLM, appendix B)."""
        line = {"memory_gb": round(self._peak() / 1e9, 3)}
        if self.per_sample:
            done = self.per_sample * samples_per_s
            line["tflops"] = float(f"{done / 1e12:.4g}")
            peak = self._possible() if precision != "fp32" else None
            if peak:
                line["mfu"] = round(done / peak, 4)
        return line

    def _peak(self) -> float:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak

    def _possible(self) -> float | None:
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((peak for part, peak in _PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
