"""How fast the training loop is: beside a loop written the customary way, and beside the bare step, in one run.

    python benchmarks/train_speed.py [--networks resnet56,vgg16,densenet40] [--batches 64,128,512] [--rounds 5] [--precision auto] [--compile default] [--device auto] [--machine] [--out FILE.json]

Three loops train the same network on as many images of CIFAR's shape (random ones: speed does not ask what they show):

    ours      `training.loop.train_epoch`: images in memory as uint8, whole batches cropped, mirrored and normalised, channels-last, autocast, fused SGD
    customary PIL images, torchvision's transforms, a DataLoader with one worker, fp32, plain SGD, the loss read by `.item()` at every step
    bare      forward, backward and update on one fixed batch, in our precision and memory layout, and nothing else

Rounds alternate between the three, medians and quartiles are compared. On a CPU each loop has one thread (ours always has), so the customary one with its worker has the
larger share of two cores. `--machine` compares what a whole machine does: the customary loop with all threads against one process of ours per core.
"""
import argparse, json, os, platform
from datetime import date
from multiprocessing import get_context
from statistics import median, quantiles
from time import perf_counter

import torch
from torch.nn import functional as F

from rethink_nb.arch import zoo
from rethink_nb.training.data import Data, Split
from rethink_nb.training.device import autocast, best_precision, pick_device
from rethink_nb.training.loop import optimiser, train_epoch
from rethink_nb.training.recipe import recipe

MEAN, STD = (.4914, .4822, .4465), (.2023, .1994, .2010)


def images_of(n):
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=g), torch.randint(10, (n,), generator=g)


class Ours:
    "Our loop over `steps` batches"
    def __init__(self, name, r, steps, device, compile=""):
        images, labels = images_of(steps*r.batch)
        split = Split(images, labels)
        self.data = Data("random", split, split, split, 10, (3, 32, 32), MEAN, STD, 4, True, "none").to(device)
        self.net, self.r, self.steps = zoo.arch(name, classes=10).build().to(device, memory_format=torch.channels_last), r, steps
        self.opt, self.forward = optimiser(self.net, r), torch.compile(self.net, mode=compile) if compile else self.net
    def __call__(self): train_epoch(self.net, self.data, self.r, self.opt, (), 0, 1, range(self.steps), forward=self.forward)


class Bare:
    "The step alone"
    def __init__(self, name, r, steps, device, arch=None):
        arch = arch or zoo.arch(name, classes=10)
        images, self.y = images_of(r.batch)
        self.x = (images[:, :arch.input[0], :arch.input[1], :arch.input[2]].float()/255).to(device).contiguous(memory_format=torch.channels_last)
        self.y, self.net, self.steps, self.r, self.device = self.y.to(device), arch.build().to(device, memory_format=torch.channels_last), steps, r, device
        self.opt = optimiser(self.net, r)
        self.net.train()
    def __call__(self):
        for _ in range(self.steps):
            with autocast(self.device, self.r.precision): logits = self.net(self.x)
            loss = F.cross_entropy(logits.float(), self.y)
            self.opt.zero_grad(set_to_none=True)
            loss.backward()
            self.opt.step()
        if self.device.type == "cuda": torch.cuda.synchronize()


class PilImages(torch.utils.data.Dataset):
    "As torchvision's CIFAR10: an array, made a PIL image when asked for"
    def __init__(self, n, transform):
        images, self.labels = images_of(n)
        self.images, self.transform = images.permute(0, 2, 3, 1).contiguous().numpy(), transform
    def __len__(self): return len(self.labels)
    def __getitem__(self, i):
        from PIL import Image
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


