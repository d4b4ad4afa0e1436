"Runs mirrored to TensorBoard and MLflow: the real ones read back, a server that is down or slow, and the command."
import shutil, socket, threading

import pytest
from conftest import child

from rethink_nb.study import track
from rethink_nb.study.grid import Study
from rethink_nb.study.store import Store


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A store with a parent and its pruning"
    at = tmp_path_factory.mktemp("track")
    study = Study(data="digits", arch="vgg-digits", ratios=[.5], arms=("parent", "pruned"), seeds=1, epochs=2)
    study.run(Store(at/"runs"), workers=1, device="cpu", progress=False)
    return study, Store(at/"runs")


def parent_of(study, store): return store.record(study.parent_run(0).id)


def test_tensorboard(finished):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    study, store = finished
    to = track.tracker("tensorboard", store)
    assert [track.mirror(to, store), track.mirror(to, store)] == [(2, {}), (0, {})]
    record = parent_of(study, store)
    seen = EventAccumulator(str(store/"tensorboard"/record["id"])).Reload()
    curve = store.curve(record["id"])
    assert [(e.step, round(e.value, 3)) for e in seen.Scalars("val_acc")] == [(k, round(v, 3)) for k, v in zip(curve.epoch, curve.val_acc)]
    assert seen.Scalars("final/test_acc")[0].value == pytest.approx(record["metrics"]["test_acc"])
    assert "record/text_summary" in seen.Tags()["tensors"] and not list(store.path.glob("tensorboard/.*"))
    assert store.ids() == sorted(r.id for r in study.trial(store).runs) # the mirror is no run


def test_mlflow(finished, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    study, store = finished
    to = track.tracker("mlflow", store)
    assert [track.mirror(to, store), track.mirror(track.tracker("mlflow", store), store)] == [(2, {}), (0, {})]
    record, client = parent_of(study, store), mlflow.MlflowClient(f"sqlite:///{store/'mlflow.db'}")
    found, = to.runs(record)
    assert found.info.status == "FINISHED" and found.data.params["recipe.epochs"] == "2" and found.data.params["network"] == "vgg-digits" and found.data.metrics["network.macs"] == record["macs"] and found.data.metrics["final.test_acc"] == record["metrics"]["test_acc"]
    assert [m.step for m in client.get_metric_history(found.info.run_id, "val_acc")] == [1, 2]
    assert {"record.json", "curve.csv", "weights.safetensors"} <= {f.path for f in client.list_artifacts(found.info.run_id)}
    client.update_run(found.info.run_id, "RUNNING") # killed while it copied: begun anew
    assert track.mirror(track.tracker("mlflow", store), store)[0] == 1 and [r.info.status for r in to.runs(record)] == ["FINISHED"]


@pytest.mark.slow
@pytest.mark.parametrize("answers", [False, True], ids=["refused", "silent"])
def test_a_server_that_is_down(answers, tmp_path):
    "The trial is carried out all the same, within reason as fast, and says so in one line"
    pytest.importorskip("mlflow")
    door = socket.create_server(("127.0.0.1", 0))
    port = door.getsockname()[1]
    if not answers: door.close()
    done = child("rethink-nb", "run", "l1", "--ratio", "0.5", "--seeds", "1", "--epochs", "1", "--arms", "parent,pruned", "--track", "mlflow", "--workers", "1", cwd=tmp_path,
                 MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}", MLFLOW_HTTP_REQUEST_TIMEOUT="2")
    if answers: door.close()
    assert done.returncode == 0 and "tracker mlflow: 0 of 2 runs are there" in done.output and "Traceback" not in done.output, done.output
    assert len(Store(tmp_path/"runs").ids()) == 2


def test_a_trial_with_a_tracker(tmp_path):
    pytest.importorskip("tensorboard")
    done = child("rethink-nb", "run", "l1", "--ratio", "0.5", "--seeds", "1", "--epochs", "1", "--arms", "parent,pruned", "--track", "tensorboard", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.output
    assert sorted(p.name for p in (tmp_path/"runs"/"tensorboard").iterdir()) == Store(tmp_path/"runs").ids()


def test_what_is_not_there(tmp_path, monkeypatch):
    "A tracker of an unknown name, and one that is not installed, are told before anything is written"
    done = child("rethink-nb", "run", "l1", "--track", "tensorbord", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean tensorboard?" in done.output and not (tmp_path/"runs").exists()
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    with pytest.raises(Exception, match=r"not installed: pip install 'rethink_nb\[track\]'"): track.tracker("mlflow", Store(tmp_path/"x"))


def test_a_hung_tracker(finished, monkeypatch, capsys):
    "One that never answers is left after a while"
    study, store = finished
    class Hung:
        package = "json"
        def __init__(self, store): pass
        def has(self, record): threading.Event().wait(60)
    monkeypatch.setitem(track.trackers.items, "hung", Hung)
    monkeypatch.setattr(track, "_REST", .2)
    with track.mirrored(store, store.ids(), "hung"): pass
    assert "it takes longer than" in capsys.readouterr().err


def test_a_damaged_run(finished, tmp_path):
    "It is named, and the others are copied"
    pytest.importorskip("tensorboard")
    study, store = finished
    shutil.copytree(store.path, tmp_path/"runs")
    shutil.rmtree(tmp_path/"runs"/"tensorboard", ignore_errors=True)
    copy, bad = Store(tmp_path/"runs"), study.parent_run(0).id
    (copy/bad/"curve.csv").write_bytes(b"\xff\xfe\x00")
    copied, wrong = track.mirror(track.tracker("tensorboard", copy), copy)
    assert copied == 1 and list(wrong) == [bad] and "damaged" in wrong[bad]
