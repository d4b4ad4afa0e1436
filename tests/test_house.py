"The house: floors, folders, fresh imports, names, export without a diff, nothing unsafe, nothing of one machine."
import ast, json, re, shutil, sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import ROOT, child, copy_tree, tree_files

NAME = "rethink_nb"
PACKAGE, NBS = ROOT / NAME, ROOT / "nbs"


# --- what there is ---------------------------------------------------------------------------------------------------
def module_files(package):
    "Dotted name -> file of each module under `package`, faces included"
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = [package.name, *file.relative_to(package).with_suffix("").parts]
        if parts[-1] == "_modidx": continue
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def is_face(file): return file.name == "__init__.py"
def library_modules(package=PACKAGE): return {name: file for name, file in module_files(package).items() if not is_face(file)}


def library_notebooks():
    "Notebooks that make a module: all but experiments, guides and the pages at the root that export nothing"
    for file in sorted(NBS.rglob("*.ipynb")):
        parts = file.relative_to(NBS).parts
        if any(part[0] in "_." for part in parts) or parts[0] in ("experiments", "guides", "dashboards") or parts == ("index.ipynb",): continue
        yield file


def experiments(root=ROOT): return sorted((root / "nbs" / "experiments").glob("[!_.]*.ipynb"))
def cells(file): return json.loads(file.read_text(encoding="utf-8"))["cells"]
def lines(findings): return "\n  ".join(["", *findings])


# --- floors ------------------------------------------------------------------------------------------------------------
FLOORS = dict(core=0, report=0, arch=1, surgery=2, methods=3, training=4, study=5, dash=6, cli=7) # `testing` stands on none


def arrows(file, name, names):
    "(line, target, through) of each import of ours: the module or face reached, and the name taken from a face if one is"
    package = name if is_face(file) else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == NAME: yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            if base.split(".")[0] != NAME: continue
            for alias in node.names:
                if f"{base}.{alias.name}" in names: yield node.lineno, f"{base}.{alias.name}", None
                else: yield node.lineno, base, alias.name


def may(source, target):
    "May a module of sub-package `source` import from sub-package `target`?"
    if source == target or "testing" in (source, target): return True
    if source not in FLOORS or target not in FLOORS: return False
    return source != "report" and FLOORS[target] < FLOORS[source]


def circles(graph):
    "One circle per knot of `graph`, as a list of names that ends where it starts"
    found, done = [], set()
    def walk(node, path):
        if node in path:
            found.append([*path[path.index(node):], node])
            return
        if node in done: return
        for follower in sorted(graph.get(node, ())): walk(follower, [*path, node])
        done.add(node)
    for node in sorted(graph): walk(node, [])
    return found


def floor_findings(package):
    "Every import in `package` that goes up, sideways, round in a circle or through a face, one line each"
    files = module_files(package)
    faces = {name for name, file in files.items() if is_face(file)}
    found, graph = [], {name: set() for name in files}
    for name, file in files.items():
        room = name.split(".")[1] if "." in name else None
        if room and room != "testing" and room not in FLOORS: found.append(f"{name}: {room!r} is on no floor")
        for line, target, taken in arrows(file, name, files):
            at = f"{name}:{line} imports {target}{f'.{taken}' if taken else ''}"
            if room is None:
                found.append(f"{at}: the root's face holds a version and nothing else")
                continue
            if target not in files:
                found.append(f"{at}: there is no such module")
                continue
            if target == NAME:
                if not (taken or "__").startswith("__"): found.append(f"{at}: through the root's face")
                continue
            if target in faces: found.append(f"{at}: through a face")
            else: graph[name].add(target)
            to = target.split(".")[1]
            if not may(room, to) and not (room == "report" and target in (f"{NAME}.core.errors", f"{NAME}.core.files")): found.append(f"{at}: upward, {room} to {to}")
    return found + ["circle: " + " -> ".join(circle) for circle in circles(graph)]


def test_floors():
    found = floor_findings(PACKAGE)
    assert not found, lines(found)


@pytest.fixture
def planted(tmp_path):
    "A copy of the package in which faults can be planted: plant('core/low.py', source) -> the findings that came with it"
    package = tmp_path / NAME
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    def plant(**sources):
        before = set(floor_findings(package))
        for where, source in sources.items():
            file = package / (where.replace("__", "/") + ".py")
            file.parent.mkdir(exist_ok=True)
            file.write_text(source)
        return sorted(set(floor_findings(package)) - before)
    plant.package = package
    return plant


