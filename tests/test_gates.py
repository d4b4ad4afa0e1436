"Networks with gates: saved and loaded, on every kind of gate and family, cut as they were trained; refused where they would be lost."
import pytest
import torch

from rethink_nb import methods
from rethink_nb.arch import zoo
from rethink_nb.arch.gates import GATES, add_gates, folded, gate_sites, gated, gates_of
from rethink_nb.arch.spec import Arch
from rethink_nb.core.errors import UserError
from rethink_nb.study import Study
from rethink_nb.surgery import cut, load, save
from rethink_nb.surgery.plan import Plan
from rethink_nb.testing.sweeps import sweep_archs
from rethink_nb.testing.toys import random_bn, random_net, toy_archs

ARCHS = sweep_archs()
CASES = [(a, on) for a in ARCHS for on in GATES if gate_sites(ARCHS[a], on)]


@pytest.mark.parametrize("arch, on", CASES)
def test_what_sss_cuts_is_what_was_trained(arch, on):
    "In double precision, a third of the factors at zero: logits before, folded, masked and cut"
    a = gated(ARCHS[arch], on, group=4)
    net = random_net(a.build(seed=1), seed=2).double().eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for v in gates_of(net).values(): v.copy_(torch.rand(len(v), generator=g)*(torch.rand(len(v), generator=g) > (.33 if a.family not in ("vgg", "external") else 0) if len(v) == 1 else torch.arange(len(v)) % 3 != 0))
    x = torch.randn(3, *a.input, generator=g).double()
    with torch.no_grad(): said = net(x)
    p = methods.prune("sss", net)
    scale = said.abs().max()
    assert p.verify(x, tolerance=1e-9).ok and not p.arch.gates and p.parent == ARCHS[arch]
    with torch.no_grad(): assert (p.net(x) - said).abs().max() < 1e-9*scale and (folded(net)(x) - said).abs().max() < 1e-9*scale
    assert p.after.params < p.before.params


@pytest.mark.parametrize("name", [n for n, a in toy_archs().items() if gate_sites(a, "neurons")])
def test_a_gated_network_is_saved_and_loaded(name, tmp_path):
    net = random_bn(gated(toy_archs()[name], "neurons").build(seed=3))
    with torch.no_grad():
        for v in gates_of(net).values(): v.uniform_(0, 1)
    again = load(save(tmp_path/"net", net))
    assert again.arch == net.arch == Arch.from_dict(net.arch.to_dict()) and all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    assert net.arch.id != toy_archs()[name].id and net.arch.scratch() == toy_archs()[name].scratch()


def test_blocks_that_sss_removed_from_a_preresnet50():
    "Factors at zero where ResNet-26 has lost its blocks, the first of three stages among them: what is cut is the target"
    a, wanted = (zoo.arch(f"preresnet50-imagenet{which}", classes=10, input=(3, 32, 32)) for which in ("", "-26"))
    net = random_bn(gated(a, "blocks").build(seed=1), seed=2).eval()
    dead = {s.block for s in wanted.sites() if s.kind == "inner" and not s.width}
    assert len(gates_of(net)) == 16 and len(dead) == 8
    with torch.no_grad():
        for at, v in gates_of(net).items(): v.fill_(0 if at.rpartition(".")[0] in dead else .8)
    p, x = methods.prune("sss", net), torch.randn(2, 3, 32, 32)
    assert p.arch == wanted and p.verify(x).ok
    with torch.no_grad(): assert (p.net.eval()(x) - net(x)).abs().max() < 1e-4*net(x).abs().max()


def test_other_methods_prune_the_folded_network():
    net = random_bn(gated(toy_archs()["vgg"], "neurons").build())
    with torch.no_grad():
        for v in gates_of(net).values(): v.uniform_(.5, 1)
    p, q = methods.prune("l1", net, .5), methods.prune("l1", folded(net), .5)
    assert p.plan == q.plan and all(torch.equal(v, q.net.state_dict()[k]) for k, v in p.net.state_dict().items())


def test_gates_that_would_be_lost_are_refused():
    net = gated(toy_archs()["resnet"]).build()
    with pytest.raises(UserError, match="fold them into its weights first"): cut(net, Plan(parent=net.arch.id))
    with pytest.raises(UserError, match="has gates already"): add_gates(net)
    with pytest.raises(UserError, match="strength -1"): methods.callbacks("sss", strength=-1.)
    with pytest.raises(UserError, match="gates on 'all'"): methods.callbacks("sss", gates="all")
    with pytest.raises(UserError, match="option strength: 'much' cannot be"): methods.callbacks("sss", strength="much")


def test_a_place_that_a_network_does_not_have_is_told_when_the_study_is_made():
    with pytest.raises(UserError, match="this vgg has no blocks to put gates on"): Study(data="digits", arch="vgg-digits", method="sss", options=dict(gates=("blocks",)))
    with pytest.raises(UserError, match="no site 'conv9'"): Study(data="digits", arch="vgg-digits", method="soft-filter", options=dict(skip=("conv9",)))
