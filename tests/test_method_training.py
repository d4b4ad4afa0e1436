"What methods add to a training: it changes nothing where it should not, keeps at zero what is gone, and is taken up bit by bit."
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rethink_nb import methods
from rethink_nb import training as T
from rethink_nb.arch import zoo
from rethink_nb.core.events import Callback
from rethink_nb.methods.slimming import SparseScales
from rethink_nb.methods.soft_filter import SoftFilters
from rethink_nb.methods.sss import SparseFactors
from rethink_nb.testing.toys import same_tensors

ARCH, RECIPE = zoo.arch("vgg-digits"), T.recipe("digits", epochs=3)


@pytest.fixture(scope="module")
def data(): return T.load_data("digits", subset=200)


@pytest.fixture(scope="module")
def dense(data):
    net = ARCH.build(seed=1)
    return net, T.train(net, data, RECIPE, seed=1, device="cpu")


def curve(history): return [{k: v for k, v in row.items() if k not in ("seconds", "device_seconds", "joules")} for row in history.rows]


def test_a_price_of_nothing_is_no_price(data, dense):
    assert methods.callbacks("slimming", strength=0.) == ()
    net = ARCH.build(seed=1)
    h = T.train(net, data, RECIPE, callbacks=[SparseScales(0.)], seed=1, device="cpu")
    assert same_tensors(net.state_dict(), dense[0].state_dict()) and curve(h) == curve(dense[1])


def test_a_full_ticket_is_the_dense_network_again(data, dense):
    "Everything stays, back to step 0, the same order of images: the same bits, whether or not the mask is applied"
    ticket = methods.prune("lottery", dense[0], 0., init=ARCH.build(seed=1))
    assert all(m.all() for m in ticket.masks.values())
    h = T.train(ticket.net, data, RECIPE, callbacks=ticket.callbacks(), seed=1, device="cpu")
    assert same_tensors(ticket.net.state_dict(), dense[0].state_dict()) and curve(h) == curve(dense[1])


def test_going_back_to_the_end_changes_nothing(dense):
    p = methods.prune("lottery", dense[0], 0., init=dense[0])
    assert same_tensors(p.net.state_dict(), dense[0].state_dict())


def test_from_step_k_on_the_training_is_replayed(data):
    "Crops and flips included, in the middle of an epoch (7 steps each); without momentum the parts are the whole"
    data, calm = replace(data, pad=1, flip=True), RECIPE.replace(momentum=0.)
    whole, parts = ARCH.build(seed=1), ARCH.build(seed=1)
    T.train(whole, data, calm, seed=1, device="cpu")
    costs = [T.train(parts, data, calm.replace(skip=a, stop=b), seed=1, device="cpu").cost for a, b in ((0, 5), (5, 10), (10, None))]
    assert [c.steps for c in costs] == [5, 5, 11] and sum(c.images for c in costs) == 3*200
    assert same_tensors(whole.state_dict(), parts.state_dict())


def test_a_late_ticket_starts_from_step_k(data, dense):
    early = ARCH.build(seed=1)
    T.train(early, data, RECIPE.replace(stop=10), seed=1, device="cpu")
    ticket = methods.prune("lottery", dense[0], .5, init=early)
    for name, v in early.state_dict().items(): assert torch.equal(ticket.net.state_dict()[name], v*ticket.masks[name] if name in ticket.masks else v)
    h = T.train(ticket.net, data, RECIPE.replace(skip=10), callbacks=ticket.callbacks(), seed=1, device="cpu")
    assert h.cost.steps == 11 and [row["epoch"] for row in h.rows] == [2, 3] and h.rows[-1]["lr"] == dense[1].rows[-1]["lr"]
    assert not any(ticket.net.get_parameter(n)[~m].any() for n, m in ticket.masks.items())
    end = methods.prune("lottery", dense[0], .5, init=dense[0])
    before = {k: v.clone() for k, v in end.net.state_dict().items()}
    assert T.train(end.net, data, RECIPE.replace(skip=21), callbacks=end.callbacks(), seed=1, device="cpu").cost.steps == 0
    assert same_tensors(before, end.net.state_dict())


