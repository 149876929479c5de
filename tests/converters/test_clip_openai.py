"""OpenAI's layout, and those that share its image towers: open_clip's and Chinese-CLIP's.

The networks here are written from the published description alone, with OpenAI's names and torch's own attention, so
that what AutoLoader makes of their weights is compared with a second computation, not with itself.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import AutoLoader, weights
from zoo.converters import clip
from zoo.errors import WeightsMismatch

WIDTH, EMBED, VOCAB, CONTEXT, SIZE = 128, 24, 40, 9, 16


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-1.702 * x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, gelu: nn.Module, mask: Tensor | None):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        parts = OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=gelu, c_proj=nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(parts)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.mask)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width: int, heads: int, gelu: nn.Module, mask: Tensor | None = None):
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, heads, gelu, mask) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x.transpose(0, 1)).transpose(0, 1)


class Vit(nn.Module):
    size = SIZE

    def __init__(self, gelu: nn.Module, heads: int = WIDTH // 64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 4, 4, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(17, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = Blocks(WIDTH, heads, gelu)
        self.proj = nn.Parameter(torch.randn(WIDTH, EMBED))

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).reshape(len(image), WIDTH, -1).permute(0, 2, 1)
        x = torch.cat([self.class_embedding + torch.zeros(len(image), 1, WIDTH), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    def __init__(self, channels: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.stride, self.downsample = stride, None
        if stride > 1 or channels != 4 * planes:
            conv = nn.Conv2d(channels, 4 * planes, 1, bias=False)
            parts = OrderedDict([("-1", nn.AvgPool2d(stride)), ("0", conv), ("1", nn.BatchNorm2d(4 * planes))])
            self.downsample = nn.Sequential(parts)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(F.avg_pool2d(y, self.stride)))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    def __init__(self, places: int, channels: int, heads: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(places + 1, channels))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj, self.heads = nn.Linear(channels, EMBED), heads

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.positional_embedding[:, None]
        biases = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        return F.multi_head_attention_forward(
            x[:1], x, x, x.shape[-1], self.heads, None, biases, None, None, False, 0.0, self.c_proj.weight,
            self.c_proj.bias, training=False, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
        )[0][0]  # fmt: skip


class ResNet(nn.Module):
    size, width = 64, 4

    def __init__(self):
        super().__init__()
        w = self.width
        self.conv1, self.bn1 = nn.Conv2d(3, w // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(w // 2)
        self.conv2, self.bn2 = nn.Conv2d(w // 2, w // 2, 3, 1, 1, bias=False), nn.BatchNorm2d(w // 2)
        self.conv3, self.bn3 = nn.Conv2d(w // 2, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w)
        self.layer1 = nn.Sequential(Bottleneck(w, w, 1), Bottleneck(4 * w, w, 1))
        self.layer2 = nn.Sequential(Bottleneck(4 * w, 2 * w, 2))
        self.layer3 = nn.Sequential(Bottleneck(8 * w, 4 * w, 2), Bottleneck(16 * w, 4 * w, 1))
        self.layer4 = nn.Sequential(Bottleneck(16 * w, 8 * w, 2))
        self.attnpool = AttentionPool(4, 32 * w, 32 * w // 64)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        x = F.avg_pool2d(torch.relu(self.bn3(self.conv3(x))), 2)
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


class Multimodal(nn.Module):
    def __init__(self, visual: nn.Module, gelu: nn.Module):
        super().__init__()
        self.visual = visual
        mask = torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1)
        self.transformer = Blocks(WIDTH, WIDTH // 64, gelu, mask)
        self.token_embedding, self.ln_final = nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, WIDTH))
        self.text_projection = nn.Parameter(torch.randn(WIDTH, EMBED))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        for name, size in (("input_resolution", visual.size), ("context_length", CONTEXT), ("vocab_size", VOCAB)):
            self.register_buffer(name, torch.tensor(size))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        x = self.ln_final(self.transformer(self.token_embedding(text) + self.positional_embedding))
        return self.visual(image), x[torch.arange(len(text)), text.argmax(-1)] @ self.text_projection


@pytest.fixture(autouse=True)
def _same_numbers_each_time():
    torch.manual_seed(0)


def published(visual: type = Vit, gelu: type = QuickGelu) -> Multimodal:
    """A network with every parameter and statistic drawn at random, so that none can be forgotten unnoticed."""
    model = Multimodal(visual(gelu()) if visual is Vit else visual(), gelu()).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif tensor.is_floating_point() and name != "logit_scale":
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def batch(model: Multimodal) -> tuple[Tensor, Tensor]:
    text = torch.randint(1, VOCAB - 1, (3, CONTEXT))
    text[0, 4] = text[1, 8] = text[2, 2] = VOCAB - 1
    return torch.randn(3, 3, model.visual.size, model.visual.size), text


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state without the numbers that only TorchScript archives hold."""
    return {name: t for name, t in model.state_dict().items() if name not in clip.TORCHSCRIPT_ONLY}


