"What only a GPU can show: several runs on one card, its memory and clocks, every method, a batch. Skipped where there is none."
import gc

import pandas as pd
import pytest
import torch
from conftest import child

from rethink_nb import methods
from rethink_nb import training as T
from rethink_nb.arch import zoo
from rethink_nb.arch.measure import latency
from rethink_nb.core.errors import UserError
from rethink_nb.study import Store, Study, Trial
from rethink_nb.training.augment import plain_batches

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SMALL = dict(data="digits", arch="vgg-digits", ratios=[.5], seeds=2, epochs=2, arms=["parent", "fine-tune", "scratch-e", "scratch-b"])


def results(store): return {id: (store.record(id)["metrics"], store.curve(id)["train_loss"].tolist() if store.record(id)["run"]["kind"] == "train" else None) for id in store.ids()}


def test_several_runs_on_one_card_give_the_bits_of_one(tmp_path):
    study, alone, together = Study(**SMALL), Store(tmp_path/"alone"), Store(tmp_path/"together")
    for store, workers in ((alone, 1), (together, 3)): Trial(study, store).run(workers, "cuda", progress=False)
    assert results(alone) == results(together)


def test_clocks_and_name_of_the_card(tmp_path):
    store = Store(tmp_path/"runs")
    Trial(Study(**SMALL), store).run(1, "cuda", progress=False)
    trained = [store.record(id) for id in store.ids() if store.record(id)["run"]["kind"] == "train"]
    assert len(trained) == 8 and {r["environment"]["device"] for r in trained} == {torch.cuda.get_device_name()}
    assert all(0 < r["cost"]["device_seconds"] <= 1.05*r["cost"]["seconds"] for r in trained)
    try: import pynvml # noqa: F401
    except ImportError: return
    assert all(r["cost"]["joules"] > 0 for r in trained)


def test_memory_is_given_back():
    data, r, held = T.load_data("digits"), T.recipe("cifar", epochs=1), []
    for _ in range(3):
        net = zoo.arch("vgg-digits").build(seed=0)
        T.train(net, data, r, device="cuda")
        del net
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[0] == held[1] == held[2]


def test_too_little_memory_is_told_in_a_line():
    data, r = T.load_data("digits"), T.recipe("cifar", epochs=1, batch=1200, precision="fp32")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 40e6)/total)
    try:
        with pytest.raises(UserError, match="out of memory: take fewer images a step than 1200"): T.train(zoo.arch("resnet56", input=(1, 8, 8)).build(seed=0), data, r, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.)
        gc.collect()
        torch.cuda.empty_cache()
    T.train(zoo.arch("vgg-digits").build(seed=0), data, r, device="cuda") # what failed stands in nobody's way


@pytest.mark.parametrize("name", ["l1", "thinet", "regression", "slimming", "sss", "soft-filter", "magnitude", "random-mask", "guided", "layerwise"])
def test_a_method_on_the_card(name):
    "Trained with what the method adds, pruned, verified, trained on"
    data, r, net = T.load_data("digits"), T.recipe("cifar", epochs=2), zoo.arch("resnet8-digits").build(seed=1)
    T.train(net, data, r, methods.callbacks(name), seed=1, device="cuda")
    pruned = methods.prune(name, net, None if name == "sss" else .3, batches=plain_batches(data.to("cuda"), 200), seed=2)
    assert pruned.verify().ok and all(p.is_cuda for p in pruned.net.parameters())
    assert T.train(pruned.net, data, r, pruned.callbacks(), seed=3, device="cuda").final["test_acc"] > .1


def test_latency_on_the_card():
    big, small = (latency(zoo.arch("vgg16", width=w).build(seed=0).cuda(), batch=1024) for w in (1, .25))
    assert big.device.startswith("cuda") and 0 < small.median < big.median


def test_a_batch_on_the_card(tmp_path):
    "Two kernels share it; called again, nothing is trained"
    (tmp_path/"two.toml").write_text('data = "digits"\narch = "vgg-digits"\nmethod = ["l1", "magnitude"]\nratios = [0.5]\nseeds = 1\nepochs = 2\narms = ["parent", "pruned", "fine-tune", "scratch-e"]\n')
    args = ("python", "-c", "from rethink_nb.cli import main; main()", "batch", "two.toml", "--device", "cuda", "--workers", "2")
    done = child(*args, cwd=tmp_path)
    assert done.returncode == 0, done.output
    store = Store(tmp_path/"runs")
    assert {store.record(id)["environment"]["device"] for id in store.ids()} == {torch.cuda.get_device_name()}
    first = {id: store.record(id)["written"] for id in store.ids()}
    again = child(*args, cwd=tmp_path)
    assert again.returncode == 0 and {id: store.record(id)["written"] for id in store.ids()} == first, again.output
    assert len(pd.read_csv(next(tmp_path.rglob("report.csv")))) >= 5
