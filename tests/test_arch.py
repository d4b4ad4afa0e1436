"The paper's networks, pinned: parameters, MACs, reference FLOPs (facts/surgery_and_flops.md 5, architectures.json)."
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rethink_nb.arch import Arch, zoo
from rethink_nb.arch.count import count
from rethink_nb.training import recipe, scratch_b

#        name          params      MACs         reference FLOPs
PINNED = {
    "vgg16":       (14_987_722, 313_463_808, 627_880_970),
    "resnet56":    (853_018,    125_485_696, 252_572_938),
    "vgg16-A":     (5_397_034,  206_279_680, 413_364_234),
    "resnet56-A":  (773_336,    112_435_840, 226_390_090),
    "resnet56-B":  (735_712,    90_907_264,  183_137_866),
    "resnet110-A": (1_688_522,  212_779_648, 428_291_338),
    "resnet110-B": (1_168_424,  155_124_352, 312_745_738),
}


@pytest.mark.parametrize("name", PINNED)
def test_pinned(name):
    c = zoo.arch(name).count()
    assert (c.params, c.macs, c.flops) == PINNED[name]


@pytest.mark.parametrize("name", zoo.names())
def test_every_network(name):
    "Builds, round-trips as JSON, and torch's own counter gives twice the MACs; the coupling table names what is there"
    a = zoo.arch(name)
    assert Arch.from_dict(a.to_dict()) == a and Arch.from_dict(a.to_dict()).id == a.id
    net = a.blank().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(): net(torch.zeros(1, *a.input, device="meta"))
    assert counter.get_total_flops() == 2*a.count().macs
    for s in a.sites():
        assert all(net.get_submodule(m).weight.shape[0] == s.width for m in (*s.outs, *s.norms))
        assert all(net.get_submodule(m).weight.shape[1] == s.width for m in s.ins)


@pytest.mark.parametrize("name", ["vgg16", "resnet20"])
@pytest.mark.parametrize("input", [(1, 28, 28), (3, 32, 32), (3, 33, 35)])
def test_other_data(name, input):
    a = zoo.arch(name, classes=7, input=input, width=.25)
    assert a.build()(torch.randn(2, *input)).shape == (2, 7)


def test_a_count_leaves_the_network_alone():
    net = zoo.arch("resnet8-digits").build().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert count(net, (1, 8, 8)) == count(net, (1, 8, 8)) == zoo.arch("resnet8-digits").count()
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("base,target,epochs", [("vgg16", "vgg16-A", 243), ("resnet56", "resnet56-A", 178), ("resnet56", "resnet56-B", 220)])
def test_scratch_b_epochs_of_the_reference(base, target, epochs):
    assert scratch_b(recipe("cifar"), zoo.arch(base).count().flops/zoo.arch(target).count().flops).epochs == epochs


def test_ids_stay():
    "An id that changes orphans every stored run: raise a schema number knowingly instead"
    from rethink_nb.study import Study
    s = Study(data="digits", arch="vgg-digits")
    assert (zoo.arch("vgg16").id, recipe("cifar").id) == ("b6b04b537f5a", "7df89b8272d4")
    assert [s.id, s.parent_run(1).id, s.prune_run("l1", .5, 1).id, s.prune_run("l1", .5, 1).group] == ["d0414ac3a49d", "82518e907312", "50dacb4eab52", "2114dd327e3c"]
