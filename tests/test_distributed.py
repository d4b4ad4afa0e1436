"A training in several processes is the training of one that passes the slices one by one; where a process dies the others end, and the same call goes on bit by bit."
import contextlib, json, os, signal, time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, child
from test_training import CLOCKS, ended, fork, stderr_to
from torch import nn
from torch.nn import functional as F

from rethink_nb import training as T
from rethink_nb.arch import zoo
from rethink_nb.core.errors import UserError
from rethink_nb.core.events import Callback
from rethink_nb.core.seed import generator
from rethink_nb.core.signals import Stopped
from rethink_nb.methods import callbacks, prune
from rethink_nb.testing.toys import same_tensors
from rethink_nb.training import distributed as D
from rethink_nb.training.augment import batch, draw
from rethink_nb.training.folders import image_folder
from rethink_nb.training.loop import optimiser, train_epoch
from rethink_nb.training.ranks import Ranks, shares

ARCH, RECIPE = zoo.arch("vgg-digits", width=.5), T.recipe("digits", epochs=2, batch=33) # 400 images: a last batch of four


@pytest.fixture(scope="module")
def data(): return T.load_data("digits", subset=400)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    "An ImageNet-style folder as data sets: in memory, and decoded by so many workers while the network trains"
    at, sets = photos(tmp_path_factory.mktemp("photos")), T.data.datasets
    sets.register("photographs", image_folder(at, size=16, pad=2))
    for w in (0, 2): sets.register(f"files-{w}", image_folder(at, size=16, decode="workers", workers=w))
    yield {name: T.load_data(name) for name in ("photographs", "files-0", "files-2")}
    for name in ("photographs", "files-0", "files-2"): sets.items.pop(name)


def in_ranks(n, task, tmp_path):
    "Do a task in n processes that were brought together; their exit codes, and what was said"
    def one(i):
        ranks = Ranks(i, n)
        D._join(ranks, "cpu", str(tmp_path/"meeting"))
        torch.set_num_threads(1)
        task(ranks)
    pids = [fork(lambda: one(i), stderr_to(tmp_path/f"said-{i}")) for i in range(n)]
    codes = [ended(p) for p in pids]
    (tmp_path/"meeting").unlink(missing_ok=True)
    return codes, [(tmp_path/f"said-{i}").read_text() for i in range(n)]


def saved(net, path):
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)


def loaded(path):
    from safetensors.torch import load_file
    return load_file(path)


def without_bn(net):
    "The same layers without batch norm"
    for name, m in list(net.named_modules()):
        if isinstance(m, nn.modules.batchnorm._BatchNorm): net.set_submodule(name, nn.Identity())
    return net


