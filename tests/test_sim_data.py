import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcodec.sim import data

FILES = {
    "train-images-idx3-ubyte.gz": (20, 4, 5),
    "train-labels-idx1-ubyte.gz": (20,),
    "t10k-images-idx3-ubyte.gz": (6, 4, 5),
    "t10k-labels-idx1-ubyte.gz": (6,),
}


def idx(array):
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return {
        name: generator.integers(0, 256 if len(shape) > 1 else 3, shape, np.uint8)
        for name, shape in FILES.items()
    }


@pytest.fixture
def write(arrays):
    def write(folder):
        folder.mkdir(parents=True)
        for name, array in arrays.items():
            (folder / name).write_bytes(gzip.compress(idx(array)))
        return folder

    return write


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch, tmp_path):
    data.load_dataset.cache_clear()
    monkeypatch.delenv("FEDCODEC_DATA_DIR", raising=False)
    monkeypatch.setattr(data, "SYSTEM_DIRECTORY", tmp_path / "system")
    yield
    data.load_dataset.cache_clear()


def test_idx_files_are_read_and_standardised_by_the_training_pixels(arrays, write, tmp_path):
    loaded = data.load_dataset("mnist", write(tmp_path / "anywhere"))
    train = arrays["train-images-idx3-ubyte.gz"].astype(np.float64)
    test = arrays["t10k-images-idx3-ubyte.gz"].astype(np.float64)
    mean, deviation = train.mean(), train.std(ddof=1)
    np.testing.assert_allclose(loaded.train_images[:, 0], (train - mean) / deviation, rtol=1e-4)
    np.testing.assert_allclose(loaded.test_images[:, 0], (test - mean) / deviation, rtol=1e-4)
    assert loaded.test_labels.tolist() == arrays["t10k-labels-idx1-ubyte.gz"].tolist()
    assert loaded.train_labels.dtype == torch.int64
    assert loaded.classes == 10


@pytest.mark.parametrize("place", ["inside --data-dir", "environment", "system"])
def test_every_documented_place_is_searched(place, write, tmp_path, monkeypatch):
    folder = tmp_path / ("system" if place == "system" else "other")
    write(folder / "fashion-mnist")
    if place == "environment":
        monkeypatch.setenv("FEDCODEC_DATA_DIR", str(folder))
    loaded = data.load_dataset("fashion-mnist", folder if place.startswith("inside") else None)
    assert len(loaded.train_labels) == 20


def test_missing_files_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset-fashion-mnist.*--data-dir"):
        data.load_dataset("fashion-mnist", tmp_path)


def test_mnist_is_never_taken_for_fashion_mnist(write, tmp_path):
    folder = write(tmp_path / "mnist")
    with pytest.raises(FileNotFoundError, match="fashion-mnist not found"):
        data.load_dataset("fashion-mnist", folder)


def test_unequal_numbers_of_images_and_labels_are_refused(write, tmp_path):
    folder = write(tmp_path / "mnist")
    short = idx(np.zeros(19, np.uint8))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(short))
    with pytest.raises(ValueError, match="20 images but 19 labels"):
        data.load_dataset("mnist", folder)


@pytest.mark.parametrize(
    "content",
    [
        b"not gzip",
        gzip.compress(idx(np.zeros((2, 3), np.uint8)))[:-9],
        gzip.compress(idx(np.zeros((2, 3), np.uint8))[:-1]),
        gzip.compress(idx(np.zeros((2, 3), np.uint8)) + b"\0"),
        gzip.compress(idx(np.zeros(2, np.uint8))),
        gzip.compress(b"\0\0\x0d\x02" + idx(np.zeros((2, 3), np.uint8))[4:]),
        gzip.compress(b"\0\0\x08\x02\0\0"),
        gzip.compress(b"\0\0\x08\x02" + b"\xff" * 8),
    ],
    ids=["text", "cut gzip", "short", "long", "dimensions", "type", "cut header", "bomb"],
)
def test_damaged_idx_files_are_refused(content, tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.gz"):
        data.read_idx(path, dimensions=2)


BATCHES = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]


@pytest.fixture
def records():
    generator = np.random.default_rng(0)
    records = {name: generator.integers(0, 256, (3, 3073), np.uint8) for name in BATCHES}
    for name, batch in records.items():
        batch[:, 0] = [0, 9, BATCHES.index(name)]
        batch[:, 1:1025] //= 4  # a darker red
    return records


@pytest.fixture
def write_cifar10(records):
    def write(folder):
        folder.mkdir(parents=True)
        for name, batch in records.items():
            batch.tofile(folder / name)
        return folder

    return write


def test_cifar10_is_read_and_each_channel_standardised(records, write_cifar10, tmp_path):
    loaded = data.load_dataset("cifar10", write_cifar10(tmp_path / "anywhere"))
    train = np.concatenate([records[name] for name in BATCHES[:5]]).astype(np.float64)
    test = records["test_batch.bin"].astype(np.float64)
    assert loaded.train_labels.tolist() == train[:, 0].tolist()
    assert loaded.test_labels.tolist() == [0, 9, 5]
    assert loaded.classes == 10
    assert loaded.train_images.shape == (15, 3, 32, 32)
    pixels, test_pixels = (array[:, 1:].reshape(-1, 3, 32, 32) for array in (train, test))
    for channel in range(3):
        mean, deviation = pixels[:, channel].mean(), pixels[:, channel].std(ddof=1)
        for found, raw in ((loaded.train_images, pixels), (loaded.test_images, test_pixels)):
            expected = (raw[:, channel] - mean) / deviation
            np.testing.assert_allclose(found[:, channel], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folder", ["", "cifar10", "cifar-10-batches-bin"])
def test_cifar10_is_found_in_its_official_folder_too(folder, write_cifar10, tmp_path):
    write_cifar10(tmp_path / "data" / folder)
    assert len(data.load_dataset("cifar10", tmp_path / "data").train_labels) == 15


def test_cifar10_is_found_where_the_environment_says(write_cifar10, tmp_path, monkeypatch):
    write_cifar10(tmp_path / "data" / "cifar10" / "cifar-10-batches-bin")
    monkeypatch.setenv("FEDCODEC_DATA_DIR", str(tmp_path / "data"))
    assert len(data.load_dataset("cifar10").train_labels) == 15


def test_missing_cifar10_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-bin.*Toronto.*data_batch_1"):
        data.load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (bytes(3072), "3072 bytes, not records of 3073"),
        (bytes(3074), "3074 bytes"),
        (bytes(3073) + b"\x0a" + bytes(3072), "label 10"),
    ],
)
def test_damaged_cifar10_files_are_refused(content, message, tmp_path):
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_1\.bin.*{message}"):
        data.read_cifar10(path)


