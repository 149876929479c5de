"""Each launcher's variables give the same place, and variables that contradict each other are named."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from zoo.errors import LaunchError
from zoo.training.place import Place, first_machine, place_in

RANK = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
# What each launcher was seen to set: torchrun of torch 2.13, deepspeed 0.19.8, accelerate 1.15.
TORCHRUN = {**RANK, "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = {**RANK, "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
ACCELERATE = {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}
ZOO = {**RANK, "LOCAL_WORLD_SIZE": "2", "ZOO_LAUNCHER": "17"}
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[1-2]",
}


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [(TORCHRUN, "torchrun"), (DEEPSPEED, "deepspeed"), (ACCELERATE, "accelerate"), (ZOO, "zoo")],
)
def test_every_launcher_gives_the_same_place(environ: dict, launcher: str):
    assert astuple(place_in(environ)) == (3, 4, 1, 2, "node1", 29500, launcher)


def test_variables_set_by_hand_mean_one_process_on_each_machine():
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert place_in(environ) == Place(1, 2, 0, 1, "node1", 29500, "other")
    assert place_in({**environ, "LOCAL_RANK": "1"}) == Place(1, 2, 1, 2, "node1", 29500, "other")


def test_a_world_of_one_needs_no_meeting_place():
    assert place_in({"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1


@pytest.mark.parametrize("environ", [{}, {"MASTER_ADDR": "node1", "MASTER_PORT": "1", "LOCAL_RANK": "0"}])
def test_a_process_without_launcher_stands_alone(environ: dict):
    assert place_in(environ) is None


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set, but RANK"),
        ({"RANK": None}, "RANK is not set, but WORLD_SIZE"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"RANK": "4"}, "rank 4 of 4"),
        ({"LOCAL_RANK": "2"}, "local rank 2 of 2"),
        ({"RANK": "one"}, "RANK='one' is no number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1' is no number"),
        ({"MASTER_PORT": ""}, "MASTER_PORT='' is no number"),
    ],
)
def test_variables_that_cannot_be_are_named(changed: dict, named: str):
    environ = {name: value for name, value in (TORCHRUN | changed).items() if value is not None}
    with pytest.raises(LaunchError, match=named):
        place_in(environ)


# --- Slurm -----------------------------------------------------------------------------------------------------------
def test_a_task_of_srun_has_a_place():
    place = place_in(SLURM)
    assert astuple(place)[:5] == (3, 4, 1, 2, "node1") and place.launcher == "slurm"


def test_all_tasks_of_a_step_agree_on_the_port_and_the_next_step_has_another():
    ports = [place_in(SLURM | {"SLURM_PROCID": rank}).master_port for rank in "0123"]
    assert len(set(ports)) == 1 and 20000 <= ports[0] < 32000
    assert place_in(SLURM | {"SLURM_STEP_ID": "1"}).master_port != ports[0]


def test_a_batch_script_and_a_single_task_stand_alone():
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}  # it is no task, and has SLURM_NTASKS
    assert place_in(batch) is None
    assert place_in(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_a_launcher_inside_a_slurm_job_decides():
    assert place_in(SLURM | TORCHRUN).launcher == "torchrun"


@pytest.mark.parametrize(("node", "count"), [("0", 4), ("1", 4), ("2", 3)])
def test_tasks_are_counted_machine_by_machine(node: str, count: int):
    environ = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": node, "SLURM_STEP_NUM_TASKS": "11"}
    assert place_in(environ).local_world_size == count


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[003-005,9],login", "node003"),
        ("node[7,9]", "node7"),
        ("rack[2-3]n[01-20]", "rack2n01"),
        ("a[1-2]-ib.lan", "a1-ib.lan"),
        ("gpu-1.lan,b[1-2]", "gpu-1.lan"),
    ],
)
def test_the_first_machine_of_slurms_list(names: str, first: str):
    assert first_machine(names) == first


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST is not set"),
        ({"SLURM_STEP_NODELIST": ",x"}, "SLURM_JOB_NODELIST=',x'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_TASKS_PER_NODE='two'"),
        ({"SLURM_PROCID": "4"}, "rank 4 of 4"),
    ],
)
def test_slurms_variables_that_cannot_be_are_named(changed: dict, named: str):
    with pytest.raises(LaunchError, match=named):
        place_in(SLURM | changed)
