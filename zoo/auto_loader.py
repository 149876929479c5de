"""A task and a model's name -> model, tokenizer and transform.

The way of the weights: the card names a file, the hub brings it, `weights` reads it, the card's converter renames it,
and strict loading puts it into a network that was built without memory of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from zoo import catalog, hub
from zoo.errors import (
    ChecksumError,
    DownloadError,
    OfflineError,
    SettingsError,
    UnreadableWeights,
    WeightsMismatch,
    nearest,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from zoo.catalog import Card

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}
# Where Hugging Face folders keep what a model's config.json does not say: mean, std, resizing.
PREPROCESSOR_CONFIGS = ("preprocessor_config.json", "processor_config.json")
TOKENIZER = "tokenizer"  # the folder of a tokenizer's files, in a folder of several networks


class AutoLoader:
    """Finds a model by name, and loads it when it is asked for.

        loader = AutoLoader("txt_img_matching", "clip-base-p32-224")
        model, tokenizer, transform = loader.get_model(), loader.get_tokenizer(), loader.get_transform()

    task_name, model_name: as `list_models` gives them; case does not matter in a model's name.
    model_dir: downloads go to the folder `<model_dir>/<model's name>`; None: $ZOO_HOME, or the user's cache folder.
    weights: a local file or folder in any published layout, instead of a download. What lies beside it (config.json,
    open_clip_config.json, the tokenizer's files) is read too, and must agree with the card. Of a model published as
    several files, such as OpenAI's encoder.pkl and decoder.pkl, it is the folder, or any one of them. A family's name,
    "clip", takes weights of any size.
    device: None is cuda if there is one, else cpu; "auto" spreads a model that is larger than its GPU over all GPUs and
    the host's memory, to draw and to measure, see `zoo.optimization.dispatch`. dtype: a torch dtype or its name
    ("bf16"); None is the card's.

    Names, device, dtype and the presence of `weights` are checked at once; nothing is downloaded or read before it is
    asked for. Raises UnknownTask, UnknownModel, DeviceNotFound, SettingsError, UnreadableWeights.

    To hand a model on to other programs, see `zoo.converters.clip` (Hugging Face's and OpenAI's layouts).
    """

    def __init__(
        self,
        task_name: str,
        model_name: str,
        model_dir: str | Path | None = None,
        weights: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        self.card = catalog.find(task_name, model_name)
        self.folder = folder_of(self.card, model_dir)
        self.weights = Path(weights).expanduser() if weights else None
        if self.weights and not self.weights.exists():
            raise UnreadableWeights(f"weights={str(weights)!r}: there is no such file or folder")
        if not self.weights and not self.card.files:
            raise SettingsError(
                f"{self.card.name!r} is a family without weights of its own: pass weights=, or one of its models"
            )
        from zoo.devices import find_device

        self.spread = device == "auto"
        self.device = find_device(None if self.spread else device)
        self.dtype = _dtype(dtype or self.card.dtype)
        self._converted: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._model: nn.Module | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's sizes, by the card or, where it has none, by the weights."""
        return self.card.config or self._state_and_config()[1]

    def get_model(self) -> nn.Module:
        """The model in evaluation mode, the same at each call.

        Raises WeightsMismatch for weights of another model or size, UnreadableWeights, UnsafePickle, DownloadError.
        """
        if self._model is None:
            from zoo import weights

            with weights.uncollected():
                self._model = self._load()
        return self._model

    def _load(self) -> nn.Module:
        from zoo import weights

        state, config = self._state_and_config()
        with weights.blank():
            model = self.card.build(config)
        device = "cpu" if self.spread else self.device
        model = weights.load(model, state, device=device, dtype=self.dtype).eval()
        if self.spread:
            from zoo.optimization import dispatch

            model = dispatch(model)
        if self.card.task == "text2img":
            model.tokenizer = self.get_tokenizer()  # `generate` takes text
        self._converted = {}, config  # the model holds the tensors now
        return model

    def get_tokenizer(self) -> Any:
        """The model's tokenizer; None for a model without text. What lies beside `weights` comes before the card's."""
        return self.card.tokenizer(self.config, self.tokenizer_files()) if self.card.tokenizer else None

    def tokenizer_files(self) -> dict[str, Path]:
        """Where the tokenizer's files are, by name, and whatever else lies beside `weights`."""
        files = dict(self._beside_weights())
        for file in self.card.files[len(self.card.parts) or 1 :]:
            # A tokenizer.json is the whole of a transformers tokenizer.
            if file.name not in files and "tokenizer.json" not in files:
                files[file.name] = hub.fetch(file, self.folder)
        return files

    def get_transform(self) -> Any:
        """PIL picture -> tensor, preprocessed as the model expects; None for a model that takes no pictures."""
        return self.card.transform(self.config) if self.card.transform else None

    def _state_and_config(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self._converted is None:
            from zoo import weights

            if not self.weights and self.card.config_file:
                hub.fetch(self.card.config_file, self.folder)
            path = self.weights or self._fetched()
            card_says = self.card.config or {}
            # What the files say comes before what the card says, so that a difference is seen below.
            config = {**card_says, **_preprocessor_config(path), **weights.read_config(path)}
            state, config = self.card.convert(read_parts(self.card, path), config)
            for field, here, there in _differences(card_says, config):
                raise WeightsMismatch(
                    f"{path} is not {self.card.name}: {field} is {there!r} in the weights or their config, and "
                    f"{here!r} on the card. Load it under its own name, or under the family's, {self.card.family!r}"
                )
            self._converted = state, config
        return self._converted

    def _fetched(self) -> Path:
        """The card's weights on this machine; of several files, the folder that they are in."""
        file, path = fetch_weights(self.card, self.folder)
        in_parts = self.card.parts and file is self.card.files[0]
        return path.parents[len(PurePath(file.name).parts) - 1] if in_parts else path

    def _beside_weights(self) -> Iterator[tuple[str, Path]]:
        """The files beside `weights` by name, those of the card also where it names them in a folder below, and those
        of a tokenizer's folder."""
        if self.weights:
            folder = self.weights if self.weights.is_dir() else self.weights.parent
            below = {f"{TOKENIZER}/{path.name}" for path in (folder / TOKENIZER).glob("*")}
            names = {path.name for path in folder.iterdir()} | {file.name for file in self.card.files} | below
            yield from ((name, folder / name) for name in sorted(names) if (folder / name).is_file())


def folder_of(card: Card, model_dir: str | Path | None = None) -> Path:
    """Where the files of a card live on this machine; None: below `hub.home()`."""
    return (Path(model_dir).expanduser() if model_dir else hub.home()) / card.name.lower()


def fetch_weights(card: Card, folder: Path) -> tuple[hub.File, Path]:
    """The weights of a card, from those of its files that is here, or the first that can be had. Raises as `hub.fetch`.

    Of weights in several parts it gives the first, with the others beside it. Altered bytes and a forbidden network end
    it at once: another file would only hide them.
    """
    sources = (card.files[0], *card.alternatives)
    here = [file for file in sources if hub.is_here(file, folder)]
    failures = []
    for file in here[:1] or sources:
        try:
            path = hub.fetch(file, folder)
            for part in card.files[1 : len(card.parts)] if file is card.files[0] else ():
                hub.fetch(part, folder)
            return file, path
        except (OfflineError, ChecksumError):
            raise
        except DownloadError as failure:
            failures.append(failure)
    raise DownloadError("\n".join(str(failure) for failure in failures)) from failures[0]


def read_parts(card: Card, path: Path) -> dict[str, Tensor]:
    """The tensors at `path`. Where the card's weights are several files, `path` is their folder or one of them, and
    they lie there together, their union, each name after its part's prefix.

    Raises as `weights.read`, and UnreadableWeights where two parts have a tensor of one name.
    """
    from zoo import weights

    folder = path if path.is_dir() else path.parent
    parts = {folder / name: prefix for name, prefix in card.parts.items()}
    if not all(part.is_file() for part in parts) or not (path.is_dir() or path in parts):
        parts = {}
    state: dict[str, Tensor] = {}
    for part, prefix in (parts or {path: ""}).items():
        tensors = {prefix + name: tensor for name, tensor in weights.read(part).items()}
        if twice := sorted(state.keys() & tensors.keys()):
            raise UnreadableWeights(f"{part} and a file beside it both hold {', '.join(twice[:8])}")
        state |= tensors
    return state


def _preprocessor_config(path: Path) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    for name in PREPROCESSOR_CONFIGS:
        if (folder / name).is_file():
            try:
                return dict(json.loads((folder / name).read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UnreadableWeights(f"{folder / name} is no readable JSON object: {error}") from error
    return {}


def _differences(expected: Mapping, found: Mapping, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(field, expected, found) of each field in which two configs differ; a field that is not found says nothing."""
    for field, value in expected.items():
        other = found.get(field, value)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _differences(value, other, f"{prefix}{field}.")
        elif _plain(value) != _plain(other):
            yield prefix + field, value, other


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    import torch

    if isinstance(dtype, str):
        if dtype.lower() not in DTYPES:
            raise SettingsError(f"no dtype {dtype!r}; {nearest(dtype, DTYPES)}")
        return getattr(torch, DTYPES[dtype.lower()])
    if not dtype.is_floating_point:
        raise SettingsError(f"a model cannot be of {dtype}; {nearest(str(dtype), DTYPES)}")
    return dtype
