"A method of one's own, from a file or an installed package: listed, in a worker process, in a notebook."
import json

import pytest
from conftest import ROOT, child

PLUGIN = '''from rethink_nb.methods import Method, register
from rethink_nb.methods.ranking import SCORE_OPTIONS, by_score, counts_by_scope

def spread(net, site):
    "Standard deviation of each filter's weights"
    conv = net.get_submodule(net.arch.site(site).outs[0])
    return conv.weight.flatten(1).std(1)

register(Method("spread", "Largest spread of weights", "predefined", "mine", by_score(spread), counts_by_scope(), options=SCORE_OPTIONS))
'''
assert PLUGIN.count("\n") <= 15 # what a user is promised
SCRIPT = """
from rethink_nb.study import Store, Study
{load}
s = Study(data="digits", arch="{arch}", method="{method}", ratios=[.5], seeds=1, epochs=1, arms=["parent", "pruned"]).run(Store("runs"), workers=1, device="cpu")
print(*s.frame().status)
""" # in a worker process, without a notebook
TRIAL = ["run", "spread", "--seeds", "2", "--epochs", "1", "--ratio", "0.5", "--workers", "2"]


def said(done, code):
    assert done.returncode == code, done.output
    return done.output


def test_a_file(tmp_path):
    "Two worker processes prune by it, and the notebook's kernel counts and draws what they did"
    (tmp_path/"mine.py").write_text(PLUGIN)
    go = lambda *args: child("rethink-nb", *args, "--plugin", "mine.py", cwd=tmp_path)
    assert "Largest spread of weights" in said(go("methods"), 0)
    assert "spread 50%" in said(go(*TRIAL), 0)
    records = [json.loads(p.read_text()) for p in (tmp_path/"runs").glob("*/record.json")]
    assert sum(r["run"].get("method") == "spread" for r in records) == 2 and all(r["status"] == "done" for r in records)
    text = (tmp_path/"spread-digits-vgg-digits.ipynb").read_text()
    assert "Largest spread of weights" in text and "--plugin" in text
    assert "spread" in said(go("report"), 0)


def test_the_variable(tmp_path):
    (tmp_path/"mine.py").write_text(PLUGIN)
    given = dict(RETHINK_NB_PLUGINS=str(tmp_path/"mine.py"))
    assert "spread" in said(child("rethink-nb", "methods", **given), 0)
    (tmp_path/"mine.py").write_text("1/0\n")
    output = said(child("rethink-nb", "methods", **given), 2)
    assert output.count("\n") == 1 and "mine.py, line 1: ZeroDivisionError" in output


@pytest.mark.parametrize("wrong, line", {"register(": "line 1: SyntaxError", "x = 1\nimport nothing_like_it": "line 2: ModuleNotFoundError",
                                         PLUGIN.replace('"spread",', '"l1",'): "line 9: method 'l1' is registered already", "raise ValueError('two\\nlines')": "ValueError: two lines"}.items())
def test_broken(tmp_path, wrong, line):
    (tmp_path/"mine.py").write_text(wrong)
    output = said(child("rethink-nb", *TRIAL, "--plugin", "mine.py", cwd=tmp_path), 2)
    assert output.count("\n") == 1 and line in output
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]


