"""Which caption fits a picture: `python examples/match_clip.py [PICTURE] --text "a cat" --text "a dog" [--model NAME]`.

Without arguments it takes a packaged picture and the packaged model, and needs no network.
"""

from __future__ import annotations

import argparse

import torch

from zoo import AutoLoader
from zoo.data import open_dataset, open_image


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", help="a picture file; default: one of the packaged emoji's test split")
    parser.add_argument("--text", action="append", help="a caption, as often as there are captions to choose from")
    parser.add_argument("--model", default="clip-emoji-tiny", help="see `zoo list` (default: %(default)s)")
    args = parser.parse_args(argv)
    captions = args.text or ["tulip", "volcano", "police car", "火山"]
    picture = open_image(args.picture, mode=None) if args.picture else tulip()

    loader = AutoLoader(task_name="txt_img_matching", model_name=args.model)
    model, tokenizer, transform = loader.get_model(), loader.get_tokenizer(), loader.get_transform()
    image = transform(picture)[None].to(loader.device)  # (1, 3, size, size)
    tokens = tokenizer.tokenize_as_tensor(captions).to(loader.device)  # (captions, context)
    with torch.inference_mode():
        probabilities = model.similarity(image, tokens).softmax(-1)[0]  # (captions,)
    for caption, probability in zip(captions, probabilities.tolist(), strict=True):
        print(f"{probability:6.1%}  {caption}")


def tulip():
    """A picture that the packaged model was not trained on."""
    dataset = open_dataset("emoji", split="test")
    return next(picture for picture, caption in dataset if caption == "tulip")


if __name__ == "__main__":
    main()
