from __future__ import annotations

import pytest
import torch

from zoo import weights
from zoo.cli import main
from zoo.data import open_dataset, unit_transform
from zoo.data.codes import (
    CodesDataset,
    Texts,
    check_codes,
    check_contexts,
    check_embeddings,
    check_moments,
    codes_collate,
    encode_dataset,
    fingerprint,
)
from zoo.errors import DataError
from zoo.models.dvae import Dvae, DvaeConfig


@pytest.fixture
def model() -> Dvae:
    torch.manual_seed(0)
    return Dvae(DvaeConfig(size=64, vocab=16, hidden=8, stem=8, blocks=1)).eval()


class Few(torch.utils.data.Dataset):
    """The first samples of another data set."""

    def __init__(self, pairs, n):
        self.pairs, self.n = pairs, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.pairs[i]


def test_codes_stand_in_place_of_the_pictures_with_the_same_captions(model):
    pictures = Few(open_dataset("emoji", "test", unit_transform(64)), 5)
    codes = encode_dataset(pictures, {"codes": model.encode}, batch_size=2, progress=False)["codes"]
    assert codes.dtype == torch.int32 and codes.shape == (5, 8, 8)
    samples = CodesDataset(Few(open_dataset("emoji", "test"), 5), codes)
    for i in range(5):
        image, caption = pictures[i]
        assert samples[i][1] == caption
        assert torch.equal(samples[i][0], model.encode(image[None])[0])
    batch = codes_collate([(samples[i][0], torch.tensor([i])) for i in range(3)])
    assert batch["codes"].dtype == torch.int64 and batch["codes"].shape == (3, 8, 8)
    assert batch["text"].tolist() == [[0], [1], [2]]


def test_codes_of_another_data_set_or_tokenizer_are_refused(model):
    pictures = Few(open_dataset("emoji", "test", unit_transform(64)), 3)
    codes, about = torch.zeros(3, 8, 8, dtype=torch.int32), {"tokenizer": fingerprint(model)}
    assert check_codes({"codes": codes}, about, pictures, model) is codes
    with pytest.raises(DataError, match="2 pictures"):
        check_codes({"codes": codes[:2]}, about, pictures, model)
    with pytest.raises(DataError, match="zoo data encode"):
        check_codes({"other": codes}, about, pictures, model)
    with torch.no_grad():
        model.encoder.blocks["input"].bias[0] += 1e-3
    with pytest.raises(DataError, match="another image tokenizer"):
        check_codes({"codes": codes}, about, pictures, model)
    with pytest.raises(DataError, match="2 codes for 3"):
        CodesDataset(pictures, codes[:2])


def test_each_encode_says_something_of_every_picture_in_order(model):
    pictures = Few(open_dataset("emoji", "test", unit_transform(64)), 5)

    def colour(image: torch.Tensor) -> torch.Tensor:
        return image.double().mean((2, 3))

    found = encode_dataset(pictures, {"codes": model.encode, "embeddings": colour}, batch_size=2, progress=False)
    assert found.keys() == {"codes", "embeddings"}
    assert found["codes"].dtype == torch.int32 and found["embeddings"].dtype == torch.float32
    image = torch.stack([pictures[i][0] for i in range(5)])
    assert torch.equal(found["codes"].long(), model.encode(image))
    assert torch.equal(found["embeddings"], image.double().mean((2, 3)).float())
    with pytest.raises(DataError, match="the data set is empty"):
        encode_dataset(Few(pictures, 0), {"codes": model.encode}, progress=False)


def test_embeddings_of_another_matcher_or_of_other_pictures_are_refused():
    matcher, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    codes, embeddings, about = torch.zeros(3, 8, 8), torch.zeros(3, 2), {"matcher": fingerprint(matcher)}
    assert check_embeddings({"embeddings": embeddings}, about, codes, matcher) is embeddings
    wrong = [
        ({"codes": codes}, about, matcher),  # there are none
        ({"embeddings": embeddings[:2]}, about, matcher),
        ({"embeddings": embeddings}, {}, matcher),  # it does not say by which
        ({"embeddings": embeddings}, about, other),
    ]
    for state, says, asked in wrong:
        with pytest.raises(DataError, match="no embeddings by this CLIP.*--matcher NAME"):
            check_embeddings(state, says, codes, asked)


def test_moments_of_another_vae_or_of_other_pictures_are_refused():
    vae, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    moments, about = torch.zeros(3, 8, 4, 4), {"tokenizer": fingerprint(vae)}
    assert check_moments({"moments": moments}, about, range(3), vae) is moments
    with pytest.raises(DataError, match="moments of 3 pictures, and the data set has 4"):
        check_moments({"moments": moments}, about, range(4), vae)
    with pytest.raises(DataError, match="these moments were made with another"):
        check_moments({"moments": moments}, about, range(3), other)
    with pytest.raises(DataError, match="no moments in this file, but codes"):
        check_moments({"codes": moments}, about, range(3), vae)


def test_contexts_are_by_this_text_tower_of_these_captions_or_refused():
    text, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    contexts, about = torch.zeros(3, 9, 4), {"text": fingerprint(text), "language": "en"}
    assert check_contexts({"contexts": contexts}, about, "en", text) is contexts
    assert check_contexts({"moments": contexts}, about, "en", text) is None  # a file may have none
    with pytest.raises(DataError, match="by another text tower"):
        check_contexts({"contexts": contexts}, about, "en", other)
    for language, said in (("both", "captions in en, not of both"), (None, "captions in en, not of a table")):
        with pytest.raises(DataError, match=said):
            check_contexts({"contexts": contexts}, about, language, text)


def test_captions_are_encoded_too_and_pictures_are_not_asked_for():
    pairs = [(None, torch.tensor([i, i + 1])) for i in range(5)]
    found = encode_dataset(
        pairs, {"contexts": lambda tokens: tokens.double() / 2}, batch_size=2, progress=False, part=1
    )
    assert found["contexts"].tolist() == [[i / 2, (i + 1) / 2] for i in range(5)]
    texts = Texts(pairs)
    assert len(texts) == 5 and texts[3].tolist() == [3, 4]


def test_the_command_writes_what_training_reads(model, tmp_path, capsys):
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config = {"size": 64, "vocab": 16, "hidden": 8, "stem": 8, "blocks": 1}
    weights.write(state, tmp_path / "model.safetensors", metadata={"config": config})
    (tmp_path / "img").mkdir()
    pairs = open_dataset("emoji", "test")
    lines = ["title\tfilepath"]
    for i in range(3):
        pairs[i][0].save(tmp_path / f"img/{i}.png")
        lines.append(f"caption {i}\t{i}.png")
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    words = ["--pairs", str(tmp_path / "pairs.tsv"), "--pictures", str(tmp_path / "img")]
    words += ["--out", str(tmp_path / "codes.safetensors"), "--weights", str(tmp_path / "model.safetensors")]
    assert main(["data", "encode", "--model", "dvae", *words]) == 0
    assert "3 pictures, 8 x 8 codes each, of 16" in capsys.readouterr().out
    path = tmp_path / "codes.safetensors"
    codes = check_codes(weights.read(path), weights.read_config(path), Few(pairs, 3), model)
    wanted = [model.encode(unit_transform(64)(pairs[i][0])[None])[0] for i in range(3)]
    assert torch.equal(codes.long(), torch.stack(wanted))
