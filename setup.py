"""Installs rlhf_jax. Extras: [test] the suite, [parity] its oracles, [plan], [tpu], [cuda]."""

from setuptools import find_packages, setup

setup(
    name="rlhf_jax",
    version="0.1.0",
    description="RLHF for language models in JAX: SFT, reward models by rank loss, clipped PPO.",
    license="Apache-2.0",
    packages=find_packages(include=["rlhf_jax", "rlhf_jax.*"]),
    # What the pages of `label` and `judge` are made of.
    package_data={"rlhf_jax.tools.pages": ["*.css", "*.js", "*.html"]},
    entry_points={
        "console_scripts": [
            f"rlhf-jax-{name} = rlhf_jax.tools.{name}:main"
            for name in ("label", "judge", "respond", "chat", "plot")
        ]
    },
    python_requires=">=3.11",
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    install_requires=[
        "jax>=0.8",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20",
        "etils[epath]>=1.9",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources",  # tensorflow-datasets 4.9.10 imports it without requiring it
        "array_record>=0.7",
        "grain>=0.2.10",
        "transformers>=4.57",
        "huggingface_hub>=0.34",
        "tokenizers>=0.22",
        "jinja2>=3.1",
        "safetensors>=0.5",
        "tyro>=0.9",
        "rich>=13",
        "tensorboardX>=2.6",
        "matplotlib>=3.8",
        "sacrebleu>=2.4",
        "rouge-score>=0.1.2",
        "jaxtyping>=0.3",
        "numpy>=1.26",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "setuptools>=70.1",  # builds the wheel that the tests install
            "beartype>=0.20",
            "hypothesis>=6",
            "nbclient>=0.10",
            "selenium>=4.20",  # drives Debian's chromium, where there is one
            "ipykernel>=6",
            "ruff>=0.14",
        ],
        # Oracles, never imported outside the tests. A constraint holds torch to its CPU build.
        "parity": ["torch>=2.6", "peft>=0.17"],
        "tpu": ["jax[tpu]"],
        # The TPU's compiler, which plans for a slice on a machine without one (run the rest there
        # with JAX_PLATFORMS=cpu). By way of jax, because a bare libtpu resolves to one that does
        # not fit it.
        "plan": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
    },
)
