"""`zoo export`: a Stable Diffusion for other programs, as a folder of diffusers or a single file of CompVis."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.models.stable_diffusion import StableDiffusion

LIBRARIES = {"vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", "UNet2DConditionModel"]}
VERSION = "0.21.0"  # whose layout this is; for one that inpaints diffusers asks
WEIGHTS = {"text_encoder": "model.safetensors"}  # and of the others diffusers' own name
TOKENIZERS = {"CLIPTextModel": "CLIPTokenizer", "BertModel": "BertTokenizer"}


EXAMPLES = """\
examples:
  zoo export stable-diffusion sd-emoji --weights runs/stable_diffusion
  zoo export stable-diffusion-v1-5 sd15.safetensors
"""


def register(commands: argparse._SubParsersAction, **settings: object) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "export", help="write a Stable Diffusion for other programs", epilog=EXAMPLES, **settings
    )
    parser.add_argument("model", help="a name that `zoo list` shows, or stable-diffusion with --weights")
    parser.add_argument("out", type=Path, help="a folder, as diffusers has it, or NAME.safetensors, CompVis's one file")
    parser.add_argument("--weights", metavar="PATH", help="a local file or folder with its weights")
    parser.add_argument("--model-dir", metavar="FOLDER", help="where downloads live (default: the user's cache)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes it, and says where."""
    from zoo import AutoLoader, weights
    from zoo.converters.stable_diffusion import to_compvis
    from zoo.errors import SettingsError
    from zoo.models.stable_diffusion import StableDiffusion

    model = AutoLoader("text2img", args.model, args.model_dir, args.weights, device="cpu").get_model()
    if not isinstance(model, StableDiffusion):
        raise SettingsError(f"{args.model} is no Stable Diffusion: of others zoo's own file is what is handed on")
    if args.out.suffix == ".safetensors":
        weights.write(to_compvis(model.state_dict(), asdict(model.config)), args.out)
    else:
        save_diffusers(model, args.out)
    print(args.out)
    return 0


def save_diffusers(model: StableDiffusion, folder: str | Path) -> None:
    """Writes model_index.json, the networks with their configs, the scheduler's config and the tokenizer's files. The
    folder may be there; files of the same names are replaced. Raises WeightsMismatch for what diffusers does not have.
    """
    from zoo import weights
    from zoo.converters.stable_diffusion import to_diffusers

    folder = Path(folder)
    parts = to_diffusers(model.state_dict(), asdict(model.config))
    scheduler = parts.pop("scheduler")
    for name, (state, config) in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        file = WEIGHTS.get(name, "diffusion_pytorch_model.safetensors")
        weights.write(state, folder / name / file, metadata={"format": "pt"})
        _write(folder / name / "config.json", config)
    _write(folder / "scheduler" / "scheduler_config.json", scheduler)
    tower = parts["text_encoder"][1]["architectures"][0]
    tokenizer = TOKENIZERS.get(tower, "XLMRobertaTokenizer")
    if model.tokenizer is not None:
        _write_tokenizer(model, folder / "tokenizer", tokenizer)
    library = "transformers" if tower in TOKENIZERS else "diffusers.pipelines.deprecated.alt_diffusion"
    _write(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionInpaintPipeline" if model.inpaints else "StableDiffusionPipeline",
            "_diffusers_version": VERSION,
            **LIBRARIES,
            "text_encoder": [library, tower],
            "tokenizer": ["transformers", tokenizer],
            "scheduler": ["diffusers", scheduler["_class_name"]],
            **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), [None, None]),
            "requires_safety_checker": False,
        },
    )


def _write_tokenizer(model: StableDiffusion, folder: Path, kind: str) -> None:
    """vocab.json, merges.txt and how prompts are padded, of CLIP's; of the others what transformers writes."""
    from zoo.errors import SettingsError
    from zoo.tokenizers import ClipTokenizer, TransformersTokenizer

    tokenizer: Any = model.tokenizer
    if isinstance(tokenizer, TransformersTokenizer):
        tokenizer.tokenizer.save_pretrained(folder)
        return
    if not isinstance(tokenizer, ClipTokenizer):
        raise SettingsError(f"a {type(tokenizer).__name__} has no form that diffusers reads: load the model without it")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer._bpe.save(str(folder))  # of the tokenizers library, the one place that knows the merges
    start, end, pad = (tokenizer.decoder[id] for id in (model.config.start, model.config.end, model.config.pad))
    words = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    _write(folder / "special_tokens_map.json", words)
    more = {"tokenizer_class": kind, "model_max_length": model.config.window, "do_lower_case": True}
    _write(folder / "tokenizer_config.json", words | more)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
