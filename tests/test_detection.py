"Detectors around networks of every family: trained a little, stored and read back, killed and taken up; and what cannot be one."
import os, signal, subprocess, sys, time

import pytest
import torch

pytest.importorskip("torchmetrics")
from conftest import child

from rethink_nb import methods
from rethink_nb.arch import zoo
from rethink_nb.arch.parts import Constant
from rethink_nb.core.errors import UserError
from rethink_nb.study.detections import Detections
from rethink_nb.study.detector import detection_run
from rethink_nb.study.grid import Study
from rethink_nb.study.run import execute
from rethink_nb.study.step import DataRef, Run
from rethink_nb.study.store import Store
from rethink_nb.study.trial import Trial
from rethink_nb.training import detection
from rethink_nb.training.recipe import recipe
from rethink_nb.training.scenes import load_scenes

SMALL = dict(classes=10, input=(1, 8, 8))


def trained_a_little(net, **sizes):
    scenes, (d, r) = load_scenes("digit-canvases", subset=16), detection.detectors.get("digit-canvases")
    d = d.replace(**sizes)
    model = detection.detector(net, 10, d, [.5]*net.arch.input[0], [.25]*net.arch.input[0])
    rows, cost = detection.train_detector(model, scenes, d, r.replace(epochs=1), device="cpu")
    return model, rows, cost


@pytest.mark.parametrize("name", ["vgg-digits", "resnet8-digits", "preresnet20", "densenet40"])
def test_every_family(name):
    "Pruned, too, and in colour: the maps are those that its classifier takes means of"
    a = zoo.arch(name, classes=10, width=.25 if "40" in name or "20" in name else 1., input=(1, 8, 8) if "digits" in name else (3, 32, 32))
    method, options = ("l1", {}) if "digits" in name else ("slimming", dict(min_keep=1)) # the second picks what each block reads
    net = methods.prune(method, a.build(seed=0), .4, **options).net
    x = torch.randn(2, *a.input)
    net.eval()
    maps = net.maps(x)
    assert net.maps(torch.randn(1, a.input[0], 40, 24)).shape[:2] == (1, maps.shape[1])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model, rows, cost = trained_a_little(net)
    assert model.backbone.out_channels == maps.shape[1] and rows[0]["images"] == 16 and cost.macs > 0
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    norms = {f"{at}.{k}" for at, m in net.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for k in m.state_dict()}
    assert any(k.endswith("conv.weight") or ".conv" in k for k in moved) and not moved & norms


def test_live_norms_move():
    net = zoo.arch("vgg-digits", **SMALL).build(seed=0)
    before = net.features.bn1.running_mean.clone()
    trained_a_little(net, frozen=False)
    assert not torch.equal(net.features.bn1.running_mean, before)


def test_what_cannot_look():
    "A family without maps, and a constant that fits images of one size"
    net = zoo.arch("vgg-digits", **SMALL).build(seed=0)
    net.arch = net.arch.replace(constants=(Constant(at="features.conv1", shape=(8, 8, 8)),))
    with pytest.raises(UserError, match="features.conv1 adds a constant map, which fits images of 8x8 pixels alone"): detection.Backbone(net)
    class Bare(torch.nn.Linear): arch = zoo.arch("vgg-digits", **SMALL)
    with pytest.raises(UserError, match=r"family vgg has no maps\(x\)"): detection.Backbone(Bare(2, 2))


def test_without_torchmetrics(tmp_path, monkeypatch):
    "One line, before anything is trained"
    monkeypatch.setitem(sys.modules, "torchmetrics.detection", None)
    trial = Trial(Study(data="digits", arch="vgg-digits", ratios=.5, arms=("parent",), seeds=1, epochs=1), tmp_path/"runs")
    with pytest.raises(UserError, match=r"pip install 'rethink_nb\[detection\]'"): Detections(trial, "digit-canvases").run(device="cpu")
    assert not (tmp_path/"runs").exists()


def test_weights_stay_away(tmp_path):
    "A network with pruned single weights keeps its zeros as a detector"
    study = Study(data="digits", arch="vgg-digits", method="magnitude", ratios=.5, arms=("fine-tune",), seeds=1, epochs=1)
    run, store = detection_run(study.cells()[0].run, "digit-canvases", subset=16, epochs=1), Store(tmp_path)
    record = execute(run, store, "cpu")
    assert record["status"] == "done", record
    zeros = lambda id: {k: (v == 0) for k, v in store.network(id).state_dict().items() if k.endswith("conv2.weight")}
    before, after = zeros(run.start.id), zeros(run.id)
    assert all((after[k] >= before[k]).all() and before[k].any() for k in before) and record["nonzero_params"] < record["params"]
    assert not torch.equal(store.network(run.id).features.conv2.weight, store.network(run.start.id).features.conv2.weight)


KILLED = """
import sys
from rethink_nb.study.detector import detection_run
from rethink_nb.study.run import execute
from rethink_nb.study.step import Run
from rethink_nb.study.store import Store
print(execute(Run.read(sys.argv[1]), Store(sys.argv[2]), "cpu")["status"])
"""

@pytest.mark.slow
def test_killed(tmp_path):
    "SIGKILL in the middle of a detector's training: the next call goes on from the checkpoint, to the same bits"
    parent = Run(kind="train", data=DataRef(name="digits"), arch=zoo.arch("vgg-digits", **SMALL), recipe=recipe("digits", epochs=1))
    run = detection_run(parent, "digit-canvases", subset=64, epochs=3)
    run.write(tmp_path/"run.json")
    call = [sys.executable, "-c", KILLED, tmp_path/"run.json"]
    assert child("python", *call[1:], tmp_path/"whole").output.strip().endswith("done")
    p = subprocess.Popen([*map(str, call), str(tmp_path/"cut")], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()})
    store, began = Store(tmp_path/"cut"), time.monotonic()
    while not (store.progress(run.id) or {}).get("epoch") and time.monotonic() - began < 120: time.sleep(.05)
    p.send_signal(signal.SIGKILL), p.wait()
    assert not store.done(run) and (store.work(run)/"checkpoint.safetensors").is_file()
    assert child("python", *call[1:], tmp_path/"cut").output.strip().endswith("done")
    whole, cut = (Store(tmp_path/k).record(run.id) for k in ("whole", "cut"))
    assert cut["metrics"] == whole["metrics"] and cut["weights_sha256"] == whole["weights_sha256"]
    assert [(Store(tmp_path/k)/run.id/"detector.safetensors").read_bytes() for k in ("whole",)] == [(Store(tmp_path/k)/run.id/"detector.safetensors").read_bytes() for k in ("cut",)]


def test_status_of_a_store(tmp_path):
    "`rethink-nb status` of results without a batch, of a folder of neither, and of none"
    study = Study(data="digits", arch="vgg-digits", ratios=.5, arms=("parent", "pruned"), seeds=1, epochs=1)
    study.run(Store(tmp_path/"runs"), workers=1, device="cpu", progress=False)
    more = study.replace(seeds=2)
    more.write(tmp_path/"runs"/"studies"/f"{more.id}.json")
    told = child("rethink-nb", "status", "runs", cwd=tmp_path)
    assert told.returncode == 0 and told.output.startswith("2 done, 2 waiting of 4 runs; ") and "of training left" in told.output, told.output
    (tmp_path/"empty").mkdir()
    for at, why in (("empty", "holds no study and no batch"), ("nowhere", "no such folder")):
        told = child("rethink-nb", "status", at, cwd=tmp_path)
        assert told.returncode == 2 and why in told.output and len(told.output.splitlines()) == 1