@pytest.mark.parametrize("source", ["from rethink_nb.study import zz_high", "from ..study.zz_high import x", "import rethink_nb.study.zz_high",
                                    "def f():\n    from ..study import zz_high"])
def test_planted_upward_import_is_found(planted, source):
    found = planted(study__zz_high="x = 1", core__zz_low=source)
    assert len(found) == 1 and "zz_low" in found[0] and "upward, core to study" in found[0], found


def test_planted_circle_is_found(planted):
    found = planted(arch__zz_a="from .zz_b import x", arch__zz_b="def f():\n    from rethink_nb.arch.zz_c import x", arch__zz_c="from . import zz_a")
    assert len(found) == 1 and found[0].startswith("circle") and all(f"zz_{letter}" in found[0] for letter in "abc"), found


def test_planted_face_imports_are_found(planted):
    for room in ("core", "arch"):
        (planted.package / room).mkdir(exist_ok=True)
        (planted.package / room / "__init__.py").touch()
    for source in ("from . import Something", "from rethink_nb.core import Something", "from ..core import *", "import rethink_nb.core", "from rethink_nb import core"):
        (planted.package / "arch" / "zz_a.py").unlink(missing_ok=True)
        found = planted(arch__zz_a=source)
        assert len(found) == 1 and "through a face" in found[0], (source, found)
    (planted.package / "arch" / "zz_a.py").unlink()
    assert not planted(arch__zz_a="from rethink_nb import __version__\nimport importlib\nf = importlib.import_module('rethink_nb.study.grid')")


def test_planted_report_and_stranger_are_found(planted):
    found = planted(core__zz_a="x = 1", core__errors="x = 1", report__zz_b="from ..core.zz_a import x", report__zz_c="from ..core.errors import x",
                    utils__zz_d="x = 1", core__zz_e="from ..report.zz_c import x")
    assert [f.split(":")[0] for f in found] == ["rethink_nb.core.zz_e", "rethink_nb.report.zz_b", "rethink_nb.utils.zz_d"], found


# --- folder = package --------------------------------------------------------------------------------------------------
def default_exp(file):
    found = [m[1] for cell in cells(file) if cell["cell_type"] == "code" for m in re.finditer(r"^#\|\s*default_exp\s+(\S+)", "".join(cell["source"]), re.M)]
    return found[0] if len(found) == 1 else found


def test_folder_is_package():
    expected = {file: ".".join(file.relative_to(NBS).with_suffix("").parts) for file in library_notebooks()}
    found = [f"{file.relative_to(ROOT)}: default_exp is {default_exp(file)!r}" for file, name in expected.items() if default_exp(file) != name]
    assert not found, lines(found)


def test_every_notebook_has_its_module_and_every_module_its_notebook():
    notebooks = {f"{NAME}." + ".".join(file.relative_to(NBS).with_suffix("").parts) for file in library_notebooks()}
    modules = set(library_modules())
    found = [f"{name}: a module without a notebook" for name in sorted(modules - notebooks)]
    found += [f"{name}: a notebook that was not exported" for name in sorted(notebooks - modules)]
    assert not found, lines(found)


def test_every_module_is_in_the_index():
    tree = ast.parse((PACKAGE / "_modidx.py").read_text())
    index = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "d")
    missing = sorted(set(library_modules()) - set(index["syms"]))
    left = sorted(set(index["syms"]) - set(library_modules()))
    assert not missing and not left, f"not in _modidx: {missing}; in _modidx without a module: {left}"


# --- fresh imports -----------------------------------------------------------------------------------------------------
# One process imports torch, then forks once per module: each child is fresh as far as our package goes.
DRIVER = r"""
import importlib, os, sys, traceback
import torch
for name in sys.argv[1:]:
    assert not [m for m in sys.modules if m.startswith("rethink_nb")]
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try: importlib.import_module(name)
        except BaseException:
            print(f"{name}: {traceback.format_exc(limit=-2).strip()}", flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status): print(f"{name}: killed by signal {os.WTERMSIG(status)}", flush=True)
"""


