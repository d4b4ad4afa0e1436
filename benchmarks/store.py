"""How long a large store keeps one waiting: its frame, its status, its report.

    python benchmarks/store.py [--seeds 68] [--repeats 3] [--out FILE.json]

Records, curves and predictions of 10,064 runs are MADE UP (nothing is trained, no number means anything): eight studies of two networks and four methods at three ratios, 68 seeds.
Timed: `Store.frame` cold (a store that was just opened; the files are in the system's cache) and warm, the status of the store within a process and by the command, and the report page.
Each pass in a process of its own; medians of the passes.
"""
import argparse, json, os, platform, random, subprocess, sys, tempfile
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from rethink_nb.study import Store, Study, Trial

METHODS, NETWORKS, RATIOS = ("l1", "thinet", "slimming", "magnitude"), ("resnet20", "vgg16"), (.3, .5, .7)
HEAD = "epoch,lr,train_loss,train_acc,val_loss,val_acc,images,steps,macs,seconds,device_seconds,joules"


def made_up(run, rng):
    "A record with the fields of a real one"
    acc = 90 + rng.gauss(0, .3)
    cost = dict(macs=10**12, images=10**6, steps=10**4, seconds=100., nonzero_macs=10**12, device_seconds=90.) if run.kind == "train" else dict(seconds=1.)
    return dict(id=run.id, group=run.group, start=run.start.id if run.start else "", needs=[b.id for b in run.befores()], run=run.to_dict(), status="done",
                metrics=dict(test_loss=.3, test_acc=acc, test_top5=99., test_ece=3., test_class_acc=[acc]*10, val_loss=.3, val_acc=acc), cost=cost, params=270_000, macs=40_000_000, flops=81_000_000,
                weights_sha256="0"*64, epochs=30, data_sha256="0"*64, environment=dict(python=platform.python_version(), torch=torch.__version__), version="0", written=f"{date.today()}T00:00:00+00:00",
                **(dict(exactness=dict(max_error=1e-7, scale=10.)) if run.kind == "prune" else {}))


def make(at, seeds):
    "The store, and how many runs it holds"
    from safetensors.torch import save
    rng = random.Random(0)
    studies = [Study(data="fashion-mnist", arch=a, method=m, ratios=RATIOS, seeds=seeds, epochs=30, precision="fp32", **(dict(options=dict(strength=1e-3)) if m == "slimming" else {})) for a in NETWORKS for m in METHODS]
    store = Store(at)
    curve = HEAD + "\n" + "".join(f"{e},.1,.3,{80 + e/3},.3,{80 + e/3},{e*55000},{e*400},{e*10**10},{e*3.},{e*3.},0\n" for e in range(1, 31))
    for s in studies:
        s.write(store/"studies"/f"{s.id}.json")
        layers = {n.removesuffix(".weight"): p.numel() for n, p in s.base.build().named_parameters() if p.dim() == 4}
        for c in s.cells():
            for r in c.run.lineage():
                at = store/r.id
                if at.is_dir(): continue
                at.mkdir(parents=True)
                kept = dict(kept={k: [int(n*(1 - c.ratio)), n] for k, n in layers.items()}) if s.counts == {} and r.kind == "prune" else {}
                (at/"record.json").write_text(json.dumps({**made_up(r, rng), **kept}, indent=1) + "\n")
                (at/"predictions.safetensors").write_bytes(save(dict(test=torch.randint(10, (10_000,)).to(torch.int16))))
                if r.kind == "train": (at/"curve.csv").write_text(curve)
                elif not s.known and not kept: s.base.write(at/"arch.json")
    return store, len(store.ids())


PASSES = {
    "frame, cold": "s = Store(at)\nbegan = clock()\ns.frame()",
    "frame, warm": "s = Store(at)\ns.frame()\nbegan = clock()\ns.frame()",
    "status": "began = clock()\nstanding(Store(at))",
    "report page": "began = clock()\nwrite_page_of(stored_trials(Store(at)), at + '.html')",
}


def seconds_of(at, code):
    "One pass in a new process, imports left out"
    text = ("import sys\nfrom time import perf_counter as clock\nimport rethink_nb.report\nfrom rethink_nb.study import Store\nfrom rethink_nb.study.standing import standing\n"
            f"from rethink_nb.study.results import write_page_of\nfrom rethink_nb.study.trial import stored_trials\nat = sys.argv[1]\n{code}\nprint(clock() - began)")
    return float(subprocess.run([sys.executable, "-c", text, str(at)], capture_output=True, text=True, check=True).stdout.split()[-1])


def command(*words):
    "Seconds of a command, imports and all"
    began = perf_counter()
    subprocess.run([str(Path(sys.executable).parent/"rethink-nb"), *words], capture_output=True, check=True)
    return perf_counter() - began


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("seeds", 68), ("repeats", 3)): p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--out", default="")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        store, n = make(Path(tmp)/"runs", args.seeds)
        print(f"{n:,} runs in {len(Trial([Study.read(f) for f in (store/'studies').glob('*.json')], store).cells):,} cells", flush=True)
        took = {name: [seconds_of(store.path, code) for _ in range(args.repeats)] for name, code in PASSES.items()}
        took["rethink-nb status"] = [command("status", str(store.path)) for _ in range(args.repeats)]
        took["rethink-nb methods"] = [command("methods") for _ in range(args.repeats)] # what a command takes that reads no store
    for name, s in took.items(): print(f"{name}: {median(s):.2f} s ({', '.join(f'{x:.2f}' for x in s)})")
    result = dict(date=str(date.today()), torch=torch.__version__, python=platform.python_version(), cores=os.cpu_count(), cpu=torch.backends.cpu.get_cpu_capability(), **vars(args), runs=n,
                  seconds={name: [round(x, 2) for x in s] for name, s in took.items()})
    if args.out: Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__": main()
