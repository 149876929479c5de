"""The same numbers from every engine, and a run that goes on under another one. Two processes do all jobs in one go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zoo import weights
from zoo.distributed import Channel
from zoo.training.checkpoint import Checkpoint


def zero(stage: int, **offload: str) -> dict:
    """Settings of DeepSpeed at a stage; optimizer="cpu" and param="cpu" offload."""
    rows = {f"offload_{what}": {"device": device} for what, device in offload.items()}
    return {"env_type": "deepspeed", "deepspeed_config": {"zero_optimization": {"stage": stage, **rows}}}


RATIO = zero(3, optimizer="cpu")
RATIO["deepspeed_config"]["zero_optimization"]["offload_optimizer"]["ratio"] = 0.3
ENGINES = {
    "ddp": {"env_type": "pytorchDDP"},
    "zero0": zero(0),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "zero1-offload": zero(1, optimizer="cpu"),
    "zero2-offload": zero(2, optimizer="cpu"),
    "zero3-offload": zero(3, optimizer="cpu", param="cpu"),
    "zero3-ratio": RATIO,
}
FILES = ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]  # for the 12 billion's see test_sharded.py
ONE = {"env_type": "pytorch", "gradient_accumulation_steps": 4}  # one process that sees what two do, at the same time
MOVES = [  # who is suspended after two steps -> who goes on
    ("ddp", "zero3"),
    ("zero3", "ddp"),
    ("zero1", "zero2-offload"),
    ("zero3-offload", "zero1"),
    ("zero2", "zero0"),
    ("zero0", "zero3-offload"),
    ("ddp", "ddp"),
    ("zero3", "zero3"),
]
# CLIP has a parameter without dimensions.
CLIP_MOVES = [("ddp", "zero3"), ("zero3", "zero0"), ("zero0", "zero2"), ("zero2", "ddp")]
LEFT = ["ddp", "zero1", "zero3-offload"]  # of two processes, which one process goes on with; and the other way round


def row(name: str, model: str, settings: dict, **more) -> dict:
    return {"folder": name, "model": model, "settings": settings, **more}


def suspended(name: str, settings: dict) -> dict:
    return row(name, "language", settings | {"simulate_suspend": 2})


def jobs_of_one() -> list[dict]:
    clip = {"env_type": "pytorch", "batch_size": 4}  # what is told apart is a micro-batch of all processes
    return [
        row("language-one", "language", ONE),
        row("clip-one", "clip", clip),
        row("linear-one", "linear", ONE),
        row("frozen-one", "frozen", ONE),
        row("ema-one", "language", ONE | {"ema": 0.5}),
        row("bad-one", "language", ONE | {"steps": 5}, data={"bad": [7]}),
        row("own-one", "language", ONE | {"lr": None}, call={"own_optimizer": True}),
        row("static-one", "language", STATIC | {"env_type": "pytorch", "batch_size": 8}),
        row("judged-one", "language", ONE | {"eval_interval": 2}, call={"valid": 12}),
        *(suspended(f"one-to-{name}", ONE) for name in LEFT),
    ]


def jobs_of_two() -> list[dict]:
    jobs = [row(f"{model}-{name}", model, s) for model in ("language", "clip") for name, s in ENGINES.items()]
    jobs += [row(f"file-{n}", "language", {"env_type": "deepspeed", "deepspeed_config": n}) for n in FILES]
    jobs.append(row("bad-zero2-offload", "language", ENGINES["zero2-offload"] | {"steps": 5}, data={"bad": [7]}))
    some = {name: ENGINES[name] for name in ("ddp", "zero0", "zero2", "zero3-offload")}
    for name, s in some.items():
        jobs += [
            row(f"linear-{name}", "linear", s),
            row(f"frozen-{name}", "frozen", s),
            row(f"ema-{name}", "language", s | {"ema": 0.5}),
            row(f"bad-{name}", "language", s | {"steps": 5}, data={"bad": [7]}),
            row(f"judged-{name}", "language", s | {"eval_interval": 2, "layer_norms": True}, call={"valid": 12}),
            row(f"recomputed-{name}", "language", s | {"checkpoint_activations": True}),
            row(f"static-{name}", "language", s | STATIC | {"batch_size": 4}),
            row(f"loader-{name}", "language", s | {"eval_interval": 2}, call={"valid": 12, "as_loader": True}),
            row(f"bf16-{name}", "language", s | {"precision": "bf16"}),
            row(f"full-{name}", "language", s, full=4),
        ]
        if "offload" not in name:
            jobs.append(row(f"own-{name}", "language", s | {"lr": None}, call={"own_optimizer": True}))
    for first, second in MOVES:
        folder = f"{first}-to-{second}"
        jobs.append(suspended(folder, ENGINES[first]) | {"kept": {"seen": 3}})
        jobs.append(row(folder, "language", ENGINES[second], kept={"seen": 0}))
    for first, second in CLIP_MOVES:
        stop = ENGINES[first] | {"simulate_suspend": 2}
        jobs += [row(f"clip-{first}-to-{second}", "clip", s) for s in (stop, ENGINES[second])]
    jobs += [suspended(f"{name}-to-one", ENGINES[name]) for name in LEFT]
    jobs += [row(f"one-to-{name}", "language", ENGINES[name]) for name in LEFT]
    jobs += [row(f"reduce-{how}", "language", {"steps": 14, "reduce": how, **ENGINES["ddp"]}) for how in REDUCES]
    jobs.append(row("foreign", "language", zero(2, optimizer="cpu") | {"lr": None}, call={"own_optimizer": True}))
    jobs.append(row("short", "language", ENGINES["ddp"], data={"count": 1}))
    jobs.append(row("alone", "language", {"env_type": "pytorch"}))
    return jobs


STATIC = {"checkpoint_activations": True, "gradient_accumulation_steps": 1}
REDUCES = ["default", "bf16", "fp16", "powersgd:2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ranks) -> Path:
    """The folder that all runs are in: one process, then two, then one again."""
    folder = tmp_path_factory.mktemp("engines")
    phases = [(jobs_of_one(), 1), (jobs_of_two(), 2), ([row(f"{n}-to-one", "language", ONE) for n in LEFT], 1)]
    for jobs, world in phases:
        ranks.together(jobs, world, folder)
    return folder


def lines(folder: Path) -> list[dict]:
    if not (folder / "log.jsonl").exists():
        pytest.fail(f"{folder.name} did not run: {[file.read_text() for file in folder.glob('error-*')]}")
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def error(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"error-{rank}.json").read_text())


def check_same(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Losses, norms of gradients and final weights agree."""
    expected, found = lines(one), lines(other)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=tolerance), (a, b)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=10 * tolerance), (a, b)
    expected, found = weights.read(one), weights.read(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        if name != "seen":  # counts the micro-batches of a process, of which two see half
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023


# --- sameness: the table of the README -------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["language", "clip"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_losses_and_weights_of_one_process(runs, engine, model):
    check_same(runs / f"{model}-one", runs / f"{model}-{engine}")


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_deepspeed_configs_trains_to_the_same_weights(runs, name):
    check_same(runs / "language-one", runs / f"file-{name}")


SOME = ["ddp", "zero0", "zero2", "zero3-offload"]


@pytest.mark.parametrize("engine", SOME)
def test_parts_of_unequal_size_are_put_together_again(runs, engine):
    check_same(runs / "linear-one", runs / f"linear-{engine}")


@pytest.mark.parametrize("engine", SOME)
def test_what_is_frozen_stands_still_and_is_exported(runs, engine):
    check_same(runs / "frozen-one", runs / f"frozen-{engine}")


@pytest.mark.parametrize("engine", SOME)
def test_the_average_of_the_weights_follows_the_engine(runs, engine):
    check_same(runs / "ema-one", runs / f"ema-{engine}")
    away = weights.read(runs / "ema-one")["out.weight"] - weights.read(runs / "language-one")["out.weight"]
    assert away.abs().max() > 1e-3


@pytest.mark.parametrize("engine", [*SOME, "zero2-offload"])
def test_not_a_number_on_one_rank_is_left_out_by_all(runs, engine):
    expected, found = lines(runs / "bad-one"), lines(runs / f"bad-{engine}")
    left_out = [line["step"] for line in expected if "left_out" in line]
    assert len(left_out) == 1
    assert [line["step"] for line in found if "left_out" in line] == left_out
    expected, found = weights.read(runs / "bad-one"), weights.read(runs / f"bad-{engine}")
    torch.testing.assert_close(found["out.weight"], expected["out.weight"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", SOME)
def test_evaluation_says_the_same(runs, engine):
    logs = [lines(runs / f"judged-{name}") for name in ("one", engine)]
    judged = [[line["eval"]["loss"] for line in log if "eval" in line] for log in logs]
    assert len(judged[0]) == 2
    assert judged[1] == pytest.approx(judged[0], abs=1e-5)


@pytest.mark.parametrize("engine", SOME)
def test_a_ready_loader_to_judge_by_is_shared(runs, engine):
    """13 samples in batches of 2: two ranks take three each, and what is left for one of them is left out."""
    logs = [lines(runs / f"{name}-{engine}") for name in ("judged", "loader")]
    judged = [[line["eval"]["loss"] for line in log if "eval" in line] for log in logs]
    assert judged[1] == pytest.approx(judged[0], abs=1e-5)


@pytest.mark.parametrize("engine", SOME[1:])
def test_the_norms_of_layers_are_the_same(runs, engine):
    expected, found = (lines(runs / f"judged-{name}")[-1] for name in ("ddp", engine))
    assert found["layer_norms"] == pytest.approx(expected["layer_norms"], abs=1e-5)
    total = sum(norm**2 for norm in found["layer_norms"].values()) ** 0.5
    assert total == pytest.approx(found["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("engine", SOME)
def test_recomputed_activations_change_nothing(runs, engine):
    check_same(runs / "language-one", runs / f"recomputed-{engine}")
    check_same(runs / "static-one", runs / f"static-{engine}")


@pytest.mark.parametrize("engine", SOME)
def test_bf16_stays_close(runs, engine):
    expected, found = lines(runs / "language-one"), lines(runs / f"bf16-{engine}")
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=0.03)
    assert {tensor.dtype for tensor in weights.read(runs / f"bf16-{engine}").values()} == {torch.float32}


@pytest.mark.parametrize("engine", SOME[:3])
def test_a_clients_optimizer_gives_the_same(runs, engine):
    check_same(runs / "own-one", runs / f"own-{engine}")


# --- going on --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("first", "second"), MOVES)
def test_a_run_goes_on_under_another_engine(runs, first, second):
    folder = runs / f"{first}-to-{second}"
    assert error(folder)["kind"] == error(folder, 1)["kind"] == "Suspended"
    check_same(runs / "language-one", folder)
    assert json.loads((folder / "kept-1.json").read_text()) == {"seen": 3}


@pytest.mark.parametrize(("first", "second"), CLIP_MOVES)
def test_a_parameter_without_dimensions_goes_along(runs, first, second):
    check_same(runs / "clip-one", runs / f"clip-{first}-to-{second}")


@pytest.mark.parametrize("engine", LEFT)
def test_one_process_goes_on_where_two_were(runs, engine):
    check_same(runs / "language-one", runs / f"{engine}-to-one")


@pytest.mark.parametrize("engine", LEFT)
def test_two_processes_go_on_where_one_was(runs, engine):
    check_same(runs / "language-one", runs / f"one-to-{engine}")


def test_ranks_share_the_writing(runs):
    """Each tensor is written once under DDP, and every number once under ZeRO."""
    for engine in ("ddp", "zero3"):
        checkpoint = Checkpoint(runs / f"language-{engine}" / "checkpoints" / "step-00000004", Channel())
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            for name, parts in checkpoint.parts[kind].items():
                held = sum(values.numel() for _, values, _ in parts)
                assert held == checkpoint.tensor(kind, name).numel()
        sizes = [file.stat().st_size for file in checkpoint.folder.glob("*.pieces.safetensors")]
        assert len(sizes) == 2 and max(sizes) < 1.3 * min(sizes)


@pytest.mark.parametrize("engine", SOME)
def test_a_disk_that_is_full_for_one_rank_stops_all_and_spoils_nothing(runs, engine):
    folder = runs / f"full-{engine}"
    for rank in (0, 1):
        assert error(folder, rank)["kind"] == "DiskFull"
        assert "step-00000004 could not be written by rank 1" in error(folder, rank)["text"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert Checkpoint(folder / "checkpoints" / "step-00000002", Channel()).shared["step"] == 2


# --- gradients on the wire -------------------------------------------------------------------------------------------
def test_the_bytes_that_are_sent_are_as_predicted(runs):
    sizes = [tensor.shape for name, tensor in weights.read(runs / "reduce-default").items() if name != "seen"]
    numbers = sum(shape.numel() for shape in sizes)
    for how, width in (("default", 4), ("bf16", 2), ("fp16", 2)):
        assert {line["bytes_sent"] for line in lines(runs / f"reduce-{how}")} == {width * numbers}
    sent = [line["bytes_sent"] for line in lines(runs / "reduce-powersgd:2")]
    # Vogels et al. 2019: a matrix (n, m) goes as (n, r) and (m, r), if that is less than half of it; vectors go whole.
    thin = sum(min(2 * (s[0] + s[1:].numel()), s.numel()) if pays(s) else s.numel() for s in sizes)
    assert sent == [4 * numbers] * 10 + [4 * thin] * 4
    assert sent[-1] < 0.3 * sent[0]


def pays(shape: torch.Size) -> bool:
    return len(shape) > 1 and 2 * 2 * (shape[0] + shape[1:].numel()) < shape.numel()


@pytest.mark.parametrize(("how", "distance"), [("bf16", 0.01), ("fp16", 0.001), ("powersgd:2", 0.3)])
def test_gradients_sent_in_fewer_bytes_train_alike(runs, how, distance):
    expected, found = ([line["loss"] for line in lines(runs / f"reduce-{name}")] for name in ("default", how))
    assert found == pytest.approx(expected, abs=distance)
    assert found[-1] < found[0]


# --- refusals --------------------------------------------------------------------------------------------------------
def test_a_foreign_optimizer_is_not_offloaded(runs):
    for rank in (0, 1):
        assert error(runs / "foreign", rank)["kind"] == "SettingsError"
        assert "SGD" in error(runs / "foreign", rank)["text"]
        assert "optimizer=None" in error(runs / "foreign", rank)["text"]


def test_a_data_set_shorter_than_the_processes_is_refused(runs):
    assert error(runs / "short", 1) == error(runs / "short") | {"trace": error(runs / "short", 1)["trace"]}
    assert "1 samples for 2 processes" in error(runs / "short")["text"]


def test_one_engine_in_two_processes_is_refused(runs):
    assert "use env_type='pytorchDDP'" in error(runs / "alone")["text"]


# --- NVMe ------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_nvme_gives_the_same(tmp_path, ranks):
    """Its kernel takes minutes to build, once. Parts of parameters here are no multiples of its block."""
    nvme = {"env_type": "deepspeed", "deepspeed_config": "zero3_nvme"}
    ranks.together([row("one", "language", ONE)], 1, tmp_path)
    jobs = [row("nvme", "language", nvme), suspended("moved", nvme), row("moved", "language", nvme)]
    jobs += [suspended("to-ddp", nvme), row("to-ddp", "language", ENGINES["ddp"])]
    jobs += [suspended("from-ddp", ENGINES["ddp"]), row("from-ddp", "language", nvme)]
    jobs.append(row("average", "language", nvme | {"ema": 0.5}))
    ranks.together(jobs, 2, tmp_path)
    for folder in ("nvme", "moved", "to-ddp", "from-ddp"):
        check_same(tmp_path / "one", tmp_path / folder)
    assert "NVMe holds them" in error(tmp_path / "average")["text"]
