"""LoRA merged into a loaded model, and words of textual inversion, against diffusers and transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zoo import weights
from zoo.converters.lora import Delta, to_ours
from zoo.errors import SettingsError, WeightsMismatch
from zoo.models.clip import TextConfig
from zoo.models.concepts import add_concept, merge_lora, read_concept
from zoo.models.kl_vae import KlVaeConfig
from zoo.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from zoo.models.text_encoder import ClipTextEncoder
from zoo.models.unet import UNetConfig
from zoo.tokenizers import ClipTokenizer
from zoo.tokenizers.concepts import ConceptTokenizer

WIDTH = 12
TINY = StableDiffusionConfig(
    text=TextConfig(context=77, width=WIDTH, depth=2, heads=2),
    unet=UNetConfig(widths=(8, 12), blocks=1, attention=(1,), heads=(2, 2), context=WIDTH, groups=4, size=8),
    vae=KlVaeConfig(size=16, widths=(8, 8), blocks=1, groups=4, scale=0.5),
)


def make() -> StableDiffusion:
    """A model that says something."""
    torch.manual_seed(0)
    model = StableDiffusion(TINY).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def change(out: int, width: int, kernel: int | None = None) -> tuple[Tensor, Tensor]:
    """A down and an up matrix."""
    ends = [[], []] if kernel is None else [[kernel, kernel], [1, 1]]
    return torch.randn(2, width, *ends[0]), torch.randn(out, 2, *ends[1])


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# --- LoRA ------------------------------------------------------------------------------------------------------------
UNET_LORA = {  # kohya's layer: (out, in, kernel), alpha
    "mid_block_attentions_0_transformer_blocks_0_attn2_to_k": ((12, WIDTH, None), 1.0),
    "mid_block_attentions_0_proj_in": ((12, 12, 1), 4.0),
    "down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj": ((96, 12, None), 2.0),
    "up_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0": ((12, 12, None), None),
    "down_blocks_0_resnets_0_conv1": ((8, 8, 3), 1.0),
    "up_blocks_1_resnets_0_conv_shortcut": ((8, 20, 1), 1.0),
}


def test_a_merged_unet_is_diffusers_with_the_products_added():
    diffusers = pytest.importorskip("diffusers")
    original = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 12),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
    )
    model = make()
    shapes = {name: tensor.shape for name, tensor in original.state_dict().items()}
    original.load_state_dict({name: t.reshape(shapes[name]) for name, t in model.unet.state_dict().items()})
    state, layers = {}, {name.replace(".", "_"): layer for name, layer in original.named_modules()}
    for layer, (shape, alpha) in UNET_LORA.items():
        down, up = change(*shape)
        state |= {f"lora_unet_{layer}.lora_down.weight": down, f"lora_unet_{layer}.lora_up.weight": up}
        if alpha:
            state[f"lora_unet_{layer}.alpha"] = torch.tensor(alpha)
        weight = layers[layer].weight.data
        weight += 0.7 * (alpha or 2) / 2 * torch.einsum("or,ri...->oi...", up.flatten(1), down).reshape(weight.shape)
    merge_lora(model, to_ours(state, model.state_dict()), scale=0.7)
    latents, timesteps, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        found, expected = model.unet(latents, timesteps, context), original(latents, timesteps, context).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_merged_text_tower_is_transformers_with_the_products_added():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 60, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "max_position_embeddings": 9}
    config = transformers.CLIPTextConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=2, bos_token_id=58, eos_token_id=59
    )
    torch.manual_seed(0)
    original = transformers.CLIPTextModel(config).eval()
    theirs = {name.removeprefix("text_model."): tensor for name, tensor in original.state_dict().items()}
    parts = {"attention.qkv": "qkv", "attention.out": ["self_attn.out_proj"], "mlp.up": ["mlp.fc1"]}
    parts |= {"mlp.down": ["mlp.fc2"], "norm1": ["layer_norm1"], "norm2": ["layer_norm2"]}
    parts["attention.qkv"] = [f"self_attn.{letter}_proj" for letter in "qkv"]
    ours = {"embed.weight": theirs["embeddings.token_embedding.weight"]}
    ours["positions"] = theirs["embeddings.position_embedding.weight"]
    for leaf in ("weight", "bias"):
        ours[f"norm_out.{leaf}"] = theirs[f"final_layer_norm.{leaf}"]
        for number in range(2):
            for part, names in parts.items():
                joined = torch.cat([theirs[f"encoder.layers.{number}.{name}.{leaf}"] for name in names])
                ours[f"transformer.blocks.{number}.{part}.{leaf}"] = joined
    model = nn.ModuleDict({"text": ClipTextEncoder(TextConfig(context=9, vocab=60, width=WIDTH, depth=2, heads=2))})
    model["text"].load_state_dict(ours)
    state = {}
    modules = {name.removeprefix("text_model."): module for name, module in original.named_modules()}
    for layer, out, width in (
        ("0.self_attn.v_proj", 12, 12),
        ("1.self_attn.q_proj", 12, 12),
        ("1.self_attn.k_proj", 12, 12),
        ("1.self_attn.out_proj", 12, 12),
        ("0.mlp.fc2", 12, 48),
    ):
        down, up = change(out, width)
        stem = f"text_encoder.text_model.encoder.layers.{layer}"
        state |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        modules[f"encoder.layers.{layer}"].weight.data += up @ down
    merge_lora(model, to_ours(state, model.state_dict()))
    tokens = torch.tensor([[58, 5, 7, 1, 59, 59, 59], [58, 59, 59, 59, 59, 59, 59]])
    with torch.no_grad():
        found, expected = model["text"](tokens), original(tokens).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


QKV, TO_K = (
    "text.transformer.blocks.0.attention.qkv.weight",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_undoing_brings_back_every_bit(dtype: torch.dtype):
    model = make().to(dtype)
    before = bits(model)
    rows = slice(WIDTH, 2 * WIDTH)
    deltas = {
        QKV: [Delta(*change(WIDTH, WIDTH), 0.5, rows), Delta(*change(WIDTH, WIDTH), 0.5, slice(0, WIDTH))],
        f"{TO_K}.weight": [Delta(*change(12, WIDTH), 0.5)],
    }
    undo = merge_lora(model, deltas, 1.3)
    after = bits(model)
    assert {name for name in before if not after[name].equal(before[name])} == deltas.keys()
    expected = before[QKV][rows].float() + 1.3 * 0.5 * deltas[QKV][0].up @ deltas[QKV][0].down
    torch.testing.assert_close(after[QKV][rows], expected.to(dtype))
    assert after[QKV][2 * WIDTH :].equal(before[QKV][2 * WIDTH :])
    second = merge_lora(model, deltas)
    second()
    assert equal(bits(model), after)
    undo()
    assert equal(bits(model), before)


def test_a_sum_is_made_in_fp32():
    """A product that half precision cannot hold is scaled before it is rounded."""
    delta = Delta(torch.full((1, WIDTH), 300.0), torch.full((12, 1), 300.0), 1.0)  # 90,000; fp16 ends at 65,504
    model = make().half()
    before = bits(model)
    merge_lora(model, {f"{TO_K}.weight": [delta]}, scale=1e-4)
    expected = before[f"{TO_K}.weight"].float() + 9
    torch.testing.assert_close(model.state_dict()[f"{TO_K}.weight"], expected.half())


def test_a_lora_of_another_base_changes_nothing():
    model = make()
    before = bits(model)
    right, wrong = Delta(*change(12, WIDTH), 1.0), Delta(*change(12, 16), 1.0)
    with pytest.raises(WeightsMismatch, match=r"another base.*attn1.to_k.weight \(12, 12\) by \(12, 16\), and 1 of 2"):
        merge_lora(model, {f"{TO_K}.weight": [right], f"{TO_K.replace('attn2', 'attn1')}.weight": [wrong]})
    with pytest.raises(WeightsMismatch, match="another base"):  # a wider text tower
        merge_lora(model, {QKV: [Delta(*change(16, WIDTH), 1.0, slice(32, 48))]})
    with pytest.raises(WeightsMismatch, match=r"\(48, 12\) by \(12, 48\)"):  # as many numbers, in other places
        merge_lora(model, {"text.transformer.blocks.0.mlp.up.weight": [Delta(*change(12, 48), 1.0)]})
    with pytest.raises(WeightsMismatch, match="1 of the 2 .*unet.nowhere"):
        merge_lora(model, {f"{TO_K}.weight": [right], "unet.nowhere.weight": [right]})
    assert equal(bits(model), before)


# --- textual inversion -----------------------------------------------------------------------------------------------
VECTORS = torch.arange(24.0).reshape(2, 12)


def test_both_layouts_are_read(tmp_path: Path):
    torch.save({"<cat-toy>": VECTORS[0]}, tmp_path / "learned_embeds.bin")
    token, vectors = read_concept(weights.read(tmp_path / "learned_embeds.bin"))
    assert token == "<cat-toy>" and vectors.equal(VECTORS[:1])
    assert read_concept({"<cat-toy>": VECTORS}, "mine")[0] == "mine"

    web_ui = {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "x", "step": 5}
    torch.save(web_ui, tmp_path / "toy.pt")
    token, vectors = read_concept(weights.read(tmp_path / "toy.pt"), "toy")
    assert token == "toy" and vectors.equal(VECTORS)

    original = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": VECTORS})}
    torch.save(original, tmp_path / "old.pt")
    assert read_concept(weights.read(tmp_path / "old.pt"), "toy")[1].equal(VECTORS)
    assert read_concept({"emb_params": VECTORS}, "toy")[1].equal(VECTORS)


def test_files_of_another_kind_are_named():
    with pytest.raises(WeightsMismatch, match=r"clip_l \(2, 12\), clip_g"):
        read_concept({"clip_l": VECTORS, "clip_g": VECTORS})
    with pytest.raises(WeightsMismatch, match="nothing"):
        read_concept({})
    with pytest.raises(WeightsMismatch, match="conv"):
        read_concept({"conv": torch.ones(1, 2, 3, 3)})
    with pytest.raises(SettingsError, match="name="):
        read_concept({"string_to_param.*": VECTORS})


def prompt(model: StableDiffusion, text: str) -> Tensor:
    with torch.no_grad():
        return model.text(model.tokenizer(text))


def test_a_concept_is_read_as_its_vectors():
    model = make()
    plain = ClipTokenizer(pad=49407)
    model.tokenizer = ConceptTokenizer(plain)
    before = prompt(model, "a photo of a cat")
    cat, dog = plain.encode("cat dog")
    add_concept(model.text, model.tokenizer, "<pets>", model.text.embed.weight[[cat, dog]].clone())
    add_concept(model.text, model.tokenizer, "MyDog", model.text.embed.weight[[dog]].double())
    assert prompt(model, "a photo of <pets>, red").equal(prompt(model, "a photo of cat dog, red"))
    assert prompt(model, "<pets> mydog").equal(prompt(model, "cat dog dog"))
    assert prompt(model, "a photo of a cat").equal(before)
    assert model.tokenizer.encode("<pets> mydog") == [49408, 49409, 49410]
    assert model.text.embed.weight.dtype == torch.float32 and not model.text.embed.weight.requires_grad


def test_a_concept_can_be_drawn():
    model = make()
    model.tokenizer = ConceptTokenizer(ClipTokenizer(pad=49407))
    add_concept(model.text, model.tokenizer, "<toy>", VECTORS)
    words = {"steps": 2, "size": (16, 16), "progress": False}
    ((a,), (b,)) = model.generate(["a (<toy>:1.5)", "a (toy:1.5)"], **words)
    assert a.tobytes() != b.tobytes()


def test_a_concept_that_does_not_fit_leaves_no_trace():
    model = make()
    tokenizer = ConceptTokenizer(ClipTokenizer())
    with pytest.raises(WeightsMismatch, match=r"\(2, 768\) and this text tower's are 12 wide.*another base"):
        add_concept(model.text, tokenizer, "<toy>", torch.ones(2, 768))
    with pytest.raises(SettingsError, match="already"):
        add_concept(model.text, tokenizer, "cat", VECTORS)
    assert len(model.text.embed.weight) == 49408 and not tokenizer.ids