@pytest.mark.skipif(not hasattr(sys, "getandroidapilevel") and sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("faces", ["as they are", "emptied"])
def test_each_module_imports_alone(tmp_path, faces):
    package = tmp_path / NAME
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    if faces == "emptied":
        for face in package.glob("*/**/__init__.py"): face.write_text("")
    done = child("python", "-c", DRIVER, *module_files(package), cwd=tmp_path, path=tmp_path)
    assert done.returncode == 0 and not done.stdout, done.output


HEAVY = {"pandas", "plotly", "sklearn", "papermill", "ipywidgets", "torchvision", "scipy", "dask", "distributed", "statsmodels", "jupyterlab", "nbdev"}


@pytest.mark.parametrize("statement,free", [("import rethink_nb", set()), ("from rethink_nb.arch import zoo", {"scipy", "ipywidgets"})])
def test_light_import(statement, free):
    if "zoo" in statement and not (PACKAGE / "arch" / "zoo.py").exists(): pytest.skip("no arch.zoo yet")
    done = child("python", "-c", f"import sys\n{statement}\nprint(*{{m.split('.')[0] for m in sys.modules}})")
    assert done.returncode == 0, done.output
    loaded = (HEAVY - free) & set(done.stdout.split())
    assert not loaded, f"`{statement}` loads {sorted(loaded)}"


def test_import_adds_little_to_torch():
    done = child("python", "-c", "import torch, time; start = time.perf_counter(); import rethink_nb; print(time.perf_counter() - start)")
    assert float(done.stdout) < .3, done.output


# --- names -------------------------------------------------------------------------------------------------------------
def lone_patches(file):
    "Lines on which `@patch` gives a class a method that no other `@patch` of the file gives it: no redefinition, whatever ruff thinks"
    places = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.FunctionDef) or not node.args.args: continue
        if not any(getattr(d, "id", getattr(getattr(d, "func", None), "id", "")).startswith("patch") for d in node.decorator_list): continue
        owner = node.args.args[0].annotation
        places.setdefault((ast.unparse(owner) if owner else None, node.name), []).append(node.lineno)
    return {where[0] for where in places.values() if len(where) == 1}


def name_findings(package):
    done = child("python", "-m", "ruff", "check", "--no-cache", "--isolated", "--select", "F821,F811,F401,F822,F823", "--per-file-ignores", "__init__.py:F401",
                 "--exclude", "_modidx.py", "--output-format", "json", package)
    assert done.returncode in (0, 1), done.output
    found = []
    for finding in json.loads(done.stdout):
        file, line = Path(finding["filename"]), finding["location"]["row"]
        if finding["code"] == "F811" and line in lone_patches(file): continue
        found.append(f"{file.relative_to(package.resolve())}:{line}: {finding['code']} {finding['message']}")
    return found


def test_no_undefined_or_unused_names():
    found = name_findings(PACKAGE)
    assert not found, lines(found)


def test_planted_names_are_found(tmp_path):
    (tmp_path / "m.py").write_text("import os\nfrom x import patch, A, B\ndef f(): return undefined_thing\ndef f(): pass\n"
                                   "@patch\ndef go(self:A): pass\n@patch\ndef go(self:B): pass\n@patch\ndef no(self:A): pass\n@patch\ndef no(self:A): pass\n")
    codes = sorted(line.split()[1] for line in name_findings(tmp_path))
    assert codes == ["F401", "F811", "F811", "F821"], codes


# --- export and clean --------------------------------------------------------------------------------------------------
def parameter_cells(file): return [cell for cell in cells(file) if "parameters" in cell["metadata"].get("tags", [])]
def tree_bytes(root): return {p: (root / p).read_bytes() for part in ("nbs", NAME) for p in (q.relative_to(root) for q in (root / part).rglob("*")) if (root / p).is_file() and "__pycache__" not in p.parts}


PLANTED = dict(cells=[dict(cell_type="code", id="11111111", execution_count=None, metadata=dict(tags=["parameters"]), outputs=[], source=["x = 1"]),
                      dict(cell_type="code", id="22222222", execution_count=3, metadata=dict(collapsed=True), outputs=[], source=["x"])],
               metadata=dict(kernelspec=dict(display_name="Python 3", language="python", name="python3"), language_info=dict(name="python")), nbformat=4, nbformat_minor=5)


def test_export_and_clean_leave_no_diff(tmp_path):
    copy = copy_tree(tmp_path / "tree")
    before = tree_bytes(copy)
    planted = copy / "nbs" / "experiments" / "planted.ipynb" # cleaning is seen to work, and to keep the tag
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(json.dumps(PLANTED))
    for command in ("nbdev_export", "nbdev_clean"):
        done = child(command, cwd=copy, path=copy)
        assert done.returncode == 0, done.output
    tags = {file.name: len(parameter_cells(file)) for file in experiments(copy)}
    assert cells(planted)[1]["execution_count"] is None
    planted.unlink()
    after = tree_bytes(copy)
    changed = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    assert not changed, f"run `make export` and commit; it changes {lines(changed)}"
    assert set(tags.values()) == {1}, f"cells tagged `parameters` after nbdev_clean: {tags}"


