"Batches: study files, each place with its own devices, and every fault: what is killed, hangs, raises, or finds no room. The end is that of an unbroken batch."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, child

from rethink_nb.study import Store
from rethink_nb.study.batch import Batch
from rethink_nb.study.cluster import local_client
from rethink_nb.study.engine import Engine
from rethink_nb.study.carry import carry_out
from rethink_nb.study.files import study_files
from rethink_nb.study.status import status_frame
from rethink_nb.study.tasks import Task

TWO = """
title = "Two methods, one seed"
data = "digits"
arch = "vgg-digits"
method = ["l1", "magnitude"]
ratios = [0.5]
seeds = 1
epochs = 2
arms = ["parent", "pruned", "fine-tune", "scratch-e"]
"""
NOTEBOOKS = ["l1-digits-vgg-digits-0.5-seed0", "magnitude-digits-vgg-digits-0.5-seed0", "overview", "parent-digits-vgg-digits-seed0"]


def batch(cwd, *args, **kwargs): return child("rethink-nb", "batch", *args, "--device", "cpu", cwd=cwd, **kwargs)
def statuses(at): return dict(status_frame(at)[["notebook", "status"]].values)
def runs(at): return pd.read_csv(at/"report-runs.csv").drop(columns=["seconds", "device_seconds", "total_seconds"])
def stamps(store): return {id: store.record(id)["written"] for id in store.ids()}


# Refusals ---------------------------------------------------------------------------------------------------------------

REFUSED = {
    "no study": ([], "give a study file"),
    "unknown study": (["smoke-al"], "unknown study file 'smoke-al': did you mean smoke-all?"),
    "no such file": (["nope.toml"], "nope.toml: no such file"),
    "misspelt key": (["bad.toml"], "bad.toml, line 6: unknown key 'ratois': did you mean ratios?"),
    "no workers": (["two.toml", "--workers", "-1"], "-1 workers: give at least 1"),
    "no scheduler": (["two.toml", "--scheduler", "tcp://127.0.0.1:1"], "scheduler tcp://127.0.0.1:1: cannot be reached"),
    "no time": (["two.toml", "--timeout", "-1"], "timeout -1: give minutes"),
    "store that cannot be written": (["two.toml", "--store", "/proc/runs"], "/proc/runs cannot be written to"),
    "out that cannot be written": (["two.toml", "--out", "/proc/out"], "/proc/out cannot be written to"),
    "out is a file": (["two.toml", "--out", "two.toml"], "is a file; name a folder"),
    "data that are not there": (["cifar.toml"], "cifar-10-batches-bin not found"),
}

@pytest.mark.parametrize("args,said", REFUSED.values(), ids=REFUSED)
def test_refused(args, said, tmp_path):
    (tmp_path/"two.toml").write_text(TWO)
    (tmp_path/"bad.toml").write_text(TWO.replace("ratios", "ratois"))
    (tmp_path/"cifar.toml").write_text(TWO.replace('"digits"', '"cifar10"').replace("vgg-digits", "resnet20"))
    done = batch(tmp_path, *args, RETHINK_NB_DATA=str(tmp_path/"none"), HOME=str(tmp_path))
    assert done.returncode == 2 and said in done.output and "Traceback" not in done.output, done.output
    assert done.output.count("\n") == 1 and not list(tmp_path.rglob("*.ipynb")) and not (tmp_path/"runs").exists()


def test_listed_and_planned_without_a_trace(tmp_path):
    (tmp_path/"two.toml").write_text(TWO)
    (tmp_path/"bad.toml").write_text("seeds = ")
    listed, planned = batch(tmp_path, "--list"), batch(tmp_path, "two.toml", "--dry-run")
    assert listed.returncode == planned.returncode == 0
    assert re.search(r"smoke-all +\d+ runs, .*Every method", listed.output) and re.search(r"two.toml +7 runs, .*Two methods", listed.output) and re.search(r"bad.toml +- .*no TOML", listed.output)
    assert all(n in planned.output for n in NOTEBOOKS) and "3 of 3 notebooks, 7 runs" in planned.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.toml", "two.toml"]


# Places -----------------------------------------------------------------------------------------------------------------

