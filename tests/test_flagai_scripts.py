"""The flow of FlagAI's CLIP examples (inference_clip.py, train_clip.py) with nothing but the import lines changed.

The weights are random, of ViT-B/32's real sizes, in OpenAI's layout, where a download would have put them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from PIL import Image

from zoo import weights
from zoo.catalog import find
from zoo.converters.clip import to_openai
from zoo.models.clip import Clip, ClipConfig

INFERENCE = """
import torch
from PIL import Image
from zoo import AutoLoader
from zoo.data import clip_transform

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
loader = AutoLoader(task_name="txt_img_matching", model_name="clip-base-p32-224")
model = loader.get_model()
model.eval()
model.to(device)
tokenizer = loader.get_tokenizer()
transform = clip_transform(img_size=model.image_size)

image = Image.open("./img/0.png")
image = transform(image).unsqueeze(0).to(device)
text = tokenizer.tokenize_as_tensor(["a diagram", "a dog", "a cat"]).to(device)
with torch.no_grad():
    image_features = model.encode_image(image)
    text_features = model.encode_text(text)
    text_probs = (image_features @ text_features.T).softmax(dim=-1)
assert image_features.shape == (1, 512) and text_features.shape == (3, 512)
assert text_probs.sum().isclose(torch.tensor(1.0))
print("inference done")
"""

TRAINING = """
import torch
from zoo import AutoLoader
from zoo import Trainer
from zoo.data import CsvDataset, clip_transform, collate_fn

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
loader = AutoLoader(task_name="txt_img_matching", model_name="CLIP-base-p32-224")
model = loader.get_model()
tokenizer = loader.get_tokenizer()
trainer = Trainer(env_type="pytorch", epochs=5, pytorch_device=device, batch_size=64, lr=1e-4, log_interval=1)

train_dataset = CsvDataset("pairs.csv", "img", clip_transform(img_size=model.image_size), tokenizer)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
with torch.no_grad():
    before = model(**collate_fn([train_dataset[i] for i in range(len(train_dataset))]))["loss"]
trainer.train(model, optimizer=optimizer, train_dataset=train_dataset, collate_fn=collate_fn)
model.eval()
with torch.no_grad():
    after = model(**collate_fn([train_dataset[i] for i in range(len(train_dataset))]))["loss"]
assert after < before, (before, after)
print("training done")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures and pairs.csv, and a home with the weights of clip-base-p32-224."""
    folder = tmp_path_factory.mktemp("flagai")
    torch.manual_seed(0)
    model = Clip(ClipConfig.from_dict(find("txt_img_matching", "clip-base-p32-224").config))
    state = to_openai(model.state_dict(), asdict(model.config))
    weights.write(state, folder / "home/clip-base-p32-224/open_clip_model.safetensors")
    (folder / "img").mkdir()
    names = ("red", "green", "blue", "white")
    for i, name in enumerate(names):
        Image.new("RGB", (260, 240), name).save(folder / f"img/{i}.png")
    lines = [f"a {name} wall\t{i}.png" for i, name in enumerate(names)]
    (folder / "pairs.csv").write_text("\n".join(["title\tfilepath", *lines]) + "\n")
    return folder


@pytest.mark.parametrize(("script", "done"), [(INFERENCE, "inference done"), (TRAINING, "training done")])
def test_the_script_runs(place, script, done):
    environment = os.environ | {"ZOO_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=place, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip().endswith(done)
