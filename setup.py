"""What the package is and what it needs. Exact versions stand in constraints.txt, tool settings in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "zoo/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[1]
README = HERE / "README.md"

setup(
    name="zoo",
    version=VERSION,
    description="CLIP, DALL-E, CLIP-GEN and Stable Diffusion: load by name, generate, and train anywhere",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    # The training scripts are also `zoo train ...`: one script, in the checkout and in the installed package. So are
    # the configs, which a Trainer takes by name.
    packages=[*find_packages(include=["zoo", "zoo.*"]), "zoo.examples", "zoo.deepspeed_configs"],
    package_dir={"zoo.examples": "examples", "zoo.deepspeed_configs": "deepspeed_configs"},
    package_data={
        "zoo": ["py.typed", "assets/**"],
        "zoo.deepspeed_configs": ["*.json"],
        "zoo.examples": ["*.txt"],
    },
    install_requires=[
        "accelerate",
        "deepspeed",
        "filelock",
        "ftfy",
        "huggingface_hub",
        "numpy",
        "pillow",
        "regex",
        "requests",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "torch",
        "tqdm",
        "transformers",
    ],
    extras_require={
        "tensorboard": ["tensorboard"],
        "test": ["diffusers", "pytest", "ruff"],
    },
    entry_points={"console_scripts": ["zoo = zoo.cli:main"]},
)