def test_each_kernel_sees_its_own_devices(tmp_path):
    "Two places with a made-up card each, and a notebook that holds on until the other one has begun"
    cells = [dict(cell_type="code", id="a", metadata=dict(tags=["parameters"]), execution_count=None, outputs=[], source='me = ""\nfolder = ""\nstore = ""'),
             dict(cell_type="code", id="b", metadata={}, execution_count=None, outputs=[], source='import os, time\nfrom pathlib import Path\nPath(folder, me).write_text(os.environ["CUDA_VISIBLE_DEVICES"])\nwhile len(list(Path(folder).glob("task*"))) < 2: time.sleep(.1)')]
    (tmp_path/"look.ipynb").write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")), nbformat=4, nbformat_minor=5)))
    (tmp_path/"seen").mkdir()
    tasks = [Task(f"task{i}", str(tmp_path/"look.ipynb"), dict(me=f"task{i}", folder=str(tmp_path/"seen"), store=str(tmp_path/"runs"))) for i in range(2)]
    with local_client([dict(CUDA_VISIBLE_DEVICES="4"), dict(CUDA_VISIBLE_DEVICES="7")]) as client:
        results = Engine(client, tasks, lambda t: carry_out(t, tmp_path/"out", timeout=300)).run()
    assert {r["status"] for r in results.values()} == {"done"}, results
    assert sorted(p.read_text() for p in (tmp_path/"seen").iterdir()) == ["4", "7"]


# A whole batch ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    at = tmp_path_factory.mktemp("unbroken")
    (at/"two.toml").write_text(TWO)
    done = batch(at, "two.toml", "--workers", "2")
    assert done.returncode == 0, done.output
    return at


def test_a_batch(unbroken):
    out = unbroken/"batch-two"
    assert sorted(p.stem for p in out.glob("*.ipynb")) == NOTEBOOKS
    assert set(statuses(out).values()) == {"done"}
    told = child("rethink-nb", "status", cwd=unbroken)
    assert told.returncode == 0 and "4 done of 4 notebooks" in told.output
    assert (out/"report.html").stat().st_size > 100_000 and len(runs(out)) == 8
    assert "scratch-e" in (out/"overview.ipynb").read_text()


def test_called_again_it_does_nothing(unbroken):
    before = stamps(Store(unbroken/"runs"))
    done = batch(unbroken, "two.toml")
    assert done.returncode == 0 and "done" not in done.stderr
    assert stamps(Store(unbroken/"runs")) == before


# Faults -------------------------------------------------------------------------------------------------------------------

pytestmark_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")

def processes(cwd, word=""):
    "Ids of the processes in a folder whose command line has a word"
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(p/"cwd").startswith(str(cwd)) and word in (p/"cmdline").read_text().replace("\0", " "): found.append(int(p.name))
        except OSError: pass
    return found


WHAT = dict(worker="spawn_main", papermill="rethink_nb.core.notebooks", kernel="ipykernel_launcher", scheduler="rethink-nb batch")


def begin(cwd, *args, before=None):
    "A batch in the background"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    with open(cwd/"said.log", "ab") as said:
        return subprocess.Popen([Path(sys.executable).parent/"rethink-nb", "batch", "two.toml", "--device", "cpu", *([] if "--scheduler" in args else ["--workers", "2"]), *args], cwd=cwd, env=env, stdout=said, stderr=said, preexec_fn=before)


def until(ready, seconds=120):
    end = time.time() + seconds
    while not (found := ready()) and time.time() < end: time.sleep(.02)
    return found


def nobody_left(cwd): return bool(until(lambda: not processes(cwd), 30))


def same(at, unbroken):
    pd.testing.assert_frame_equal(runs(at/"batch-two"), runs(unbroken/"batch-two"), check_exact=True)
    assert sorted(p.stem for p in (at/"batch-two").glob("*.ipynb")) == NOTEBOOKS and not list(at.rglob("*.part*"))


@pytest.fixture
def at(tmp_path):
    (tmp_path/"two.toml").write_text(TWO)
    yield tmp_path
    for pid in processes(tmp_path): os.kill(pid, signal.SIGKILL) # of a test that has failed


@pytest.mark.slow
@pytestmark_proc
@pytest.mark.parametrize("what", ["worker", "papermill", "kernel"])
def test_a_process_is_killed(what, at, unbroken):
    "In the middle of a training; somebody else goes on from its checkpoint, and the end is that of an unbroken batch"
    p = begin(at)
    assert until(lambda: list(at.glob("runs/.work/*/progress.json")))
    os.kill(processes(at, WHAT[what])[0], signal.SIGKILL)
    assert p.wait(300) == 0, (at/"said.log").read_text()
    same(at, unbroken)
    assert nobody_left(at)


