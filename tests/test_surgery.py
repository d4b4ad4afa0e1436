"What is cut equals what is masked, whatever the plan; what cannot be is refused."
from contextlib import contextmanager
from copy import deepcopy
from random import Random

import pytest
import torch

from rethink_nb import methods
from rethink_nb.arch import zoo
from rethink_nb.core.errors import UserError
from rethink_nb.surgery import Plan, cut, fresh, masked, pack, verify
from rethink_nb.testing.families import random_plan
from rethink_nb.testing.sweeps import amounts_of, needs_of, sweep_archs
from rethink_nb.testing.toys import random_bn, random_net, toy_archs

ARCHS = sweep_archs()


def test_single_precision_and_training_mode():
    net = random_bn(zoo.arch("resnet56").build()).train()
    p = methods.prune("l1", net, target="B")
    assert p.verify().ok and net.training and p.net.training
    assert all(q.requires_grad for q in p.net.parameters())


def test_a_smaller_network_trains():
    net = methods.prune("l1", zoo.arch("vgg-digits").build(), .5).net
    net(torch.randn(4, 1, 8, 8)).sum().backward()
    assert all(q.grad is not None for q in net.parameters())


def test_pruning_twice_is_a_plan_of_its_own():
    net = random_bn(toy_archs()["resnet"].build()).eval()
    p = methods.prune("l1", net, .3)
    q = methods.prune("l1", p.net, .3)
    assert q.verify().ok
    with pytest.raises(UserError, match="not for"): cut(net, q.plan)


@pytest.mark.parametrize("keep", [{"stage1.block1": (0, 1, 1)}, {"stage1": ()}, {"stage1.block1": (-1,)}, {"stage9.block1": (0,)}, {"stage2.shortcut": (0, 1)}, {"stem.out": ()}])
def test_bad_plans_are_refused(keep):
    a = toy_archs()["resnet"]
    for f in (cut, masked):
        with pytest.raises(UserError): f(a.build(), Plan(parent=a.id, keep=keep))


def test_verify_sees_one_wrong_channel():
    a = toy_archs()["vgg"]
    net = random_bn(a.build())
    p = Plan(parent=a.id, keep={"conv1": (0, 1)})
    assert verify(masked(net, p), cut(net, p)).ok
    assert not verify(masked(net, p), cut(net, p.replace(keep={"conv1": (0, 2)}))).ok


@pytest.mark.parametrize("name,target,skip,ratios", [
    ("resnet56", "A", (7, 9, 18, 26), (.1, .1, .1)),
    ("resnet56", "B", (7, 8, 9, 16, 18, 26), (.6, .3, .1)),
    ("resnet34", "A", (0, 3, 6, 7, 12, 13, 14, 15), (.3, .3, .3, 0.)), # its convolutions 2, 8, 14, 16, 26, 28, 30, 32
    ("resnet34", "B", (0, 3, 6, 7, 12, 13, 14, 15), (.5, .6, .4, 0.)),
])
def test_targets_are_the_reference_rule(name, target, skip, ratios):
    "The lists of facts/architectures.md are what the reference's rule gives: fraction a stage, blocks left alone"
    a = zoo.arch(name)
    inner = [s.name for s in a.sites() if s.free]
    by_rule = methods.pruned_arch("l1", a, ratios, skip=[inner[i] for i in skip], mode="reference")
    assert by_rule == zoo.arch(f"{name}-{target}") == methods.prune("l1", a.build(), target=target).arch


@pytest.mark.parametrize("bad,why", [
    (dict(ratio=1.), "outside"), (dict(ratio=-.1), "outside"), (dict(ratio=.95), "empty, and it cannot go"), (dict(target="A"), "no target of"),
    (dict(), "give one of"), (dict(ratio=.5, macs=.5), "give one of"), (dict(macs=0.), "outside"), (dict(widths={"nope": 1}), "no site"),
    (dict(ratio=(.1, .2, .3)), "ratios for"), (dict(ratio=.5, mode="rough"), "mode"), (dict(ratio=.5, skip=["nope"]), "no site"), (dict(ratio=float("nan")), "outside"),
])
def test_bad_requests(bad, why):
    with pytest.raises(UserError, match=why): methods.prune("l1", toy_archs()["vgg"].build(), **bad)


