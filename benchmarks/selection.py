"""How long it takes to choose 256 of 512 channels of one layer: ThiNet's two variants and LASSO, and to fit what reads them.

    python benchmarks/selection.py [--channels 512] [--keep 256] [--rows 10000] [--threads 2] [--repeats 3] [--out FILE.json]

The layer is a 3x3 convolution of as many outputs as inputs; what it saw are mixtures of a quarter as many sources behind ReLU, so that channels depend on each other as those of a network do.
Then a whole ResNet-20 of random weights with 500 images of 28x28: looked at in one pass that halts at every layer, and in a pass a layer, as it is where memory is short.
Medians of all repeats, in seconds.
"""
import argparse, json, os, platform
from datetime import date
from statistics import median
from time import perf_counter

import torch

from rethink_nb.arch import zoo
from rethink_nb.methods.all import methods # noqa: F401 (registers them)
from rethink_nb.methods.base import prune
from rethink_nb.methods.reconstruct import drawn_layer, full_fit, scalar_fit
from rethink_nb.methods.regression import REGRESSION_OPTIONS, lasso_choice
from rethink_nb.methods.thinet import greedy_choice
from rethink_nb.surgery import capture


def layer(channels, rows):
    "A layer and what it saw"
    g = torch.Generator().manual_seed(0)
    sources, mix = torch.randn(rows, channels//4, 9, generator=g), torch.randn(channels//4, channels, generator=g)/(channels//4)**.5
    x = (torch.einsum("rsp,sc->rcp", sources, mix) + .3*torch.randn(rows, channels, 9, generator=g)).relu()
    return lambda: drawn_layer(x, torch.randn(channels, channels, 3, 3, generator=g)/(9*channels)**.5, g)


def network(images, room):
    "ThiNet on a whole network, with so much memory"
    net, x = zoo.arch("resnet20", input=(1, 28, 28)).build(), torch.randn(images, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    def task(_):
        capture.ROOM, before = room, capture.ROOM
        try: prune("thinet", net, .5, batches=[x])
        finally: capture.ROOM = before
    return task


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("channels", 512), ("keep", 256), ("rows", 10_000), ("threads", 2), ("repeats", 3)): p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--out", default="")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    fresh, kept = layer(args.channels, args.rows), tuple(range(args.keep))
    tasks = {"thinet backward": lambda l: greedy_choice("backward")(l, args.keep), "thinet forward": lambda l: greedy_choice("forward")(l, args.keep),
             "lasso": lambda l: lasso_choice(REGRESSION_OPTIONS, 0)(l, args.keep), "scalar fit": lambda l: scalar_fit(l, kept), "full fit": lambda l: full_fit(l, kept),
             "resnet20, one pass": network(500, capture.ROOM), "resnet20, a pass a layer": network(500, 0)}
    result = dict(date=str(date.today()), torch=torch.__version__, python=platform.python_version(), cores=os.cpu_count(), cpu=torch.backends.cpu.get_cpu_capability(), **vars(args), seconds={})
    for name, task in tasks.items():
        times = []
        for _ in range(args.repeats):
            l = fresh() # what a layer remembers belongs to the time
            start = perf_counter()
            task(l)
            times.append(perf_counter() - start)
        result["seconds"][name] = dict(median=round(median(times), 3), all=[round(t, 3) for t in times])
        print(f"{name:24} {median(times):7.2f} s", flush=True)
    if args.out:
        del result["out"]
        with open(args.out, "w") as f: json.dump(result, f, indent=1)


if __name__ == "__main__": main()
