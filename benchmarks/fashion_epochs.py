"""A real training, and its share of the bare step: ResNet-20 on all of Fashion-MNIST for three epochs.

    OMP_NUM_THREADS=1 python benchmarks/fashion_epochs.py --out FILE.json [--root FOLDER] [--epochs 3] [--precision auto] [--device auto]

After each epoch the bare step (forward, backward, update on one fixed batch, in the same precision and memory layout) is timed for a few seconds, so that both see the same machine.
"images/s" of an epoch counts its training and the look at 5,000 held-out images, as the curve's seconds do; "steps only" leaves the look out.
"""
import argparse, json, os, platform
from datetime import date
from statistics import median
from time import perf_counter

import torch
from train_speed import Bare

from rethink_nb import training as T
from rethink_nb.arch import zoo
from rethink_nb.training.device import pick_device


def bare_rate(bare, seconds=8.):
    "Images a second of the bare step"
    bare()
    start, n = perf_counter(), 0
    while perf_counter() - start < seconds: bare(); n += bare.steps
    return n*bare.r.batch/(perf_counter() - start)


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
    bare, rows = Bare(args.arch, r, 8, device, arch), []
    def look(row):
        start = perf_counter()
        T.evaluate(net, data.to(device).val, data, precision=r.precision)
        evaluation = perf_counter() - start
        seconds, images = row["seconds"] - sum(x["epoch_seconds"] for x in rows), len(data.train)
        rows.append({**row, "epoch_seconds": seconds, "images_per_s": images/seconds, "steps_only": images/(seconds - evaluation), "bare": bare_rate(bare)})
        x = rows[-1]
        print(f"epoch {row['epoch']}: val {row['val_acc']:.2f} %, {x['images_per_s']:.0f} images/s, steps only {x['steps_only']:.0f}, bare {x['bare']:.0f} ({x['steps_only']/x['bare']:.1%})", flush=True)
    net = arch.build(seed=0)
    h = T.train(net, data, r, seed=0, device=str(device), report=look)
    found = dict(date=str(date.today()), torch=torch.__version__, python=platform.python_version(), cores=os.cpu_count(), cpu=torch.backends.cpu.get_cpu_capability(),
                 device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", threads=torch.get_num_threads(), network=args.arch, precision=r.precision, batch=r.batch, data_sha256=data.checksum,
                 share=round(median(x["steps_only"]/x["bare"] for x in rows), 4), final={k: v for k, v in h.final.items() if k != "test_class_acc"}, cost=h.cost.to_dict(), rows=rows)
    with open(args.out, "w") as f: json.dump(found, f, indent=1)
    print(f"test {h.final['test_acc']:.2f} %, share of the bare step {found['share']:.1%}")


if __name__ == "__main__": main()
