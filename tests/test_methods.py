"Every method on every family it serves: pruned, proved, counted, written, read, trained on; what it does not serve is refused."
import pytest
import torch
from torch.nn.functional import cross_entropy

from rethink_nb import methods
from rethink_nb.arch import Arch, zoo
from rethink_nb.arch.count import count
from rethink_nb.core.errors import UserError
from rethink_nb.core.events import call_all
from rethink_nb.methods.survey import sensitivity
from rethink_nb.surgery import Plan, fresh, load, save
from rethink_nb.testing.sweeps import amounts_of, needs_of, sweep_archs
from rethink_nb.testing.toys import random_bn, random_net, toy_archs, toy_images

ARCHS = sweep_archs()
# methods that look at images take long in double precision: on larger networks they are asked once
ASKED = [(m, a, str(r)) for m in methods.names() for a in ARCHS for r in amounts_of(m) if r == {"ratio": .4} or "batches" not in methods.info(m).needs or a in toy_archs()]
UNSCALED = [(m, a, r) for m, a, r in ASKED if m in ("slimming", "guided") and not ARCHS[a].switches.norm and ARCHS[a].switches.head != "flat-norm"] # without batch norm
NOT_SERVED = [("slimming", "groups"), ("guided", "groups")] # scales of single channels say nothing of a group
SWEEP = [case for case in ASKED if case not in UNSCALED and case[:2] not in NOT_SERVED]


def steps(net, callbacks, n=2):
    "A few optimiser steps with momentum"
    opt, images, labels = torch.optim.SGD(net.parameters(), lr=.05, momentum=.9), toy_images(8, net.arch).to(next(net.parameters())), torch.arange(8) % net.arch.classes
    net.train()
    call_all(callbacks, "prepare", net)
    for _ in range(n):
        opt.zero_grad()
        cross_entropy(net(images), labels).backward()
        call_all(callbacks, "after_backward", net)
        opt.step()
        call_all(callbacks, "after_step", net, .05)
    return net


def sized(a): return a.widths, {s.site: len(s.channels) for s in a.selections}


@pytest.mark.parametrize("method,arch,asked", SWEEP)
def test_every_method_on_every_family(method, arch, asked, tmp_path):
    a, asked = ARCHS[arch], next(r for r in amounts_of(method) if str(r) == asked)
    net = random_net(a.build(seed=1), seed=2).double().eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    p = methods.prune(method, net, seed=3, **asked, **needs_of(method, a))
    v = p.verify(torch.randn(4, *a.input), tolerance=1e-9) # few images: double precision is slow
    assert v.ok, v
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
    assert p.arch == p.net.arch and count(p.net, a.input).params == p.after.params == sum(q.numel() for q in p.net.parameters())
    try: known = methods.pruned_arch(method, a, **asked, **{k: v for k, v in needs_of(method, a).items() if k == "min_keep"})
    except UserError: assert methods.info(method).category == "automatic" # widths are found in weights
    else: assert p.arch.replace(constants=()) == known or sized(p.arch) == sized(known) and known.selections != a.selections # constants depend on weights, and which channels of a stream are read
    assert Plan.from_dict(p.plan.to_dict()) == p.plan and Arch.from_dict(p.arch.to_dict()) == p.arch
    if asked.get("ratio") == 0: assert p.arch == a and all(torch.equal(t, p.whole().state_dict()[k]) for k, t in p.net.state_dict().items())
    if asked.get("ratio") != .4: return
    again = load(save(tmp_path/"small", p.net, p.plan)).eval()
    assert torch.equal(again(torch.ones(1, *a.input).double()), p.net.eval()(torch.ones(1, *a.input).double()))
    scratch = fresh(p.arch, p.masks, seed=1)
    for n in (p.net, scratch):
        was = {k: v.detach().clone() for k, v in n.named_parameters()}
        steps(n, p.callbacks())
        moved = [not torch.equal(was[k], v) for k, v in n.named_parameters() if k.endswith("weight")]
        assert moved[-1] and sum(moved) > len(moved)/2 # a branch one channel wide may be silent for all eight images
        for k, m in (p.masks or {}).items(): assert not n.get_parameter(k)[~m].any()


@pytest.mark.parametrize("method,arch", sorted({case[:2] for case in UNSCALED}))
def test_methods_that_need_batch_norm_say_so(method, arch):
    with pytest.raises(UserError, match="^slimming cannot (prune this vgg|guide the pruning of this vgg): no batch norm scales channels"): methods.prune(method, ARCHS[arch].build(), .4)
    with pytest.raises(UserError, match="^sss cannot prune this vgg: .* no batch norm"): methods.prune("sss", ARCHS[arch].build())


@pytest.mark.parametrize("method,arch", NOT_SERVED)
def test_what_a_method_does_not_serve_is_refused(method, arch):
    with pytest.raises(UserError, match=f"slimming cannot (prune|guide the pruning of) this {ARCHS[arch].family}: no batch norm scales channels that could go"): methods.prune(method, ARCHS[arch].build(), .4)


