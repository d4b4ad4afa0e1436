"Data sets read from real and from damaged files; splits, picks and augmentation"
import gzip, hashlib, tarfile
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pytest
import torch

from rethink_nb.core.errors import UserError
from rethink_nb.core.seed import generator
from rethink_nb.training import augment as A
from rethink_nb.training import data as D

fashion = D.find(list(D._fashion_sha), [D._debian])
needs_fashion = pytest.mark.skipif(fashion is None, reason=f"Fashion-MNIST is not in {D._debian} (apt install dataset-fashion-mnist)")


@pytest.fixture
def nothing(monkeypatch, tmp_path):
    "A machine on which no data set lies"
    monkeypatch.delenv("RETHINK_NB_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(D, "_debian", tmp_path / "none")
    return tmp_path


def refusal(f, *args, **kwargs) -> str:
    with pytest.raises(UserError) as e: f(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def cifar_bytes(n, coarse, classes, seed=0):
    "`n` records of CIFAR's true layout, with what should be read from them"
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(n, 3, 32, 32), dtype=np.uint8)
    labels = (np.arange(n) % classes).astype(np.uint8)
    head = [labels // 5, labels] if coarse else [labels]
    return np.concatenate([np.stack(head, 1), images.reshape(n, -1)], 1).tobytes(), images, labels


# Splits -------------------------------------------------------------------------------------------------------------------------

def test_digits_are_split_without_overlap():
    from sklearn.datasets import load_digits
    d, raw = D.load_data("digits"), load_digits()
    ours = torch.cat([torch.cat([s.images.flatten(1).long(), s.labels[:, None]], 1) for s in d.splits.values()])
    theirs = torch.cat([torch.from_numpy(raw.data * 255 / 16).round().long(), torch.from_numpy(raw.target)[:, None]], 1)
    assert sorted(ours.tolist()) == sorted(theirs.tolist())


@pytest.mark.parametrize("n", [10, 137, 990])
def test_pick_is_a_partition_that_keeps_the_shares(n):
    labels = torch.arange(1000) % 10
    chosen, left = D.pick(labels, n, seed=3)
    assert torch.equal(torch.cat([chosen, left]).sort().values, torch.arange(1000)) and len(chosen) == n
    assert all(abs(c - n / 10) < 1 for c in torch.bincount(labels[chosen], minlength=10).tolist())
    assert torch.equal(chosen, chosen.sort().values)


@pytest.mark.parametrize("kw", [dict(subset=0), dict(subset=-5), dict(subset=9), dict(subset=1001), dict(subset=2.5), dict(subset="10"),
                                dict(val=3), dict(val=1200), dict(val=-1)])
def test_numbers_that_no_split_can_have_are_refused(kw): refusal(D.load_data, "digits", **kw)


def test_split_seed_moves_validation_only():
    a, b, c = D.load_data("digits"), D.load_data("digits", seed=1), D.load_data("digits", seed=1)
    assert torch.equal(a.test.images, b.test.images) and not torch.equal(a.val.images, b.val.images)
    assert b.checksum == c.checksum != a.checksum
    assert len(D.load_data("digits", val=0).val) == 0
    assert D.load_data("digits", subset=1000).checksum == a.checksum


# Augmentation -------------------------------------------------------------------------------------------------------------------

def test_crop_and_mirror_equal_torchvision_image_by_image():
    from torchvision.transforms import functional as T
    x, toy = torch.randint(256, (40, 3, 12, 12), dtype=torch.uint8), replace(D.load_data("digits"), pad=3, flip=True)
    dy, dx, flip = A.draw(40, toy, generator(0, "a"))
    got = A.crop_flip(x, dy, dx, flip, 3)
    for i in range(40):
        want = T.crop(T.pad(x[i], 3), int(dy[i]), int(dx[i]), 12, 12)
        assert torch.equal(got[i], T.hflip(want) if flip[i] else want)
    assert set(dy.tolist()) == set(range(7)) and 5 < int(flip.sum()) < 35


def test_normalise_equals_torchvision():
    from torchvision.transforms import functional as T
    d = replace(D.load_data("digits"), mean=(.4914, .4822, .4465), std=(.2023, .1994, .2010))
    x = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    assert torch.allclose(A.normalise(x, d), T.normalize(x / 255, d.mean, d.std), atol=1e-6)


def test_batches_replay_from_their_seed():
    d = replace(D.load_data("digits"), pad=2, flip=True)
    a, b, c = (A.batch(d.train.images, torch.arange(64), d, A.draw(64, d, generator(s, "x"))) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_sees_the_same_batch():
    d, idx = replace(D.load_data("digits"), pad=2, flip=True), torch.arange(256)
    cpu, gpu = (A.batch(x.train.images, idx, x, A.draw(256, d, generator(0, "x"))).cpu() for x in (d, d.to("cuda")))
    assert torch.allclose(cpu, gpu, atol=1e-6)


# Fashion-MNIST ------------------------------------------------------------------------------------------------------------------

@needs_fashion
def test_real_fashion_mnist():
    d = D.load_data("fashion-mnist", subset=2000)
    assert [len(s) for s in d.splits.values()] == [2000, 5000, 10000] and d.input == (1, 28, 28)
    assert d.train.counts(10) == [200] * 10 and d.val.counts(10) == [500] * 10 and d.test.counts(10) == [1000] * 10
    assert d.checksum == "753bcd70b39c586e950c4b26b92abaffc043cdc1444f75d7ad0941cedd996089"
    assert "subset of 2,000" in repr(d)


@needs_fashion
@pytest.mark.parametrize("sub", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_fashion_mnist_is_found_plain_or_packed(nothing, monkeypatch, sub):
    here = nothing / "data" / sub
    here.mkdir(parents=True)
    for f in fashion[:3]: (here / f.name).symlink_to(f)
    (here / fashion[3].name.removesuffix(".gz")).write_bytes(gzip.decompress(fashion[3].read_bytes()))
    assert len(D.read_fashion(nothing / "data")[1]) == 10000
    monkeypatch.setenv("RETHINK_NB_DATA", str(nothing / "data"))
    assert len(D.find(list(D._fashion_sha), [p / sub for p in D.bases()])) == 4


@needs_fashion
@pytest.mark.parametrize("harm", ["cut", "flipped", "other"])
def test_damaged_fashion_mnist_is_named(nothing, harm):
    for f in fashion: (nothing / f.name).symlink_to(f)
    bad = nothing / "train-labels-idx1-ubyte.gz"
    raw = bad.read_bytes()
    bad.unlink()
    plain = bytearray(gzip.decompress(raw))
    plain[100] ^= 1
    bad.write_bytes({"cut": raw[:len(raw) // 2], "flipped": gzip.compress(bytes(plain)), "other": b"<html>not found</html>"}[harm])
    assert str(bad) in refusal(D.load_data, "fashion-mnist", root=nothing)


def test_no_fashion_mnist_says_what_to_put_where(nothing):
    line = refusal(D.load_data, "fashion-mnist", root=nothing / "here")
    assert "t10k-labels-idx1-ubyte.gz" in line and str(nothing / "here/fashion-mnist") in line and "dataset-fashion-mnist" in line


def test_fashion_mnist_without_network(nothing, monkeypatch):
    def cut(*a, **k): raise URLError("no route to host")
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", cut)
    line = refusal(D.load_data, "fashion-mnist", root=nothing, download=True)
    assert "no route to host" in line and "dataset-fashion-mnist" in line


# CIFAR --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("coarse,classes", [(False, 10), (True, 100)])
def test_cifar_records(tmp_path, coarse, classes):
    raw, images, labels = cifar_bytes(200, coarse, classes)
    half = len(raw) // 2
    files = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for f, part in zip(files, (raw[:half], raw[half:])): f.write_bytes(part)
    s = D.read_cifar(files, coarse, images=100)
    assert np.array_equal(s.images.numpy(), images) and np.array_equal(s.labels.numpy(), labels)
    assert s.images.dtype == torch.uint8 and s.labels.dtype == torch.int64


def small(monkeypatch, name, images):
    "The registered set `name`, with that many images a file"
    source = D.datasets.get(name)
    monkeypatch.setitem(D.datasets.items, name, replace(source, read=replace(source.read, images=images)))
    return source.read


@pytest.mark.parametrize("name,classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_by_name(nothing, monkeypatch, name, classes):
    files = small(monkeypatch, name, (1000, 500))
    (nothing / files.folder).mkdir()
    for names, n in ((files.train, 1000), (files.test, 500)):
        for i, f in enumerate(names): (nothing / files.folder / f).write_bytes(cifar_bytes(n, files.coarse, classes, i)[0])
    d = D.load_data(name, root=nothing, val=200, subset=400)
    assert [len(s) for s in d.splits.values()] == [400, 200, 500] and d.input == (3, 32, 32)
    assert d.val.counts(classes) == [200 // classes] * classes and d.mean == (.4914, .4822, .4465)
    cut = nothing / files.folder / files.test[0]
    cut.write_bytes(cut.read_bytes()[:-(3072 + 1 + files.coarse)]) # a whole record is missing: only the count can tell
    assert str(cut) in refusal(D.load_data, name, root=nothing)


def test_cifar_files_that_are_not_cifar(tmp_path):
    f = tmp_path / "data_batch_1.bin"
    for raw in (b"", bytes(3072), bytes([11]) + bytes(3072)):
        f.write_bytes(raw)
        assert str(f) in refusal(D.read_cifar, [f])
    assert "missing.bin cannot be read" in refusal(D.read_cifar, [tmp_path / "missing.bin"])


@pytest.mark.parametrize("name,archive", [("cifar10", "cifar-10-binary.tar.gz"), ("cifar100", "cifar-100-binary.tar.gz")])
def test_no_cifar_says_what_to_put_where(nothing, monkeypatch, name, archive):
    def cut(*a, **k): raise URLError("no route to host")
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", cut)
    for line in (refusal(D.load_data, name), refusal(D.load_data, name, download=True)):
        assert archive in line and ".cache/rethink_nb" in line
    assert "no route to host" in line


def test_cifar_download_unpacks_an_archive_carried_here(nothing, monkeypatch):
    files = small(monkeypatch, "cifar10", (50, 50))
    for f in files.train + files.test:
        (nothing / "src" / files.folder).mkdir(parents=True, exist_ok=True)
        (nothing / "src" / files.folder / f).write_bytes(cifar_bytes(50, False, 10)[0])
    with tarfile.open(nothing / files.archive, "w:gz") as t: t.add(nothing / "src" / files.folder, files.folder)
    md5 = hashlib.md5((nothing / files.archive).read_bytes()).hexdigest()
    read = replace(files, images=(50, 50), md5=md5)
    assert [len(s) for s in read(nothing, download=True)] == [250, 50]


def test_unknown_data_set():
    assert "did you mean" in refusal(D.load_data, "fashion-minst")
    assert "unknown data set" in refusal(D.load_data, "imagenette")
