"Every experiment notebook through papermill: at its smoke-size defaults, and on real images with other parameters."
import json
from pathlib import Path

import pytest
from conftest import child

from rethink_nb.core.errors import UserError
from rethink_nb.study.notebook import experiments, run_notebook, values_of


CONTROLLED = {"trial": "n=3+3", "straight_after": "n=3 pairs", "precision": "3 pairs", "cross": "n=3 pairs", "retraining": "n=2+2", "transfer": "n=2+2", "detection": "n=2+2", "l1": "n=2+2", "thinet": "n=2+2", "regression": "n=2+2", "soft_filter": "n=2+2",
              "slimming": "n=2 pairs", "sss": "n=2 pairs", "magnitude": "n=2 pairs", "lottery": "n=2 pairs", "guided": "n=2 pairs"} # compare arms, so many times
SAID = {**{k: (v, "95% intervals") for k, v in CONTROLLED.items()}, "parent": ("2 of 2 parents are trained",), "overview": ("holds no study yet",)}

DAILY = ("trial", "slimming", "parent", "overview") # those of other methods have the shape of slimming; studies of one question are changed seldom

@pytest.mark.parametrize("name", [n if n in DAILY else pytest.param(n, marks=pytest.mark.slow) for n in experiments().names()])
def test_smoke(name, tmp_path):
    done = child("papermill", experiments().get(name), tmp_path/"out.ipynb", "-p", "store", tmp_path/"runs", "--no-progress-bar", cwd=tmp_path)
    assert done.returncode == 0, done.output
    cells = json.loads((tmp_path/"out.ipynb").read_text())["cells"]
    assert any("injected-parameters" in c["metadata"].get("tags", []) for c in cells)
    text = json.dumps(cells)
    assert all(said in text for said in SAID[name])


@pytest.mark.parametrize("name", [n for n in experiments().names() if "Trial(study, store)" in experiments().get(n).read_text()])
def test_the_study_of_an_experiment(name, tmp_path):
    "Its parameters make a study that can be carried out; and every unusual study of its method comes back from them"
    cells = ["".join(c["source"]) for c in json.loads(experiments().get(name).read_text())["cells"] if c["cell_type"] == "code"]
    made = {}
    exec(cells[0], made)
    made["store"] = str(tmp_path/"runs")
    exec(cells[1], made)
    study = made["study"]
    assert len(made["trial"].runs) > 1 and not (tmp_path/"runs").exists()
    asked = study.replace(seeds=1, first_seed=3, epochs=7, subset=500, width=2., alpha=.1)
    again = made | values_of(asked, name, fixed=("arms",))
    exec(cells[1], again)
    assert again["study"] == asked


@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_other_parameters(tmp_path):
    out = run_notebook("trial", tmp_path/"fm.ipynb", data="fashion-mnist", archs="resnet20", width=.25, subset=500, epochs=1, seeds=1, ratios=[.5], store=str(tmp_path/"runs"))
    text = out.read_text()
    assert "resnet20 at 0.25 x its width on fashion-mnist (a subset of 500 training images)" in text and "holds for these networks and data" in text


def test_a_failing_cell_is_kept(tmp_path):
    with pytest.raises(UserError, match="unknown network 'nope'"): run_notebook("trial", tmp_path/"x.ipynb", archs="nope")
    assert [p.name for p in tmp_path.iterdir()] == ["x.failed.ipynb"]
