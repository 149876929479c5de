"""What a path is, is found out by its content; what cannot be read says what it is and what to do."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from zoo.errors import UnreadableWeights
from zoo.weights import read, read_config, write


def safetensors(path, value=1.0):
    save_file({"w": torch.full((2,), value)}, path)


def pickled(path, value=1.0):
    torch.save({"w": torch.full((2,), value)}, path)


# --- folders ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "chosen, others",
    [
        ("model.safetensors", ["open_clip_model.safetensors", "pytorch_model.bin", "x.safetensors", "optimizer.pt"]),
        ("open_clip_model.safetensors", ["open_clip_pytorch_model.bin", "pytorch_model.bin", "x.safetensors"]),
        ("open_clip_pytorch_model.bin", ["pytorch_model.bin"]),
        ("diffusion_pytorch_model.safetensors", ["diffusion_pytorch_model.bin"]),
        ("pytorch_model.bin", ["training_args.bin", "x.safetensors"]),
        ("x.safetensors", ["y.bin", "z.pt"]),
        ("x.ckpt", ["config.json"]),
        ("encoder.pkl", []),
    ],
)
def test_a_folder_gives_the_first_it_knows(tmp_path, chosen, others):
    for name in others:
        (tmp_path / name).write_text("must not be opened")
    (safetensors if chosen.endswith("s") else pickled)(tmp_path / chosen, 5.0)
    assert read(tmp_path)["w"].tolist() == [5, 5]


def test_a_folder_that_leaves_a_choice_or_none_is_an_error_that_lists_it(tmp_path):
    with pytest.raises(UnreadableWeights, match="only: nothing"):
        read(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "readme.md").touch()
    with pytest.raises(UnreadableWeights, match="only: readme.md, unet/"):
        read(tmp_path)
    safetensors(tmp_path / "a.safetensors")
    safetensors(tmp_path / "b.safetensors")
    with pytest.raises(UnreadableWeights, match="several files of weights: a.safetensors, b.safetensors"):
        read(tmp_path)
    with pytest.raises(UnreadableWeights, match="no file or folder"):
        read(tmp_path / "absent.pt")


# --- shards ----------------------------------------------------------------------------------------------------------
def sharded(folder, make, name, weight_map=None):
    ending = name.split(".")[1]
    files = [f"part-{i}.{ending}" for i in (1, 2)]
    for i, file in enumerate(files):
        if make is not None:
            (save_file if ending == "safetensors" else torch.save)({f"w{i}": torch.full((1,), float(i))}, folder / file)
    weight_map = weight_map or {"w0": files[0], "w1": files[1]}
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_shards_are_joined_through_the_index_or_its_folder(tmp_path, name):
    sharded(tmp_path, save_file, name)
    for path in (tmp_path, tmp_path / name):
        assert {key: tensor.item() for key, tensor in read(path).items()} == {"w0": 0, "w1": 1}


def test_missing_shards_are_all_named(tmp_path):
    sharded(tmp_path, None, "model.safetensors.index.json")
    with pytest.raises(UnreadableWeights, match="2 more of its 2 shards: part-1.safetensors, part-2.safetensors"):
        read(tmp_path)


def test_tensors_that_no_shard_has_are_named(tmp_path):
    names = {"w0": "part-1.safetensors", "lost": "part-2.safetensors"}
    sharded(tmp_path, save_file, "model.safetensors.index.json", names)
    with pytest.raises(UnreadableWeights, match="lost in part-2.safetensors"):
        read(tmp_path)


@pytest.mark.parametrize("outside", ["../x.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\\b"])
def test_an_index_never_leaves_its_folder(tmp_path, outside):
    safetensors(tmp_path / "x.safetensors")
    (tmp_path / "inner").mkdir()
    sharded(tmp_path / "inner", save_file, "model.safetensors.index.json", {"w": outside})
    with pytest.raises(UnreadableWeights, match="outside its folder"):
        read(tmp_path / "inner")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"w": 3}}', "[" * 100_000])
def test_a_damaged_index_is_an_error(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UnreadableWeights, match="index.json"):
        read(tmp_path)


# --- what is something else ------------------------------------------------------------------------------------------
def picture(form):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, form)
    return stream.getvalue()


def tar():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        file.addfile(tarfile.TarInfo("x"))
    return stream.getvalue()


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "empty"),
        (b"\n <!DOCTYPE html><html>no</html>", "web page"),
        (b"<html><body>404</body></html>", "web page"),
        (b"version https://git-lfs.example/spec/v1\noid sha256:00\nsize 605\n", "git lfs pull"),
        (picture("PNG"), "picture"),
        (picture("JPEG"), "picture"),
        (b'{"error": "not found"}', "JSON"),
        (gzip.compress(b"x"), "gzip"),
        (tar(), "tar archive"),
        (b"\x93NUMPY\x01\x00", "numpy"),
        (b"\x80\x04N.", "bare pickle"),
        (bytes(1000), "of no format that zoo reads"),
        (b"x", "of no format that zoo reads"),
    ],
)
def test_what_is_no_weights_says_what_it_is(tmp_path, content, said):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnreadableWeights, match=said) as error:
        read(tmp_path)
    assert str(path) in str(error.value)


def test_the_name_of_a_file_does_not_decide(tmp_path):
    safetensors(tmp_path / "x.bin")
    pickled(tmp_path / "y.safetensors")
    assert read(tmp_path / "x.bin").keys() == read(tmp_path / "y.safetensors").keys() == {"w"}


def test_a_file_without_tensors_is_an_error(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(UnreadableWeights, match="holds no tensors"):
        read(tmp_path / "x.pt")


# --- configs ---------------------------------------------------------------------------------------------------------
def test_a_config_is_found_in_the_folder_or_beside_the_file(tmp_path):
    assert read_config(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_config(tmp_path) == {"a": 1}
    pickled(tmp_path / "pytorch_model.bin")
    assert read_config(tmp_path) == read_config(tmp_path / "pytorch_model.bin") == {"a": 1}


def test_an_open_clip_file_takes_the_open_clip_config(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "open_clip_config.json").write_text('{"b": 2}')
    safetensors(tmp_path / "open_clip_model.safetensors")
    assert read_config(tmp_path) == {"b": 2}
    safetensors(tmp_path / "model.safetensors")
    assert read_config(tmp_path) == {"a": 1}


def test_the_config_inside_a_file_wins_over_the_one_beside_it(tmp_path):
    (tmp_path / "config.json").write_text('{"width": 1, "depth": 2}')
    write({"w": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"config": {"width": 8}, "format": "pt"})
    assert read_config(tmp_path) == {"width": 8, "depth": 2}


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff\xfe{\x00"])
def test_a_damaged_config_is_an_error(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UnreadableWeights, match="config.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("config", ["{", "[1]"])
def test_a_damaged_config_inside_a_file_is_an_error(tmp_path, config):
    write({"w": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"config": config})
    with pytest.raises(UnreadableWeights, match="config in its header"):
        read_config(tmp_path / "x.safetensors")
