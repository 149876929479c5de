"""Small files that change a Stable Diffusion that is loaded: LoRA, and words of textual inversion.

model = AutoLoader("text2img", "stable-diffusion-v1-5").get_model()
undo = add_lora(model, "watercolour.safetensors", scale=0.8)
token = add_concept(model, "cat-toy.safetensors")  # "<cat-toy>"
model.generate(f"a photo of {token} in the snow")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from zoo import weights
from zoo.converters import lora
from zoo.errors import SettingsError
from zoo.models.concepts import add_concept as grow
from zoo.models.concepts import merge_lora, read_concept
from zoo.models.stable_diffusion import StableDiffusion
from zoo.tokenizers.concepts import ConceptTokenizer


def add_lora(model: StableDiffusion, file: str | Path, scale: float = 1.0) -> Callable[[], None]:
    """Adds `scale` times a LoRA to the weights of a model -> a function that takes it out again, bit for bit; of
    several the last must go first.

    `file`: of diffusers (PEFT's names or the older ones) or kohya's scripts. Raises UnreadableWeights, and
    WeightsMismatch for a LoRA of another base or kind.
    """
    return merge_lora(model, lora.to_ours(weights.read(file), model.state_dict().keys()), scale)


def add_concept(model: StableDiffusion, file: str | Path, name: str | None = None) -> str:
    """Teaches a model a word -> the token that stands for it in prompts: the file's own, or `name`.

    `file`: of diffusers, or of the popular web UI, whose token is what the file is called. Raises UnreadableWeights,
    WeightsMismatch for one of another base, SettingsError for a token that there is already.
    """
    if model.tokenizer is None:
        raise SettingsError("a word needs the model's tokenizer: load the model by AutoLoader")
    state = weights.read(file)
    try:
        token, vectors = read_concept(state, name)
    except SettingsError:
        token, vectors = read_concept(state, Path(file).stem)
    tokenizer = model.tokenizer
    tokenizer = tokenizer if isinstance(tokenizer, ConceptTokenizer) else ConceptTokenizer(tokenizer)
    grow(model.text, tokenizer, token, vectors)
    model.tokenizer = tokenizer
    return token