def load(path: Path) -> nn.Module:
    return AutoLoader("txt_img_matching", "clip", weights=path, device="cpu").get_model()


def assert_same(model: nn.Module, reference: Multimodal) -> None:
    image, text = batch(reference)
    with torch.no_grad():
        expected = reference(image, text)
        torch.testing.assert_close(model.encode_image(image), expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.encode_text(text), expected[1], atol=1e-5, rtol=1e-5)
    assert model.logit_scale == reference.logit_scale


# --- reading ---
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("visual", [Vit, ResNet])
def test_a_torchscript_archive_gives_the_originals_outputs(visual: type, tmp_path, caplog):
    reference = published(visual)
    with torch.no_grad():
        torch.jit.trace(reference, batch(reference), check_trace=False).save(str(tmp_path / "model.pt"))
    assert_same(load(tmp_path / "model.pt"), reference)
    assert not caplog.records


@pytest.mark.parametrize("visual", [Vit, ResNet])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_training_checkpoint_gives_the_originals_outputs(visual: type, prefix: str, tmp_path):
    reference = published(visual)
    state = {prefix + name: tensor for name, tensor in tensors(reference).items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {0: torch.zeros(1)}}}, tmp_path / "epoch_3.pt")
    assert_same(load(tmp_path / "epoch_3.pt"), reference)


def test_bare_weights_of_openais_layout_take_openais_activation_and_say_so(tmp_path, caplog):
    reference = published()
    torch.save(tensors(reference), tmp_path / "model.pt")
    assert_same(load(tmp_path / "model.pt"), reference)
    assert "quick_gelu" in caplog.text


def test_half_precision_is_read_into_the_dtype_of_the_card(tmp_path):
    reference = published()
    half = {name: t.half() if t.ndim > 1 else t for name, t in tensors(reference).items()}
    torch.save(half, tmp_path / "model.pt")
    model = load(tmp_path / "model.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    reference.load_state_dict(half | {name: getattr(reference, name) for name in clip.TORCHSCRIPT_ONLY})
    assert_same(model, reference)


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": EMBED,
        "vision_cfg": {"image_size": SIZE, "layers": 2, "width": WIDTH, "patch_size": 4, "head_width": 32},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCAB, "width": WIDTH, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"},
}