@pytest.mark.parametrize("k", [0, 10])
def test_a_part_of_a_training_killed_and_resumed_is_the_same(tmp_path, data, k):
    at, whole, net, epochs = tmp_path/"checkpoint.safetensors", ARCH.build(seed=1), ARCH.build(seed=1), []
    part = RECIPE.replace(skip=k, stop=17)
    h = T.train(whole, data, part, seed=1, device="cpu")
    def die(row):
        if row["epoch"] == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): T.train(ARCH.build(seed=1), data, part, seed=1, device="cpu", checkpoint=at, report=die)
    again = T.train(net, data, part, seed=1, device="cpu", checkpoint=at, report=lambda row: epochs.append(row["epoch"]))
    assert epochs == [3] and same_tensors(whole.state_dict(), net.state_dict()) and curve(again) == curve(h) and h.cost.steps == 17 - k


def test_pruned_weights_are_zero_at_every_epochs_end(data, dense):
    p, seen = methods.prune("magnitude", dense[0], .9), []
    class Look(Callback):
        def epoch_end(self, net, epoch): seen.append(sum(net.get_parameter(k)[~m].abs().sum().item() for k, m in p.masks.items()))
    T.train(p.net, data, RECIPE, callbacks=[*p.callbacks(), Look()], seed=1, device="cpu")
    assert seen == [0., 0., 0.]


def test_a_price_pulls_scales_down(data, dense):
    net, (cb,) = ARCH.build(seed=1), methods.callbacks("slimming", strength=.01)
    T.train(net, data, RECIPE, callbacks=[cb], seed=1, device="cpu")
    sizes = lambda n: torch.cat([m.weight.detach().abs() for m in n.modules() if isinstance(m, torch.nn.BatchNorm2d)])
    assert sizes(net).mean() < sizes(dense[0]).mean() and len(cb.history) == 3 and torch.equal(cb.history[-1].abs(), sizes(net))


def test_a_soft_training_that_diverges_is_told_as_any_other(data):
    class Spoil(Callback):
        def after_step(self, net, lr): net.features.conv1.weight.data[0] = float("nan")
    with pytest.raises(T.Diverged, match="diverged in epoch 1"): T.train(ARCH.build(seed=1), data, RECIPE, callbacks=[Spoil(), SoftFilters(.9)], seed=1, device="cpu")


def _callbacks(kind, net):
    if kind == "slimming": return [SparseScales(.01)]
    if kind == "soft-filter": return [SoftFilters(.5)]
    if kind == "sss": return [SparseFactors(.02, "neurons")]
    p = methods.prune("lottery", ARCH.build(seed=7), .5, init=net)
    return list(p.callbacks())


def _train(kind, checkpoint=None, report=None):
    net = ARCH.build(seed=1)
    callbacks = _callbacks(kind, net)
    h = T.train(net, T.load_data("digits", subset=200), RECIPE, callbacks=callbacks, seed=1, device="cpu", checkpoint=checkpoint, report=report)
    return net, curve(h), callbacks[0]


@pytest.mark.parametrize("kind", ["slimming", "soft-filter", "sss", "lottery"])
def test_a_training_killed_and_resumed_is_the_same(kind, tmp_path):
    "A process ends itself by SIGKILL after its second epoch; another one goes on"
    at = tmp_path/"checkpoint.safetensors"
    code = (f"import os, signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_method_training import _train\n"
            f"_train({kind!r}, {str(at)!r}, lambda row: os.kill(os.getpid(), signal.SIGKILL) if row['epoch'] == 2 else None)")
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL and at.is_file(), ended.stderr.decode()
    epochs = []
    net, rows, cb = _train(kind, at, lambda row: epochs.append(row["epoch"]))
    whole, whole_rows, whole_cb = _train(kind)
    assert epochs == [3] and same_tensors(net.state_dict(), whole.state_dict()) and rows == whole_rows
    assert same_tensors(cb.state_dict(), whole_cb.state_dict()) and (kind == "lottery" or len(cb.state_dict()[{"slimming": "scales", "soft-filter": "norms", "sss": "factors"}[kind]]) == 3)


def test_a_checkpoint_of_other_masks_is_not_taken_up(tmp_path, data):
    at, epochs = tmp_path/"checkpoint.safetensors", []
    for seed in (7, 8):
        net = ARCH.build(seed=1)
        p = methods.prune("lottery", ARCH.build(seed=seed), .5, init=net)
        start = ARCH.build(seed=1)
        T.train(start, data, RECIPE, callbacks=p.callbacks(), seed=1, device="cpu", checkpoint=at, report=lambda row: epochs.append(row["epoch"]))
    assert epochs == [1, 2, 3, 1, 2, 3]
