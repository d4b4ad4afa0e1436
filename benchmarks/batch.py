"""What a batch costs beside its trainings, and what working side by side gains.

    python benchmarks/batch.py [--tasks 1000] [--places 2] [--repeats 2] [--out FILE.json]

First tasks that do nothing, by the engine of batches: milliseconds each, a cluster that is there already.
Then eight notebooks of the experiment l1 at its smoke size (two ratios, four seeds; their parents are trained beforehand), on fresh stores, in three ways that take turns:
one after another with one thread, one after another with two processes of one thread each inside the notebook, and two at once with one thread each, as a batch does it.
Seconds from the first notebook's start to the last one's end; the cluster's own start is told apart.
"""
import argparse, json, os, platform, shutil, tempfile
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace

import torch

from rethink_nb.study.cluster import local_client, places
from rethink_nb.study.engine import Engine
from rethink_nb.study.grid import Study
from rethink_nb.study.carry import carry_out
from rethink_nb.study.tasks import tasks_of


def nothing(task): return dict(status="done", error="")


def timed(f):
    began = perf_counter()
    result = f()
    return perf_counter() - began, result


def noops(n, spots):
    "Milliseconds a task"
    tasks = [SimpleNamespace(name=f"task{i}", needs=()) for i in range(n)]
    with local_client(places(spots, "cpu")) as client: took, results = timed(Engine(client, tasks, nothing).run)
    assert len(results) == n
    return 1e3*took/n


def side_by_side(at, spots, workers):
    "Seconds of eight notebooks, and of the cluster's start"
    study = Study(data="digits", arch="vgg-digits", method="l1", ratios=[.3, .5], seeds=4, epochs=3)
    tasks = tasks_of([study], store=str(at/"runs"), device="cpu", workers=workers)
    work = partial(carry_out, out=at/"out")
    began = perf_counter()
    with local_client(places(spots, "cpu")) as client:
        start = perf_counter() - began
        parents = [t for t in tasks if t.experiment == "parent"]
        Engine(client, parents, work).run()
        took, results = timed(Engine(client, [t for t in tasks if t.experiment != "parent"], work).run)
    assert len(results) == 8 and all(r["status"] == "done" for r in results.values()), results
    return took, start


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tasks", 1_000), ("places", 2), ("repeats", 2)): p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--out", default="")
    args = p.parse_args()
    ways = {"one after another, one thread": (1, 1), "one after another, two processes in the notebook": (1, 2), f"{args.places} at once, one thread each": (args.places, 1)}
    each, seconds, starts = [noops(args.tasks, args.places) for _ in range(args.repeats)], {w: [] for w in ways}, []
    print(f"no-op: {', '.join(f'{x:.2f}' for x in each)} ms a task", flush=True)
    for _ in range(args.repeats):
        for name, (spots, workers) in ways.items():
            at = Path(tempfile.mkdtemp())
            took, start = side_by_side(at, spots, workers)
            seconds[name].append(took)
            starts.append(start)
            shutil.rmtree(at)
            print(f"{name}: {took:.1f} s", flush=True)
    slow, inside, fast = (median(seconds[w]) for w in ways)
    result = dict(date=str(date.today()), torch=torch.__version__, python=platform.python_version(), cores=os.cpu_count(), cpu=torch.backends.cpu.get_cpu_capability(), **vars(args),
                  noop_ms=[round(x, 2) for x in each], cluster_start_seconds=round(median(starts), 2), seconds={w: [round(x, 1) for x in s] for w, s in seconds.items()},
                  faster_than_one_thread=round(slow/fast, 2), faster_than_two_processes=round(inside/fast, 2))
    print(f"{slow/fast:.2f} times faster than one after another, {inside/fast:.2f} times faster than with two processes inside; a cluster starts in {median(starts):.1f} s")
    if args.out: Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__": main()
