"""All package metadata.

The folder ``kernels/`` is installed as ``i2am.kernels``: the top-level name belongs to a package of
Hugging Face's.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

EXPORT = ["pyarrow>=17", "zarr>=3.1"]
# torchvision and torch-fidelity, which needs it, are in no extra: PyPI's torchvision replaces a CPU
# build of torch; tests have stand-ins
METRICS = ["scipy>=1.13", "torchmetrics>=1.8"]
PLOTS = ["matplotlib>=3.9"]
RAY = ["ray>=2.40"]
TRAIN = ["accelerate>=1.0", "torchmetrics>=1.8"]
TEST = [
    *EXPORT,
    *PLOTS,
    *RAY,
    *TRAIN,
    "hypothesis>=6.100",
    "playwright>=1.50",
    "psutil>=6.0",
    "pytest>=8.0",
    "pytest-benchmark>=5.0",
    "pytest-cov>=5.0",
    "pytest-xdist>=3.6",
    "scikit-image>=0.24",
    "scipy>=1.13",
    "xarray>=2025.1",
]

setup(
    name="i2am",
    version="0.1.0",
    description="Image-to-image attribution maps of diffusion pipelines",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # listed by hand: find_packages would not see that kernels/ is i2am.kernels
    packages=[
        "i2am",
        "i2am.adapters",
        "i2am.adapters.attention",
        "i2am.adapters.prompts",
        "i2am.attribution",
        "i2am.cli",
        "i2am.data",
        "i2am.evaluation",
        "i2am.evaluation.scores",
        "i2am.files",
        "i2am.kernels",
        "i2am.kernels.fused",
        "i2am.layouts",
        "i2am.metrics",
        "i2am.models",
        "i2am.models.conversion",
        "i2am.plots",
        "i2am.training",
        "i2am.viewer",
    ],
    package_dir={
        "i2am": "i2am",
        "i2am.kernels": "kernels",
        "i2am.kernels.fused": "kernels/fused",
    },
    package_data={
        "i2am": ["py.typed"],
        "i2am.kernels": ["README.md"],
        "i2am.models": ["**/*.json", "*.md", "**/*.safetensors"],
        "i2am.viewer": ["*.css", "*.html", "*.js"],
    },
    include_package_data=False,
    install_requires=[
        "click>=8.2",
        "diffusers>=0.42",
        "numpy>=1.26",
        "pillow>=10.3",
        "safetensors>=0.8",
        "torch>=2.11",
        "tqdm>=4.60",
        "transformers>=5.0",
        (
            "triton>=3.6; sys_platform == 'linux' and "
            "(platform_machine == 'x86_64' or platform_machine == 'aarch64')"
        ),
    ],
    extras_require={
        "metrics": METRICS,
        "plots": PLOTS,
        "export": EXPORT,
        "ray": RAY,
        "train": TRAIN,
        "test": TEST,
        "dev": [*TEST, "mypy>=1.15", "ruff>=0.12"],
    },
    entry_points={"console_scripts": ["i2am = i2am.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
