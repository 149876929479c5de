"""What a run will need: equal to DeepSpeed's estimators, to hand counts, and near what real runs take."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from zoo.errors import SettingsError
from zoo.training.memory import KNOWN, Machine, Setup, Sizes, device_states, host_states, lacks, layout, need, plans

ROOT = Path(__file__).parent.parent.parent
DALLE = Sizes(parameters=12_295_601_920, trained=12_295_601_920, largest=97_517_568)
SMALL = Sizes(parameters=151_277_313, trained=151_277_313, largest=25_296_896)
GIB = 2**30


def bf16(stage: int, **more: object) -> Setup:
    return Setup(engine="deepspeed", stage=stage, precision="bf16", **more)


# --- DeepSpeed's own estimators --------------------------------------------------------------------------------------
@pytest.mark.parametrize("sizes", [DALLE, SMALL], ids=["dalle", "clip"])
@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_states_are_those_of_deepspeeds_estimators(sizes: Sizes, gpus: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    spread = dict(world_size=gpus, per_machine=gpus)

    def same(setup: Setup, host: int, device: int) -> None:
        assert device_states(sizes, setup) == pytest.approx(device, abs=8)  # a share is rounded down, here by parts
        assert host_states(sizes, setup) == pytest.approx(host, abs=8)

    for offload in (None, "cpu"):
        same(bf16(2, offload_optimizer=offload, **spread), *zero2(sizes.parameters, gpus, 1, bool(offload)))
        for param in {None, offload}:
            for init in (True, False):
                setup = bf16(3, offload_optimizer=offload, offload_param=param, zero_init=init, **spread)
                theirs = zero3(sizes.parameters, sizes.largest, gpus, 1, bool(offload), bool(param), init)
                same(setup, *theirs[:2])


def test_on_several_machines_each_host_holds_its_part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3

    setup = bf16(3, offload_optimizer="cpu", offload_param="cpu", zero_init=True, world_size=16, per_machine=8)
    host, device, _ = zero3(DALLE.parameters, DALLE.largest, 8, 2)
    assert (host_states(DALLE, setup), device_states(DALLE, setup)) == (host, device)


# --- the arithmetic --------------------------------------------------------------------------------------------------
def test_plain_training_takes_sixteen_bytes_a_parameter():
    for precision in ("fp32", "bf16"):
        assert device_states(SMALL, Setup(precision=precision)) == 16 * SMALL.parameters


def test_what_is_frozen_has_no_gradient_and_no_optimizer():
    half = replace(SMALL, trained=SMALL.parameters // 2)
    saved = SMALL.parameters - half.trained
    assert device_states(half, Setup()) == device_states(SMALL, Setup()) - 12 * saved
    assert device_states(half, bf16(2)) == device_states(SMALL, bf16(2)) - 18 * saved


def test_each_stage_shares_out_more():
    states = [device_states(SMALL, bf16(stage, world_size=8, per_machine=8)) for stage in range(4)]
    assert states == sorted(states, reverse=True) and len(set(states)) == 4
    by_all = [device_states(SMALL, bf16(stage)) for stage in range(3)]
    assert len(set(by_all)) == 1  # alone there is nobody to share with


def test_partial_offload_lies_between_none_and_all():
    none, half, all_ = (
        bf16(3, offload_optimizer=place, ratio=ratio, zero_init=True)
        for place, ratio in ((None, 1.0), ("cpu", 0.5), ("cpu", 1.0))
    )
    device = [device_states(DALLE, setup) for setup in (none, half, all_)]
    assert device[1] == pytest.approx((device[0] + device[2]) / 2)
    assert 2 * host_states(DALLE, half) == pytest.approx(host_states(DALLE, all_))


def test_gradients_and_activations_count_once_only_where_they_take_turns():
    act = 10**9
    alone = need(SMALL, Setup(gpu=False), act)
    assert alone.device == 12 * SMALL.parameters + max(4 * SMALL.parameters, act)
    for setup in (Setup(accumulation=2, gpu=False), Setup(world_size=2, per_machine=2, gpu=False)):
        assert need(SMALL, setup, act).device == 16 * SMALL.parameters + act
    for stage, turns in ((1, True), (2, True), (3, False)):
        one, two = (need(SMALL, bf16(stage, accumulation=n), act) for n in (1, 2))
        assert (two.device - one.device) == (min(act, one.gradients) if turns else 0)


def test_without_a_gpu_everything_is_the_hosts():
    setup = Setup(world_size=2, per_machine=2, gpu=False)
    small, large = need(SMALL, setup, 0), need(SMALL, setup, 10**9)
    assert large.host - small.host == 2 * 10**9
    assert small.host > 2 * small.device


def test_an_average_of_the_weights_lies_where_the_masters_lie():
    for setup in (Setup(), bf16(2, world_size=4, per_machine=4)):
        more = need(SMALL, replace(setup, ema=True), 0).device - need(SMALL, setup, 0).device
        assert more == 4 * SMALL.trained // setup.world_size
    offloaded = bf16(2, offload_optimizer="cpu")
    averaged = replace(offloaded, ema=True)
    assert need(SMALL, averaged, 0).device == need(SMALL, offloaded, 0).device
    assert host_states(SMALL, averaged) > host_states(SMALL, offloaded)


def test_an_average_that_is_offloaded_is_the_hosts_whatever_the_engine():
    spread = dict(world_size=8, per_machine=4)
    for setup, share in ((Setup(**spread), 4), (bf16(0, **spread), 4), (bf16(2, **spread), 1 / 2)):
        without, kept, moved = (need(DALLE, replace(setup, **words), 0) for words in (
            {}, {"ema": True}, {"ema": True, "ema_offload": True},
        ))  # fmt: skip
        assert moved.device == without.device < kept.device and moved.checkpoint == kept.checkpoint
        # Without a GPU nothing is built elsewhere first, and the host holds what it would have held.
        bare = replace(setup, gpu=False, ema=True)
        on_host = host_states(DALLE, replace(bare, ema_offload=True)) - host_states(DALLE, bare)
        assert on_host == 4 * DALLE.trained * share
        assert need(DALLE, replace(bare, ema_offload=True), 0).host == need(DALLE, bare, 0).host
    # A host with a GPU has room for it since building the model took as much; not where that was done in pieces.
    pieces = bf16(3, zero_init=True, **spread)
    assert need(DALLE, replace(pieces, ema=True), 0).host < 4 * DALLE.trained / 2
    assert need(DALLE, replace(pieces, ema=True, ema_offload=True), 0).host > 4 * DALLE.trained / 2


def test_nvme_moves_the_states_to_the_disk():
    setup = bf16(3, offload_optimizer="nvme", offload_param="nvme", zero_init=True)
    assert need(DALLE, setup, 0).nvme == 18 * DALLE.parameters
    assert host_states(DALLE, setup) < host_states(DALLE, replace(setup, offload_optimizer="cpu"))


def test_the_disk_holds_the_checkpoints_and_the_one_being_written():
    two, three = (need(SMALL, Setup(keep=keep), 0) for keep in (2, 3))
    assert two.checkpoint == 12 * SMALL.parameters
    assert three.disk - two.disk == two.checkpoint and two.disk > 3 * two.checkpoint


def test_a_model_built_in_pieces_is_never_whole_on_a_host():
    """At stage 3 only, and not from NVMe. Pieces lie in fp32 where an offloaded optimizer will be."""
    whole = [host_states(DALLE, bf16(stage)) for stage in (2, 3)]
    pieces = [host_states(DALLE, bf16(stage, zero_init=True)) for stage in (2, 3)]
    assert whole[0] == whole[1] == pieces[0] == int(1.5 * 4 * DALLE.parameters)
    assert pieces[1] == int(1.5 * 4 * DALLE.largest)
    little = bf16(3, offload_optimizer="cpu", ratio=0.1, zero_init=True)
    assert host_states(DALLE, little) == int(1.5 * 4 * (DALLE.largest + DALLE.parameters))


def test_states_in_bf16_are_half_and_only_for_bf16():
    setup = bf16(3, offload_optimizer="cpu", ratio=0.6, zero_init=True)
    half = replace(setup, half_states=True)
    assert 2 * host_states(DALLE, half) == pytest.approx(host_states(DALLE, setup))
    # reference: 2 bytes a parameter, and of 8 more two fifths; the rest on the host
    assert device_states(DALLE, half) == pytest.approx((2 + 0.4 * 8) * DALLE.parameters + 4 * DALLE.largest)
    machine = Machine(gpu=200 * GIB, host=500 * GIB)
    assert lacks(need(DALLE, half, 0), half, machine) is None
    single = replace(half, precision="fp32")
    assert lacks(need(DALLE, single, 0), single, machine) == "is for bf16"


# --- setups ----------------------------------------------------------------------------------------------------------
def test_every_config_that_ships_is_known_and_read():
    files = {path.stem: json.loads(path.read_text()) for path in (ROOT / "deepspeed_configs").glob("*.json")}
    assert set(files) == {name for name in KNOWN if name}
    for name, file in files.items():
        zero, fields = file["zero_optimization"], layout(name)
        assert fields["stage"] == zero["stage"]
        for what in ("optimizer", "param"):
            assert fields.get(f"offload_{what}") == zero.get(f"offload_{what}", {}).get("device")
        if "reduce_bucket_size" in zero:
            assert fields["reduce_bucket"] == zero["reduce_bucket_size"]


def test_the_first_that_fits_is_the_fastest_that_fits():
    def first(gpu: float, host: float) -> str | None:
        machine = Machine(gpu=int(gpu * GIB), host=int(host * GIB))
        found = plans(DALLE, machine, Setup(precision="bf16"), lambda setup: GIB)
        assert [plan.config for plan in found] == list(KNOWN)
        return next((plan.config or plan.setup.engine for plan in found if plan.lacks is None), "none")

    assert [first(400, 600), first(80, 600), first(16, 600), first(16, 128), first(8, 8)] == [
        "pytorch",
        "zero2_offload",
        "zero3_offload",
        "zero3_nvme",
        "none",
    ]


def test_what_is_short_is_named():
    setup = Setup(gpu=True)
    what = need(SMALL, setup, 0)
    enough = dict(gpu=what.device, host=what.host, disk=what.disk)
    assert lacks(what, setup, Machine(**enough)) is None
    for name in enough:
        said = lacks(what, setup, Machine(**enough | {name: enough[name] - 10**8}))
        assert said == f"{name if name != 'gpu' else 'GPU'} short of 0.1 GB"


@pytest.mark.parametrize(
    "wrong",
    [
        dict(batch_size=0),
        dict(world_size=0),
        dict(accumulation=0),
        dict(world_size=8, per_machine=3),
        dict(precision="fp8"),
        dict(stage=4),
        dict(offload_optimizer="cpu"),
        dict(stage=2, offload_param="cpu"),
        dict(stage=2, offload_optimizer="cpu", ratio=0.5),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(wrong: dict):
    with pytest.raises(SettingsError):
        Setup(**wrong)


def test_sizes_that_cannot_be_are_refused():
    for wrong in (dict(parameters=0), dict(trained=0), dict(trained=SMALL.parameters + 1), dict(largest=0)):
        with pytest.raises(SettingsError):
            Sizes(**asdict(SMALL) | wrong)
