"""The command line: what each command prints, its exit code, and one clear line for what a user can mend."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import zoo
from zoo import catalog
from zoo.catalog import find, list_models
from zoo.cli import main
from zoo.commands import demo, tables, train
from zoo.commands.catalog import card_of
from zoo.commands.evaluate import kind_of
from zoo.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from zoo.weights import write

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "zoo" / "assets"
HEAVY = ("torch", "transformers", "PIL", "requests", "numpy", "huggingface_hub")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that load a small CLIP of random weights: a folder in the published format."""
    from zoo.tokenizers import ClipTokenizer

    folder = tmp_path_factory.mktemp("tiny")
    shutil.copy(ASSETS / "emoji_bpe.txt.gz", folder / "merges.txt.gz")
    vocabulary = ClipTokenizer(folder / "merges.txt.gz").vocab_size
    torch.manual_seed(0)
    image = VitConfig(size=16, patch=8, width=16, depth=1, heads=2)
    config = ClipConfig(embed=8, image=image, text=TextConfig(context=24, vocab=vocabulary, width=16, depth=1, heads=2))
    write(Clip(config).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    return ["--model", "clip", "--weights", str(folder), "--device", "cpu"]


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = []
    for name, colour in (("red.png", (200, 0, 0)), ("blue.png", (0, 0, 200))):
        Image.new("RGB", (40, 30), colour).save(tmp_path / name)
        paths.append(str(tmp_path / name))
    return paths


def fails(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The one line that a failing command says, and nothing else."""
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("zoo: ")
    return said.err


# --- all commands ----------------------------------------------------------------------------------------------------
def test_version(capsys: pytest.CaptureFixture):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"zoo {zoo.__version__}\n"


def test_help_teaches_by_examples_that_parse(capsys: pytest.CaptureFixture):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    examples = [line.strip() for line in text.splitlines() if line.startswith("  zoo ")]
    assert len(examples) >= 5
    for example in examples:
        assert example.split()[1] in text.partition("commands:")[2].partition("start here")[0].split()
    assert "clip-base-p32-224" in text and find("txt_img_matching", "clip-base-p32-224")


ALL = ["list", "info", "pull", "match", "plan", "train", "launch", "watch", "eval", "export", "demo"]


@pytest.mark.parametrize("command", ALL)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture):
    assert main([command, "--help"]) == 0
    assert f"zoo {command}" in capsys.readouterr().out


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture):
    assert "match" in fails(capsys, "mtach")
    assert "zoo --help" in fails(capsys)


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["list"], ["info", "clip-base-p32-224"]])
def test_what_only_reads_the_catalog_loads_nothing_heavy(argv: list[str]):
    code = (
        f"import sys, zoo.cli; zoo.cli.main({argv}); print(*[m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr.split() == []


def test_debug_shows_where_an_error_arose(capsys: pytest.CaptureFixture):
    for argv in (["--debug", "info", "clipp"], ["info", "clipp", "--debug"]):
        with pytest.raises(zoo.errors.UnknownModel):
            main(argv)
    assert "zoo: " in fails(capsys, "info", "clipp")


def test_an_error_of_several_lines_is_said_in_one(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalog, "cards", lambda task: (_ for _ in ()).throw(zoo.errors.WeightsMismatch("a\n  b\nc")))
    assert fails(capsys, "list") == "zoo: a b c\n"


def test_a_fault_of_zoo_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalog, "cards", lambda task: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_ctrl_c_is_no_traceback(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalog, "cards", lambda task: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "zoo: stopped\n"


def test_ctrl_c_in_a_training_says_how_to_go_on(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    def stop(argv: list[str]) -> None:
        raise KeyboardInterrupt("stopped after step 3 of 9; run the same command to go on")

    monkeypatch.setitem(train.SCRIPTS, "clip", lambda: types.SimpleNamespace(main=stop))
    assert main(["train", "clip"]) == 130
    assert "step 3 of 9; run the same command" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet():
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "zoo.cli", "list"]
    with os.fdopen(writing, "w") as nobody:
        run = subprocess.run(command, cwd=ROOT, stdout=nobody, stderr=subprocess.PIPE, env=buffered)
    assert (run.returncode, run.stderr) == (141, b"")


def test_a_terminal_of_few_letters_is_written_to():
    code = "import zoo.cli; from zoo.commands import catalog; print(zoo.cli.main(['--version'])); print('嘿')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and run.stdout.endswith("\\u563f\n")


# --- list, info, pull ------------------------------------------------------------------------------------------------
def test_list_has_every_model_once(capsys: pytest.CaptureFixture):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    names = [line.split()[1] for line in out.splitlines()[1:]]
    assert names == list_models()
    assert "\x1b" not in out and "…" not in out


def test_list_as_json(capsys: pytest.CaptureFixture):
    assert main(["list", "--json", "--task", "txt_img_matching"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list_models("txt_img_matching")
    assert all(row["here"] in ("yes", "no", "part", "-") for row in rows)


def test_what_is_here_is_said_to_be_here(capsys: pytest.CaptureFixture, tmp_path: Path):
    def here() -> str:
        assert main(["list", "--json", "--model-dir", str(tmp_path)]) == 0
        rows = json.loads(capsys.readouterr().out)
        return next(row["here"] for row in rows if row["name"] == card.name)

    card = find("txt_img_matching", "clip-base-p32-224")
    assert here() == "no"
    path = tmp_path / card.name / card.files[0].name
    path.parent.mkdir()
    path.touch()
    assert here() == ("yes" if len(card.files) == 1 else "part")


def test_unknown_names_show_the_nearest(capsys: pytest.CaptureFixture):
    assert "clip-base-p32-224" in fails(capsys, "info", "clip-bse-p32-224")
    assert "clip-base-p32-224" in fails(capsys, "pull", "clip-bse-p32-224")
    assert "txt_img_matching" in fails(capsys, "list", "--task", "text_image_matching")
    assert "emoji" in fails(capsys, "eval", "clip", "--data", "emojis")
    assert "test" in fails(capsys, "eval", "clip", "--split", "tset")
    assert "clip" in fails(capsys, "train", "clop")


def test_info_says_all_that_the_card_says(capsys: pytest.CaptureFixture):
    card = find("txt_img_matching", "clip-base-p32-224")
    assert main(["info", "CLIP-base-p32-224"]) == 0
    out = capsys.readouterr().out
    told = [card.name, card.task, card.family, card.licence, card.source, *card.figures, *card.languages]
    told += [part for file in card.files for part in (file.name, file.sha256, file.url) if part]
    for part in told:
        assert part in out
    assert main(["info", card.name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figures"] == card.figures and found["files"][0]["sha256"] == card.files[0].sha256


def test_info_says_where_a_model_would_live(capsys: pytest.CaptureFixture, tmp_path: Path):
    assert main(["info", "clip-base-p32-224", "--model-dir", str(tmp_path)]) == 0
    assert str(tmp_path / "clip-base-p32-224") in capsys.readouterr().out


def test_one_name_in_two_tasks_asks_for_the_task(monkeypatch: pytest.MonkeyPatch):
    card = find("txt_img_matching", "clip")
    monkeypatch.setattr(catalog, "CARDS", (card, replace(card, task="text2img")))
    with pytest.raises(zoo.errors.SettingsError, match="--task txt_img_matching or text2img"):
        card_of("clip", None)
    assert card_of("clip", "text2img").task == "text2img"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder served on this machine, and a card, the only one, of the files that a test names."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    (tmp_path / "served").mkdir()
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *a: None)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

        def card(name: str, data: bytes | None, sha256: str | None = None, **more) -> zoo.hub.File:
            if data is not None:
                (tmp_path / "served" / name).write_bytes(data)
            file = zoo.hub.File(name=name, url=f"http://127.0.0.1:{server.server_port}/{name}", sha256=sha256)
            row = replace(find("txt_img_matching", "clip"), files=(file,), **more)
            monkeypatch.setattr(catalog, "CARDS", (row,))
            return file

        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield card
        server.shutdown()


def test_pull_downloads_verifies_and_says_where(served, tmp_path: Path, capsys: pytest.CaptureFixture):
    served("a.bin", b"weights", hashlib.sha256(b"weights").hexdigest())
    for how in ("downloaded", "was here"):
        assert main(["pull", "clip", "--model-dir", str(tmp_path)]) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'clip' / 'a.bin'}: 7 B, {how}, sha256 verified\n"


def test_pull_refuses_other_bytes(served, tmp_path: Path, capsys: pytest.CaptureFixture):
    served("a.bin", b"weights", "0" * 64)
    assert "sha256" in fails(capsys, "pull", "clip", "--model-dir", str(tmp_path))
    assert not (tmp_path / "clip" / "a.bin").exists()


def test_pull_takes_another_source_of_the_same_weights(served, tmp_path: Path, capsys, caplog):
    other = served("other.bin", b"weights")
    served("gone.bin", None, alternatives=(other,))
    assert main(["pull", "clip", "--model-dir", str(tmp_path)]) == 0
    assert "gone.bin" in caplog.text
    assert "other.bin: 7 B, downloaded, no sha256 published" in capsys.readouterr().out


def test_pull_says_that_a_packaged_file_is_packaged(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    file = zoo.hub.File(name="merges.txt.gz", packaged="emoji_bpe.txt.gz")
    monkeypatch.setattr(catalog, "CARDS", (replace(find("txt_img_matching", "clip"), files=(file,)),))
    assert main(["pull", "clip"]) == 0
    assert capsys.readouterr().out.endswith("emoji_bpe.txt.gz: 14.3 kB, was here, packaged\n")


def test_pull_of_a_family_has_nothing_to_download(capsys: pytest.CaptureFixture):
    assert "nothing to download" in fails(capsys, "pull", "clip")


# --- match -----------------------------------------------------------------------------------------------------------
TEXTS = ["--text", "a red picture", "--text", "蓝色的图片", "--text", "a dog"]


def test_match_gives_each_picture_probabilities_over_the_captions(tiny, pictures, capsys: pytest.CaptureFixture):
    assert main(["match", *pictures, *TEXTS, *tiny, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in found] == pictures
    for row in found:
        assert [caption["text"] for caption in row["captions"]] == TEXTS[1::2]
        assert sum(caption["probability"] for caption in row["captions"]) == pytest.approx(1)
        assert row["best"] == max(row["captions"], key=lambda caption: caption["probability"])["text"]


def test_match_is_the_softmax_of_the_similarity(tiny, pictures, capsys: pytest.CaptureFixture):
    loader = zoo.AutoLoader("txt_img_matching", "clip", weights=tiny[3], device="cpu")
    images = torch.stack([loader.get_transform()(Image.open(path)) for path in pictures])
    tokens = loader.get_tokenizer().tokenize_as_tensor(TEXTS[1::2])
    expected = loader.get_model().eval().similarity(images, tokens).softmax(-1)
    assert main(["match", *pictures, *TEXTS, *tiny, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for row, values in zip(found, expected, strict=True):
        assert [c["probability"] for c in row["captions"]] == pytest.approx(values.tolist(), abs=1e-5)


def test_match_prints_a_table_with_one_star_a_picture(tiny, pictures, capsys: pytest.CaptureFixture):
    assert main(["match", *pictures, *TEXTS, *tiny]) == 0
    out = capsys.readouterr().out
    assert out.count("* ") == len(pictures) and "\x1b" not in out
    for part in (*pictures, *TEXTS[1::2], "%"):
        assert part in out


def test_match_draws_the_map(tiny, pictures, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "map.png"
    assert main(["match", *pictures, *TEXTS, *tiny, "--plot", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    with Image.open(path) as drawn:
        assert drawn.width > 2 * 72 and drawn.height > 4 * 72
    assert ".png" in fails(capsys, "match", *pictures, *TEXTS, *tiny, "--plot", str(tmp_path / "map.xyz"))
    nowhere = str(tmp_path / "no" / "map.png")
    assert f"zoo: {nowhere}: No such file" in fails(capsys, "match", *pictures, *TEXTS, *tiny, "--plot", nowhere)


def test_match_needs_captions_to_choose_among(pictures, capsys: pytest.CaptureFixture):
    assert "--text" in fails(capsys, "match", pictures[0])
    assert "there are 1" in fails(capsys, "match", pictures[0], "--text", "a cat")
    assert "there are 1" in fails(capsys, "match", pictures[0], "--text", "a cat", "--text", " ")


def test_match_names_a_bad_picture(pictures, tmp_path: Path, capsys: pytest.CaptureFixture):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    assert "bad.png" in fails(capsys, "match", pictures[0], str(bad), *TEXTS)
    assert "gone.png" in fails(capsys, "match", str(tmp_path / "gone.png"), *TEXTS)


def test_match_names_the_nearest_model(pictures, capsys: pytest.CaptureFixture):
    assert "clip-emoji-tiny" in fails(capsys, "match", *pictures, *TEXTS, "--model", "clip-emoji-tinny")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_said(tiny, pictures, capsys: pytest.CaptureFixture):
    assert "cuda" in fails(capsys, "match", *pictures, *TEXTS, *tiny[:4], "--device", "cuda")


# --- train, eval, demo -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("answer", [None, 0, 3])
def test_train_hands_the_rest_to_the_script(answer: int | None, monkeypatch: pytest.MonkeyPatch):
    given = []
    script = types.SimpleNamespace(main=lambda argv: given.append(argv) or answer)
    monkeypatch.setitem(sys.modules, "zoo.examples", types.ModuleType("zoo.examples"))
    monkeypatch.setitem(sys.modules, "zoo.examples.train_clip", script)
    assert main(["train", "clip", "--steps", "3", "--help", "--run-folder", "x"]) == (answer or 0)
    assert given == [["--steps", "3", "--help", "--run-folder", "x"]]


class Few:
    """Every fortieth sample of a named data set."""

    def __init__(self, dataset):
        self.dataset, self.count = dataset, 40

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int):
        return self.dataset[i * 40]

    def row(self, i: int) -> dict:
        return self.dataset.row(i * 40)

    def caption(self, row: dict) -> str:
        return self.dataset.caption(row)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Forty of the emoji instead of all -> three of their captions."""
    import zoo.data

    whole = zoo.data.open_dataset
    monkeypatch.setattr(zoo.data, "open_dataset", lambda *a, **k: Few(whole(*a, **k)), raising=False)
    test = zoo.data.open_dataset("emoji", "test")
    return [test.row(i)["caption_en"] for i in range(3)]


def test_eval_prints_both_directions(tiny, few, capsys: pytest.CaptureFixture):
    assert main(["eval", "clip", *tiny]) == 0
    out = capsys.readouterr().out
    assert "40 pictures, 40 captions" in out and "picture to text" in out and "text to picture" in out
    for name in ("R@1", "R@5", "R@10", "median rank", "mean rank"):
        assert name in out


def test_eval_as_json_in_both_languages(tiny, few, capsys: pytest.CaptureFixture):
    found = []
    for language in ("en", "zh"):
        assert main(["eval", "clip", *tiny, "--json", "--language", language]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [f["language"] for f in found] == ["en", "zh"]
    for ranks in (f[way] for f in found for way in ("picture_to_text", "text_to_picture")):
        assert 0 <= ranks["recall"]["1"] <= ranks["recall"]["5"] <= ranks["recall"]["10"] <= 1
        assert 1 <= ranks["mean_rank"] <= ranks["candidates"] == 40
    assert found[0]["text_to_picture"] != found[1]["text_to_picture"]


def test_eval_refuses_a_batch_of_nothing(capsys: pytest.CaptureFixture):
    assert "--batch-size" in fails(capsys, "eval", "clip", "--batch-size", "0")


def test_the_demo_tells_all_its_steps(tiny, few, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "STEPS", 10)
    monkeypatch.setattr(demo, "BATCH", 4)
    monkeypatch.setattr(demo, "CAPTIONS", ("no such caption", *few))
    monkeypatch.setattr(demo, "EDITS", {"no such caption": "", few[0]: "angry face"})
    monkeypatch.setattr(demo, "CANDIDATES", 2)
    monkeypatch.setattr(demo, "PROMPTS", ("red apple", "红心", "volcano", "cat face"))
    pictures = ("match.png", *(f"{name}.png" for name in demo.PAINTERS), "edited.png")
    out = tmp_path / "tour"
    for folder in ("run", "run-2"):  # a second tour leaves the first one's run alone
        assert main(["demo", "--out", str(out), *tiny]) == 0
        text = capsys.readouterr().out
        assert all(f"[{step}/7]" in text for step in range(1, 8))
        assert all(str(out / name) in text for name in (*pictures, folder))
        assert (out / folder / "log.jsonl").exists() and (out / folder / "model.safetensors").exists()
    assert all(Image.open(out / name).width > 300 for name in pictures)


def test_the_captions_of_the_demo_are_held_out():
    from zoo.data import open_dataset

    dataset = open_dataset("emoji", "test")
    assert set(demo.CAPTIONS) <= {dataset.row(i)["caption_en"] for i in range(len(dataset))}
    assert len(set(demo.CAPTIONS)) == 10


@pytest.mark.slow
def test_the_demo_works_on_what_is_packaged(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["demo", "--out", str(tmp_path), "--device", "cpu"]) == 0
    losses = [
        float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.strip().startswith("step")
    ]
    assert losses[-1] < losses[0]


# --- tables ----------------------------------------------------------------------------------------------------------
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))


ROWS = [["clip-base", "a licence that takes very many words to say " * 3, "12"], ["笑脸", "MIT", "3456"]]


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_a_table_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch):
    terminal(monkeypatch, columns)
    lines = tables.table(["name", "licence", "size"], ROWS, right=(2,)).splitlines()
    assert all(tables.width(line) <= columns for line in lines)
    assert "…" in lines[1] and "MIT" in lines[2]


