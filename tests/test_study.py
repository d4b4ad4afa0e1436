"The store under two writers and under damage; a study killed at any point ends with the same numbers."
import json, os, signal, subprocess, sys, time
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, child

from rethink_nb.core.errors import UserError
from rethink_nb.study import Run, Store, Study, Trial, execute, stored_trials

SMALL = ["run", "l1", "--data", "digits", "--arch", "vgg-digits", "--ratio", "0.5", "--seeds", "1", "--epochs", "4", "--store", "runs"]
NUMBERS = ["network", "ratio", "arm", "mean", "sd", "n", "params", "macs", "train_macs", "total_macs", "epochs"]


def command(args, cwd): return child("rethink-nb", *args, cwd=cwd)


def numbers(path): return pd.read_csv(path)[NUMBERS]


def stamps(store): return {id: store.record(id)["written"] for id in store.ids()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    at = tmp_path_factory.mktemp("unbroken")
    done = command(SMALL, at)
    assert done.returncode == 0, done.output
    return at


def kill_after(args, cwd, ready):
    "Start a command and SIGKILL it when `ready()`"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    p = subprocess.Popen([Path(sys.executable).parent/"rethink-nb", *args], cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 120
    while not ready() and p.poll() is None and time.time() < end: time.sleep(.02)
    p.send_signal(signal.SIGKILL)
    p.wait()


def no_workers_left(cwd):
    "Workers notice that their parent is gone"
    def alive():
        found = []
        for p in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(p/"cwd") == str(cwd): found.append(p.name)
            except OSError: pass
        return found
    end = time.time() + 20
    while alive() and time.time() < end: time.sleep(.1)
    return not alive()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_killed_and_called_again(tmp_path, unbroken):
    "Once in the first training, once after some runs; nothing finished is trained again; the end is the unbroken one"
    store = Store(tmp_path/"runs")
    for ready in (lambda: list(tmp_path.glob("runs/.work/*/checkpoint.safetensors")), lambda: len(store.ids()) >= 3):
        kill_after(SMALL, tmp_path, ready)
        assert no_workers_left(tmp_path)
    before = stamps(store)
    assert before
    done = command(SMALL, tmp_path)
    assert done.returncode == 0, done.output
    assert {k: v for k, v in stamps(store).items() if k in before} == before
    name = "l1-digits-vgg-digits.csv"
    pd.testing.assert_frame_equal(numbers(tmp_path/name), numbers(unbroken/name), check_exact=True)


@pytest.mark.parametrize("sign,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_it_saves_and_goes(sign, code, tmp_path):
    "A long training is not waited for: its step is finished and saved, no worker stays, the same command goes on"
    long = [*SMALL[:-2], "--store", "runs"]
    long[long.index("--epochs") + 1] = "4000"
    # a test run in the background of a shell ignores SIGINT, and so would its children
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    p = subprocess.Popen([Path(sys.executable).parent/"rethink-nb", *long], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    end = time.time() + 60
    while not list(tmp_path.glob("runs/.work/*/checkpoint.safetensors")) and time.time() < end: time.sleep(.05)
    sent = time.time()
    p.send_signal(sign)
    _, err = p.communicate(timeout=30)
    assert max(f.stat().st_mtime for f in tmp_path.glob("runs/.work/*/checkpoint.safetensors")) >= sent - .01
    assert p.returncode == code and "the same command goes on from here" in err and "Traceback" not in err
    assert no_workers_left(tmp_path) and list(tmp_path.glob("runs/.work/*/checkpoint.safetensors"))


def test_report_over_several_studies(tmp_path):
    "Of two scales, and one asked for twice with more seeds: every result counts once"
    store = Store(tmp_path/"runs")
    few = Study(data="digits", arch="vgg-digits", ratios=[.5], seeds=1, epochs=1)
    for s in (few, few.replace(seeds=2), few.replace(scale="pocket", arch="resnet8-digits")): Trial(s, store).run(device="cpu", progress=False)
    done = command(["report", "--store", "runs"], tmp_path)
    assert done.returncode == 0, done.output
    assert "n=2+2" in done.stdout and "n=3" not in done.stdout and "Margin 0.5 points" in done.stdout and "Margin 2 points" in done.stdout
    assert (tmp_path/"report.html").read_text().count("<h2>Scale pocket, margin 0.5: Verdicts</h2>") == 1


FILE = """
title = "Half of a small network"
data = "digits"
arch = "vgg-digits"
claims = [1]
primary = ["scratch-b vs fine-tune"]
[scales.smoke]
ratios = [0.5]
seeds = 2
epochs = 2
"""

def test_the_report_of_a_study_file(tmp_path, monkeypatch, capsys):
    "Page, CSV and LaTeX tell one thing; it is told what may not be concluded; what is not there is refused in a line"
    from rethink_nb.cli import main
    from rethink_nb.study.files import read_studies
    (tmp_path/"half.toml").write_text(FILE)
    (tmp_path/"runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for words, said in ((["half.toml", "--store", "nowhere"], "no such folder"), (["half.toml", "--scale", "paper"], "has no scale 'paper'"), (["--scale", "smoke"], "name the file, too"), (["half.toml", "--out", "page.txt"], "ends in .html"),
                        (["halt"], "unknown study file 'halt'"), (["half.toml"], "rethink-nb batch half.toml carries it out")):
        assert main(["report", *words]) == 2
        assert said in (err := capsys.readouterr().err) and err.count("\n") == 1, err
    trial = Trial(read_studies("half.toml").studies, "runs").run(device="cpu", progress=False)
    assert main(["report", "half.toml"]) == 0
    page, tex = (tmp_path/"half.html").read_text(), (tmp_path/"half.tex").read_text()
    for words in ("Half of a small network", "What may not be concluded", "this scale only checks that everything works", "asked, at a scale that finds nothing", "Verdicts as a map"): assert words in page, words
    assert "http://" not in page.split("<body>")[1].split("<script")[0] and tex.count("\\begin{longtable}") == 2 and "vgg-digits" in tex
    v = pd.read_csv(tmp_path/"half-verdicts.csv")
    assert v.setup.notna().all() and v.primary.sum() == 1 and len(v) == len(trial.verdicts())
    assert f"{v[v.primary].difference.iloc[0]:+.2f}" in tex and f"{v[v.primary].difference.iloc[0]:+.2f}" in page
    (tmp_path/"runs"/"studies").rename(tmp_path/"runs"/"away")
    assert main(["report"]) == 2 # without the file, the store must know its studies


def test_studies_of_two_setups_are_not_averaged(tmp_path):
    "Frames that a user puts together: the same names for other trainings"
    from rethink_nb.report.stats import verdicts
    from rethink_nb.report.tables import trial_table
    store, s = Store(tmp_path/"runs"), Study(data="digits", arch="vgg-digits", ratios=[.5], seeds=1, epochs=1, arms=["parent", "scratch-e"])
    long = s.replace(epochs=2)
    both = pd.concat([s.run(store, device="cpu", progress=False).frame(), long.run(store, device="cpu", progress=False).frame()])
    assert len(trial_table(both)) == 4 # their names tell the epochs
    alike = both.assign(network="vgg-digits")
    for refuses in (lambda: trial_table(alike), lambda: verdicts(alike, [("scratch-e", "parent")], 2)):
        with pytest.raises(UserError, match=r"2 setups under one name \(1 to 2 epochs"): refuses()
    assert trial_table(alike, mixed=True).n.max() == 2


def test_the_rig_sees_a_difference_that_is_there(tmp_path):
    "Positive control: at one epoch of retraining, inherited weights win clearly over random ones"
    from rethink_nb.report.stats import compare
    from rethink_nb.study import run_all
    s, store = Study(data="digits", arch="vgg-digits", ratios=[.3], seeds=3), Store(tmp_path/"runs")
    one = s.recipe.replace(epochs=1, lr=.01, schedule="constant")
    short = lambda arm: [c.run.replace(recipe=one) for c in s.cells() if c.arm == arm]
    inherited, random = short("fine-tune"), short("scratch-e")
    run_all([r for x in (*inherited, *random) for r in x.lineage()], store, device="cpu", progress=False)
    accuracy = lambda runs: [store.record(r.id)["metrics"]["test_acc"] for r in runs]
    c = compare(accuracy(inherited), accuracy(random), margin=s.points)
    assert c.verdict == "better" and c.lo > 10, c


def test_test_images_are_read_once(monkeypatch):
    from rethink_nb.arch import zoo
    from rethink_nb.training import load_data, loop, recipe
    scores = import_module("rethink_nb.training.scores") # the face has a function of that name
    data, seen = load_data("digits"), []
    plain = scores.logits_of
    def look(net, split, *a, **k): return seen.append(len(split)) or plain(net, split, *a, **k)
    monkeypatch.setattr(scores, "logits_of", look)
    loop.train(zoo.arch("vgg-digits").build(), data, recipe("digits", epochs=3), device="cpu")
    assert seen == [len(data.val)]*3 + [len(data.test)]


def test_a_finished_study_trains_nothing(unbroken):
    store = Store(unbroken/"runs")
    before = stamps(store)
    done = command(SMALL, unbroken)
    assert done.returncode == 0 and stamps(store) == before
    assert f"{len(before)} runs, {len(before)} done already" in done.stderr


def test_what_a_run_leaves(unbroken):
    for name in ("l1-digits-vgg-digits.ipynb", "l1-digits-vgg-digits.html", "l1-digits-vgg-digits.csv"): assert (unbroken/name).is_file()
    nb = json.loads((unbroken/"l1-digits-vgg-digits.ipynb").read_text())
    assert any("application/vnd.plotly.v1+json" in o.get("data", {}) for c in nb["cells"] for o in c.get("outputs", []))
    assert sorted(p.name for p in unbroken.iterdir()) == [*(f"l1-digits-vgg-digits{end}" for end in ("-runs.csv", "-verdicts.csv", ".csv", ".html", ".ipynb", ".tex")), "runs"]
    store = Store(unbroken/"runs")
    for id in store.ids():
        record = store.record(id)
        run = Run.from_dict(record["run"])
        assert run.id == id and run.group == record["group"] and store.network(id).arch
        assert record["environment"]["torch"] and record["data_sha256"]
        assert (run.kind == "prune") == (store/id/"plan.json").is_file()
    assert stored_trials(store)[0].frame().status.eq("done").all()


def test_a_damaged_store_is_named_and_the_rest_readable(tmp_path):
    s, store = Study(data="digits", arch="vgg-digits", ratios=[.5], seeds=1, epochs=1), Store(tmp_path/"runs")
    cut = s.prune_run("l1", .5, 0)
    execute(cut, store, device="cpu")
    record, weights = (store/cut.start.id/n for n in ("record.json", "weights.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:len(whole)//2])
    with pytest.raises(UserError, match=f"{cut.start.id}/weights.safetensors: damaged"): execute(s.prune_run("random-channels", .5, 0), store, device="cpu")
    weights.unlink()
    with pytest.raises(UserError, match="missing"): store.network(cut.start.id)
    record.write_text(record.read_text()[:200])
    good, bad = store.records()
    assert [r["id"] for r in good] == [cut.id] and len(bad) == 1 and str(record) in bad[0]
    (tmp_path/"runs"/"studies").mkdir()
    s.write(tmp_path/"runs"/"studies"/f"{s.id}.json")
    done = command(["report", "--store", "runs"], tmp_path)
    assert done.returncode == 2 and str(Path("runs")/cut.start.id/"record.json") in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path/"report.html").exists()


def test_two_writers_train_once(tmp_path):
    "Two processes ask for one run at one time"
    code = ("import sys; from rethink_nb.study import *; s = Study(data='digits', arch='vgg-digits', seeds=1, epochs=3);"
            "r = execute(s.parent_run(0), Store('runs'), device='cpu'); print(r['written'], r['metrics']['test_acc'], r['cost']['seconds'])")
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[0] for p in both]
    assert said[0] and said[0] == said[1]


def test_scratch_is_shared_between_methods(tmp_path):
    a = Study(data="digits", arch="vgg-digits", ratios=[.5], seeds=1)
    b = a.replace(method="random-channels")
    scratch = lambda s: {c.arm: c.run.id for c in s.cells() if c.arm.startswith("scratch")}
    assert scratch(a) == scratch(b)
    assert len(Trial([a, b], tmp_path/"runs").runs) < len(Trial(a, tmp_path/"runs").runs) + len(Trial(b, tmp_path/"runs").runs) - 2


@pytest.mark.slow
@pytest.mark.parametrize("runs_done", [0, 5, 17, 40, 70, 88])
def test_demo_killed_anywhere(tmp_path, runs_done, demo):
    store = Store(tmp_path/"demo"/"runs")
    kill_after(["demo"], tmp_path, lambda: len(store.ids()) >= runs_done and (runs_done or list(tmp_path.glob("demo/runs/.work/*/checkpoint.safetensors"))))
    before = stamps(store)
    done = command(["demo"], tmp_path)
    assert done.returncode == 0, done.output
    assert {k: v for k, v in stamps(store).items() if k in before} == before
    pd.testing.assert_frame_equal(numbers(tmp_path/"demo"/"report.csv"), numbers(demo/"demo"/"report.csv"), check_exact=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    at = tmp_path_factory.mktemp("demo")
    done = command(["demo"], at)
    assert done.returncode == 0, done.output
    return at


@pytest.mark.slow
def test_a_finished_demo_takes_seconds(demo):
    before, began = stamps(Store(demo/"demo"/"runs")), time.time()
    assert command(["demo"], demo).returncode == 0
    assert stamps(Store(demo/"demo"/"runs")) == before and time.time() - began < 30


def test_controls_have_the_widths_of_what_they_control_where_dense_layers_are_gone():
    from rethink_nb.methods import pruned_arch
    from rethink_nb.study import Study
    for arch in ("densenet40", "densenet-bc-100"):
        s = Study(data="digits", arch=arch, method="l1", ratios=[.7], seeds=1, width=.25)
        small, request = pruned_arch("l1", s.base, .7), s.prune_run("random-channels", .7, 0).request
        assert any(x.kind == "constant" for x in small.sites()) and pruned_arch("random-channels", s.base, **request) == small