def by_hand(net, data, r, n, epochs):
    "One process that passes the slices of each batch one by one and averages their gradients; running statistics are those of the first slices"
    opt = torch.optim.SGD(net.parameters(), lr=r.lr, momentum=r.momentum, weight_decay=r.weight_decay)
    net.train()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(data.train), generator=generator(0, "order", epoch))
        moves = draw(len(order), data, generator(0, "augment", epoch))
        for g in opt.param_groups: g["lr"] = r.lr_at(epoch)
        for at in torch.arange(len(order)).split(r.batch):
            k = min(n, len(at)//2)
            grads = [torch.zeros_like(p) for p in net.parameters()]
            for i, part in enumerate(x.flip(0) for x in torch.tensor_split(at.flip(0), k)[::-1]): # the larger slices last
                before = {name: b.clone() for name, b in net.named_buffers()}
                x = batch(data.train.images, order[part], data, [m[part] for m in moves])
                loss = F.cross_entropy(net(x.to(grads[0].dtype)).float(), data.train.labels[order[part]])
                for g, d in zip(grads, torch.autograd.grad(loss, list(net.parameters()))): g += d*(len(part)/len(at))
                if i: [b.copy_(before[name]) for name, b in net.named_buffers()]
            for p, g in zip(net.parameters(), grads): p.grad = g
            opt.step()
    return net


def test_slices_make_up_the_batch():
    for n in range(1, 9):
        for images in range(2, 40):
            parts = shares(slice(5, 5 + images), n)
            assert len(parts) == n and [i for p in parts for i in range(p.start, p.stop)] == list(range(5, 5 + images))
            sizes = [p.stop - p.start for p in parts if p.stop > p.start]
            assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1 and (len(sizes) == n or images < 2*n)
            assert abs(sum(Ranks(i, n).share(slice(5, 5 + images))[1] for i in range(n)) - 1) < 1e-12


@pytest.mark.parametrize("n", [2, 3]) # of the last four images, the third of three has none
@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize("what", ["digits", "photographs", "files-2"]) # these with crops and mirrors
def test_ranks_are_one_process_that_averages(data, photographs, tmp_path, n, bn, what):
    "In float64, all steps together the same to 1e-12; without batch norm also the plain run"
    data = photographs.get(what, data)
    arch = ARCH.replace(input=data.input, classes=data.classes)
    made = lambda: (arch.build(seed=1) if bn else without_bn(arch.build(seed=1))).double()
    r, steps = RECIPE.replace(processes=n), range(len(data.train)//33 + 1)
    def task(ranks):
        net = made()
        opt = optimiser(net, r)
        for epoch in (1, 2): train_epoch(net, data, r, opt, (), 0, epoch, steps, forward=lambda x: net(x.double()), ranks=ranks)
        saved(net, tmp_path/f"net-{ranks.rank}")
    codes, said = in_ranks(n, task, tmp_path)
    assert codes == [0]*n, said
    nets = [loaded(tmp_path/f"net-{i}") for i in range(n)]
    assert all(same_tensors(nets[0], x) for x in nets[1:]) # buffers of the first for all
    def near(a, b, most): return max(float((a[k].double() - b[k].double()).abs().max()) for k in a) < most
    hand = by_hand(made(), data, r, n, 2).state_dict()
    assert near(nets[0], hand, 1e-12)
    plain = made()
    opt = optimiser(plain, RECIPE)
    for epoch in (1, 2): train_epoch(plain, data, RECIPE, opt, (), 0, epoch, steps, forward=lambda x: plain(x.double()))
    # the loss is float32, whose mean over a slice rounds in another way than the mean over a batch
    assert near(nets[0], plain.state_dict(), 1e-5) != bn


def test_a_whole_training(data, tmp_path):
    "`train` itself, in float32: against the hand to 1e-5 in the first steps, the books kept once"
    r = RECIPE.replace(processes=2, stop=5)
    def task(ranks):
        net = ARCH.build(seed=1)
        h = T.train(net, data, r, seed=0, device="cpu", checkpoint=tmp_path/"checkpoint.safetensors", ranks=ranks)
        assert (h is None) == (ranks.rank > 0)
        if h: (tmp_path/"history").write_text(json.dumps(dict(rows=h.rows, cost=h.cost.to_dict(), final=h.final)))
        saved(net, tmp_path/f"net-{ranks.rank}")
    codes, said = in_ranks(2, task, tmp_path)
    assert codes == [0, 0], said
    hand = by_hand(ARCH.build(seed=1), replace_train(data, 5*33), r, 2, 1)
    h, found = json.loads((tmp_path/"history").read_text()), loaded(tmp_path/"net-0")
    assert all(torch.allclose(found[k], v, rtol=0, atol=1e-5) for k, v in hand.state_dict().items())
    assert (h["cost"]["images"], h["cost"]["steps"], len(h["rows"])) == (5*33, 5, 1)
    assert h["cost"]["macs"] == T.train_macs(ARCH, 5*33)
    net = ARCH.build()
    net.load_state_dict(found)
    assert h["final"]["val_acc"] == T.evaluate(net, data.val, data)[1]


def replace_train(data, images):
    "The first images in the order of the first epoch, in an order that comes out the same"
    from dataclasses import replace
    first = torch.randperm(len(data.train), generator=generator(0, "order", 1))[:images]
    back = torch.empty(images, dtype=torch.long)
    back[torch.randperm(images, generator=generator(0, "order", 1))] = first
    return replace(data, train=data.train.take(back))


@pytest.mark.parametrize("name, options, network", [("slimming", dict(strength=.01), "vgg-digits"), ("sss", dict(strength=.01), "resnet8-digits"), ("soft-filter", dict(ratio=.3), "vgg-digits"), ("masks", {}, "vgg-digits")])
def test_callbacks_of_methods_stay_the_same_in_all(data, tmp_path, name, options, network):
    "They see averaged gradients, so weights, states and masks are the same to the last bit in both (`check_same` is asked after each epoch)"
    def task(ranks):
        net = zoo.arch(network, width=.5).build(seed=1)
        cbs = list(callbacks(name, **options)) if name != "masks" else None
        if cbs is None:
            p = prune("magnitude", net, .5)
            net, cbs = p.net, list(p.callbacks())
        T.train(net, data, RECIPE.replace(processes=2), cbs, seed=0, device="cpu", ranks=ranks)
        saved(net, tmp_path/f"net-{ranks.rank}")
        states = {f"{i}.{k}": v.contiguous() for i, cb in enumerate(cbs) for k, v in cb.state_dict().items()}
        from safetensors.torch import save_file
        save_file(states, tmp_path/f"states-{ranks.rank}")
        if name == "masks": assert all((w[~p.masks[n]] == 0).all() for n, w in net.named_parameters() if n in p.masks)
    codes, said = in_ranks(2, task, tmp_path)
    assert codes == [0, 0], said
    for what in ("net", "states"): assert same_tensors(*(loaded(tmp_path/f"{what}-{i}") for i in range(2)))


class OwnWay(Callback):
    "Does another thing in each process"
    def __init__(self, rank): self.off = rank
    def key(self): return "the same"
    def after_step(self, net, lr): next(net.parameters()).data += 1e-7*self.off


def test_a_callback_that_does_not_do_the_same_is_refused(data, tmp_path):
    def task(ranks): T.train(ARCH.build(seed=1), data, RECIPE.replace(processes=2), [OwnWay(ranks.rank)], device="cpu", ranks=ranks)
    codes, said = in_ranks(2, task, tmp_path)
    assert codes == [3, 3] and all("UserError: the 2 processes have other weights each after epoch 1: callback OwnWay does not do the same in all of them; train in one process" in s for s in said), said


# Faults ---------------------------------------------------------------------------------------------------------------------------

ASK = dict(arch="vgg-digits", data="digits", recipe="digits", epochs=3, processes=2, method="slimming", options=dict(strength=.01), subset=400)


def results(path): return loaded(path/"trained.safetensors"), json.loads((path/"history").read_text())


def kept(path, checkpoint=None):
    "The training of `ASK` in two processes, its results in a folder"
    path.mkdir()
    def task(ranks):
        found = D._train_rank(ranks, "cpu", lambda row: None, D.BY_NAME, ASK, checkpoint, 1e9, str(path))
        if found: (path/"history").write_text(json.dumps([[{k: v for k, v in row.items() if k not in CLOCKS} for row in found["rows"]], found["final"]]))
    codes, said = in_ranks(2, task, path)
    assert codes == [0, 0], said
    return results(path)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory): return kept(tmp_path_factory.mktemp("unbroken")/"run")


def same(a, b): return same_tensors(a[0], b[0]) and a[1] == b[1]


def members(pid):
    "Processes that a process has started, itself left out"
    found = {}
    for p in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError): found[int(p.name)] = int((p/"stat").read_text().rpartition(")")[2].split()[1])
    return sorted(k for k, parent in found.items() if parent == pid and b"spawn_main" in (Path("/proc")/str(k)/"cmdline").read_bytes())