@pytest.mark.slow
@pytestmark_proc
def test_the_scheduler_is_killed(at, unbroken):
    "It lives in the batch's own process: nobody goes on training, what was finished stays, and the same command does the rest"
    for nth in (0, 2):
        p = begin(at)
        assert until(lambda: len(Store(at/"runs").ids()) >= nth and list(at.glob("runs/.work/*/progress.json")))
        p.kill(), p.wait()
        assert nobody_left(at)
    before = stamps(Store(at/"runs"))
    assert len(before) >= 2 and "waiting" in child("rethink-nb", "status", cwd=at).output
    assert batch(at, "two.toml").returncode == 0
    assert {k: v for k, v in stamps(Store(at/"runs")).items() if k in before} == before
    same(at, unbroken)


@pytest.mark.slow
@pytestmark_proc
@pytest.mark.parametrize("seed", range(3))
def test_three_kills_at_random_moments(seed, at, unbroken):
    "Any process, the batch itself among them; begun again whenever it has died"
    from random import Random
    draw, p = Random(seed), begin(at)
    for _ in range(3):
        time.sleep(draw.uniform(1, 12))
        if alive := processes(at): os.kill(draw.choice(alive), signal.SIGKILL)
        time.sleep(.5)
        if p.poll() is not None: p = begin(at)
    while p.wait(300) not in (0, 1): p = begin(at) # killed
    assert batch(at, "two.toml").returncode == 0, (at/"said.log").read_text()
    same(at, unbroken)