def test_a_table_is_whole_in_a_pipe():
    assert "…" not in tables.table(["name", "licence", "size"], ROWS)


def test_columns_stand_below_each_other_in_every_script():
    lines = tables.table(["name", "n"], [["笑脸", "1"], ["abcd", "2"], ["e\u0301", "3"]]).splitlines()
    assert lines == ["name  n", "笑脸  1", "abcd  2", "e\u0301     3"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "?"),
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (605e6, "605 MB"),
        (999_600_000, "1.0 GB"),
        (4.8e9, "4.8 GB"),
        (2.5e12, "2500 GB"),
    ],
)
def test_sizes_are_said_for_people(size: float | None, text: str):
    assert tables.in_bytes(size) == text


@pytest.mark.parametrize(
    ("count", "text"), [(None, "?"), (2_000_000, "2.0 M"), (151_277_313, "151.3 M"), (1.2e9, "1.20 B")]
)
def test_counts_are_said_for_people(count: float | None, text: str):
    assert tables.in_millions(count) == text


def test_a_kind_is_the_one_kind_word_of_a_caption():
    assert kind_of("flag: Brazil") == "flag"
    assert kind_of("cat face") is None  # two kinds
    assert kind_of("volcano") is None
    assert kind_of("handbag") is None  # a word, not letters


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "least"), [("zero-shot", 0.5), ("linear-probe", 0.85)])
def test_the_packaged_model_tells_kinds_apart(metric, least, capsys):
    assert main(["eval", "clip", "--metric", metric, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] > least > found["commonest"]
    assert found["kinds"] == 12
