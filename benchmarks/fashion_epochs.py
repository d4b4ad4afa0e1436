"""A real training, and its share of the bare step: ResNet-20 on all of Fashion-MNIST for three epochs.

    OMP_NUM_THREADS=1 python benchmarks/fashion_epochs.py --out FILE.json [--root FOLDER] [--epochs 3] [--precision auto] [--device auto]

After each 20 steps of the training, 5 bare steps (forward, backward, update on one fixed batch, in the same precision and memory layout) are timed, so that both see the same machine. The look at the held-out images after
each epoch is in neither.
"""
import argparse, json, os, platform
from datetime import date
from statistics import median
from time import perf_counter

import torch
from train_speed import Bare

from rethink_nb import training as T
from rethink_nb.arch import zoo
from rethink_nb.core.events import Callback
from rethink_nb.training.device import pick_device


class Watch(Callback):
    "Times the loop in chunks of steps, and after each chunk a few bare steps: both see the same machine"
    def __init__(self, bare, batch, chunk=20): self.bare, self.batch, self.chunk, self.steps, self.pairs, self.epochs = bare, batch, chunk, 0, [], []
    def key(self): return "nothing that changes the training"
    def _now(self):
        if self.bare.device.type == "cuda": torch.cuda.synchronize()
        return perf_counter()
    def after_step(self, net, lr):
        self.steps += 1
        if self.steps == 1: self.began = self._now() # the first step of an epoch comes after draws and held-out images
        if self.steps <= 1 or (self.steps - 1) % self.chunk: return
        loop = self.chunk*self.batch/(self._now() - self.began)
        start = self._now()
        self.bare()
        self.pairs.append((loop, self.bare.steps*self.batch/(self._now() - start)))
        self.began = self._now()
    def epoch_end(self, net, epoch):
        ours, bare = ([p[k] for p in self.pairs] for k in (0, 1))
        self.epochs.append(dict(loop=median(ours), bare=median(bare), share=median(a/b for a, b in self.pairs), chunks=len(ours)))
        self.steps, self.pairs = 0, []


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", required=True)
    p.add_argument("--root", default=None)
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--arch", default="resnet20")
    p.add_argument("--precision", default="auto")
    p.add_argument("--device", default="auto")
    args = p.parse_args()
    device, data = pick_device(args.device), T.load_data("fashion-mnist", root=args.root)
    if device.type == "cpu": torch.set_num_threads(1)
    r = T.recipe("fashion-mnist", epochs=args.epochs, precision=T.best_precision(device) if args.precision == "auto" else args.precision)
    arch = zoo.arch(args.arch, classes=data.classes, input=data.input)
    bare = Bare(args.arch, r, 5, device, arch)
    bare()
    watch, net = Watch(bare, r.batch), arch.build(seed=0)
    def look(row): print(f"epoch {row['epoch']}: val {row['val_acc']:.2f} %, {watch.epochs[-1]}", flush=True)
    h = T.train(net, data, r, [watch], seed=0, device=str(device), report=look)
    rows = [{**{k: v for k, v in row.items() if k not in ("seconds", "device_seconds", "joules")}, **seen} for row, seen in zip(h.rows, watch.epochs)]
    found = dict(date=str(date.today()), torch=torch.__version__, python=platform.python_version(), cores=os.cpu_count(), cpu=torch.backends.cpu.get_cpu_capability(),
                 device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", threads=torch.get_num_threads(), network=args.arch, precision=r.precision, batch=r.batch, data_sha256=data.checksum,
                 share=round(median(x["share"] for x in rows), 4), final={k: v for k, v in h.final.items() if k != "test_class_acc"}, macs=h.cost.macs, rows=rows)
    with open(args.out, "w") as f: json.dump(found, f, indent=1)
    print(f"test {h.final['test_acc']:.2f} %, share of the bare step {found['share']:.1%}")


if __name__ == "__main__": main()
