"""What only a GPU can show: fp16 and its loss scale, NCCL, and ZeRO-Offload between two memories."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo import weights

WORKER = Path(__file__).with_name("worker.py")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]
ENGINES = {
    "pytorch": {"env_type": "pytorch"},
    "ddp": {"env_type": "pytorchDDP"},
    "zero2": {"env_type": "deepspeed", "deepspeed_config": "zero2"},
    "zero2-offload": {"env_type": "deepspeed", "deepspeed_config": "zero2_offload"},
    "zero3-offload": {"env_type": "deepspeed", "deepspeed_config": "zero3_offload"},
}


def train(folder: Path, model: str = "language", **settings: object) -> list[dict]:
    """A run on the first GPU, in a process of its own -> its log."""
    usual = {"pytorch_device": "cuda", "steps": 8}
    file = folder.with_suffix(".json")
    file.write_text(json.dumps([{"folder": str(folder), "model": model, "settings": usual | settings}]))
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    environment = os.environ | place | {"PYTHONPATH": str(WORKER.parents[2])}
    done = subprocess.run([sys.executable, str(WORKER), str(file)], env=environment, capture_output=True, text=True)
    said = [error.read_text() for error in folder.glob("error-*.json")]
    assert done.returncode == 0 and not said, f"{said}\n{done.stderr[-2000:]}"
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_losses_of_the_cpu(tmp_path, engine):
    expected = train(tmp_path / "cpu", pytorch_device="cpu")
    found = train(tmp_path / "gpu", **ENGINES[engine])
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision_trains_and_exports_fp32(tmp_path, engine, precision):
    found = train(tmp_path / "half", precision=precision, **ENGINES[engine])
    expected = train(tmp_path / "fp32", **ENGINES[engine])
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=0.05)
    assert {t.dtype for t in weights.read(tmp_path / "half").values() if t.is_floating_point()} == {torch.float32}
    assert all(("loss_scale" in line) == (precision == "fp16") for line in found)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_suspended_run_goes_on(tmp_path, engine):
    expected = train(tmp_path / "whole", model="clip", **ENGINES[engine])
    folder = tmp_path / "parts"
    with pytest.raises(AssertionError, match="Suspended"):
        train(folder, model="clip", simulate_suspend=3, **ENGINES[engine])
    for file in folder.glob("error-*.json"):
        file.unlink()
    found = train(folder, model="clip", **ENGINES[engine])
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-4)
