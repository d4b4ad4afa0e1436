"Every experiment notebook through papermill: at its smoke-size defaults, and on real images with other parameters."
import json
from pathlib import Path

import pytest
from conftest import child

from rethink_nb.core.errors import UserError
from rethink_nb.study.notebook import experiments, run_notebook


@pytest.mark.parametrize("name", experiments().names())
def test_smoke(name, tmp_path):
    done = child("papermill", experiments().get(name), tmp_path/"out.ipynb", "-p", "store", tmp_path/"runs", "--no-progress-bar", cwd=tmp_path)
    assert done.returncode == 0, done.output
    cells = json.loads((tmp_path/"out.ipynb").read_text())["cells"]
    assert any("injected-parameters" in c["metadata"].get("tags", []) for c in cells)
    text = json.dumps(cells)
    assert {"trial": "n=3+3", "straight_after": "n=3 pairs", "precision": "3 pairs", "cross": "n=3 pairs"}[name] in text and "95% intervals" in text


@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_other_parameters(tmp_path):
    out = run_notebook("trial", tmp_path/"fm.ipynb", data="fashion-mnist", archs="resnet20", width=.25, subset=500, epochs=1, seeds=1, ratios=[.5], store=str(tmp_path/"runs"))
    text = out.read_text()
    assert "resnet20 on fashion-mnist" in text and "holds for these networks and data" in text


def test_a_failing_cell_is_kept(tmp_path):
    with pytest.raises(UserError, match="unknown network 'nope'"): run_notebook("trial", tmp_path/"x.ipynb", archs="nope")
    assert [p.name for p in tmp_path.iterdir()] == ["x.failed.ipynb"]