def open_clip_folder(folder: Path, config: dict = OPEN_CLIP, split: bool = False) -> Multimodal:
    reference = published(gelu=nn.GELU)
    for block in reference.visual.transformer.resblocks:
        block.attn.num_heads, block.attn.head_dim = 4, 32
    moved = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    state = {"text." + n if split and n.startswith(moved) else n: t for n, t in tensors(reference).items()}
    if split:
        state["text.attn_mask"] = torch.zeros(CONTEXT, CONTEXT)
    weights.write(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return reference


@pytest.mark.parametrize("split", [False, True])
def test_an_open_clip_folder_says_activation_heads_and_preprocessing(split: bool, tmp_path, caplog):
    reference = open_clip_folder(tmp_path, split=split)
    loader = AutoLoader("txt_img_matching", "clip", weights=tmp_path)
    assert_same(loader.get_model(), reference)
    transform = loader.get_transform()
    assert (transform.mean, transform.std) == ((0.5,) * 3, (0.25,) * 3)
    assert (transform.resize, transform.interpolation, transform.img_size) == ("squash", "bilinear", SIZE)
    assert not caplog.records


@pytest.mark.parametrize("tower", ["vision_cfg", "text_cfg"])
def test_an_open_clip_option_that_zoo_does_not_have_is_refused(tower: str, tmp_path):
    config = json.loads(json.dumps(OPEN_CLIP))
    config["model_cfg"][tower]["ls_init_value"] = 1e-5
    open_clip_folder(tmp_path, config)
    with pytest.raises(WeightsMismatch, match="ls_init_value"):
        load(tmp_path)


def test_an_open_clip_config_of_another_size_is_refused(tmp_path):
    config = json.loads(json.dumps(OPEN_CLIP))
    config["model_cfg"]["vision_cfg"]["layers"] = 3
    open_clip_folder(tmp_path, config)
    with pytest.raises(WeightsMismatch, match=r"image.depth is 2 by the shapes .* and 3 by open_clip_config.json"):
        load(tmp_path)


@pytest.mark.parametrize("visual", [Vit, ResNet])
def test_chinese_clips_own_layout(visual: type, tmp_path):
    import transformers

    text = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1)
    bert = transformers.BertModel(transformers.BertConfig(**text, max_position_embeddings=20, layer_norm_eps=1e-12))
    reference, projection = published(visual).visual, torch.randn(64, EMBED)
    state = {"visual." + name: t for name, t in reference.state_dict().items()}
    state |= {"bert." + name: t for name, t in bert.eval().state_dict().items()}  # with its pooler, which is not used
    state |= {"text_projection": projection, "logit_scale": torch.tensor(4.6)}
    torch.save({"state_dict": {"module." + name: t for name, t in state.items()}}, tmp_path / "clip_cn.pt")
    loader = AutoLoader("txt_img_matching", "clip", weights=tmp_path / "clip_cn.pt")
    model = loader.get_model()
    tokens = torch.randint(1, VOCAB, (2, 7))
    tokens[0, 4:] = 0
    image = torch.randn(2, 3, reference.size, reference.size)
    with torch.no_grad():
        expected = bert(tokens, attention_mask=(tokens != 0).long()).last_hidden_state[:, 0] @ projection
        torch.testing.assert_close(model.encode_text(tokens), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.encode_image(image), reference(image), atol=1e-5, rtol=1e-5)
    assert loader.get_transform().resize == "squash"


def test_a_tower_too_wide_to_guess_its_heads_is_refused():
    state = {name: torch.empty(tuple(2080 if n == WIDTH else n for n in t.shape), device="meta")
             for name, t in tensors(published()).items()}  # fmt: skip
    with pytest.raises(WeightsMismatch, match="heads the image tower of width 2080"):
        clip.to_ours(state, {})


@pytest.mark.parametrize("lost", ["visual.proj", "token_embedding.weight"])
def test_half_a_clip_is_refused_by_name(lost: str):
    state = tensors(published())
    del state[lost]
    with pytest.raises(WeightsMismatch, match="both an image and a text tower"):
        clip.to_ours(state, {})


def test_the_weights_of_another_model_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "model.pt")
    with pytest.raises(WeightsMismatch, match=r"2 tensors \(bias, weight, ...\) are not a CLIP"):
        load(tmp_path / "model.pt")


@pytest.mark.parametrize("lost", ["visual.ln_post.weight", "transformer.resblocks.0.mlp.c_fc.bias"])
def test_a_missing_tensor_is_named(lost: str, tmp_path):
    state = tensors(published())
    del state[lost]
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(WeightsMismatch, match="1 of .* missing"):
        load(tmp_path / "model.pt")


def test_a_tensor_that_is_left_over_is_named(tmp_path):
    torch.save(tensors(published()) | {"visual.extra.weight": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(WeightsMismatch, match="visual.extra.weight"):
        load(tmp_path / "model.pt")


# --- writing ---
@pytest.mark.parametrize("visual", [Vit, ResNet])
def test_openais_layout_survives_the_way_to_ours_and_back(visual: type):
    state = tensors(published(visual))
    back = clip.to_openai(*clip.to_ours(state, {}))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
