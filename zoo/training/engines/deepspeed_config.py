"""DeepSpeed's JSON: what the run's settings decide, plus a file of `deepspeed_configs/` that says how to shard.

One number has one owner. What the Trainer decides may stand in a file only if it says the same, or "auto".
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from zoo.errors import SettingsError, nearest

from ..optimizer import DEFAULT_LR
from ..settings import Settings

DEFAULT: dict[str, Any] = {"zero_optimization": {"stage": 2}}
_PACKAGE = "zoo.deepspeed_configs"
_DEVICES = ("none", "cpu", "nvme")
_AUTO = "auto"


def read_config(given: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """A dict, the path of a JSON file, or the name of one that comes with zoo. Raises SettingsError."""
    if given is None:
        return json.loads(json.dumps(DEFAULT))
    if isinstance(given, Mapping):
        try:
            return json.loads(json.dumps(dict(given)))
        except (TypeError, ValueError) as error:
            raise SettingsError(f"deepspeed_config cannot be written as JSON: {error}") from error
    if not isinstance(given, (str, Path)):
        raise SettingsError(f"deepspeed_config is a {type(given).__name__}: give a name, a file or a dict")
    path = Path(given)
    if not path.suffix and not path.is_file():  # a run folder may be called zero3
        shipped = {file.name.removesuffix(".json"): file for file in _shipped()}
        if str(given) not in shipped:
            raise SettingsError(f"no deepspeed_config {str(given)!r}; {nearest(str(given), shipped)}; or give a file")
        path = shipped[str(given)]
    elif not path.is_file():
        raise SettingsError(f"deepspeed_config: there is no file {path}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"deepspeed_config: {path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise SettingsError(f"deepspeed_config: {path} must hold one JSON object")
    return found


def _shipped() -> Iterator[Any]:
    try:
        yield from (file for file in resources.files(_PACKAGE).iterdir() if file.name.endswith(".json"))
    except ModuleNotFoundError:
        return


def build_config(settings: Settings, world_size: int) -> dict[str, Any]:
    """What deepspeed.initialize takes. Raises SettingsError naming both values where file and settings differ."""
    config = read_config(settings.deepspeed_config)
    zero = config["zero_optimization"] = {"stage": 0} | _section(config, "zero_optimization")
    _check_sharding(zero)
    if zero["stage"] == 0 and settings.precision == "bf16":
        # Measured with 0.19.8: its bf16 optimizer without ZeRO starts Adam's count one too high, and drifts.
        zero["stage"] = 1
    owned = {
        "train_micro_batch_size_per_gpu": ("batch_size", settings.batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", settings.gradient_accumulation_steps),
        "train_batch_size": (
            "batch_size * gradient_accumulation_steps * processes",
            settings.batch_size * settings.gradient_accumulation_steps * world_size,
        ),
        "gradient_clipping": ("clip_grad", float(settings.clip_grad)),  # always written: DeepSpeed's default is 1.0
    }
    for key, (name, value) in owned.items():
        _same(f"deepspeed_config's {key}", config.get(key, _AUTO), name, value)
        config[key] = value
    for key in ("bf16", "fp16"):
        on = settings.precision == key
        given = _section(config, key)
        _same(
            f"deepspeed_config's {key}.enabled",
            given.get("enabled", _AUTO),
            f"precision={settings.precision!r}, so",
            on,
        )
        config[key] = given | {"enabled": on}
    _check_half_states(config["bf16"])
    if zero["stage"] == 0:
        config["gradient_clipping"] = 0.0  # the engine clips: 0.19.8 fails on parameters without dimensions
    _check_optimizer(_section(config, "optimizer"), settings)
    config.pop("optimizer", None)
    if config.pop("scheduler", None) is not None:
        raise SettingsError(
            f"deepspeed_config has a scheduler, and the trainer lr_decay={settings.lr_decay!r}, warm_up="
            f"{settings.warm_up!r}: take it out of the file, or pass lr_scheduler to train()"
        )
    config.setdefault("steps_per_print", 1 << 40)
    config["zero_allow_untested_optimizer"] = True
    return config


def _section(holder: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object of this name in another, empty where there is none. Raises SettingsError where it is no object."""
    found = holder.get(name)
    if found is not None and not isinstance(found, dict):
        raise SettingsError(f"deepspeed_config's {name} is {found!r}: give an object in braces")
    return found or {}