@contextmanager
def silenced(net, plan):
    "The full network with activations, not weights, set to zero: what `masked` is meant to be, by another way"
    def zero(gone): return lambda m, args, y: y.index_fill(1, torch.tensor(gone), 0)
    def zero_input(gone): return lambda m, args: (args[0].index_fill(1, torch.tensor(gone), 0), *args[1:])
    hooks = []
    for name, kept in plan.kept(net.arch).items():
        s = net.arch.site(name)
        gone = sorted(set(range(s.width)) - set(kept))
        places = s.norms or s.outs
        if s.kind == "stream": places = s.outs
        if s.kind == "stream" and net.arch.family in ("resnet", "imagenet_resnet"): # what passes each block, with whatever the shortcut brings
            places = [f"{name}.block{b}" for b in range(1, net.arch.stages[s.stage - 1] + 1) if name != "stem"] + (["bn"] if "conv" in s.outs else [])
        hooks += [net.get_submodule(m).register_forward_hook(zero(gone)) for m in places]
        if s.kind == "in" and not s.norms: hooks += [net.get_submodule(m).register_forward_pre_hook(zero_input(gone)) for m in s.ins]
    try: yield net
    finally:
        for h in hooks: h.remove()


@pytest.mark.parametrize("arch", ["vgg", "resnet", "preresnet", "densenet", "densenet-bc", "resnet50-lottery", "imagenet-resnet", "bottlenecks", "imagenet-vgg", "imagenet-vgg-scaled"])
@pytest.mark.parametrize("seed", range(6))
def test_cut_is_the_network_with_silent_activations(arch, seed):
    a, random = ARCHS[arch], Random(seed)
    net = random_net(a.build(seed), seed).double().eval()
    some = [s for s in a.sites() if s.kind != "route" and random.random() < .4] or [a.sites()[0]]
    plan = Plan(parent=a.id, keep={s.name: tuple(sorted(random.sample(range(s.width), max(1, s.width//2)))) for s in some})
    x = torch.randn(3, *a.input, dtype=torch.float64)
    with torch.no_grad(), silenced(net, plan): by_hooks = net(x)
    with torch.no_grad(): small, whole = cut(net, plan)(x), net(x)
    assert (small - by_hooks).abs().max() <= 1e-9*by_hooks.abs().max()
    assert (small - whole).abs().max() > 1e-3*whole.abs().max() # it is another network than the whole one


def test_a_stream_is_scored_by_its_channels_where_blocks_write_to_some_only():
    "Each writer's filters count for the channels they go to, not for their place in the row"
    a = toy_archs()["resnet"]
    net = random_bn(a.build())
    some = cut(net, Plan(parent=a.id, keep={"stem.out": (1, 3), "stage1.block1.out": (2,)}))
    with torch.no_grad():
        for m, norm in (("conv", (5., 1.)), ("stage1.block1.conv2", (3.,))):
            for row, n in zip(some.get_submodule(m).weight, norm): row.fill_(n/row.numel())
    p = methods.prune("l1", some, widths={"stage1": 2})
    assert [round(s, 5) for s in p.plan.scores["stage1"]] == [0, 5, 3, 1] and p.plan.keep["stage1"] == (1, 2) and p.verify().ok


@pytest.mark.parametrize("change,why", [
    (lambda net: setattr(net.stage1.block1, "relu", torch.nn.LeakyReLU()), "stage1.block1.relu is not as its Arch builds it"),
    (lambda net: setattr(net.bn, "eps", .5), "bn is not as its Arch builds it .BatchNorm2d, eps 0.5"),
    (lambda net: net.stage1.register_forward_hook(lambda m, x, y: 2*y), "stage1 has a forward hook"),
    (lambda net: delattr(net, "arch"), "carries no .arch"),
])
def test_a_network_changed_by_hand_is_refused(change, why, tmp_path):
    from rethink_nb.surgery import save
    a = toy_archs()["resnet"]
    net, plan = a.build(), Plan(parent=a.id, keep={"stage1.block1": (0,)})
    change(net)
    for f in (lambda: cut(net, plan), lambda: masked(net, plan), lambda: methods.prune("l1", net, .5), lambda: save(tmp_path/"x", net)):
        with pytest.raises(UserError, match=why): f()
    assert not (tmp_path/"x").exists()


def test_what_is_no_weight_is_kept_as_well():
    a = toy_archs()["resnet"]
    net = a.build()
    net.bn.momentum, net.bn.training = .01, False
    net.conv.weight.requires_grad_(False)
    for keep in ({"stage1.block1": (0,)}, {"stage1": (0, 2)}): # the second changes a shortcut, for which the masked network is built anew
        for other in (cut(net, Plan(parent=a.id, keep=keep)), masked(net, Plan(parent=a.id, keep=keep))):
            assert (other.bn.momentum, other.bn.training, other.conv.weight.requires_grad, other.fc.weight.requires_grad) == (.01, False, False, True)


def test_networks_with_constants_are_pruned_again():
    a = zoo.arch("resnet8-digits")
    soft = cut(random_bn(a.build()), Plan(parent=a.id, keep={"stage1.block1": (0, 1, 2), "stage2.block1": ()}, constants=True))
    assert soft.arch.constants
    for method in methods.names():
        for request_ in (*amounts_of(method), *([dict(ratio=.95)] if methods.info(method).amounts else ())): assert methods.prune(method, soft, **request_, **needs_of(method, soft.arch)).verify().ok


def test_half_precision_is_not_taken_for_a_fault():
    net = random_bn(zoo.arch("densenet40", width=.5).build())
    for kind in (torch.bfloat16, torch.float16): assert methods.prune("l1", net.to(kind), .4).verify().ok


def test_masks_start_from_scratch_where_layers_are_gone():
    "A dense layer that gives constants alone is left out from scratch, and the masks of its readers are cut with it"
    net = random_bn(zoo.densenet(3, growth=4, input=(1, 8, 8)).build()).eval()
    mask = torch.rand(net.get_submodule("stage1.layer3.conv1").weight.shape, generator=torch.Generator().manual_seed(0)) < .5
    p = methods.carry_out(net, Plan(parent=net.arch.id, keep={"stage1.layer2.in": (), "stage1.layer1": (0, 2)}, masks={"stage1.layer3.conv1.weight": pack(mask)}))
    assert p.verify().ok and p.arch.site("stage1.layer2").kind == "constant"
    start = fresh(p.arch, p.masks, seed=1)
    stays = [*range(8), 8, 10] # the base and what is left of layer 1
    assert start.arch == p.arch.scratch() and torch.equal(start.stage1.layer3.conv1.weight != 0, mask[:, stays])
    with pytest.raises(UserError, match="fits no weight"): fresh(p.arch, {"stage1.layer3.conv1.weight": mask}, seed=1)
    start.train()(torch.randn(2, 1, 8, 8)).sum().backward()


def test_scores_that_are_not_numbers_are_refused():
    net = toy_archs()["vgg"].build()
    torch.nn.init.constant_(net.features.conv2.weight, float("nan"))
    with pytest.raises(UserError, match="conv2 has scores that are not finite"): methods.prune("l1", net, .5)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["vgg", "resnet", "preresnet", "densenet", "densenet-bc", "resnet50-lottery", "imagenet-resnet", "bottlenecks", "imagenet-vgg", "imagenet-vgg-scaled"])
@pytest.mark.parametrize("seed", range(4))
def test_on_a_gpu_it_is_the_same(arch, seed):
    "Selections, routes, constants and weight masks on the device: cut = masked, and both are what the CPU makes of the same plan"
    net = random_net(ARCHS[arch].build(seed), seed).double().eval()
    for again in (0, 1): # the second time from a network with selections and constants
        plan = random_plan(net, 2*seed + again, constants=seed % 2 == 1)
        try: here = methods.carry_out(net, plan)
        except UserError: return
        there = methods.carry_out(deepcopy(net).cuda(), plan)
        assert there.verify(tolerance=1e-9).ok and all(t.is_cuda for t in (*there.net.state_dict().values(), *(there.masks or {}).values()))
        assert verify(here.net, deepcopy(there.net).cpu(), tolerance=1e-9).ok and there.arch == here.arch
        single = methods.carry_out(deepcopy(net).float().cuda(), plan)
        assert single.verify().ok # TF32 or not
        assert fresh(here.arch, here.masks, seed=1).arch == fresh(there.arch, there.masks, seed=1).arch
        net = random_net(here.net, seed + 1).eval()