@pytest.mark.parametrize("method", [m for m in methods.names() if methods.info(m).amounts])
def test_unknown_options_and_missing_needs_are_refused(method):
    net = toy_archs()["resnet"].build()
    given = needs_of(method, net.arch)
    with pytest.raises(UserError, match=f"{method} has no option 'temperature'"): methods.prune(method, net, .5, temperature=1, **given)
    with pytest.raises(UserError, match="give one of ratio, target, widths, macs, params: none given"): methods.prune(method, net, **given)
    with pytest.raises(UserError): methods.prune(method, net, 1.5, **given)
    for need in methods.info(method).needs:
        with pytest.raises(UserError, match=f"{method} needs .*{need}="): methods.prune(method, net, .5, **{k: v for k, v in given.items() if k != need})


@pytest.mark.parametrize("method", [m for m in methods.names() if methods.info(m).rounds])
@pytest.mark.parametrize("arch", toy_archs())
def test_rounds(method, arch):
    "Three rounds with training between: each proves itself, what is gone stays gone, and the end is what was asked"
    a, seen = toy_archs()[arch], []
    def retrain(p):
        assert p.verify().ok
        seen.append(p)
        return steps(p.net, p.callbacks())
    p = methods.prune(method, random_bn(a.build(seed=1)), .4, rounds=3, retrain=retrain, **needs_of(method, a))
    assert p.verify().ok and len(seen) == 2 and p.before == a.count()
    if p.masks:
        for early, late in zip(seen, [*seen[1:], p]): assert all((late.masks[k] <= m).all() for k, m in early.masks.items())
        total = sum(m.numel() for m in p.masks.values())
        assert sum(int(m.sum()) for m in p.masks.values()) == total - int(.4*total + 1e-9)
    else: assert seen[0].arch.count().params > seen[1].arch.count().params > p.after.params


READING = ("slimming", "thinet", "regression", "layerwise") # judge what is read, not what is made


@pytest.mark.parametrize("arch", list(toy_archs()))
@pytest.mark.parametrize("method", [m for m in methods.names() if "widths" in methods.info(m).amounts and m != "uniform"]) # which knows no single site
def test_sensitivity_of_every_structured_method(method, arch):
    "A row a site and ratio; the unpruned network first; one site alone gets smaller, and by what it holds"
    a = toy_archs()[arch]
    net = random_bn(a.build(seed=1), seed=2)
    given = {k: v for k, v in needs_of(method, a).items() if k in methods.info(method).needs} | (dict(level="filter") if "level" in methods.info(method).options else {})
    if method in READING and arch == "densenet": # where these look at what is read, never at what is made
        with pytest.raises(UserError, match="slimming has no scores|is read by several layers"): sensitivity(net, lambda n: 0, [.3], method=method, **given)
        return
    found = sensitivity(net, lambda n: sum(p.numel() for p in n.parameters()), [.3, .7], method=method, **given)
    whole = sum(p.numel() for p in net.parameters())
    assert set(found[found.ratio == 0].value) == {whole} and (found.groupby("site").size() == 3).all()
    assert found.groupby("site").value.is_monotonic_decreasing.all() and (found[found.kept < found.width].value < whole).all()
    streams = {s.name for s in a.sites() if s.kind == "stream"}
    assert (set(found.site) >= streams) == (method not in READING or not streams)


@pytest.mark.parametrize("method, options", [("thinet", dict(rescale="none", images=8, draws=1)), ("layerwise", dict(select="l1", rescale="none", images=8)), ("random-channels", {})])
def test_a_target_that_says_what_blocks_read(method, options):
    "ResNet-2x: the network pruned is the target, channel lists included; a control draws others, as many"
    a = zoo.arch("resnet50-thinet", classes=10, input=(3, 32, 32))
    wanted = zoo.arch("resnet50-thinet-2x", classes=10, input=(3, 32, 32))
    p = methods.prune(method, random_bn(a.build()), target="2x", **options, **({} if method == "random-channels" else {"batches": [toy_images(20, a)]}))
    assert p.verify().ok and methods.pruned_arch(method, a, target="2x", **options) == wanted
    assert p.arch == wanted if method != "random-channels" else sized(p.arch) == sized(wanted) and p.arch != wanted


def test_a_target_that_says_what_blocks_read_is_refused_by_methods_that_choose_filters_alone():
    net = zoo.arch("resnet50-thinet", classes=10, input=(3, 32, 32)).build()
    for method in ("l1", "slimming", "uniform"):
        with pytest.raises(UserError, match="which channels blocks read"): methods.prune(method, net, target="2x")


@pytest.mark.slow
def test_regression_goes_to_its_own_target():
    a = zoo.arch("resnet50-thinet", classes=10, input=(3, 32, 32))
    p = methods.prune("regression", random_bn(a.build()), target="2x", batches=[toy_images(20, a)], rescale="none", draws=2, rows=20)
    assert p.verify().ok and p.arch == zoo.arch("resnet50-thinet-2x", classes=10, input=(3, 32, 32))