def install(folder, name, value, source):
    "A package as pip would leave it: its module, and metadata with an entry point"
    (folder/f"{name}.py").write_text(source)
    meta = folder/f"{name}-1.0.dist-info"
    meta.mkdir()
    (meta/"METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (meta/"entry_points.txt").write_text(f"[rethink_nb.methods]\n{name} = {value}\n")


def test_an_installed_package(tmp_path):
    "A module that registers itself, and a broken neighbour that is left out with a word"
    install(tmp_path, "mine", "mine", PLUGIN)
    install(tmp_path, "broken", "broken", "1/0\n")
    done = child("python", "-c", SCRIPT.format(load="", method="spread", arch="vgg-digits"), cwd=tmp_path, path=f"{ROOT}:{tmp_path}")
    assert "done done" in said(done, 0)
    assert "methods of broken (rethink_nb.methods) are left out: ZeroDivisionError" in done.stderr


def test_an_installed_method(tmp_path):
    "The entry point may be the method itself"
    install(tmp_path, "mine", "mine:method", PLUGIN.replace("register(Method(", "method = (Method("))
    assert "Largest spread of weights" in said(child("rethink-nb", "methods", path=f"{ROOT}:{tmp_path}"), 0)


def test_a_family_in_a_worker(tmp_path):
    "A network of one's own, tried by a trial: its worker processes load the file, too"
    import inspect
    import test_new_family as own
    (tmp_path/"allconv.py").write_text("\n".join([
        "from torch import nn", "from rethink_nb.arch import Arch, Family, Site, register_family", "from rethink_nb.arch.zoo import networks", inspect.getsource(own.AllConv), inspect.getsource(own.sites),
        "register_family(Family('allconv', n_sites=lambda arch: sum(arch.stages), sites=sites, Net=AllConv))",
        "networks.register('allconv4', lambda classes=10, input=(3, 32, 32), width=1.: Arch(family='allconv', stages=(2, 2), widths=(8, 12, 16, 10), classes=classes, input=input))"]))
    load = "from rethink_nb.methods import load_plugin; load_plugin('allconv.py')"
    assert "done done" in said(child("python", "-c", SCRIPT.format(load=load, method="slimming", arch="allconv4"), cwd=tmp_path), 0)
    assert "allconv4" in said(child("rethink-nb", "archs", "--plugin", "allconv.py", cwd=tmp_path), 0)


DATA = '''from rethink_nb.training.data import datasets
from rethink_nb.training.folders import image_folder
datasets.register("three", image_folder("{path}", size=8, channels=1, pad=0, flip=False))
'''


def test_a_data_set_of_ones_own(tmp_path):
    "A folder of images, named in a file: worker processes and the notebook's kernel know it, and the printed command names the file"
    from PIL import Image

    from rethink_nb.training.data import read_digits
    images = read_digits()[0]
    for i in range(400):
        if (label := int(images.labels[i])) < 3:
            (tmp_path/"images"/str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.images[i, 0].numpy()).save(tmp_path/"images"/str(label)/f"{i}.png")
    (tmp_path/"mine.py").write_text(DATA.format(path=tmp_path/"images"))
    run = ["run", "l1", "--data", "three", "--seeds", "1", "--epochs", "1", "--ratio", "0.5", "--recipe", "digits"]
    text = said(child("rethink-nb", *run, "--plugin", "mine.py", cwd=tmp_path), 0)
    assert "on three (all training images)" in text
    assert f"--plugin {tmp_path/'mine.py'}" in next(tmp_path.glob("*.html")).read_text()
    assert "unknown data set 'three'" in said(child("rethink-nb", *run, cwd=tmp_path), 2)
    assert "three has no recipe of its own: name one by recipe_name=" in said(child("rethink-nb", *run[:-2], "--plugin", "mine.py", cwd=tmp_path), 2)


def test_an_edited_data_set_takes_the_place_of_the_old_one_and_its_results_are_not_mixed(tmp_path, monkeypatch):
    "Loaded again in one session; in a store, what was made of the old images is not gone on from"
    from rethink_nb.methods import load_plugin, plugins
    from rethink_nb.training.data import datasets, load_data
    monkeypatch.setenv("RETHINK_NB_PLUGINS", "") # which `load_plugin` fills
    monkeypatch.setattr(plugins, "_loaded", dict(plugins._loaded))
    source = "from dataclasses import replace\nfrom rethink_nb.training.data import Split, datasets\ndef read(root=None, download=False):\n    return tuple(Split(s.images, (s.labels + {shift})%10) for s in datasets.get('digits').read())\ndatasets.register('shifted', replace(datasets.get('digits'), read=read))\n"
    file, before = tmp_path/"mine.py", dict(datasets.items)
    file.write_text(source.format(shift=0))
    try:
        assert load_plugin(file) == []
        old = load_data("shifted")
        run = ["run", "l1", "--data", "shifted", "--seeds", "1", "--epochs", "1", "--ratio", "0.5", "--recipe", "digits", "--plugin", "mine.py", "--arms"]
        said(child("rethink-nb", *run, "parent,pruned", cwd=tmp_path), 0)
        file.write_text(source.format(shift=1))
        load_plugin(file)
        assert load_data("shifted").checksum != old.checksum
    finally: datasets.items.clear(), datasets.items.update(before)
    assert "shifted has changed since run" in said(child("rethink-nb", *run, "parent,pruned,fine-tune", cwd=tmp_path), 2)


def test_a_data_set_of_this_session_alone_is_refused(tmp_path):
    code = ("from rethink_nb.study import Store, Study\nfrom rethink_nb.training.data import datasets\ndatasets.register('mine', datasets.get('digits'))\n"
            "try: Study(data='mine', arch='vgg-digits', ratios=[.5], seeds=1, epochs=1, recipe_name='digits').run(Store('runs'), device='cpu')\nexcept ValueError as e: print('told:', e)")
    assert "told: data set mine lives in this session alone" in said(child("python", "-c", code, cwd=tmp_path), 0)
    assert not list(tmp_path.glob("runs/*/record.json"))
