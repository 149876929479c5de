"""What a run will need, before it starts: bytes on each GPU, on each host and on disk, as numbers from numbers.

T trained parameters of P, N processes, n of them on each of M hosts. States in bytes per parameter, with Adam:

    pytorch, DDP       weights 4 P, gradients 4 T, Adam 8 T: autocast computes in bf16 over fp32 weights
    DeepSpeed, bf16    weights 2, gradients 2, in fp32 again 4 for the step, fp32 weights 4, Adam 8; by stage of ZeRO
                       (Rajbhandari et al. 2020, figure 1) optimizer (1), gradients (2) and weights (3) are divided by N

DeepSpeed's own estimators (estimate_zero2_model_states_mem_needs in runtime/zero/stage_1_and_2.py, and zero3 in
stage3.py) give the same sums; their factor of 1.5 for buffers on the host is kept. Beyond them stand activations,
communication buffers, and what a process takes by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from zoo.errors import SettingsError

from .engines.deepspeed_config import read_config

HOST_FACTOR = 1.5  # pinned memory is rounded up to powers of two, and copies exist for a moment
PROCESS = 600_000_000  # host: Python, torch and a data loader, without the model
CONTEXT = 1_000_000_000  # GPU: CUDA's context, the libraries' workspaces, holes between allocations
# The fastest first: ZeRO 1 and 2 send what DDP sends, ZeRO-3 half as much again (ZeRO, section 7); what is offloaded
# crosses the bus twice in a step. Names of deepspeed_configs/; None is a run without DeepSpeed.
KNOWN = (None, "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "dalle_12b_zero3_offload", "zero3_nvme")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a network: parameters, those that are trained, and those of its largest layer."""

    parameters: int
    trained: int
    largest: int

    def __post_init__(self) -> None:
        if not 0 < self.trained <= self.parameters or not 0 < self.largest <= self.parameters:
            raise SettingsError(f"{self}: give 1 parameter or more, of which trained and largest are a part")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a run is laid out. `batch_size` is per process and micro-batch; `stage` is None where DeepSpeed is not used.

    `ratio`: the share of the optimizer that is offloaded. `half_states`: master weights and Adam's states in bf16.
    `zero_init`: the model is built in pieces, never whole on a host. The five after it count parameters; they are
    DeepSpeed 0.19.8's defaults (runtime/zero/config.py, offload_config.py). Raises SettingsError.
    """

    engine: str = "pytorch"
    stage: int | None = None
    offload_optimizer: str | None = None
    offload_param: str | None = None
    ratio: float = 1.0
    half_states: bool = False
    zero_init: bool = False
    reduce_bucket: int = 500_000_000
    reduce_buckets: int = 1  # 2: one is filled while the other is sent
    live_parameters: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    parameter_buffers: int = 500_000_000
    precision: str = "fp32"
    batch_size: int = 1
    accumulation: int = 1
    world_size: int = 1
    per_machine: int = 1
    checkpoint_activations: bool = False
    ema: bool = False
    ema_offload: bool = False
    keep: int = 3
    gpu: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "world_size", "per_machine", "keep"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)}: give a whole number, 1 or more")
        if self.world_size % self.per_machine:
            raise SettingsError(
                f"{self.world_size} processes, {self.per_machine} per machine: give a number per machine that divides"
            )
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise SettingsError(f"precision={self.precision!r}: choose one of fp32, bf16, fp16")
        if self.stage not in (None, 0, 1, 2, 3):
            raise SettingsError(f"stage={self.stage}: ZeRO has the stages 0, 1, 2 and 3")
        if (self.offload_optimizer and not self.stage) or (self.offload_param and self.stage != 3):
            raise SettingsError("the optimizer is offloaded from ZeRO stage 1 on, parameters at stage 3 only")
        if not 0 <= self.ratio <= 1 or (self.ratio < 1 and self.stage != 3):
            raise SettingsError(f"ratio={self.ratio}: give 0 to 1, and less than 1 at ZeRO stage 3 only")

    @property
    def computing(self) -> str:
        """See activation_bytes: DeepSpeed converts the weights, the others compute in bf16 over fp32 weights."""
        return "fp32" if self.precision == "fp32" else "autocast" if self.stage is None else "half"


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes. The first five, less `never_together`, are of one process and its device; the others of one host."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    never_together: int
    host: int
    nvme: int
    checkpoint: int
    disk: int

    @property
    def device(self) -> int:
        """The peak of one process on its device."""
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.buffers - self.never_together


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one host has, in bytes: memory of each GPU (None: it has none), its own, and disk (None: not asked)."""

    gpu: int | None
    host: int
    disk: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A setup, the deepspeed_config behind it, what it needs, and what the machine lacks; None if it fits."""

    config: str | None
    setup: Setup
    need: Need
    lacks: str | None


def layout(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """A deepspeed_config, as the Trainer takes it -> the fields of a Setup that it decides. Raises SettingsError."""
    config = read_config(given)
    zero, bf16 = config.get("zero_optimization", {}), config.get("bf16", {})
    optimizer, param = (zero.get(f"offload_{what}") or {} for what in ("optimizer", "param"))
    stage = zero.get("stage", 0)
    fields = {
        "stage": stage,
        "offload_optimizer": _place(optimizer),
        "offload_param": _place(param),
        "ratio": optimizer.get("ratio"),
        "half_states": bf16.get("bf16_optimizer_states"),
        "reduce_bucket": zero.get("reduce_bucket_size"),
        "reduce_buckets": 2 if stage in (1, 2) and zero.get("overlap_comm") else 1,
        "live_parameters": zero.get("stage3_max_live_parameters"),
        "sub_group": zero.get("sub_group_size"),
        "parameter_buffers": param.get("buffer_count", 5) * param.get("buffer_size", 100_000_000),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _place(offload: Mapping[str, Any]) -> str | None:
    device = offload.get("device")
    return None if device == "none" else device


def plans(
    sizes: Sizes,
    machine: Machine,
    run: Setup,
    activations: Callable[[Setup], int],
    configs: Iterable[str | None] = KNOWN,
) -> list[Plan]:
    """Every setup for this run, in the order of `configs`. `activations`: a setup -> bytes of one micro-batch."""
    found = []
    alone = "pytorch" if run.world_size == 1 else "pytorchDDP"
    for name in configs:
        fields = {"engine": "deepspeed", **layout(name)} if name else {"engine": alone}
        setup = replace(run, gpu=machine.gpu is not None, **fields)
        what = need(sizes, setup, activations(setup))
        found.append(Plan(config=name, setup=setup, need=what, lacks=lacks(what, setup, machine)))
    return found


def lacks(need: Need, setup: Setup, machine: Machine) -> str | None:
    """What the machine has too little of, and by how much; None if the run fits."""
    if setup.half_states and setup.precision != "bf16":
        return "is for bf16"
    device = need.device if setup.gpu else 0
    pairs = (
        ("GPU", device, machine.gpu),
        ("host", need.host, machine.host),
        ("disk", need.disk + need.nvme, machine.disk),
    )
    short = [
        f"{name} short of {(asked - there) / 1e9:.1f} GB"
        for name, asked, there in pairs
        if there is not None and asked > there
    ]
    return ", ".join(short) or None


def need(sizes: Sizes, setup: Setup, activations: int) -> Need:
    """The bytes of a run; `activations` are those of one micro-batch of one process, see activation_bytes."""
    weights, gradients, optimizer = _on_device(sizes, setup)
    buffers = _buffers(sizes, setup)
    # Gradients come as activations go, and the larger of the two is the peak: where nothing is accumulated, and no
    # buffer keeps the gradients' place, as DDP's and ZeRO-3's do. A CPU's buckets fill with them.
    takes_turns = setup.accumulation == 1 and (setup.stage in (1, 2) or (not setup.stage and setup.world_size == 1))
    fresh = gradients if setup.gpu or not setup.stage else gradients + buffers
    never_together = min(fresh, activations) if takes_turns else 0
    ema = 4 * sizes.trained if setup.ema else 0
    if not (setup.offload_optimizer or setup.ema_offload):  # the average lies where the master weights lie
        optimizer += ema // (setup.world_size if setup.stage else 1)
    checkpoint = 4 * sizes.parameters + 8 * sizes.trained + ema
    device = weights + gradients + optimizer + activations + buffers - never_together
    host = setup.per_machine * PROCESS + host_states(sizes, setup)
    return Need(
        parameters=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        buffers=buffers,
        never_together=never_together,
        host=host if setup.gpu else host + setup.per_machine * device,
        nvme=_nvme(sizes, setup),
        checkpoint=checkpoint,
        disk=checkpoint * (setup.keep + 1) + 2 * 4 * sizes.parameters,  # one being written; best/ and the result
    )


def device_states(sizes: Sizes, setup: Setup) -> int:
    """Weights, gradients and optimizer of one process on its device: what DeepSpeed's estimators give."""
    return sum(_on_device(sizes, setup))


