"A family of one's own, added with the public face alone (nbs/guides/new_family.ipynb explains it): an all-convolutional network."
import pytest
import torch
from torch import nn

from rethink_nb import methods
from rethink_nb.arch import Arch, Family, Site, register_family
from rethink_nb.arch.count import count
from rethink_nb.arch.gates import add_gates, folded, gates_of
from rethink_nb.core import UserError
from rethink_nb.surgery import Plan, cut, fresh, load, masked, save, verify
from rethink_nb.testing.sweeps import needs_of


class AllConv(nn.Module):
    "3x3 convolutions, strides between stages, a 1x1 convolution and the mean over positions"
    def __init__(self, arch):
        super().__init__()
        self.arch, widths = arch, (arch.input[0], *arch.widths)
        ends = {sum(arch.stages[:s]) for s in range(1, len(arch.stages))}
        self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(i, o, 3, 1 + (k in ends), 1), nn.BatchNorm2d(o), nn.ReLU())
                                    for k, (i, o) in enumerate(zip(widths, widths[1:]), 1)))
        self.last = nn.Conv2d(widths[-1], arch.classes, 1)

    def init_(self): nn.init.normal_(self.last.weight, 0, .01)

    def forward(self, x): return self.last(self.body(x)).mean((2, 3))


def sites(arch):
    stages = [s for s, n in enumerate(arch.stages, 1) for _ in range(n)]
    return [Site(name=f"conv{k}", width=w, stage=s, outs=(f"body.{k - 1}.0",), norms=(f"body.{k - 1}.1",), ins=(f"body.{k}.0" if k < len(stages) else "last",))
            for k, (w, s) in enumerate(zip(arch.widths, stages), 1)]


@pytest.mark.parametrize("method", methods.names())
def test_a_family_of_ones_own(method, tmp_path):
    register_family(Family("allconv", n_sites=lambda arch: sum(arch.stages), sites=sites, Net=AllConv))
    a = Arch(family="allconv", stages=(2, 2), widths=(8, 12, 16, 10), input=(3, 9, 9))
    net = a.build(seed=1).double()
    for bn in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)): nn.init.uniform_(bn.running_mean); nn.init.uniform_(bn.bias)
    if not methods.info(method).amounts: # what training has left at zero
        add_gates(net)
        with torch.no_grad():
            for v in gates_of(net).values(): v[::2] = 0
    p = methods.prune(method, net, *((.5,) if methods.info(method).amounts else ()), **needs_of(method, a))
    assert p.verify(tolerance=1e-9).ok and p.arch.count().params == count(p.net, a.input).params == p.after.params == sum(q.numel() for q in p.net.parameters())
    one = Plan(parent=a.id, keep={"conv4": (7,)}, constants=True)
    plain = folded(net)
    assert verify(masked(plain, one), cut(plain, one), tolerance=1e-9).ok
    save(tmp_path/"small", p.net, p.plan)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert torch.equal(load(tmp_path/"small").eval()(x), p.net.eval()(x))
    scratch = fresh(p.arch, seed=2)
    scratch(x.float()).sum().backward()
    assert scratch.arch == p.arch.scratch() and all(q.grad is not None for q in scratch.parameters())
    with pytest.raises(UserError, match="conv1 would have 0"): a.with_widths({"conv1": 0})