class Customary:
    "The loop that most scripts contain, the reference's among them; its loader keeps its worker, so that starting one is not on the clock"
    def __init__(self, name, r, steps, device):
        from torchvision import transforms as t
        data = PilImages(steps*r.batch, t.Compose([t.RandomCrop(32, padding=4), t.RandomHorizontalFlip(), t.ToTensor(), t.Normalize(MEAN, STD)]))
        self.loader = torch.utils.data.DataLoader(data, batch_size=r.batch, shuffle=True, num_workers=1, persistent_workers=True, pin_memory=device.type == "cuda")
        self.net, self.device = zoo.arch(name, classes=10).build().to(device), device
        self.opt = torch.optim.SGD(self.net.parameters(), lr=r.lr, momentum=r.momentum, weight_decay=r.weight_decay)
    def __call__(self):
        self.net.train()
        total, right = 0., 0
        for x, y in self.loader:
            x, y = x.to(self.device), y.to(self.device)
            self.opt.zero_grad()
            logits = self.net(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            self.opt.step()
            total += loss.item()
            right += logits.argmax(1).eq(y).sum().item()


def timed(loop, images):
    "Images a second of one call"
    start = perf_counter()
    loop()
    return images/(perf_counter() - start)


def spread(rates):
    q = quantiles(rates, n=4) if len(rates) > 1 else [rates[0]]*3
    return dict(median=round(median(rates), 1), low=round(q[0], 1), high=round(q[2], 1), all=[round(v, 1) for v in rates])


def race(name, batch, args):
    "Images a second of each loop"
    device, r = pick_device(args.device), recipe("cifar", batch=batch, precision=args.precision, lr=1e-3)
    steps = max(2, -(-args.images//batch))
    loops = {k: make(name, r, steps, device) for k, make in (("ours", Ours), ("bare", Bare), ("customary", Customary))}
    if args.compile: loops["compiled"] = Ours(name, r, steps, device, args.compile)
    rates = {k: [] for k in loops}
    for loop in loops.values(): loop() # the first steps pick kernels and grow buffers
    for i in range(args.rounds):
        for k in list(loops)[i % len(loops):] + list(loops)[:i % len(loops)]: rates[k].append(timed(loops[k], steps*batch))
    return {k: spread(v) for k, v in rates.items()}


def _solo(kind, threads, name, batch, args, ready, out):
    torch.set_num_threads(threads)
    r = recipe("cifar", batch=batch, precision=args.precision, lr=1e-3)
    steps = max(2, -(-args.images//batch))
    loop = kind(name, r, steps, torch.device("cpu"))
    loop()
    for _ in range(args.rounds):
        ready.wait()
        out.put((kind.__name__, timed(loop, steps*batch)))
        ready.wait()


def machine(name, batch, args):
    "Images a second of all cores: one customary process with every thread, then one process of ours per core, in turns"
    context, cores, found = get_context("spawn"), os.cpu_count(), {"customary": [], "ours": []}
    for kind, n, threads in ((Customary, 1, cores), (Ours, cores, 1)):
        ready, out = context.Barrier(n), context.Queue()
        workers = [context.Process(target=_solo, args=(kind, threads, name, batch, args, ready, out)) for _ in range(n)]
        for w in workers: w.start()
        rates = [out.get()[1] for _ in range(n*args.rounds)]
        for w in workers: w.join()
        found[kind.__name__.lower()] = [sum(rates[i:i + n]) for i in range(0, len(rates), n)]
    return {k: spread(v) for k, v in found.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--networks", default="resnet56,vgg16,densenet40")
    p.add_argument("--batches", default="64,128,512")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--images", type=int, default=512, help="of one turn, at least two batches")
    p.add_argument("--precision", default="auto", help="bf16, fp32, or what is fastest on this device")
    p.add_argument("--device", default="auto")
    p.add_argument("--machine", action="store_true", help="compare whole machines too, at the first batch size")
    p.add_argument("--compile", default="", help="time our loop compiled in this mode, too")
    p.add_argument("--out", default="")
    p.add_argument("--append", action="store_true", help="keep the rows of other networks that the file has")
    args = p.parse_args()
    device, batches = pick_device(args.device), [int(b) for b in args.batches.split(",")]
    if args.precision == "auto": args.precision = best_precision(device)
    if device.type == "cpu": torch.set_num_threads(1)
    result = dict(date=str(date.today()), torch=torch.__version__, python=platform.python_version(), cores=os.cpu_count(), cpu=torch.backends.cpu.get_cpu_capability(),
                  device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", threads=torch.get_num_threads(), precision=args.precision, rounds=args.rounds, rows=[])
    if args.append and os.path.isfile(args.out):
        with open(args.out) as f: result["rows"] = [r for r in json.load(f)["rows"] if r["network"] not in args.networks.split(",")]
    for name in args.networks.split(","):
        for batch in batches:
            row = dict(network=name, batch=batch, **race(name, batch, args))
            row |= dict(to_customary=round(row["ours"]["median"]/row["customary"]["median"], 3), to_bare=round(median(a/b for a, b in zip(row["ours"]["all"], row["bare"]["all"])), 3))
            result["rows"].append(row)
            print(f"{name:11} batch {batch:4}   ours {row['ours']['median']:8.1f}   customary {row['customary']['median']:8.1f} ({row['to_customary']:.2f} times)   bare {row['bare']['median']:8.1f} ({row['to_bare']:.1%})   images/s" + (f"   compiled {row['compiled']['median']:8.1f}" if args.compile else ""), flush=True)
        if args.machine and device.type == "cpu":
            row = dict(network=name, batch=batches[0], machine=True, **machine(name, batches[0], args))
            row["to_customary"] = round(row["ours"]["median"]/row["customary"]["median"], 3)
            result["rows"].append(row)
            print(f"{name:11} batch {batches[0]:4}   whole machine: {os.cpu_count()} processes of ours {row['ours']['median']:8.1f}   one customary with {os.cpu_count()} threads {row['customary']['median']:8.1f} ({row['to_customary']:.2f} times)", flush=True)
        if args.out:
            with open(args.out, "w") as f: json.dump(result, f, indent=1)


if __name__ == "__main__": main()
