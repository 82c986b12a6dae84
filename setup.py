"""Packaging of megatron_sbn and of its stand-alone kernel library sbn_kernels.

`kernels/` itself is not a package: Hugging Face publishes one under that name.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-sbn",
    version="0.1.0",
    description="Distributed pretraining of Sparse-BitNet (ternary, N:M sparse) language models",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_sbn", "megatron_sbn.*"])
    + find_packages(where="kernels", include=["sbn_kernels", "sbn_kernels.*"]),
    package_dir={"sbn_kernels": "kernels/sbn_kernels"},
    package_data={"megatron_sbn": ["py.typed"], "sbn_kernels": ["py.typed"]},
    # Outside a checkout `sbn submit` takes the scripts from there, and any command the recipes.
    data_files=[
        ("share/megatron_sbn/slurm", sorted(str(path) for path in Path("slurm").iterdir())),
        *(
            (f"share/megatron_sbn/{folder}", sorted(str(path) for path in folder.iterdir() if path.is_file()))
            for folder in (Path("recipes"), *sorted(path for path in Path("recipes").iterdir() if path.is_dir()))
        ),
    ],
    install_requires=[
        "torch>=2.11",
        "triton>=3.6",
        "megatron-core>=0.16.1,<0.20",
        "deepspeed>=0.19.8,<0.20",
        "sentencepiece>=0.2",
        "mlflow>=3.1",
        "pydantic>=2.7",
        "PyYAML>=6",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "safetensors>=0.5",
        "pyarrow>=17",
        "zstandard>=0.22",
        "numpy>=1.26",
        "psutil>=5.9",
        "packaging>=24.2",
    ],
    extras_require={
        "tokenizers": ["tokenizers>=0.20"],  # sbn prepare --tokenizer tokenizer.json
        "dev": [
            "ruff",
            "mypy",
            "types-PyYAML",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "uv",
            "tokenizers",
        ],
    },
    entry_points={"console_scripts": ["sbn = megatron_sbn.cli:main"]},
)