def test_experiments_have_one_parameters_cell():
    found = {}
    for file in experiments():
        tagged = parameter_cells(file)
        if len(tagged) != 1: found[file.name] = f"{len(tagged)} cells tagged `parameters`"
        else:
            try:
                for node in ast.parse("".join(tagged[0]["source"])).body: ast.literal_eval(node.value)
            except (ValueError, AttributeError): found[file.name] = "the parameters cell holds more than plain literals"
    assert not found, found
    assert (NBS / "experiments" / ".notest").exists()


def test_notebooks_carry_no_outputs():
    found = [str(file.relative_to(ROOT)) for file in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in file.parts
             for cell in cells(file) if cell.get("outputs") or cell.get("execution_count")]
    assert not found, f"clear the outputs of {sorted(set(found))}"


# --- nothing unsafe ----------------------------------------------------------------------------------------------------
UNSAFE = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unsafe_findings(package):
    "Every way of reading or writing pickles in `package`, one line each"
    found = []
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            why = None
            if isinstance(node, ast.Import): why = next((f"import {a.name}" for a in node.names if a.name.split(".")[0] in UNSAFE), None)
            elif isinstance(node, ast.ImportFrom):
                if (node.module or "").split(".")[0] in UNSAFE and not node.level: why = f"from {node.module} import"
                elif node.module == "torch" and {a.name for a in node.names} & {"load", "save"}: why = "torch.load or torch.save under a bare name"
            elif isinstance(node, ast.Call):
                call, words = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                if call == "torch.save": why = "torch.save"
                elif call in ("torch.load", "torch.hub.load_state_dict_from_url", "load_state_dict_from_url") and words.get("weights_only") != "True": why = f"{call} without weights_only=True"
                elif call.split(".")[-1] in ("read_pickle", "to_pickle") or words.get("allow_pickle") == "True": why = call
            if why: found.append(f"{file.relative_to(package)}:{node.lineno}: {why}")
    return found


def test_no_pickle():
    found = unsafe_findings(PACKAGE)
    assert not found, lines(found)


def test_planted_pickle_is_found(tmp_path):
    bad = ["import pickle", "from pickle import loads", "import torch; torch.save(1, 'f')", "torch.load('f')", "torch.load('f', weights_only=False)",
           "from torch import load", "np.load('f', allow_pickle=True)", "pd.read_pickle('f')"]
    (tmp_path / "m.py").write_text("\n".join([*bad, "torch.load('f', weights_only=True)", "np.load('f')"]))
    assert sorted(int(line.split(":")[1]) for line in unsafe_findings(tmp_path)) == list(range(1, len(bad) + 1))


# --- nothing of one machine ----------------------------------------------------------------------------------------------
MACHINE = re.compile(r"(?<![\w.~}-])/(?:work|root|home/\w+|Users/\w+)" + r"/")


def test_no_machine_paths():
    assert MACHINE.search("open('" + "/ro" + "ot/x')") and MACHINE.search("/ho" + "me/me/x") and not MACHINE.search("https://x.org/work" + "/x")
    found = []
    for path in tree_files():
        try: text = (ROOT / path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError): continue
        found += [f"{path}:{text.count(chr(10), 0, m.start()) + 1}: {m[0]}" for m in MACHINE.finditer(text)]
    assert not found, lines(found)


def test_no_build_output_is_tracked():
    found = [str(p) for p in tree_files() if p.suffix in (".pyc", ".pt", ".pth", ".safetensors", ".whl") or p.name == ".last_checked"]
    assert not found, lines(found)


def test_ignore_file_hides_no_source():
    "A pattern such as `data/` written for weights would also hide nbs/data or rethink_nb/data"
    if not (ROOT / ".git").exists() or not shutil.which("git"): pytest.skip("no git checkout")
    sources = [str(f.relative_to(ROOT)) for part in (NBS, PACKAGE) for f in part.rglob("*") if f.suffix in (".py", ".ipynb", ".toml") and not {"__pycache__", ".ipynb_checkpoints"} & set(f.parts)]
    hidden = child("git", "check-ignore", "--no-index", *sources).stdout.split()
    assert not hidden, hidden


def test_settings_name_this_package():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    face = ast.parse((PACKAGE / "__init__.py").read_text())
    version = next(ast.literal_eval(n.value) for n in face.body if isinstance(n, ast.Assign) and n.targets[0].id == "__version__")
    assert settings["DEFAULT"]["lib_name"] == NAME and settings["DEFAULT"]["version"] == version