def begun(tmp_path, seconds=0.):
    "A process that trains by `train_distributed`, once it has written a checkpoint; and the ids of its two"
    at = tmp_path/"checkpoint.safetensors"
    pid = fork(lambda: D.train_distributed(arguments=ASK, device="cpu", checkpoint=at, seconds=seconds), stderr_to(tmp_path/"said"))
    end = time.time() + 240
    while not at.exists() and time.time() < end: time.sleep(.002)
    return pid, members(pid), at


@pytest.mark.parametrize("rank", [0, 1])
def test_one_is_killed(tmp_path, unbroken, rank):
    pid, both, at = begun(tmp_path)
    assert len(both) == 2
    os.kill(both[rank], signal.SIGKILL)
    began = time.time()
    assert ended(pid) == 3 and time.time() - began < 20
    line, = (tmp_path/"said").read_text().splitlines()
    assert line == f"Died: process {rank} of 2 was killed by SIGKILL, by hand or for want of memory, and the others were ended: the same call goes on from the last checkpoint"
    assert not any(Path(f"/proc/{p}").exists() for p in both)
    assert same(kept(tmp_path/"again", str(at)), unbroken)


def test_asked_to_stop_it_saves(tmp_path, unbroken):
    "The one that has started them is asked; they finish the step"
    pid, both, at = begun(tmp_path, 1e9)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 3
    line, = (tmp_path/"said").read_text().splitlines()
    assert line.startswith("Stopped: stopped by SIGTERM in epoch ") and line.endswith("all is saved, and the same call goes on from there")
    assert same(kept(tmp_path/"again", str(at)), unbroken)


