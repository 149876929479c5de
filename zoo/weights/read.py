"""A weights file, an index of shards or a folder -> name -> tensor, and the config that lies beside it.

What a file is, its first bytes say, not its name. Nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.errors import UnreadableWeights, UnsafePickle
from zoo.weights.mapped import MappedFile
from zoo.weights.msgpack_file import is_msgpack, read_msgpack
from zoo.weights.safetensors_file import METADATA, is_safetensors, read_header, read_safetensors
from zoo.weights.torch_files import PICKLE_START, read_legacy, read_zip

# What a folder is asked for, in this order; then for its one file of weights, safetensors before all others.
KNOWN_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "pytorch_model.fp16.bin",
    "diffusion_pytorch_model.fp16.bin",
    "flax_model.msgpack",
)
# A folder of folders, as diffusers writes it: the networks that are read, each from its own, and what says that it is.
NETWORKS = ("text_encoder", "bert", "unet", "vae", "vqvae")
FOLDER_INDEX = "model_index.json"
OTHER_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
INDEX = re.compile(r"\.index(\.\w+)?\.json$")
CONFIGS = ("config.json", "open_clip_config.json")
FOLDER_CONFIGS = {  # files of a folder of folders that say something; of one entry the last is believed
    **dict.fromkeys(NETWORKS, ("config.json",)),
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer_config.json", "special_tokens_map.json"),
}

_OTHER_KINDS = (  # how a file that holds no weights starts, and what to do about it
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; run `git lfs pull` in that folder"),
    (b"<!doctype", "a web page, perhaps a refusal or a login page that was saved as the file; fetch it again"),
    (b"<html", "a web page, perhaps a refusal or a login page that was saved as the file; fetch it again"),
    (b"<?xml", "an XML document, perhaps a refusal that was saved as the file; fetch it again"),
    (b"\x89png", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"gif8", "a picture"),
    (b"\x93numpy", "a numpy array; give its tensors names and save them with zoo.weights.write"),
    (b"\x89hdf", "an HDF5 file, as Keras writes; zoo reads safetensors and files of torch.save"),
    (b"gguf", "a GGUF file; zoo reads safetensors and files of torch.save"),
    (b"\x1f\x8b", "a gzip archive; unpack it and name the file inside"),
    (b"7z", "a 7z archive; unpack it and name the file inside"),
    (b"%pdf", "a PDF document"),
    (b"{", "a JSON file; an index of shards has a name ending in .index.json"),
)


def read(path: str | Path) -> dict[str, Tensor]:
    """Weights -> tensors on the CPU by name, read from disk when they are touched, private to this process.

    `path` is a safetensors file, a file of torch.save or torch.jit.save, a msgpack file of flax, a pickle of NumPy
    arrays, the index of a sharded checkpoint, or a folder with one of them: the first of KNOWN_NAMES, else its only
    *.safetensors, else its only file with one of OTHER_SUFFIXES. Nested dicts are flattened, {"state_dict": {"x":
    tensor}} -> "state_dict.x", and flax's to "state_dict/x"; a TorchScript archive gives parameters and buffers,
    "visual.conv1.weight"; all that is no tensor is left out. A folder as diffusers writes it gives those of its
    NETWORKS, "unet.conv_in.weight".
    Raises UnreadableWeights, and UnsafePickle for a pickle that asks for more than tensors.
    """
    if networks := _networks(Path(path)):
        return {f"{name}.{key}": tensor for name, folder in networks.items() for key, tensor in read(folder).items()}
    path = find(path)
    state = _read_shards(path) if INDEX.search(path.name) else _read_file(path)
    if not state:
        raise UnreadableWeights(f"{path} holds no tensors")
    return state


def find(path: str | Path) -> Path:
    """The file to read: `path` itself, or the one that `read` chooses in a folder. Raises UnreadableWeights."""
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise UnreadableWeights(f"there is no file or folder {path}")
        return path
    known = [path / name for name in KNOWN_NAMES if (path / name).is_file()]
    if known:
        return known[0]
    for suffixes in ((".safetensors",), OTHER_SUFFIXES):
        found = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise UnreadableWeights(f"{path} holds several files of weights: {names}. Name the one to read")
    names = sorted(file.name + "/" * file.is_dir() for file in path.iterdir())
    held = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    raise UnreadableWeights(f"{path} holds no weights, only: {held or 'nothing'}")


def _networks(path: Path) -> dict[str, Path]:
    """The networks of a folder of folders, {} for anything else; a file of weights beside them comes first where no
    FOLDER_INDEX says what the folder is."""
    if not path.is_dir() or (_holds_weights(path) and not (path / FOLDER_INDEX).is_file()):
        return {}
    return {name: path / name for name in NETWORKS if _holds_weights(path / name)}


def _holds_weights(folder: Path) -> bool:
    known = (*KNOWN_NAMES, ".safetensors", *OTHER_SUFFIXES)
    return folder.is_dir() and any(file.name.endswith(known) and file.is_file() for file in folder.iterdir())


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        if is_safetensors(start):  # first, since its length may look like the start of a pickle
            return read_safetensors(MappedFile(path))
        if start.startswith(b"PK\3\4"):
            return read_zip(MappedFile(path))
        if start.startswith(PICKLE_START):
            return read_legacy(MappedFile(path))
        if is_msgpack(start):
            return read_msgpack(MappedFile(path))
        raise UnreadableWeights(_kind(start))
    except OSError as error:
        raise UnreadableWeights(f"{path} cannot be read: {error}") from error
    except UnreadableWeights as error:
        raise UnreadableWeights(f"{path}: {error}") from error
    except UnsafePickle as error:
        raise UnsafePickle(f"{path}: {error}. Nothing of it ran; look for the same weights as safetensors") from error


def _kind(start: bytes) -> str:
    """What a file is that starts with these bytes and holds no weights, and what to do."""
    text = start.lstrip(b"\xef\xbb\xbf\r\n\t ").lower()
    if not start:
        return "an empty file; fetch it again"
    for magic, kind in _OTHER_KINDS:
        if text.startswith(magic):
            return kind
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it and name the file inside"
    return "of no format that zoo reads, which are safetensors, files of torch.save and of flax; perhaps it is damaged"


def _read_shards(path: Path) -> dict[str, Tensor]:
    """The tensors that an index names, from the shards beside it."""
    shard_of = _read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise UnreadableWeights(f"{path} is no index of shards: it has no weight_map")
    files = sorted(set(shard_of.values()))
    outside = [name for name in files if name in ("", ".", "..") or Path(name).name != name or "\\" in name]
    if outside:
        raise UnreadableWeights(f"{path} names files outside its folder: {', '.join(outside[:8])}")
    gone = [name for name in files if not (path.parent / name).is_file()]
    if gone:
        raise UnreadableWeights(f"{path} needs {len(gone)} more of its {len(files)} shards: {', '.join(gone[:8])}")
    shards = {name: _read_file(path.parent / name) for name in files}
    lost = [f"{name} in {file}" for name, file in shard_of.items() if name not in shards[file]]
    if lost:
        raise UnreadableWeights(f"{path} names {len(lost)} tensors that its shards lack: {', '.join(lost[:8])}")
    return {name: shards[file][name] for name, file in shard_of.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableWeights(f"{path} is no readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UnreadableWeights(f"{path} should hold a JSON object")
    return content


def read_config(path: str | Path) -> dict[str, Any]:
    """The config that came with weights, {} if none.

    It is the config.json or open_clip_config.json in the folder, or beside the file (an open_clip file prefers the
    latter), updated with the entry "config" in the metadata of a safetensors file, where `write` puts it.
    Of a folder as diffusers writes it, those of its folders, as {"diffusers": {"unet": {...}, ...}}.
    Raises UnreadableWeights where one is damaged.
    """
    path = Path(path)
    if _networks(path):
        return {"diffusers": {name: _read_folder_config(path / name) for name in FOLDER_CONFIGS}}
    folder = path if path.is_dir() else path.parent
    try:
        weights = find(path)
    except UnreadableWeights:
        weights = None  # a folder with a config alone, or of several parts
    preferred = CONFIGS[::-1] if weights and weights.name.startswith("open_clip") else CONFIGS
    beside = [folder / name for name in preferred if (folder / name).is_file()]
    config = _read_json(beside[0]) if beside else {}
    return config | (_written_config(weights) if weights else {})


def _read_folder_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name in FOLDER_CONFIGS[folder.name]:
        config |= _read_json(folder / name) if (folder / name).is_file() else {}
    return config


def _written_config(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            if not is_safetensors(file.read(9)):
                return {}
        metadata = read_header(path)[0].get(METADATA)
        text = metadata.get("config") if isinstance(metadata, dict) else None
        config = {} if text is None else json.loads(text)
    except (OSError, TypeError, ValueError, RecursionError, UnreadableWeights) as error:
        raise UnreadableWeights(f"{path}: a damaged config in its header: {error}") from error
    if not isinstance(config, dict):
        raise UnreadableWeights(f"{path}: the config in its header is no JSON object")
    return config
