"Random plans on every family: what is cut is what is masked, counted and written."
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rethink_nb.arch import Arch, zoo
from rethink_nb.arch.count import count
from rethink_nb.arch.spec import Switches
from rethink_nb.core.errors import UserError
from rethink_nb.surgery import Plan, cut, fresh, load, masked, save, verify
from rethink_nb.testing.families import random_plan
import rethink_nb.testing.gated  # noqa: F401 (a builder)
from rethink_nb.testing.toys import random_net, toy_archs


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
    "imagenet-resnet": Arch(family="imagenet_resnet", stages=(1, 2), widths=(3, 5, 4, 6, 5), input=(2, 13, 9)),
    "imagenet-bottlenecks": Arch(family="imagenet_resnet", stages=(2, 1), widths=(3, 6, 5, 4, 3, 5, 4, 3, 6), input=(1, 16, 16), switches=Switches(bottleneck=True, shortcut_bias=True)),
    "vgg-flat": Arch(family="vgg", stages=(1, 2, 2), widths=(3, 5, 4, 7, 6), input=(2, 14, 14), switches=Switches(head="flat", norm=False, conv_bias=True)),
    "vgg-flat-scaled": Arch(family="vgg", stages=(2, 1), widths=(3, 4, 6), input=(1, 9, 14), switches=Switches(head="flat-norm", bn_init=.5)),
    "vgg-flat-bn": Arch(family="vgg", stages=(1, 2, 1), widths=(4, 3, 5, 6), input=(1, 11, 8), switches=Switches(head="flat", conv_bias=True)),
    "vgg-plain": switched("vgg", norm=False),
    "imagenet-groups": Arch(family="imagenet_resnet", stages=(2, 1), widths=(3, 6, 5, 3, 5, 4), input=(1, 16, 16), switches=Switches(bottleneck=True, group_width=2)),
    "imagenet-preresnet": switched("preresnet", large_stem=True, normed_shortcut=True).replace(input=(2, 13, 9)),
    "imagenet-preresnet-after": switched("preresnet", large_stem=True, normed_shortcut=True, select_after_norm=True).replace(input=(1, 16, 16)),
    "preresnet-shared": switched("preresnet", normed_shortcut=True),
    "external": zoo.arch("toy:gated", classes=10, input=(1, 8, 8)),
    "densenet-bottleneck": BOTTLENECK,
    "densenet-bottleneck-after": BOTTLENECK.replace(switches=BOTTLENECK.switches.replace(select_after_norm=True)),
}


def check(net, plan, tmp, seen: Counter):
    "The smaller network of a plan, held against everything it must equal; None where the plan leaves no network"
    try: small = cut(net, plan)
    except UserError as e:
        assert "would have 0 channels" in str(e) # a reader on which everything depends was left with nothing
        seen["refused"] += 1
        return None
    assert small.training == net.training
    big, x = masked(net, plan), torch.randn(2, *net.arch.input, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    v = verify(big, small, x, tolerance=1e-9)
    assert v.ok, v
    seen["worst"] = max(seen["worst"], v.max_error/max(v.scale, 1e-300))

    c, own = small.arch.count(), count(small, small.arch.input)
    assert (c.params, c.macs, c.flops) == (own.params, own.macs, own.flops) and c.params == sum(p.numel() for p in small.parameters())
    assert Arch.from_dict(small.arch.to_dict()) == small.arch == small.arch.check() and Plan.from_dict(plan.to_dict()) == plan

    save(tmp, small, plan)
    again = load(tmp)
    assert again.arch == small.arch and Plan.read(tmp/"plan.json") == plan
    assert all(torch.equal(v, again.state_dict()[k]) and v.dtype == again.state_dict()[k].dtype for k, v in small.state_dict().items())
    assert torch.equal(again.eval()(x), small.eval()(x))

    widths = [s.width for s in small.arch.sites()]
    seen.update(dict(cuts=1, width_one=1 in widths, width_zero=0 in widths, constants=len(small.arch.constants) > 0, maps=any(len(k.shape) == 3 and k.shape[1] > 1 for k in small.arch.constants),
                     selections=len(small.arch.selections) > 0, masks=len(plan.masks) > 0))
    try: scratch = fresh(small.arch, seed=1)
    except UserError as e: # without the constants nothing is left to read: no such network can be trained
        assert "would have 0 channels" in str(e) and small.arch.family == "densenet"
        return small
    assert scratch.arch == small.arch.scratch() == scratch.arch.scratch() and not scratch.arch.constants and scratch(x.float()).shape == (2, 10)
    return small


def run_cases(name, n, tmp):
    arch, seen = ARCHS[name], Counter()

    @settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32), st.sampled_from([.15, .5, 1.]), st.sampled_from([0., .1, .5]), st.booleans())
    def cases(seed, touched, zeros, constants):
        net = random_net(arch.build(seed % 1000), seed).double().train(bool(seed % 2))
        before = {k: v.clone() for k, v in net.state_dict().items()}
        small = check(net, random_plan(net, seed, touched, zeros, constants), tmp/"one", seen)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training == bool(seed % 2)
        # what was pruned once can be pruned again: selections, routes and constants of the parent are cut too
        if small is not None: check(random_net(small, seed + 1), random_plan(small, seed + 1, touched, zeros, constants), tmp/"two", seen)

    cases()
    print(f"\n{name}: " + ", ".join(f"{k} {v:.1e}" if k == "worst" else f"{k} {v}" for k, v in seen.items()))
    return seen


@pytest.mark.parametrize("name", ARCHS)
def test_random_plans(name, tmp_path): assert run_cases(name, 15, tmp_path)["cuts"] > 15


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHS)
def test_many_random_plans(name, tmp_path):
    seen = run_cases(name, 200, tmp_path)
    # the cases reach what they are for
    assert seen["width_one"] and seen["masks"] and seen["cuts"] > 250
    if ARCHS[name].family not in ("vgg", "external"): assert seen["width_zero"] and seen["constants"] and seen["selections"]