@pytest.mark.slow
@pytestmark_proc
def test_a_scheduler_elsewhere(at, unbroken):
    "A running scheduler is named by its address; when it is killed the batch says so, and goes on when there is one again"
    def cluster():
        bin, env = Path(sys.executable).parent, {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        address = at/"address.json"
        address.unlink(missing_ok=True)
        both = [subprocess.Popen([bin/"dask", *args, "--scheduler-file", address], cwd=at, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                for args in (("scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard"), ("worker", "--nthreads", "1", "--nworkers", "2", "--no-dashboard"))]
        assert until(address.is_file)
        return both, json.loads(address.read_text())["address"]
    (scheduler, workers), address = cluster()
    p = begin(at, "--scheduler", address)
    assert until(lambda: list(at.glob("runs/.work/*/progress.json")))
    scheduler.kill(), scheduler.wait()
    assert p.wait(120) == 2 and "the scheduler is gone; the same command goes on from here" in (at/"said.log").read_text()
    workers.kill(), workers.wait()
    assert nobody_left(at)
    (scheduler, workers), address = cluster()
    done = batch(at, "two.toml", "--scheduler", address)
    assert done.returncode == 0, done.output
    for x in (workers, scheduler): x.kill(), x.wait()
    same(at, unbroken)


@pytest.mark.slow
def test_a_notebook_fails_and_the_others_go_on(at):
    "A price that leaves nothing: its row says why, the summary too, and the exit code"
    (at/"two.toml").write_text(TWO.replace('"magnitude"]', '"l1"]').replace('["l1", "l1"]', '"l1"') + '\n[[study]]\n\n[[study]]\nmethod = "sss"\nratios = []\nprices = [0.5]\n')
    done = batch(at, "two.toml")
    assert done.returncode == 1 and "1 of 4 notebooks have no result" in done.output and "the price has taken every factor" in done.output, done.output
    assert sorted(statuses(at/"batch-two").values()) == ["done", "done", "done", "failed"]
    assert "failed: " in (told := child("rethink-nb", "status", cwd=at).output) and "train with a lower strength" in told
    assert (at/"batch-two"/"report.html").is_file()


@pytest.mark.slow
def test_a_damaged_record(at):
    "It is told by its name before anything starts; when it is gone, its run is made again"
    store = Store(at/"runs")
    parent = Batch(at/"two.toml", store=store.path).tasks[0].runs[0]
    (store/parent.id).mkdir(parents=True)
    (store/parent.id/"record.json").write_text("{")
    done = batch(at, "two.toml")
    assert done.returncode == 2 and "damaged" in done.output and "Traceback" not in done.output, done.output
    (store/parent.id/"record.json").unlink()
    assert batch(at, "two.toml").returncode == 0


@pytest.mark.slow
def test_a_notebook_takes_too_long(at):
    done = batch(at, "two.toml", "--timeout", "0.03")
    assert done.returncode == 1 and "it took longer than 1.8 s" in done.output, done.output
    assert nobody_left(at) and batch(at, "two.toml").returncode == 0


@pytest.mark.slow
@pytestmark_proc
def test_memory_runs_out(at):
    "In a wide network; the narrow one is not harmed"
    import resource
    (at/"two.toml").write_text(TWO.replace('["l1", "magnitude"]', '"l1"') + "\n[[study]]\n\n[[study]]\nwidth = 64\ntraining = {batch = 1000}\n")
    size = "import resource, rethink_nb.study, rethink_nb.report, papermill; print(int(open('/proc/self/statm').read().split()[0])*resource.getpagesize())"
    limit = int(child("python", "-c", size).stdout) + 2**31 # what a notebook's process takes before it does anything, and some more
    p = begin(at, before=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    said = (p.wait(400), (at/"said.log").read_text())
    assert said[0] == 1 and "emory" in said[1], said
    found = statuses(at/"batch-two")
    assert sorted(found.values()) == ["done", "done", "done", "failed", "skipped"], found


@pytest.mark.slow
def test_a_full_disk(at, unbroken):
    "As one with no room for files above some size: nothing half-written stays, and with more room the same command does the rest"
    import resource
    p = begin(at, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)))
    assert p.wait(300) in (1, 2) and "Traceback" not in (at/"said.log").read_text(), (at/"said.log").read_text()
    good, bad = Store(at/"runs").records()
    assert not bad and not list(at.rglob("*.part*"))
    assert batch(at, "two.toml").returncode == 0
    same(at, unbroken)


COUNTS = """
import os
from rethink_nb.methods.base import Method, info, register
like = info("l1")
def choose(net, ask):
    with open(os.environ["COUNTED"], "a") as f: f.write(f"{ask.amount}\\n")
    return like.choose(net, ask)
register(Method("counted", "L1, counted", "predefined", "a test", choose, like.counts, options=like.options))
"""

@pytest.mark.slow
@pytest.mark.parametrize("out", ["batch-two", "other"])
def test_two_batches_at_once(out, at, monkeypatch):
    "On one store, in one folder or in two: every run is made once, and both come to the end"
    (at/"two.toml").write_text(TWO.replace('["l1", "magnitude"]', '"counted"').replace("[0.5]", "[0.3, 0.5]"))
    (at/"counts.py").write_text(COUNTS)
    monkeypatch.setenv("COUNTED", str(at/"counted"))
    both = [begin(at, "--plugin", "counts.py", "--workers", "1", "--out", o) for o in ("batch-two", out)]
    assert [p.wait(400) for p in both] == [0, 0], (at/"said.log").read_text()
    assert len((at/"counted").read_text().splitlines()) == 2
    for o in {"batch-two", out}: assert set(statuses(at/o).values()) == {"done"}


@pytest.mark.slow
@pytestmark_proc
def test_asked_to_stop(at, unbroken):
    "One line, no traceback, nobody left, and the same command goes on"
    p = begin(at, before=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a test run in the background of a shell ignores it
    assert until(lambda: list(at.glob("runs/.work/*/progress.json")))
    p.send_signal(signal.SIGINT)
    assert p.wait(60) == 130
    said = (at/"said.log").read_text()
    assert "interrupted; the same command goes on from here" in said and "Traceback" not in said, said
    assert nobody_left(at) and batch(at, "two.toml").returncode == 0
    same(at, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in study_files().names() if n != "smoke-all"])
def test_every_study_file(name, tmp_path):
    "Those that ship, at smoke scale: every notebook is done, and the report holds the primary comparisons against each other"
    done = child("rethink-nb", "batch", name, "--scale", "smoke", "--device", "cpu", cwd=tmp_path, timeout=1800)
    assert done.returncode == 0, done.output
    assert set(statuses(tmp_path/f"batch-{name}-smoke").values()) == {"done"}
    assert "(Holm)" in (tmp_path/f"batch-{name}-smoke"/"report.html").read_text()
