"""A tokenizer of transformers, read from local files, answers as ClipTokenizer does."""

from __future__ import annotations

import io
import pickle

import pytest
import torch

from zoo.errors import CaptionTooLong, DataError, SettingsError
from zoo.tokenizers import TransformersTokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "笑", "脸", "a", "cat", "##s", "dog", ","]
PAD, UNKNOWN, START, END = 0, 1, 2, 3


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bert(bert_folder) -> TransformersTokenizer:
    return TransformersTokenizer.from_folder(bert_folder, kind="bert")


@pytest.fixture(scope="module")
def xlm_folder(tmp_path_factory):
    from sentencepiece import SentencePieceTrainer

    texts = ["red heart", "a grinning face", "a red heart and a face", "红心", "笑脸", "笑得满地打滚"] * 10
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    folder = tmp_path_factory.mktemp("xlm")
    (folder / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def xlm(xlm_folder) -> TransformersTokenizer:
    return TransformersTokenizer.from_folder(xlm_folder, kind="xlm-roberta")


def test_bert_gives_the_ids_of_its_vocabulary_in_a_context_of_52(bert):
    tokens = bert.tokenize_as_tensor(["笑脸", "A cats"])
    assert tokens.shape == (2, 52) and tokens.dtype == torch.int64
    assert tokens[0, :5].tolist() == [START, 5, 6, END, PAD]
    assert tokens[1, :6].tolist() == [START, 7, 8, 9, END, PAD]
    assert (bert.vocab_size, bert.start_token, bert.end_token, bert.pad) == (len(WORDS), START, END, PAD)
    assert bert("笑脸").equal(tokens[:1])


def test_xlm_roberta_shifts_the_pieces_by_one_and_pads_with_one(xlm, xlm_folder):
    from sentencepiece import SentencePieceProcessor

    # fairseq's order, which XLM-R keeps: <s> <pad> </s> <unk>, then the pieces from the fourth on, and last <mask>.
    pieces = SentencePieceProcessor(model_file=str(xlm_folder / "sentencepiece.bpe.model"))
    assert xlm.vocab_size == len(pieces) + 2
    assert (xlm.start_token, xlm.pad, xlm.end_token) == (0, 1, 2)
    for text in ("a red heart", "笑脸", "Ａ　red  heart"):
        expected = [0, *(id + 1 if id else 3 for id in pieces.encode(text)), 2]
        assert xlm(text)[0].tolist() == expected + [1] * (77 - len(expected))


@pytest.mark.parametrize("kind", ["bert", "xlm"])
def test_a_long_text_is_cut_and_keeps_its_end(kind, request):
    tokenizer = request.getfixturevalue(kind)
    tokens = tokenizer(["a " * 200])
    assert tokens.shape == (1, tokenizer.context_length)
    assert tokens[0, 0] == tokenizer.start_token and tokens[0, -1] == tokenizer.end_token
    assert (tokens[0, 1:-1] == tokenizer.encode("a")[0]).all()
    with pytest.raises(CaptionTooLong, match="has 202 tokens"):
        tokenizer(["a " * 200], truncate="error")


@pytest.mark.parametrize("kind, text", [("bert", "a cat"), ("xlm", "a red heart")])
def test_decoding_gives_the_text_again(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer(text)[0], skip_special=True) == text


def test_a_folder_its_file_and_its_saved_json_are_the_same_tokenizer(bert, bert_folder, xlm, xlm_folder, tmp_path):
    text = "a cats 笑脸 red heart"
    for tokenizer, file, kind in (
        (bert, bert_folder / "vocab.txt", "bert"),
        (xlm, xlm_folder / "sentencepiece.bpe.model", "xlm-roberta"),
    ):
        saved = tmp_path / kind
        saved.mkdir()
        tokenizer.tokenizer.backend_tokenizer.save(str(saved / "tokenizer.json"))
        for source in (file, str(saved), saved / "tokenizer.json"):
            assert TransformersTokenizer.from_folder(source, kind)(text).equal(tokenizer(text))


def test_a_length_baked_into_tokenizer_json_does_not_cut(bert, tmp_path):
    from tokenizers import Tokenizer

    baked = Tokenizer.from_str(bert.tokenizer.backend_tokenizer.to_str())
    baked.enable_truncation(4)
    baked.enable_padding(length=9, pad_id=5)
    baked.save(str(tmp_path / "tokenizer.json"))
    assert TransformersTokenizer.from_folder(tmp_path, "bert")("a cat a dog").equal(bert("a cat a dog"))


def test_a_folder_without_vocabulary_is_refused_and_not_an_empty_tokenizer(tmp_path):
    with pytest.raises(DataError, match="vocab.txt or tokenizer.json"):
        TransformersTokenizer.from_folder(tmp_path, "bert")
    with pytest.raises(DataError, match="absent"):
        TransformersTokenizer.from_folder(tmp_path / "absent" / "vocab.txt", "bert")


def test_an_unknown_kind_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(SettingsError, match="nearest: bert"):
        TransformersTokenizer.from_folder(tmp_path, "brt")


def test_a_pickled_tokenizer_gives_the_same_ids(bert):
    assert pickle.loads(pickle.dumps(bert))("a cat").equal(bert("a cat"))


def test_context_length_can_be_another(bert_folder):
    tokenizer = TransformersTokenizer.from_folder(bert_folder, "bert", context_length=8)
    assert tokenizer("a cat").shape == (1, 8) and tokenizer("a cat", 6).shape == (1, 6)
