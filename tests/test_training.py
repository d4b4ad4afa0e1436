"No work is lost: killed, stopped, damaged, without room on the disk or in memory, a training goes on bit by bit or says in one line why it cannot."
import contextlib, io, json, os, random, resource, signal, sys, time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import child

from rethink_nb import training as T
from rethink_nb.arch import zoo
from rethink_nb.core.errors import UserError
from rethink_nb.core.signals import Stopped
from rethink_nb.methods import callbacks
from rethink_nb.study import Store, Study, execute
from rethink_nb.study.run import work
from rethink_nb.testing.toys import same_tensors
from rethink_nb.training import checkpoint as C

ARCH, RECIPE = zoo.arch("vgg-digits", width=.5), T.recipe("digits", epochs=4)
CLOCKS = ["seconds", "device_seconds", "joules"]


@pytest.fixture(scope="module")
def data(): return T.load_data("digits", subset=400)


def fork(task, before=lambda: None):
    "The id of a child process that carries out a task"
    pid = os.fork()
    if pid: return pid
    try:
        before()
        task()
        os._exit(0)
    except BaseException as e:
        os.write(2, f"{type(e).__name__}: {e}\n".encode())
        os._exit(3)


def stderr_to(path):
    "In a child: what is said goes to a file, not to pytest"
    def change():
        sys.stderr = path.open("w", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
    return change


def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def training(at, data, out, seconds=0., **more):
    "A training with slimming's callback, whose state counts, that writes a checkpoint after each step, and its results at the end"
    cb = callbacks("slimming", strength=.01)
    net = ARCH.build(seed=1)
    h = T.train(net, data, RECIPE, cb, seed=1, device="cpu", checkpoint=at, seconds=seconds, **more)
    from safetensors.torch import save_file
    save_file({**{k: v.contiguous() for k, v in net.state_dict().items()}, **{f"cb.{i}.{k}": v.contiguous() for i, c in enumerate(cb) for k, v in c.state_dict().items()}}, out.with_suffix(".tmp"))
    out.with_suffix(".json").write_text(json.dumps([{k: v for k, v in row.items() if k not in CLOCKS} for row in h.rows] + [h.final]))
    os.replace(out.with_suffix(".tmp"), out)


def results(out):
    from safetensors.torch import load_file
    return load_file(out), json.loads(out.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")/"out.safetensors"
    assert ended(fork(lambda: training(None, data, out))) == 0
    return results(out)


def same(a, b): return same_tensors(a[0], b[0]) and a[1] == b[1]


# Killed ---------------------------------------------------------------------------------------------------------------------------

def killed_at_random(data, tmp_path, seed, kills):
    "Kill one training so many times, each time at a random moment of what is left; it is called again until it ends"
    draw, out, at = random.Random(seed), tmp_path/"out.safetensors", tmp_path/"checkpoint.safetensors"
    left = 0
    for i in range(kills):
        pid = fork(lambda: training(at, data, out))
        seen, end = at.stat().st_mtime_ns if at.exists() else 0, time.time() + 60
        for _ in range(draw.randint(1, 6)): # some checkpoints later ...
            while time.time() < end and (at.stat().st_mtime_ns if at.exists() else 0) == seen and os.waitpid(pid, os.WNOHANG) == (0, 0): time.sleep(.0005)
            seen = at.stat().st_mtime_ns if at.exists() else 0
        time.sleep(draw.uniform(0, .01)) # ... at any moment of a step, or of the next one's writing
        with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError): left += ended(pid) == -signal.SIGKILL
    assert left >= kills - 1, "it ended before it was killed often enough"
    assert ended(fork(lambda: training(at, data, out))) == 0
    return results(out)


def test_killed_three_times(data, tmp_path, unbroken):
    assert same(killed_at_random(data, tmp_path, 0, 3), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_twenty_times(data, tmp_path, unbroken, seed):
    assert same(killed_at_random(data, tmp_path, seed, 4), unbroken)


@pytest.mark.parametrize("moment", ["half written", "written", "old one moved", "done"])
@pytest.mark.parametrize("nth", [1, 2, 30])
def test_killed_while_a_checkpoint_is_written(data, tmp_path, unbroken, moment, nth):
    "The n-th checkpoint is never finished, in each of the ways in which it can be unfinished"
    out, at, count = tmp_path/"out.safetensors", tmp_path/"checkpoint.safetensors", [0]
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    def plant():
        write, move = C.write_bytes, os.replace
        def half(path, content):
            count[0] += 1
            if count[0] == nth and moment == "half written": (path.parent/f".{path.name}.{os.getpid()}.part").write_bytes(content[:len(content)//2]), die()
            return write(path, content)
        def replaced(a, b):
            name = Path(b).name
            if count[0] == nth and moment == "written" and "new" not in name and ".part" not in str(a): die()
            move(a, b)
            if count[0] == nth and (moment == "old one moved" and "before" in name or moment == "done" and name == at.name): die()
            if count[0] == nth and moment == "old one moved" and nth == 1 and "new" in name: die() # there is no old one
        C.write_bytes, os.replace = half, replaced
    assert ended(fork(lambda: training(at, data, out), plant)) == -signal.SIGKILL
    assert ended(fork(lambda: training(at, data, out))) == 0
    assert same(results(out), unbroken)


@pytest.mark.parametrize("damage", [lambda b: b[:len(b)//2], lambda b: b[:-5] + bytes([b[-5] ^ 16]) + b[-4:], lambda b: b"", lambda b: b"x"*len(b)])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(data, tmp_path, unbroken, damage):
    out, at = tmp_path/"out.safetensors", tmp_path/"checkpoint.safetensors"
    def stop(row):
        if row["epoch"] == 3: os.kill(os.getpid(), signal.SIGKILL)
    assert ended(fork(lambda: training(at, data, out, seconds=1e9, report=stop))) == -signal.SIGKILL
    at.write_bytes(damage(at.read_bytes()))
    epochs = tmp_path/"epochs"
    def tell(row):
        with epochs.open("a") as f: f.write(f"{row['epoch']} ")
    assert ended(fork(lambda: training(at, data, out, report=tell), stderr_to(tmp_path/"said"))) == 0
    assert epochs.read_text() == "3 4 " # the checkpoint of the second epoch was taken up
    assert b"checkpoint.safetensors: the checkpoint is damaged; the one before is taken" in (tmp_path/"said").read_bytes()
    assert same(results(out), unbroken)


# Asked to stop --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_finishes_the_step_and_saves(data, tmp_path, unbroken, sign):
    out, at = tmp_path/"out.safetensors", tmp_path/"checkpoint.safetensors"
    pid = fork(lambda: training(at, data, out, seconds=1e9), stderr_to(tmp_path/"said"))
    while not at.exists(): time.sleep(.001)
    os.kill(pid, sign)
    assert ended(pid) == 3
    line, = (tmp_path/"said").read_text().splitlines()
    assert line.startswith(f"Stopped: stopped by {sign.name} in epoch ") and line.endswith("all is saved, and the same call goes on from there")
    assert ended(fork(lambda: training(at, data, out))) == 0
    assert same(results(out), unbroken)


def test_without_a_checkpoint_it_says_that_all_is_lost(data):
    def ask(row): os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Stopped, match="stopped by SIGINT in epoch 1: no checkpoint was named, so the training is lost"):
        T.train(ARCH.build(), data, RECIPE, device="cpu", report=ask)


# What cannot go on ----------------------------------------------------------------------------------------------------------------

def test_a_full_disk_leaves_the_store_readable(tmp_path):
    store, s = Store(tmp_path/"runs"), Study(data="digits", arch="vgg-digits", ratios=[.5], seeds=1, epochs=2)
    runs = {c.arm: c.run for c in s.cells()}
    execute(runs["parent"], store, device="cpu")
    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000)) # as a disk with no more room for files: writing on gives an OSError
    def task():
        status = work(runs["scratch-e"], store.path, "cpu", None)
        assert status[1] == "failed" and "OSError" in status[2], status
        assert work(runs["pruned"], store.path, "cpu", None)[1] == "failed"
    assert ended(fork(task, full)) == 0
    good, bad = store.records()
    assert [r["id"] for r in good] == [runs["parent"].id] and not bad
    assert not list(store.path.rglob("*.part")) # nothing half-written is left
    assert execute(runs["scratch-e"], store, device="cpu")["status"] == "done"


def test_no_memory_is_told_with_what_to_change(data):
    def little(): resource.setrlimit(resource.RLIMIT_AS, (int(Path("/proc/self/statm").read_text().split()[0])*resource.getpagesize() + 200*2**20,)*2)
    def task():
        big = replace(data, train=T.data.Split(torch.zeros(2000, 3, 64, 64, dtype=torch.uint8), torch.zeros(2000, dtype=torch.long)), input=(3, 64, 64), mean=(.5,)*3, std=(.5,)*3)
        try: T.train(zoo.arch("vgg16", input=(3, 32, 32)).build(), big, RECIPE.replace(batch=2000), device="cpu")
        except UserError as e: assert str(e).startswith("out of memory: take fewer images a step than 2000"), str(e)
        else: raise AssertionError("there was enough memory")
    assert ended(fork(task, little)) == 0


@pytest.mark.slow
def test_a_compiled_training_learns_the_same(data):
    "Other kernels, other bits, the same training; a checkpoint of the eager one is another's"
    nets = [ARCH.build(seed=1) for _ in range(2)]
    eager, compiled = (T.train(n, data, RECIPE.replace(epochs=2, compile=c), seed=1, device="cpu") for n, c in zip(nets, ("", "default")))
    assert [abs(a["train_loss"] - b["train_loss"]) < .02 for a, b in zip(eager.rows, compiled.rows)] == [True, True]
    assert all(torch.allclose(a, b, atol=.05) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


@pytest.mark.slow
def test_no_compiler_is_told_in_one_line(tmp_path):
    done = child("python", "-c", "from rethink_nb import training as T\nfrom rethink_nb.arch import zoo\n"
                 "try: T.train(zoo.arch('vgg-digits').build(), T.load_data('digits'), T.recipe('digits', epochs=1, compile='default'), device='cpu')\n"
                 "except ValueError as e: print('told:', e)", cwd=tmp_path, CXX=str(tmp_path/"nothing"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path/"cache"))
    assert done.stdout.startswith("told: compile 'default' does not work here"), done.stderr


def test_a_diverged_run_is_kept_and_counted(tmp_path):
    s = Study(data="digits", arch="vgg-digits", ratios=[.5], seeds=1, epochs=2, arms=["parent", "fine-tune", "scratch-e"])
    store = Store(tmp_path/"runs")
    s.run(store, workers=1, device="cpu", progress=False)
    wild = s.replace(training=dict(lr=1e6))
    with contextlib.redirect_stderr(said := io.StringIO()): wild.run(store, workers=1, device="cpu", progress=False)
    assert "diverged in epoch 1" in said.getvalue()
    f = wild.frame(store).set_index("arm")
    assert f.status.to_dict() == {"parent": "diverged", "fine-tune": "diverged", "scratch-e": "diverged"}
    record = store.record(wild.parent_run(0).id)
    assert record["status"] == "diverged" and record["cost"]["steps"] == 32 and len(store.curve(record["id"])) == 1
    written = record["written"]
    with contextlib.redirect_stderr(said := io.StringIO()): wild.run(store, workers=1, device="cpu", progress=False)
    assert store.record(record["id"])["written"] == written and "diverged" in said.getvalue() # told again, not tried again


def test_a_study_in_which_all_diverges_is_told(tmp_path):
    "With a loss that is a number, too; its page and its table count the runs, and another study of the store keeps its own"
    good = Study(data="digits", arch="vgg-digits", ratios=[.5], seeds=1, epochs=1, arms=["parent", "scratch-e"])
    good.run(Store(tmp_path/"runs"), workers=1, device="cpu", progress=False)
    done = child("rethink-nb", "run", "l1", "--ratio", "0.5", "--seeds", "2", "--epochs", "1", "--scale", "pocket", "--arms", "parent,scratch-e", "--training", "lr=100,milestones=0.5+0.75", cwd=tmp_path)
    assert done.returncode == 1 and "0 (2 diverged)" in done.stdout and "4 of 4 cells have no result: 4 diverged" in done.stdout, done.output
    assert child("rethink-nb", "report", "--store", "runs", cwd=tmp_path).returncode == 0
    text = (tmp_path/"report.html").read_text()
    assert "0 (2 diverged)" in text and "scratch-e" in text


def test_a_reference_run_that_diverges_is_no_error(tmp_path):
    s = Study(data="digits", arch="vgg-digits", ratios=[.5], seeds=1, epochs=1, arms=["parent"], reference=True, training=dict(batch=400, lr=1e30))
    assert execute(s.parent_run(0), Store(tmp_path/"runs"), device="cpu")["status"] == "diverged"


# What it says ---------------------------------------------------------------------------------------------------------------------

def test_evaluation_is_the_mean_over_images(data):
    net = ARCH.build(seed=1)
    x = T.logits_of(net, data.test, data, size=100)
    assert torch.allclose(x, T.logits_of(net, data.test, data, size=1000), atol=1e-5) and len(x) == len(data.test)
    loss, acc = T.evaluate(net, data.test, data)
    assert abs(loss - torch.nn.functional.cross_entropy(x, data.test.labels).item()) < 1e-6 and acc == 100*(x.argmax(1) == data.test.labels).sum().item()/len(x)


def test_calibration_error_of_torchmetrics_definition():
    "Against the sum over bins, bin by bin"
    g = torch.Generator().manual_seed(0)
    logits, labels = 3*torch.randn(500, 7, generator=g), torch.randint(7, (500,), generator=g)
    sure, said = logits.softmax(1).max(1)
    gap = 0.
    for b in range(15):
        there = (sure > b/15) & (sure <= (b + 1)/15)
        if there.any(): gap += there.sum().item()*abs((said == labels)[there].double().mean().item() - sure[there].double().mean().item())
    from rethink_nb.training.scores import calibration_error
    assert abs(calibration_error(logits, labels) - 100*gap/500) < 1e-4


def test_auto_precision_is_resolved_before_it_is_recorded(data):
    study = Study(data="fashion-mnist", arch="resnet20")
    assert study.precision == study.recipe.precision == T.best_precision(torch.device("cpu")) or torch.cuda.is_available()
    assert Study(data="digits", arch="vgg-digits").precision == "fp32"
    for asked in ("auto", T.best_precision(torch.device("cpu"))):
        net = ARCH.build(seed=2)
        T.train(net, data, RECIPE.replace(epochs=1, precision=asked), device="cpu")
        if asked == "auto": first = {k: v.clone() for k, v in net.state_dict().items()}
    assert same_tensors(first, net.state_dict())


def test_the_reference_mode_holds_nothing_out(tmp_path):
    s = Study(data="digits", arch="vgg-digits", ratios=[.5], seeds=1, epochs=2, arms=["parent", "fine-tune"], reference=True)
    record = execute(s.parent_run(0), Store(tmp_path/"runs"), device="cpu")
    assert record["cost"]["images"] == 2*1200 and record["metrics"]["best_test_acc"] >= record["metrics"]["test_acc"]
    assert s.network == "vgg-digits, 2 epochs, as the reference"


# On a GPU -------------------------------------------------------------------------------------------------------------------------

on_gpu = lambda f: pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(f))


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gpu_same_seed_same_bits(data, precision):
    nets = [zoo.arch("resnet8-digits").build(seed=1) for _ in range(2)]
    a, b = (T.train(n, data, RECIPE.replace(epochs=2, precision=precision), callbacks("slimming", strength=.01), seed=1, device="cuda") for n in nets)
    assert same_tensors(nets[0].state_dict(), nets[1].state_dict()) and a.final == b.final


@on_gpu
def test_gpu_waits_for_nobody_within_an_epoch(data):
    "Between two steps the host asks nothing of the device: torch raises where it does"
    from rethink_nb.training.loop import optimiser, train_epoch
    d = replace(data, pad=2, flip=True).to("cuda")
    net = zoo.arch("resnet8-digits").build(seed=1).to("cuda", memory_format=torch.channels_last)
    opt, r = optimiser(net, RECIPE), RECIPE.replace(precision="bf16")
    train_epoch(net, d, r, opt, (), 0, 1, range(3))
    at = []
    def watch():
        at.append(0)
        torch.cuda.set_sync_debug_mode("error" if len(at) < 9 else "default") # from the second step on to the last but one
    try: train_epoch(net, d, r, opt, (), 0, 2, range(10), step_over=watch)
    finally: torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_gpu_compiled(data, mode):
    nets = [ARCH.build(seed=1) for _ in range(2)]
    eager, compiled = (T.train(n, data, RECIPE.replace(epochs=2, compile=c), seed=1, device="cuda") for n, c in zip(nets, ("", mode)))
    assert [abs(a["train_loss"] - b["train_loss"]) < .05 for a, b in zip(eager.rows, compiled.rows)] == [True, True]


@on_gpu
def test_gpu_masks_and_checkpoints(data, tmp_path):
    from rethink_nb.methods import prune
    p, at = prune("magnitude", ARCH.build(seed=1), .5), tmp_path/"checkpoint.safetensors"
    def stop(row): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): T.train(p.net, data, RECIPE.replace(epochs=2), p.callbacks(), seed=1, device="cuda", checkpoint=at, report=stop)
    nets = [prune("magnitude", ARCH.build(seed=1), .5) for _ in range(2)]
    for q, where in zip(nets, (at, None)): T.train(q.net, data, RECIPE.replace(epochs=2), q.callbacks(), seed=1, device="cuda", checkpoint=where)
    assert same_tensors(nets[0].net.state_dict(), nets[1].net.state_dict())
    assert all((w[~p.masks[n].to(w.device)] == 0).all() for n, w in nets[0].net.named_parameters() if n in p.masks)