def offload_of(config: Mapping[str, Any], what: str) -> str:
    """Where the "optimizer" or the "param" go: none, cpu or nvme."""
    return (config["zero_optimization"].get(f"offload_{what}") or {}).get("device") or "none"


def half_states(config: Mapping[str, Any]) -> bool:
    """Whether master weights and the optimizer's states are in bf16."""
    return bool((config.get("bf16") or {}).get("bf16_optimizer_states"))


def prepare_nvme(config: dict[str, Any], settings: Settings, sizes: list[int], world_size: int) -> bool:
    """Whether anything goes to NVMe; then the folder is made, and blocks set so that no gradient is written.

    With 0.19.8 gradients whose parts are no multiple of 512 bytes came back from NVMe wrong, without a word (measured
    at a width of 320). Those smaller than a block stay in memory. Raises SettingsError where the folder cannot be made.
    """
    rows = [config["zero_optimization"].get(f"offload_{what}") or {} for what in ("optimizer", "param")]
    rows = [row for row in rows if row.get("device") == "nvme"]
    for row in rows:
        if row.get("nvme_path", _AUTO) == _AUTO:
            folder = Path(settings.run_folder) if settings.run_folder else Path(tempfile.gettempdir()) / "zoo"
            row["nvme_path"] = str(folder / "nvme")
        try:
            Path(row["nvme_path"]).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"nvme_path {row['nvme_path']!r} cannot be written: {error}") from error
    parts = [-(-size // world_size) for size in sizes]
    if rows and any(part % 128 for part in parts):
        aio = config.setdefault("aio", {})
        aio["block_size"] = max(aio.get("block_size", 1 << 20), 1 << (4 * max(parts)).bit_length())
    return bool(rows)


def _check_sharding(zero: dict[str, Any]) -> None:
    stage = zero["stage"]
    if stage not in (0, 1, 2, 3):
        raise SettingsError(f"deepspeed_config's zero_optimization.stage is {stage!r}: 0, 1, 2 or 3")
    if zero.pop("cpu_offload", False):  # FlagAI's example has the old word
        zero.setdefault("offload_optimizer", {"device": "cpu"})
    for what, least in (("optimizer", 1), ("param", 3)):
        row = _section(zero, f"offload_{what}")
        device = row.get("device") or "none"
        if device not in _DEVICES:
            raise SettingsError(f"deepspeed_config's offload_{what}.device is {device!r}: {', '.join(_DEVICES)}")
        needed = 3 if device == "nvme" or row.get("ratio", 1.0) != 1.0 else least
        if device != "none" and stage < needed:
            detail = f"to {device}" if row.get("ratio", 1.0) == 1.0 else f"in part, ratio={row['ratio']}"
            raise SettingsError(
                f"deepspeed_config offloads the {what} {detail} at ZeRO stage {stage}, which needs stage {needed}"
            )


def _check_half_states(bf16: Mapping[str, Any]) -> None:
    """DeepSpeed 0.19.8 takes them for a run in fp32 too, and makes an optimizer in bf16 over it."""
    asked = {key: bool(bf16.get(key)) for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states")}
    if any(asked.values()) and not (all(asked.values()) and bf16["enabled"]):
        raise SettingsError(
            f"deepspeed_config's bf16 has {json.dumps(asked)}: give both, with precision='bf16' to the trainer, "
            "or neither"
        )


def _check_optimizer(section: Mapping[str, Any], settings: Settings) -> None:
    kind = str(section.get("type", "AdamW"))
    if kind.lower() not in ("adam", "adamw"):
        raise SettingsError(
            f"deepspeed_config's optimizer is {kind!r}, and the trainer's AdamW: take it out of the file, or pass an "
            "optimizer to train()"
        )
    for name, value in _section(section, "params").items():
        if name in ("lr", "betas", "eps", "weight_decay"):
            ours = getattr(settings, name)
            ours = list(ours) if name == "betas" else DEFAULT_LR if name == "lr" and ours is None else ours
            _same(f"deepspeed_config's optimizer {name}", value, name, ours)


def _same(theirs: str, value: Any, ours: str, expected: Any) -> None:
    if value == _AUTO or value == expected:
        return
    raise SettingsError(f"{theirs} is {value!r}, and the trainer's {ours} {expected!r}: take it out of the file")
