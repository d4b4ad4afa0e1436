"Where torch-pruning can do what we do, it does the same: the L1 rule and the cut of ResNet-56's inner widths."
import pytest
import torch
from torch import nn

from rethink_nb import methods
from rethink_nb.arch import zoo
from rethink_nb.testing.toys import random_bn

tp = pytest.importorskip("torch_pruning", reason="needs the extra `pruning`")


@pytest.mark.parametrize("request_", [dict(ratio=.4), dict(ratio=(.6, .3, .1)), dict(target="B")], ids=str)
def test_same_filters_same_outputs(request_):
    net = random_bn(zoo.arch("resnet56").build(seed=4), seed=5).double().eval()
    p = methods.prune("l1", net, **request_)
    x, other = torch.randn(4, 3, 32, 32, dtype=torch.float64), zoo.arch("resnet56").build(seed=4).double().eval()
    other.load_state_dict(net.state_dict())

    module = {s: net.arch.site(s).outs[0] for s in p.plan.keep}
    own = {other.get_submodule(m): 1 - len(p.plan.keep[s])/net.arch.site(s).width for s, m in module.items()}
    others = [m for m in other.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m not in own]
    # its default score averages over coupled layers and normalises, which is not the L1 paper's rule (facts/surgery_and_flops.md 3)
    rule = tp.importance.MagnitudeImportance(p=1, group_reduction="first", normalizer=None)
    tp.pruner.BasePruner(other, x, importance=rule, pruning_ratio=0., pruning_ratio_dict=own, ignored_layers=others).step()

    for s, m in module.items():
        theirs = other.get_submodule(m).weight
        assert torch.equal(theirs, net.get_submodule(m).weight[list(p.plan.keep[s])]), f"{s}: other filters"
    with torch.no_grad(): assert torch.allclose(other(x), p.net(x), rtol=0, atol=1e-9*other(x).abs().max().item())
    assert sum(q.numel() for q in other.parameters()) == p.after.params
