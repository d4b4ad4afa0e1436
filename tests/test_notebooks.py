"Each notebook is one test: its cells run in a process of their own, and the first that fails is shown."
import json
from configparser import ConfigParser

import pytest
from conftest import ROOT, child

NBS = ROOT / "nbs"
settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
SKIP = settings["DEFAULT"]["tst_flags"].split()

# Experiments are run by papermill in a test of their own (nbs/experiments/.notest says the same to nbdev_test).
NOTEBOOKS = [file for file in sorted(NBS.rglob("*.ipynb"))
             if not any(part[0] in "_." for part in file.relative_to(NBS).parts) and not (file.parent / ".notest").exists()]
SLOW = [file for file in NOTEBOOKS if any(line.replace(" ", "") == '"#|slow\\n",' for line in file.read_text(encoding="utf-8").splitlines())]

# nbdev's own runner (its directives, its skipping), called without the globbing around it.
RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb
ok, seconds = test_nb(Path(sys.argv[1]), skip_flags=sys.argv[2].split(), force_flags=sys.argv[3].split(), basepath=sys.argv[4])
sys.exit(not ok)
"""


def run(file, force=""):
    "Run the notebook `file`; `force` names flags whose cells are run too"
    return child("python", "-c", RUN, file, " ".join(SKIP), force, ROOT, cwd=file.parent)


def check(file, force=""):
    done = run(file, force)
    if done.returncode: pytest.fail(f"{file.relative_to(ROOT) if ROOT in file.parents else file}\n{done.output[-6000:]}", pytrace=False)


def name(file): return str(file.relative_to(NBS).with_suffix(""))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name)
def test_notebook(file): check(file)


@pytest.mark.slow
@pytest.mark.parametrize("file", SLOW, ids=name)
def test_notebook_with_its_slow_cells(file): check(file, force="slow")


def code(source): return dict(cell_type="code", id=f"{abs(hash(source)):x}"[:8], execution_count=None, metadata={}, outputs=[], source=source.splitlines(keepends=True))


def test_broken_assertion_in_a_notebook_fails(tmp_path):
    "The runner's own check, on a copy of a small notebook of the ground floor"
    small = min((NBS / "core").glob("*.ipynb"), key=lambda file: file.stat().st_size)
    copy = tmp_path / small.name
    def with_cells(*sources):
        notebook = json.loads(small.read_text(encoding="utf-8"))
        notebook["cells"] += [code(source) for source in sources]
        copy.write_text(json.dumps(notebook))
        return run(copy)
    skipped = with_cells("#| slow\nraise ValueError('a slow cell ran')", "#| eval: false\nraise ValueError('a cell of eval: false ran')")
    assert skipped.returncode == 0, skipped.output
    broken = with_cells("from fastcore.test import test_eq\ntest_eq(1 + 1, 3)")
    assert broken.returncode == 1 and "test_eq(1 + 1, 3)" in broken.output and "2\n3" in broken.output, broken.output