def test_digits_are_split_alike_in_every_class():
    digits = data.load_dataset("digits")
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    train = torch.bincount(digits.train_labels).numpy()
    test = torch.bincount(digits.test_labels).numpy()
    np.testing.assert_allclose(test / (train + test), 0.2, atol=0.01)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown data set 'nope'"):
        data.load_dataset("nope", Path("."))


def test_iid_shares_are_a_permutation_and_as_equal_as_can_be():
    parts = data.partition_iid(103, 10, np.random.default_rng(1))
    assert sorted(np.concatenate(parts)) == list(range(103))
    assert np.concatenate(parts).tolist() != list(range(103))
    assert {len(part) for part in parts} == {10, 11}


def test_iid_refuses_more_clients_than_samples():
    with pytest.raises(ValueError, match="cannot be shared"):
        data.partition_iid(3, 4, np.random.default_rng(1))


LABELS = np.repeat(np.arange(10), 200)


def skew(alpha):
    parts = data.partition_dirichlet(LABELS, 20, alpha, np.random.default_rng(2))
    assert sorted(np.concatenate(parts)) == list(range(len(LABELS)))
    assert min(map(len, parts)) >= data.MINIMUM_SAMPLES
    return np.mean([np.bincount(LABELS[part]).max() / len(part) for part in parts])


def test_dirichlet_is_a_permutation_and_a_smaller_alpha_skews_more():
    assert skew(0.2) > skew(1.0) + 0.1 > skew(100.0) + 0.2
    assert skew(100.0) < 0.2


def test_dirichlet_follows_its_generator():
    same, again, other = (
        data.partition_dirichlet(LABELS, 20, 0.5, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert all(np.array_equal(*pair) for pair in zip(same, again, strict=True))
    assert [len(part) for part in same] != [len(part) for part in other]


@pytest.mark.parametrize(
    ("clients", "alpha", "message"),
    [(201, 1.0, "fewer than 10"), (150, 0.001, "fewer than 10"), (5, 0.0, "above zero")],
)
def test_dirichlet_refuses_what_cannot_be_shared_out(clients, alpha, message, monkeypatch):
    monkeypatch.setattr(data, "MAXIMUM_DRAWS", 3)
    with pytest.raises(ValueError, match=message):
        data.partition_dirichlet(LABELS, clients, alpha, np.random.default_rng(0))


def test_a_tenth_of_a_client_is_held_out_at_random():
    part = np.arange(100, 171)
    training, validation = data.hold_out(part, np.random.default_rng(1))
    assert len(validation) == 7
    assert sorted(np.concatenate([training, validation])) == part.tolist()
    assert validation.tolist() != part[:7].tolist()
    again = data.hold_out(part, np.random.default_rng(1))
    assert np.array_equal(training, again[0])


def test_nothing_may_be_held_out_but_not_all():
    training, validation = data.hold_out(np.arange(5), np.random.default_rng(1), share=0)
    assert (len(training), len(validation)) == (5, 0)
    with pytest.raises(ValueError, match="below one"):
        data.hold_out(np.arange(5), np.random.default_rng(1), share=1)


def test_labels_and_shapes_that_do_not_fit_are_refused(arrays, write, tmp_path):
    def refused(what, **changes):
        for name, array in changes.items():
            file = {"labels": "t10k-labels-idx1-ubyte.gz", "images": "t10k-images-idx3-ubyte.gz"}
            arrays[file[name]] = array
        with pytest.raises(ValueError, match=what):
            data.load_dataset("mnist", write(tmp_path / what.replace(" ", "-")))

    labels, images = arrays["t10k-labels-idx1-ubyte.gz"], arrays["t10k-images-idx3-ubyte.gz"]
    refused("the label 255 in data of 10", labels=np.where(labels == labels[0], 255, labels))
    refused("images of shape", labels=labels, images=images.reshape(len(images), 1, -1))
    refused("images of shape .0,", labels=labels[:0], images=images[:0])


def test_damage_inside_the_compressed_stream_is_named(write, tmp_path):
    folder = write(tmp_path / "mnist")
    path = folder / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    messages = []
    for place in range(10, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            data.read_idx(path, dimensions=3)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 0.9 * (len(whole) - 10)
    assert all(path.name in message for message in messages)


def test_a_digest_is_of_the_data(arrays, write, tmp_path):
    first = data.dataset_digest("mnist", write(tmp_path / "first"))
    assert data.dataset_digest("mnist", write(tmp_path / "copy")) == first
    arrays["t10k-labels-idx1-ubyte.gz"] = arrays["t10k-labels-idx1-ubyte.gz"][::-1]
    assert data.dataset_digest("mnist", write(tmp_path / "other")) != first
