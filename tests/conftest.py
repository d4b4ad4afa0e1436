"What all tests share: one thread per process, child processes that see this checkout, and the seconds of each file."
import os
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): os.environ[name] = "1" # before anything imports torch

import re, shutil, subprocess, sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = {".git", ".venv", "build", "dist", "runs", "data", "demo", "_docs", "_proc", "__pycache__", ".ipynb_checkpoints", ".pytest_cache", ".ruff_cache"}


def tree_files(root=ROOT):
    "Relative paths of what git tracks or would track; without git, everything but build outputs"
    if (root / ".git").exists() and shutil.which("git"):
        out = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True).stdout
        found = [Path(p) for p in out.split("\0") if p]
    else: found = [p.relative_to(root) for p in root.rglob("*")]
    return sorted(p for p in found if (root / p).is_file() and not NOT_SOURCE & set(p.parts))


def copy_tree(to):
    "A copy of the working tree under `to`, without what git ignores"
    for path in tree_files():
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        try: shutil.copyfile(ROOT / path, to / path)
        except FileNotFoundError: pass # a sibling test's temporary file
    return to


def child(*args, cwd=ROOT, path=ROOT, timeout=600, **env):
    "Run a command; python and console scripts are those of this environment, the package is the one under `path`"
    bin = Path(sys.executable).parent
    args = [sys.executable if args[0] == "python" else args[0], *map(str, args[1:])]
    env = {**os.environ, "PYTHONPATH": str(path), "PATH": f"{bin}{os.pathsep}{os.environ.get('PATH', '')}", "NO_COLOR": "1", **env}
    env.pop("IN_TEST", None) # nbdev's exporter does nothing where it is set
    done = subprocess.run(args, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    done.output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    return done


def pytest_collection_modifyitems(items):
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu: return
    import torch
    if torch.cuda.is_available(): return
    for item in on_gpu: item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter):
    "Seconds spent in each test file, all workers together; the budgets stand in tests/README.md"
    seconds = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration") and hasattr(report, "nodeid"): seconds[report.nodeid.split("::")[0]] += report.duration
    if seconds:
        terminalreporter.section("seconds per file (sum over workers)")
        for name, spent in sorted(seconds.items(), key=lambda pair: -pair[1]): terminalreporter.write_line(f"{spent:7.1f}  {name}")