def _on_device(sizes: Sizes, setup: Setup) -> tuple[int, int, int]:
    total, trained, ways = sizes.parameters, sizes.trained, setup.world_size
    if setup.stage is None:
        return 4 * total, 4 * trained, 8 * trained
    low = 4 if setup.precision == "fp32" else 2
    single = 2 if setup.half_states else 4  # the master weights, their gradients, and each of Adam's two states
    here = (1 - setup.ratio) if setup.offload_optimizer else 1.0
    if setup.stage == 3:
        # A layer is gathered whole, in weights and gradients. ZeRO-3 keeps gradients in one precision only.
        weights = 4 * sizes.largest + (0 if setup.offload_param else low * total // ways)
        return weights, int(here * single * trained / ways), int(here * 3 * single * trained / ways)
    if setup.offload_optimizer:
        return low * total, 0, 0
    shards = ways if setup.stage else 1
    whole = 1 if setup.stage < 2 else ways  # stage 1 keeps all gradients until the step
    return low * total, low * trained // whole + single * trained // shards, 3 * single * trained // shards


def host_states(sizes: Sizes, setup: Setup) -> int:
    """Weights, gradients and optimizer on one host: offloaded, or for the moment in which each process builds them."""
    low = 4 if setup.precision == "fp32" else 2
    machines = setup.world_size // setup.per_machine
    pieces = setup.zero_init and setup.stage == 3 and setup.offload_param != "nvme"
    built = sizes.largest if pieces else sizes.parameters
    built *= 4 * setup.per_machine if setup.gpu else 0  # without a GPU the model stays where it was built
    if pieces and setup.offload_optimizer:  # until the end in fp32, where the optimizer will be
        built += 4 * sizes.parameters // machines
    average = 4 * sizes.trained * setup.per_machine / (setup.world_size if setup.stage else 1)
    held = average if setup.ema and (setup.offload_optimizer or setup.ema_offload) else 0.0
    if setup.stage is None:
        return max(built, int(held))
    single = 2 if setup.half_states else 4
    if setup.offload_optimizer == "cpu":
        held += setup.ratio * 4 * single * sizes.trained / machines
    elif setup.offload_optimizer == "nvme":  # gradients, and a piece of the states at a time
        piece = min(setup.sub_group, sizes.trained // setup.world_size)
        held += single * sizes.trained / machines + setup.per_machine * 4 * single * piece
    if setup.offload_param == "cpu":
        held += low * sizes.parameters / machines
    elif setup.offload_param == "nvme":
        held += setup.per_machine * setup.parameter_buffers * low
    return int((HOST_FACTOR if setup.gpu else 1) * max(built, held))


def _nvme(sizes: Sizes, setup: Setup) -> int:
    """Master weights, Adam's states and gradients, and weights, on one host's NVMe (ZeRO-Infinity, 2021)."""
    machines = setup.world_size // setup.per_machine
    optimizer = 16 * sizes.trained if setup.offload_optimizer == "nvme" else 0
    weights = (4 if setup.precision == "fp32" else 2) * sizes.parameters if setup.offload_param == "nvme" else 0
    return (optimizer + weights) // machines


def _buffers(sizes: Sizes, setup: Setup) -> int:
    """What DeepSpeed sends from, and what the device's libraries take. DDP's buckets are the gradients themselves."""
    own = CONTEXT if setup.gpu else 0
    if not setup.stage:
        return own
    low = 4 if setup.precision == "fp32" else 2
    # Buckets are allocated whole; on a CPU the system gives the pages that are written to.
    buckets = setup.reduce_bucket * setup.reduce_buckets
    buckets = buckets if setup.gpu else min(buckets, sizes.trained)
    gathered = min(setup.live_parameters, sizes.parameters) if setup.stage == 3 else 0
    return own + low * (buckets + gathered)
