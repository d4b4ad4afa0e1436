"""Random plans on every family: what is cut is what is masked, counted and written.

`RETHINK_NB_CASES` sets the number of cases (default 200; `make test-all` runs 2,000).
"""
import os
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings, target
from hypothesis import strategies as st

from rethink_nb.arch import Arch
from rethink_nb.arch.count import count
from rethink_nb.core.errors import UserError
from rethink_nb.surgery import Plan, cut, fresh, load, masked, save, verify
from rethink_nb.testing.toys import random_bn, toy_archs

CASES = int(os.environ.get("RETHINK_NB_CASES", 200))


def switched(name, **switches): return toy_archs()[name].replace(switches=toy_archs()[name].switches.replace(**switches))


BOTTLENECK = switched("densenet", bottleneck=True).replace(widths=(*toy_archs()["densenet"].widths, 5, 4, 6, 5))
ARCHS = {
    **toy_archs(),
    "vgg-biased-hidden": switched("vgg", conv_bias=True, head="hidden"),
    "resnet-projection": switched("resnet", shortcut="projection"),
    "resnet-detached": switched("resnet", detach_shortcut=True),
    "resnet-three": Arch(family="resnet", stages=(1, 2, 1), widths=(3, 5, 7, 4, 5, 3, 6), input=(2, 7, 9)),
    "preresnet-after": switched("preresnet", select_after_norm=True),
    "preresnet-odd": toy_archs()["preresnet"].replace(input=(3, 7, 5)),
    "densenet-after": switched("densenet", select_after_norm=True),
    "densenet-bottleneck": BOTTLENECK,
    "densenet-bottleneck-after": BOTTLENECK.replace(switches=BOTTLENECK.switches.replace(select_after_norm=True)),
}
worst = {}


def draw_plan(arch: Arch, random: Random, touched: float, zeros: float, constants: bool) -> Plan:
    "Some sites lose a fraction of 0 to 0.95 of their channels; some, where it is legal, all"
    keep = {}
    for s in arch.sites():
        if s.kind == "route" or not s.width or constants and s.kind == "in" or random.random() > touched: continue
        n = max(1, int(s.width*(1 - random.uniform(0, .95))))
        if s.block and random.random() < zeros: n = 0
        keep[s.name] = tuple(sorted(random.sample(range(s.width), n)))
    return Plan(parent=arch.id, keep=keep, constants=constants)


def check(net, plan, tmp):
    "The smaller network of a plan, held against everything it must equal; None where the plan leaves no network"
    try: small = cut(net, plan)
    except UserError as e:
        assert "would have 0 channels" in str(e) # a reader on which everything depends was left with nothing
        return None
    assert small.training == net.training
    big, x = masked(net, plan), torch.randn(2, *net.arch.input, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    v = verify(big, small, x, tolerance=1e-9)
    assert v.ok, v
    worst[net.arch.family] = max(worst.get(net.arch.family, 0), v.max_error/max(v.scale, 1e-300))
    c, own = small.arch.count(), count(small, small.arch.input)
    assert (c.params, c.macs, c.flops) == (own.params, own.macs, own.flops) and c.params == sum(p.numel() for p in small.parameters())
    assert Arch.from_dict(small.arch.to_dict()) == small.arch == small.arch.check() and Plan.from_dict(plan.to_dict()) == plan
    save(tmp, small, plan)
    again = load(tmp)
    assert again.arch == small.arch and Plan.read(tmp/"plan.json") == plan
    assert all(torch.equal(v, again.state_dict()[k]) and v.dtype == again.state_dict()[k].dtype for k, v in small.state_dict().items())
    assert torch.equal(again.eval()(x), small.eval()(x))
    try: scratch = fresh(small.arch, seed=1)
    except UserError as e: # without the constants nothing is left to read: no such network can be trained
        assert "would have 0 channels" in str(e) and small.arch.family == "densenet"
        return small
    assert scratch.arch == small.arch.scratch() and not scratch.arch.constants and scratch(x.float()).shape == (2, 10)
    return small


@pytest.mark.parametrize("name", ARCHS)
def test_random_plans(name, tmp_path):
    arch = ARCHS[name]

    @settings(max_examples=max(CASES//len(ARCHS), 1), deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32), st.sampled_from([.15, .5, 1.]), st.sampled_from([0., .1, .5]), st.booleans())
    def cases(seed, touched, zeros, constants):
        random = Random(seed)
        net = random_bn(arch.build(seed % 1000), seed).double().train(bool(seed % 2))
        before = {k: v.clone() for k, v in net.state_dict().items()}
        small = check(net, draw_plan(arch, random, touched, zeros, constants), tmp_path/"one")
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training == bool(seed % 2)
        if small is None: return
        target(len(small.arch.constants), label="constants")
        # what was pruned once can be pruned again: selections, routes and constants of the parent are cut too
        check(random_bn(small, seed + 1), draw_plan(small.arch, random, touched, zeros, constants), tmp_path/"two")

    cases()
    print(name, worst)
