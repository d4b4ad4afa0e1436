"The wheel: every module and the experiment notebooks in it, and an install that needs no checkout."
import zipfile
from configparser import ConfigParser

import pytest
from conftest import ROOT, child, copy_tree


PLANTED = ["zz_planted.ipynb", "zz_planted.toml"] # so that the mapping is seen to work whatever experiments there are


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy of the tree, so that nothing is left in the checkout"
    base = tmp_path_factory.mktemp("wheel")
    copy = copy_tree(base / "tree")
    for name in PLANTED: (copy / "nbs" / "experiments" / name).write_text("{}")
    build = ["python", "-m", "pip", "wheel", "--disable-pip-version-check", "--quiet", "--no-deps", "-w", base / "out"]
    done = child(*build, "--no-build-isolation", copy, cwd=base, path=base)
    if done.returncode: done = child(*build, copy, cwd=base, path=base) # no fresh setuptools here: pip fetches one
    assert done.returncode == 0, done.output
    found = list((base / "out").glob("*.whl"))
    assert len(found) == 1, found
    return found[0]


def experiments(): return PLANTED + [f.name for f in sorted((ROOT / "nbs" / "experiments").iterdir()) if f.suffix in (".ipynb", ".toml")]


def test_wheel_holds_modules_and_experiments(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(f.relative_to(ROOT)) for f in (ROOT / "rethink_nb").rglob("*.py")}
    pages = {f"rethink_nb/experiments/{name}" for name in experiments()}
    missing = sorted((modules | pages | {"rethink_nb/py.typed"}) - names)
    assert not missing, f"not in the wheel: {missing}"
    stray = sorted(n for n in names if not n.startswith("rethink_nb/") and ".dist-info/" not in n)
    assert not stray, f"in the wheel, but none of the package's: {stray}"


def test_install_outside_the_checkout(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = child("python", "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps", "--target", target, wheel, cwd=elsewhere, path=target)
    assert done.returncode == 0, done.output
    ask = "import rethink_nb, importlib.resources as r; print(rethink_nb.__file__, rethink_nb.__version__, *sorted(f.name for f in r.files('rethink_nb').joinpath('experiments').iterdir()), sep='|')"
    done = child("python", "-c", ask, cwd=elsewhere, path=target)
    assert done.returncode == 0, done.output
    file, version, *names = done.stdout.strip().split("|")
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert file.startswith(str(target)) and version == settings["DEFAULT"]["version"]
    assert set(experiments()) <= set(names), names


def test_command_of_the_install_starts(wheel, tmp_path):
    target = tmp_path / "site"
    done = child("python", "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps", "--target", target, wheel, cwd=tmp_path, path=target)
    assert done.returncode == 0, done.output
    done = child("python", target / "bin" / "rethink-nb", "--help", cwd=tmp_path, path=target)
    assert done.returncode == 0 and "demo" in done.output, done.output
    where = child("python", "-c", "from rethink_nb.study.notebook import experiments; print(experiments().get('trial'))", cwd=tmp_path, path=target)
    assert where.stdout.startswith(str(target)), where.output
