"""How long cutting takes, beside torch-pruning, on the same networks, the same channels, in one run.

    OMP_NUM_THREADS=1 python benchmarks/surgery.py        (needs the extra `pruning`)

Two comparisons. "decide and cut": ours scores every site by L1, makes the plan and builds the smaller network; torch-pruning traces one image, scores the same
layers by the same rule and prunes them (its `BasePruner`). "cut": both are given the channels; ours makes and carries out a plan, torch-pruning traces and prunes.
torch-pruning works in place; the copy it works on is made outside the clock. Rounds alternate, medians are compared, and both must give the same logits.
"""
from copy import deepcopy
from statistics import median
from time import perf_counter

import torch
import torch_pruning as tp
from torch import nn

from rethink_nb.arch import zoo
from rethink_nb.methods.amounts import kept_counts
from rethink_nb.methods.base import Ask, methods
from rethink_nb.methods.l1 import choose_l1
from rethink_nb.surgery import Plan, cut
from rethink_nb.testing.toys import random_bn

ROUNDS, RATIO = 15, .4


def best(net, counts):
    return choose_l1(net, Ask({}, methods.get("l1").options, counts)).keep


def ours_decides(net, counts):
    return cut(net, Plan(parent=net.arch.id, keep=best(net, counts)))


def theirs_decides(net, kept, x):
    own = {net.get_submodule(m): 1 - k for m, k in kept.items()}
    others = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m not in own]
    rule = tp.importance.MagnitudeImportance(p=1, group_reduction="first", normalizer=None) # the L1 paper's; its default is another rule
    tp.pruner.BasePruner(net, x, importance=rule, pruning_ratio=0., pruning_ratio_dict=own, ignored_layers=others).step()
    return net


def theirs_cuts(net, gone, x):
    graph = tp.DependencyGraph().build_dependency(net, example_inputs=x)
    for module, idxs in gone.items():
        graph.get_pruning_group(net.get_submodule(module), tp.prune_conv_out_channels, idxs=idxs).prune()
    return net


def race(net, ours, theirs, x):
    "Median milliseconds of both, and how far their logits are apart"
    times = [], []
    for _ in range(ROUNDS):
        copy = deepcopy(net)
        start = perf_counter(); a = ours(net); times[0].append(perf_counter() - start)
        start = perf_counter(); b = theirs(copy); times[1].append(perf_counter() - start)
    with torch.no_grad(): error = (a(x) - b(x)).abs().max()/b(x).abs().max()
    return *(1000*median(t) for t in times), error.item()


def bench(name):
    arch = zoo.arch(name)
    net, x, counts = random_bn(arch.build()).eval(), torch.randn(1, *arch.input), kept_counts(arch, RATIO)
    keep = best(net, counts)
    module, width = {s: arch.site(s).outs[0] for s in keep}, {s: arch.site(s).width for s in keep}
    gone = {module[s]: sorted(set(range(width[s])) - set(k)) for s, k in keep.items()}
    kept = {module[s]: len(k)/width[s] for s, k in keep.items()}
    for job, ours, theirs in (("decide and cut", lambda n: ours_decides(n, counts), lambda n: theirs_decides(n, kept, x)),
                              ("cut", lambda n: cut(n, Plan(parent=arch.id, keep=keep)), lambda n: theirs_cuts(n, gone, x))):
        a, b, error = race(net, ours, theirs, x)
        print(f"{name:13} {len(keep):4} sites  {job:15} ours {a:6.1f} ms   torch-pruning {b:6.1f} ms   {b/a:5.1f} times   logits differ by {error:.0e} of their scale", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, torch-pruning {tp.__version__}, {ROUNDS} alternating rounds, one thread, medians, {RATIO:.0%} of each site removed")
    for name in ("resnet110", "preresnet164", "densenet40"): bench(name)
