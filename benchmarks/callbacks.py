"""What a method's callback adds to a training step.

    OMP_NUM_THREADS=1 python benchmarks/callbacks.py

One thread, a batch of 64 images of noise; the network is trained by SGD with momentum as `training.loop` does it, steps with and without the callback in turns, so that both
see the same machine. The callback itself is timed within each step; printed is its median share of a step, and the ratio of the two medians as a check that nothing hides between the calls.
"""
from statistics import median
from time import perf_counter

import torch
from torch.nn.functional import cross_entropy

from rethink_nb.arch import zoo
from rethink_nb.methods.magnitude import magnitude_masks, prunable_weights
from rethink_nb.methods.slimming import SparseScales
from rethink_nb.methods.sparse import StayZero

STEPS = 25


def step(net, opt, x, y, callback):
    "Seconds of one step, and of the callback in it"
    own, start = 0., perf_counter()
    loss = cross_entropy(net(x), y)
    opt.zero_grad(set_to_none=True)
    loss.backward()
    if callback: at = perf_counter(); callback.after_backward(net); own += perf_counter() - at
    opt.step()
    if callback: at = perf_counter(); callback.after_step(net, .1); own += perf_counter() - at
    return perf_counter() - start, own


def bench(name, what, make):
    net = zoo.arch(name).build().to(memory_format=torch.channels_last)
    x, y = torch.randn(64, *net.arch.input).contiguous(memory_format=torch.channels_last), torch.arange(64) % 10
    opt, callback = torch.optim.SGD(net.parameters(), lr=.01, momentum=.9, weight_decay=1e-4, fused=True), make(net)
    callback.prepare(net)
    for _ in range(2): step(net, opt, x, y, callback)
    rows = [(step(net, opt, x, y, None)[0], *step(net, opt, x, y, callback)) for _ in range(STEPS)]
    plain, whole, own = (median(c) for c in zip(*rows))
    print(f"{name:13} {what:9} step {1000*plain:7.1f} ms   callback {1000*own:6.3f} ms = {own/whole:6.2%} of a step   steps with and without: {whole/plain:.3f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, batch 64, {STEPS} steps each, medians")
    for name in ("resnet20", "vgg11", "preresnet20"):
        bench(name, "slimming", lambda net: SparseScales(1e-4))
        bench(name, "masks", lambda net: StayZero(magnitude_masks(prunable_weights(net), .8)))
