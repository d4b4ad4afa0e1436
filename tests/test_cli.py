"What a user gets wrong: one line on stderr that names it, exit 2, nothing written."
import pytest
from conftest import child

from rethink_nb.cli import commands, main
from rethink_nb.study import Store, Study, Trial
from rethink_nb.surgery.export import check_exported

BAD = {
    "command": (["rum"], "did you mean run"),
    "export nothing": (["export", "nowhere/net"], "nowhere/net: no such folder"),
    "export a store": (["export", "store"], "store holds many runs: name the folder of one"),
    "export format": (["export", "vgg-digits", "--format", "tflite"], "format 'tflite': give onnx or torch.export"),
    "export end": (["export", "vgg-digits", "--out", "net.pb"], "onnx goes to a file that ends in .onnx"),
    "export into a file": (["export", "vgg-digits", "--out", "afile/net.onnx"], "afile is a file"),
    "export parent": (["export", "vgg-digits", "--parent", "vgg17"], "unknown network 'vgg17'"),
    "export threads": (["export", "vgg-digits", "--format", "torch.export", "--out", "afile.pt2", "--threads", "0"], "threads 0: give a whole number"),
    "network": (["count", "resnet65"], "did you mean resnet56"),
    "method": (["prune", "l11", "vgg-digits", "out", "--ratio", "0.5"], "unknown method 'l11'"),
    "data": (["run", "l1", "--data", "fashion-mnst"], "did you mean fashion-mnist"),
    "run network": (["run", "l1", "--arch", "vgg16x"], "did you mean vgg16"),
    "run method": (["run", "l2"], "unknown method"),
    "no plugin": (["methods", "--plugin", "nowhere.py"], "nowhere.py: no such file"),
    "plugin": (["run", "l1", "--plugin", "afile"], "afile: not a Python file"),
    "ratio above": (["run", "l1", "--ratio", "1.0"], "outside [0, 1)"),
    "ratio below": (["prune", "l1", "vgg-digits", "out", "--ratio=-0.1"], "outside [0, 1)"),
    "ratio word": (["run", "l1", "--ratio", "half"], "ratio 'half'"),
    "empties": (["run", "l1", "--ratio", "0.95"], "leaves conv1 (16 channels) empty, and it cannot go"),
    "target": (["prune", "l1", "resnet20", "out", "--target", "A"], "no target of resnet20"),
    "target of another": (["prune", "l1", "resnet56", "out", "--target", "vgg16-A"], "no target of resnet56"),
    "store is a file": (["run", "l1", "--store", "afile"], "afile is a file"),
    "out is a file": (["prune", "l1", "vgg-digits", "afile/x", "--ratio", "0.5"], "afile is a file"),
    "not a number": (["run", "l1", "--seeds", "three"], "seeds"),
    "no seeds": (["run", "l1", "--seeds", "0"], "at least one seed"),
    "missing argument": (["prune", "l1"], "required"),
    "unknown option": (["demo", "--fast"], "--fast"),
    "scale": (["run", "l1", "--scale", "big"], "unknown scale"),
    "margin": (["run", "l1", "--margin=-1"], "margin"),
    "alpha": (["run", "l1", "--alpha", "2"], "alpha"),
    "precision": (["run", "l1", "--precision", "fp8"], "precision"),
    "subset": (["run", "l1", "--subset", "3"], "subset"),
    "device": (["run", "l1", "--device", "cuda:77"], "device"),
    "workers": (["run", "l1", "--workers=-2"], "workers"),
    "width": (["count", "vgg16", "--width", "0"], "width"),
    "input": (["count", "vgg16", "--input", "32"], "input"),
    "classes": (["count", "vgg16", "--classes", "0"], "0 classes"),
    "small input": (["count", "vgg16", "--input", "3x8x8"], "at least 16x16"),
    "nan": (["run", "l1", "--ratio", "nan"], "outside [0, 1)"),
    "out cannot be made": (["run", "l1", "--out", "/proc/nothing"], "/proc/nothing"),
    "huge": (["count", "resnet20", "--classes", "99999999999999999999"], "classes"),
    "no folder": (["prune", "l1", "nofolder/x", "out", "--ratio", "0.5"], "nofolder/x: no such folder"),
    "empty name": (["count", ""], "name a folder"),
    "target and multiple": (["prune", "l1", "resnet56", "out", "--target", "A", "--multiple", "8"], "multiple goes with a ratio"),
    "macs too few": (["prune", "l1", "resnet20", "out", "--macs", "1e-9"], "of the macs still stay"),
    "option": (["prune", "l1", "resnet20", "out", "--ratio", "0.5", "--options", "scpe=global"], "l1 has no option 'scpe': there are skip, mode"),
    "options": (["prune", "l1", "resnet20", "out", "--ratio", "0.5", "--options", "global"], "give name=value"),
    "no start": (["prune", "lottery", "resnet20", "out", "--ratio", "0.5"], "give init="),
    "no masks by cost": (["prune", "magnitude", "resnet20", "out", "--macs", "0.5"], "magnitude does not go by macs: give ratio"),
    "study option": (["run", "magnitude", "--options", "scop=layer"], "magnitude has no option 'scop': there are scope"),
    "strength": (["run", "slimming", "--options", "strength=-1"], "strength -1"),
    "rounds": (["run", "lottery", "--rounds", "0"], "0 rounds"),
    "one step": (["run", "uniform", "--rounds", "2"], "uniform prunes in one step"),
    "rewind": (["run", "magnitude", "--rewind", "5"], "rewind 5"),
    "late rewind": (["run", "lottery", "--rewind", "5000"], "step 5000 to rewind to: 12 epochs of 1,000 images are 384 steps"),
    "cap": (["run", "slimming", "--cap", "0.5"], "cap 0.5"),
    "rewind to the end": (["run", "lottery", "--epochs", "1", "--rewind", "32"], "step 32 to rewind to: 1 epochs of 1,000 images are 32 steps"),
    "typed option": (["run", "slimming", "--options", "min_keep=x"], "option min_keep: 'x' cannot be; give a whole number"),
    "typed option of prune": (["prune", "l1", "resnet20", "out", "--ratio", "0.5", "--options", "multiple=2.5,scope=global"], "option multiple: 2.5 cannot be"),
    "site to skip": (["run", "slimming", "--options", "skip=foo"], "no site 'foo'"),
    "mode": (["run", "slimming", "--options", "mode=foo"], "mode 'foo'"),
    "scope": (["run", "magnitude", "--options", "scope=foo"], "scope 'foo'"),
    "bool": (["run", "magnitude", "--options", "linear=maybe"], "option linear: 'maybe' cannot be; give True or False"),
    "option twice": (["run", "slimming", "--options", "strength=1e-4,strength=2"], "strength stands twice"),
    "no images": (["prune", "thinet", "vgg-digits", "out", "--ratio", "0.5"], "say which by --data"),
    "few images": (["prune", "regression", "vgg-digits", "out", "--ratio", "0.5", "--data", "digits", "--options", "images=20,draws=2"], "places do not determine"),
    "no gates": (["prune", "sss", "vgg-digits", "out"], "trained with gates"),
    "no prices": (["run", "l1", "--prices", "0.1"], "l1 goes by ratios"),
    "prices instead": (["run", "sss", "--ratio", "0.5"], "give prices instead of ratios"),
    "bad price": (["run", "sss", "--prices", "x"], "prices 'x'"),
    "an amount too many": (["prune", "sss", "vgg-digits", "out", "--ratio", "0.5"], "leave ratio out"),
    "variant": (["run", "thinet", "--options", "variant=sideways"], "variant 'sideways'"),
    "no part in training": (["run", "l1", "--pretrained", "digits"], "leave pretrained out"),
    "guide": (["run", "guided", "--options", "by=thinet"], "by 'thinet'"),
    "no ratio": (["run", "l1", "--ratio", ""], "ratio '': give a number"),
    "plugin of the first": (["methods", "--plugin", "nowhere.py", "--plugin", "afile"], "nowhere.py: no such file"),
    "plugin folder": (["methods", "--plugin", "."], "a folder"),
    "masks need a ratio": (["run", "magnitude", "--ratio", "0"], "removes nothing"),
    "multiple": (["prune", "l1", "resnet20", "out", "--ratio", "0.5", "--multiple", "0"], "multiple 0"),
    "nothing removed": (["run", "l1", "--ratio", "0"], "removes nothing"),
    "wide": (["run", "l1", "--width", "inf"], "width inf"),
    "many seeds": (["run", "l1", "--seeds", "100000000000000000000"], "at most 1,000 seeds"),
    "out is no page": (["report", "--store", ".", "--out", "afile"], "ends in .html"),
    "no store": (["report", "--store", "nowhere"], "no such folder"),
    "arm": (["run", "l1", "--arms", "fine-tun"], "did you mean fine-tune"),
    "arm's schedule": (["run", "l1", "--arms", "fine-tune@big"], "unknown schedule 'big'"),
    "arm's length": (["run", "l1", "--arms", "fine-tune:x"], "give name, name@schedule or name@schedule:epochs"),
    "arm longer than the parent": (["run", "l1", "--arms", "pipeline-e:12"], "retraining takes 12 epochs of 12, and leaves none to the parent"),
    "rewinds too far": (["run", "l1", "--arms", "weight-rewind:20"], "lr-rewind over 20 epochs: the parent's schedule has 12"),
    "recipe": (["run", "l1", "--recipe", "cfar"], "unknown recipe 'cfar'"),
    "training field": (["run", "l1", "--training", "bach=3"], "a recipe has no field 'bach'"),
    "training value": (["run", "l1", "--training", "batch=many"], "batch"),
    "training epochs": (["run", "l1", "--training", "epochs=3"], "give epochs to the study"),
    "compile": (["run", "l1", "--training", "compile=fast"], "compile 'fast'"),
    "no parent": (["run", "l1", "--parent", "nowhere"], "nowhere: no such file or folder"),
    "parent is no network": (["run", "l1", "--parent", "afile"], "or a .safetensors file"),
    "parent is an empty folder": (["run", "l1", "--parent", "."], "arch.json"),
    "cifar is not there": (["run", "l1", "--data", "cifar10", "--arch", "resnet20"], "cifar-10-binary"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, tmp_path, monkeypatch, capsys):
    argv, said = BAD[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RETHINK_NB_DATA", raising=False)
    (tmp_path/"afile").write_text("")
    (tmp_path/"store"/"studies").mkdir(parents=True)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and "Traceback" not in err and not out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["afile", "store"]


def test_fashion_mnist_not_there(tmp_path, monkeypatch, capsys):
    import rethink_nb.training.data as data
    from rethink_nb.study.run import data_of
    monkeypatch.setattr(data, "_debian", tmp_path/"nothing")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RETHINK_NB_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    data_of.cache_clear()
    assert main(["run", "l1", "--data", "fashion-mnist", "--arch", "resnet20", "--subset", "100"]) == 2
    err = capsys.readouterr().err
    assert "train-images-idx3-ubyte" in err and "dataset-fashion-mnist" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_through_a_process(tmp_path):
    done = child("rethink-nb", "count", "vgg61", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("rethink-nb: unknown network 'vgg61': did you mean vgg") and done.stderr.count("\n") == 1
    done = child("rethink-nb", "count", "resnet56", "--layers", cwd=tmp_path)
    assert done.returncode == 0 and "125,485,696 MACs" in done.stdout and "stage3.block9.conv2" in done.stdout


@pytest.mark.parametrize("name", commands.names())
def test_help(name, capsys):
    with pytest.raises(SystemExit) as e: main([name, "--help"])
    assert e.value.code == 0 and f"rethink-nb {name}" in capsys.readouterr().out


def test_usage(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ("demo", "methods", "archs", "count", "prune", "run", "report"))


def test_prune_and_read_back(tmp_path, capsys):
    "A network written by `prune` is a source again"
    assert main(["prune", "l1", "resnet20", str(tmp_path/"a"), "--ratio", "0.6,0.3,0.1"]) == 0
    assert "equal" in capsys.readouterr().out
    assert main(["prune", "random-channels", str(tmp_path/"a"), str(tmp_path/"b"), "--macs", "0.5", "--seed", "4"]) == 0
    assert "NOT" not in capsys.readouterr().out


def test_prune_leaves_runs_and_nonsense_alone(tmp_path, capsys):
    "A run of a store is no place to write to, and weights that are not finite make no network"
    import torch
    from safetensors.torch import load_file, save_file
    from rethink_nb.study import Store, Study, execute
    run, store = Study(data="digits", arch="vgg-digits", ratios=[.5], seeds=1, epochs=1).parent_run(0), Store(tmp_path/"runs")
    execute(run, store, device="cpu")
    at, before = store/run.id, (store/run.id/"weights.safetensors").read_bytes()
    assert main(["prune", "l1", str(at), str(at), "--ratio", "0.5"]) == 2
    assert "is a run of a store" in capsys.readouterr().err and (at/"weights.safetensors").read_bytes() == before
    assert main(["prune", "l1", str(at), str(tmp_path/"a"), "--ratio", "0.3"]) == 0
    weights = load_file(tmp_path/"a"/"weights.safetensors")
    weights["features.conv1.weight"][0] = torch.nan
    save_file(weights, tmp_path/"a"/"weights.safetensors")
    capsys.readouterr()
    assert main(["prune", "l1", str(tmp_path/"a"), str(tmp_path/"b"), "--ratio", "0.3"]) == 2
    assert "not finite" in capsys.readouterr().err and not (tmp_path/"b").exists()


def _edit(name, change): return lambda at: (at/name).write_text(change((at/name).read_text()))
def _arch(**changes): return _edit("arch.json", lambda text: __import__("json").dumps(__import__("json").loads(text) | changes))


DAMAGE = {
    "cut arch": (_edit("arch.json", lambda text: text[:40]), "arch.json: damaged"),
    "cut weights": (lambda at: (at/"weights.safetensors").write_bytes((at/"weights.safetensors").read_bytes()[:-100]), "weights.safetensors: damaged"),
    "no weights": (lambda at: (at/"weights.safetensors").unlink(), "weights.safetensors: missing"),
    "foreign": (_edit("arch.json", lambda text: "{\"model\": 3}"), "arch.json"),
    "plan as arch": (lambda at: (at/"plan.json").replace(at/"arch.json"), "holds the record of a Plan"),
    "newer": (_arch(schema=7), "written by a newer rethink_nb"),
    "no schema": (_arch(schema="x"), "damaged: schema 'x'"),
    "classes": (_arch(classes=2**63), "classes"),
    "widths": (_arch(widths=[2**40]*12), "1,048,576"),
    "stages": (_arch(stages=[-1, 4, 6]), "at least one layer"),
    "selection": (_arch(selections=[{"site": "stage1", "channels": [0]}]), "selects nothing"),
    "constant": (_arch(constants=[{"at": "conv", "shape": [-1, 1, 1]}]), "sizes that no network has"),
    "constant nowhere": (_arch(constants=[{"at": "nowhere", "shape": [1, 1, 1]}]), "no part of this network"),
    "other widths": (_arch(widths=[16, 32, 64, *[4]*9]), "another architecture"),
    "folder": (lambda at: ((at/"arch.json").unlink(), (at/"arch.json").mkdir()), "arch.json"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    at = tmp_path_factory.mktemp("saved")/"net"
    assert main(["prune", "l1", "resnet20", str(at), "--ratio", "0.5"]) == 0
    return at


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_networks(name, saved, tmp_path, capsys):
    import shutil
    damage, said = DAMAGE[name]
    at = shutil.copytree(saved, tmp_path/"net")
    damage(at)
    capsys.readouterr()
    for argv in (["count", str(at)], ["prune", "l1", str(at), str(tmp_path/"out"), "--ratio", "0.5"]):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert said in err and err.count("\n") == 1 and "Traceback" not in err and not out
    assert not (tmp_path/"out").exists()


def test_a_network_is_not_overwritten(saved, tmp_path, capsys):
    import shutil
    at = shutil.copytree(saved, tmp_path/"net")
    before = {p.name: p.read_bytes() for p in at.iterdir()}
    assert main(["prune", "l1", str(at), str(at), "--ratio", "0.5"]) == 2 and "--force" in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in at.iterdir()}
    assert main(["count", str(at), "--classes", "3"]) == 2 and "leave them out" in capsys.readouterr().err
    assert main(["prune", "l1", str(at), str(at), "--ratio", "0.5", "--force"]) == 0
    assert main(["count", str(at), "--sites"]) == 0 and "effective" in capsys.readouterr().out
    for name in ("summary.html", "plan.json"):
        (tmp_path/name/name).mkdir(parents=True)
        assert main(["prune", "l1", "resnet20", str(tmp_path/name), "--ratio", "0.5"]) == 2
        assert [p.name for p in (tmp_path/name).iterdir()] == [name] and "is a folder" in capsys.readouterr().err


def test_a_run_is_exported_and_timed_beside_its_parent(tmp_path, capsys):
    "The file that onnxruntime reads says what the run's network says; the parent is found in the store"
    pytest.importorskip("onnxruntime")
    store = Store(tmp_path/"runs")
    Trial(Study(data="digits", arch="vgg-digits", ratios=[.5], seeds=1, epochs=1, arms=["parent", "pruned"]), store).run(1, "cpu", progress=False)
    tuned = next(id for id in store.ids() if store.record(id)["run"]["kind"] == "prune")
    assert main(["export", str(store/tuned), "--out", str(tmp_path/"net.onnx")]) == 0
    said = capsys.readouterr().out
    assert "read again, largest difference" in said and said.count("onnxruntime") == 4 and "parent" in said
    assert check_exported(store.network(tuned), tmp_path/"net.onnx").ok
    assert main(["export", str(store/tuned), "--format", "torch.export", "--out", str(tmp_path/"net.pt2"), "--untimed"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.pt2", "runs"]


def test_doctor_says_what_is_here(tmp_path, monkeypatch, capsys):
    "Versions, devices, data and a store of which one record is damaged; missing data say how to get them"
    monkeypatch.setenv("HOME", str(tmp_path)); monkeypatch.delenv("RETHINK_NB_DATA", raising=False)
    (tmp_path/"runs"/"0123456789ab").mkdir(parents=True)
    (tmp_path/"runs"/"0123456789ab"/"record.json").write_text("{")
    assert main(["doctor", "--store", str(tmp_path/"runs")]) == 0
    said = capsys.readouterr().out
    for words in ("Python", "ok  digits", "--  cifar10", "ask for it at image-net.org", "1 damaged", "0123456789ab", "GiB free", "ok  pruning"): assert words in said, words
    assert main(["doctor", "--root", str(tmp_path/"runs"/"0123456789ab"/"record.json")]) == 0 # told as a line of the data that it was for
