"""LoRA and textual inversion files change a loaded Stable Diffusion as they say, and can be taken out again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zoo import weights
from zoo.additions import add_concept, add_lora
from zoo.errors import SettingsError, WeightsMismatch
from zoo.models.clip import TextConfig
from zoo.models.kl_vae import KlVaeConfig
from zoo.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from zoo.models.unet import UNetConfig
from zoo.tokenizers.context import ContextTokenizer

TINY = StableDiffusionConfig(
    text=TextConfig(context=9, vocab=64, width=12, depth=1, heads=2),
    unet=UNetConfig(widths=(8, 12), blocks=1, attention=(1,), heads=(2, 2), context=12, groups=4, size=8),
    vae=KlVaeConfig(size=16, widths=(8, 8), blocks=1, groups=4, scale=0.5),
    start=61,
    end=62,
    pad=63,
    window=9,
)
LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


class Letters(ContextTokenizer):
    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 60 for letter in text]


@pytest.fixture
def model() -> StableDiffusion:
    torch.manual_seed(0)
    model = StableDiffusion(TINY, tokenizer=Letters())
    for parameter in model.unet.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def lora(folder: Path, width: int = 12) -> Path:
    torch.manual_seed(1)
    path = folder / "style.safetensors"
    weights.write({f"{LAYER}.lora_A.weight": torch.randn(2, width), f"{LAYER}.lora_B.weight": torch.randn(12, 2)}, path)
    return path


def drawn(model: StableDiffusion, prompt: str = "ab") -> Tensor:
    pictures = []
    model.generate(prompt, steps=2, progress=False, preview=lambda _, picture: pictures.append(picture))
    return pictures[-1]


def test_a_lora_adds_its_product_and_is_taken_out_bit_for_bit(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, path = drawn(model), lora(tmp_path)
    undo = add_lora(model, path, scale=0.5)
    file = weights.read(path)
    product = file[f"{LAYER}.lora_B.weight"] @ file[f"{LAYER}.lora_A.weight"]
    torch.testing.assert_close(model.state_dict()[f"{LAYER}.weight"], before[f"{LAYER}.weight"] + 0.5 * product)
    assert not torch.equal(drawn(model), plain)
    undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_lora_of_another_base_is_refused_and_changes_nothing(model, tmp_path):
    before = drawn(model)
    with pytest.raises(WeightsMismatch, match="another base"):
        add_lora(model, lora(tmp_path, width=20))
    assert torch.equal(drawn(model), before)


@pytest.mark.parametrize(("key", "token"), [("<toy>", "<toy>"), ("string_to_param.*", "toy")])
def test_a_word_is_read_by_its_token_or_by_what_its_file_is_called(model, tmp_path, key: str, token: str):
    weights.write({key: torch.ones(2, 12)}, tmp_path / "toy.safetensors")
    known = drawn(model, "ab")
    assert add_concept(model, tmp_path / "toy.safetensors") == token
    assert torch.equal(drawn(model, "ab"), known)
    assert not torch.equal(drawn(model, f"ab {token}"), drawn(model, "ab xx"))
    with pytest.raises(SettingsError, match="already"):
        add_concept(model, tmp_path / "toy.safetensors")


def test_a_word_of_another_base_is_refused_and_so_is_one_without_a_tokenizer(model, tmp_path):
    weights.write({"<toy>": torch.ones(1, 16)}, tmp_path / "toy.safetensors")
    with pytest.raises(WeightsMismatch, match="another base"):
        add_concept(model, tmp_path / "toy.safetensors")
    with pytest.raises(SettingsError, match="AutoLoader"):
        add_concept(StableDiffusion(replace(TINY)), tmp_path / "toy.safetensors")