@pytest.mark.slow
def test_the_one_that_started_them_is_killed(tmp_path, unbroken):
    pid, both, at = begun(tmp_path)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    end = time.time() + 20
    while any(Path(f"/proc/{p}/exe").exists() for p in both) and time.time() < end: time.sleep(.05)
    assert not any(Path(f"/proc/{p}/exe").exists() for p in both)
    assert same(kept(tmp_path/"again", str(at)), unbroken)


@pytest.mark.slow
def test_a_study_of_which_one_is_killed(tmp_path):
    "The command ends with one line; the same command goes on from the checkpoint"
    import subprocess, sys
    words = [str(Path(sys.executable).parent/"rethink-nb"), "run", "l1", "--arms", "parent", "--seeds", "1", "--epochs", "40", "--gpus", "2", "--device", "cpu"]
    running = subprocess.Popen(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end, seen = time.time() + 240, []
    while time.time() < end and not list(tmp_path.glob("runs/.work/*/checkpoint.safetensors")): time.sleep(.01)
    for worker in members(running.pid): seen += members(worker)
    assert len(seen) == 2
    os.kill(seen[1], signal.SIGKILL)
    out, err = running.communicate(timeout=120)
    line = err.splitlines()[-1]
    assert running.returncode == 2 and line == "rethink-nb: process 1 of 2 was killed by SIGKILL, by hand or for want of memory, and the others were ended: the same call goes on from the last checkpoint", err
    before = json.loads(next(tmp_path.glob("runs/.work/*/progress.json")).read_text())["epoch"]
    done = child(*words, cwd=tmp_path)
    assert done.returncode == 0, done.output
    record = json.loads(next(tmp_path.glob("runs/*/record.json")).read_text())
    assert record["status"] == "done" and 1 <= before < 40 and record["cost"]["steps"] == 40*32


@pytest.mark.slow
@pytest.mark.parametrize("ask", [dict(lr=1e30), dict(arch="resnet8-digits", method="sss")])
def test_what_comes_back(ask):
    "A training that diverges says so with its curve; a network that its method has changed comes back with what was added"
    if "lr" in ask:
        with pytest.raises(T.Diverged, match="training diverged in epoch 1") as e: D.train_distributed(arguments={**ASK, **ask}, device="cpu")
        assert len(e.value.rows) == 1 and e.value.cost.images == 400
    else:
        net, h, (state,) = D.train_distributed(arguments={**ASK, **ask}, device="cpu")
        assert state["factors"].shape[0] == 3 and len(h.rows) == 3 and T.evaluate(net, T.load_data("digits", subset=400).val, T.load_data("digits", subset=400))[1] == h.final["val_acc"]


def test_what_cannot_be_is_refused():
    for ask, told in ((dict(processes=0), "processes 0: give a whole number from 1"), (dict(processes=3, batch=5), "batch 5 over 3 processes: give at least 6 images a step, two for each")):
        with pytest.raises(UserError, match=told): T.recipe("digits", **ask)
    if torch.cuda.device_count() < 2:
        with pytest.raises(UserError): D.devices_of(2, "cuda")
    for n in (0, -1, 1.5):
        with pytest.raises(UserError, match="give a whole number from 1"): D.devices_of(n, "cpu")
    assert T.recipe("digits").id == T.recipe("digits", processes=1).id != T.recipe("digits", processes=2).id


# Images -------------------------------------------------------------------------------------------------------------------------

def photos(at, size=24):
    "An ImageNet-style folder: pieces of scikit-learn's two photographs, a folder each, every fifth for `val`"
    from PIL import Image
    from sklearn.datasets import load_sample_images
    for name, image in zip(("temple", "flower"), load_sample_images().images):
        for i in range(120):
            y, x = 24 + 24*(i//12), 48*(i % 12)
            folder = at/("val" if i % 5 == 0 else "train")/name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[y:y + size, x:x + size]).save(folder/f"{i:03}.{'jpg' if i % 2 else 'png'}")
    return at


def test_decoded_while_training(photographs, tmp_path):
    "Whoever decodes, and where the training was taken up: the same bits; another epoch, other windows"
    r, nets, stopped = T.recipe("digits", epochs=2), {}, tmp_path/"checkpoint.safetensors"
    made = lambda: ARCH.replace(input=(3, 16, 16), classes=2).build(seed=1)
    for w in (0, 2):
        nets[w] = made()
        T.train(nets[w], photographs[f"files-{w}"], r, seed=3, device="cpu")
    assert same_tensors(nets[0].state_dict(), nets[2].state_dict())

    class Stop(Callback):
        def __init__(self, steps): self.left = steps
        def key(self): return ""
        def after_step(self, net, lr):
            self.left -= 1
            if not self.left: os.kill(os.getpid(), signal.SIGINT)
    net = made()
    with pytest.raises(Stopped): T.train(net, photographs["files-2"], r, [Stop(8)], seed=3, device="cpu", checkpoint=stopped)
    net = made()
    T.train(net, photographs["files-2"], r, [Stop(-1)], seed=3, device="cpu", checkpoint=stopped)
    assert same_tensors(net.state_dict(), nets[0].state_dict())
    d = photographs["files-0"]
    seen = [batch(d.train.images, torch.arange(8), d, draw(8, d, generator(3, "augment", e))) for e in (1, 1, 2)]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert torch.equal(batch(d.test.images, torch.arange(4), d), batch(photographs["files-2"].test.images, torch.arange(4), d))


def test_a_broken_image_is_named(tmp_path):
    broken = next((photos(tmp_path)/"train"/"temple").glob("*.jpg"))
    broken.write_bytes(broken.read_bytes()[:300])
    T.data.datasets.register("broken", image_folder(tmp_path, size=16, decode="workers", workers=2))
    try:
        with pytest.raises(UserError, match=f"{broken} cannot be read as an image"): T.train(ARCH.replace(input=(3, 16, 16), classes=2).build(), T.load_data("broken"), T.recipe("digits", epochs=1), device="cpu")
    finally: T.data.datasets.items.pop("broken")


def test_methods_look_at_images_in_files(photographs):
    d = photographs["files-2"]
    x, y = T.plain_batches(d, 40)[0]
    assert x.shape == (40, 3, 16, 16) and len(y) == 40 and x.isfinite().all()


def plugin(tmp_path):
    "A file that makes the photographs a data set wherever it is loaded"
    photos(tmp_path/"photos")
    path = tmp_path/"photos.py"
    path.write_text("from pathlib import Path\nfrom rethink_nb.training.data import datasets\nfrom rethink_nb.training.folders import image_folder\n"
                                      "datasets.register('photos', image_folder(Path(__file__).parent/'photos', size=16, pad=2))\n")
    return path


def test_a_run_on_photographs(tmp_path):
    "From a script: the record says how many processes there were, and costs count every image once"
    plugin(tmp_path)
    (tmp_path/"script.py").write_text("from rethink_nb.methods import load_plugin\nfrom rethink_nb.study import Store, Study, execute\n"
        "if __name__ == '__main__':\n    load_plugin('photos.py')\n    s = Study(data='photos', arch='vgg-digits', ratios=[.5], seeds=1, epochs=4, arms=['parent'], recipe_name='digits', training=dict(processes=2))\n"
        "    print(execute(s.parent_run(0), Store('runs'), device='cpu')['status'])\n")
    done = child("python", "script.py", cwd=tmp_path)
    assert done.stdout == "done\n", done.output
    record = json.loads(next(tmp_path.glob("runs/*/record.json")).read_text())
    assert record["cost"]["images"] == 4*173 and record["cost"]["device_seconds"] > 0 and record["metrics"]["test_acc"] > 60 and '"processes": 2' in json.dumps(record)


@pytest.mark.slow
def test_a_trial_on_photographs(tmp_path):
    "A command, a folder of images, two processes a training: a parent and Scratch-E"
    path = plugin(tmp_path)
    words = ["rethink-nb", "run", "l1", "--data", "photos", "--arch", "vgg-digits", "--recipe", "digits", "--epochs", "4", "--ratio", "0.5", "--arms", "parent,scratch-e", "--seeds", "1", "--plugin", path, "--device", "cpu"]
    done = child(*words, "--gpus", "2", cwd=tmp_path)
    assert done.returncode == 0, done.output
    records = [json.loads(p.read_text()) for p in tmp_path.glob("runs/*/record.json")]
    assert len([r for r in records if r["status"] == "done"]) == 2
    for r in records:
        assert r["cost"]["images"] == 4*173 and r["cost"]["device_seconds"] > 0 and r["metrics"]["test_acc"] > 60, r["metrics"]
    assert "processes=2" in done.stdout


@pytest.mark.parametrize("gpus, told", [("0", "gpus 0: give a whole number from 1"), ("-3", "gpus -3: give a whole number from 1"), ("99", "ask for fewer, or say --device cpu for as many processes on the CPU")])
def test_gpus_that_are_not_there(tmp_path, capsys, monkeypatch, gpus, told):
    from rethink_nb.cli import main
    monkeypatch.chdir(tmp_path)
    assert main(["run", "l1", "--gpus", gpus]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert told in line and not list(tmp_path.iterdir())


# With devices --------------------------------------------------------------------------------------------------------------------

@pytest.mark.gpu
def test_gpu_images_in_files(photographs):
    nets = [ARCH.replace(input=(3, 16, 16), classes=2).build(seed=1) for _ in range(2)]
    for net, w in zip(nets, (0, 2)): T.train(net, photographs[f"files-{w}"], T.recipe("digits", epochs=2), device="cuda")
    assert same_tensors(nets[0].state_dict(), nets[1].state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_gpu_two_of_them():
    "By nccl: the same bits twice, and a loss near that of two processes on the CPU"
    (a, x, _), (b, y, _), (_, cpu, _) = (D.train_distributed(arguments=ASK, device=d) for d in ("cuda", "cuda", "cpu"))
    assert same_tensors(a.state_dict(), b.state_dict()) and x.final == y.final and abs(x.rows[0]["train_loss"] - cpu.rows[0]["train_loss"]) < .02
