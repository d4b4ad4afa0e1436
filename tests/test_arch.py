"The paper's networks, pinned: parameters, MACs, reference FLOPs (facts/surgery_and_flops.md 5, architectures.json)."
from random import Random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rethink_nb.arch import Arch, zoo
from rethink_nb.arch.count import count
from rethink_nb.arch.parts import Constant
from rethink_nb.arch.spec import Selection
from rethink_nb.core.errors import UserError
from rethink_nb.surgery import Plan, cut, masked, verify
from rethink_nb.surgery.plan import owned
from rethink_nb.testing.families import random_plan
from rethink_nb.testing.toys import random_bn, random_net, toy_archs
from rethink_nb.training import recipe, scratch_b

#        name             params      MACs         reference FLOPs
PINNED = {
    "vgg16":         (14_987_722, 313_463_808, 627_880_970),
    "resnet56":      (853_018,    125_485_696, 252_572_938),
    "preresnet164":  (1_703_258,  247_646_720, 504_759_306), # MACs and FLOPs: the table; parameters: 1.71 M of the reference less its selection indices
    "densenet40":    (1_059_298,  282_917_328, 573_052_330),
    "vgg16-A":     (5_397_034,  206_279_680, 413_364_234),
    "resnet56-A":  (773_336,    112_435_840, 226_390_090),
    "resnet56-B":  (735_712,    90_907_264,  183_137_866),
    "resnet110-A": (1_688_522,  212_779_648, 428_291_338),
    "resnet110-B": (1_168_424,  155_124_352, 312_745_738),
    "resnet34":      (21_797_672, 3_663_761_408, 7_340_393_960), # with the average pool, which the reference counts
    "resnet50":      (25_557_032, 4_089_184_256, 8_212_012_520 + 7*7*2048), # torchvision's, and the average pool
    "resnet50-thinet": (25_560_872, 4_089_184_256, 8_213_618_152), # and the bias of the projections
    "vgg11-imagenet":      (132_863_336, 7_609_090_048,  15_239_171_048), # parameters as torchvision tells them
    "vgg11-bn-imagenet":   (132_868_840, 7_609_090_048,  15_254_023_144),
    "vgg16-bn-imagenet":   (138_365_992, 15_470_264_320, 31_000_857_576),
    "vgg11-slimming-imagenet": (132_868_840 + 4*4096, 7_609_090_048, 15_254_023_144), # batch norm over vectors costs nothing in the reference's count
    "vgg16-imagenet":      (138_357_544, 15_470_264_320, 30_973_762_536), # torchvision's, to the last number
    "vgg16-imagenet-conv": (131_452_552, 4_791_205_888,  9_599_388_648),
    "vgg16-imagenet-gap":  (8_322_696,   4_668_084_224,  9_353_028_584),
    "vgg16-imagenet-tiny": (1_325_368,   1_004_578_816,  2_017_487_848),
    "vgg16-imagenet-5x":   (130_879_294, 3_515_283_520,  7_043_492_200),
    "resnet34-A":  (20_151_764, 3_100_184_576, 6_212_499_416),
    "resnet34-B":  (19_469_372, 2_782_269_440, 5_576_203_448),
    "resnet50-thinet-30": (8_669_158,  1_166_283_835, 2_360_886_113),
    "resnet50-thinet-50": (12_385_704, 1_822_031_872, 3_674_383_592),
    "resnet50-thinet-70": (16_949_086, 2_601_392_356, 5_235_013_502),
    "resnet50-thinet-2x": (19_697_424, 2_730_129_076, 5_493_782_306),
    "resnext50": (25_028_904, 4_230_479_872, 8_504_563_688), # torchvision's resnext50_32x4d, and the average pool
    "preresnet50-imagenet": (25_549_480, 4_089_184_256, 8_209_704_424), # torchvision's ResNet-50 less the batch norms and ReLUs that stand elsewhere; MACs are equal
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
    for s in owned(a).values(): # what a block reads by a list of its own belongs to that
        assert all(net.get_submodule(m).weight.shape[0] == s.width*s.each for m in (*s.outs, *s.norms))
        for m in s.ins: # flattened maps of 7x7 have 49 numbers a channel
            assert net.get_submodule(m).weight.shape[1] == s.width*s.each*(49 if (s.name, m) == ((f"conv{sum(a.stages[:-1])}", "head.fc1")) and a.switches.head.startswith("flat") else 1)


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


# rows of facts/architectures.md: base over pruned FLOPs, FLOPs and parameters cut in %, Scratch-B epochs
ROWS = {
    "vgg16-A": (1.519, 34.17, 63.99, 243), "resnet56-A": (1.1157, 10.37, 9.34, 178), "resnet56-B": (1.3791, 27.49, 13.75, 220),
    "resnet110-A": (1.1883, 15.84, 2.28, 190), "resnet110-B": (1.6273, 38.55, 32.38, 260),
    "resnet34-A": (1.1816, 15.37, 7.55, 106), "resnet34-B": (1.3164, 24.03, 10.68, 118),
    "vgg16-imagenet-conv": (3.2266, 69.01, 4.99, 180), "vgg16-imagenet-gap": (3.3116, 69.8, 93.98, 180), "vgg16-imagenet-tiny": (15.3526, 93.49, 99.04, 180), "vgg16-imagenet-5x": (4.3975, 77.26, 5.41, 180),
    "resnet50-thinet-30": (3.479, 71.26, 66.08, 180), "resnet50-thinet-50": (2.2354, 55.26, 51.54, 180), "resnet50-thinet-70": (1.569, 36.26, 33.69, 141),
    "resnet50-thinet-2x": (1.4951, 33.11, 22.94, 134),
}


@pytest.mark.parametrize("target", ROWS)
def test_rows_of_the_paper(target):
    base, small = zoo.arch(target.rpartition("-")[0]).count(), zoo.arch(target).count()
    ratio, flops, params, epochs = ROWS[target]
    assert round(base.flops/small.flops, 4) == ratio
    assert (round(100*(1 - small.flops/base.flops), 2), round(100*(1 - small.params/base.params), 2)) == (flops, params)
    large = zoo.arch(target).input[1] == 224 # where the reference doubles the epochs at most
    assert scratch_b(recipe("imagenet" if large else "cifar"), base.flops/small.flops, *([2] if large else [])).epochs == epochs


@pytest.mark.parametrize("depth, blocks, epochs", [(41, (0, 4, 6, 3), 117), (32, (1, 4, 4, 1), 145), (26, (0, 2, 5, 1), 179)])
def test_networks_that_sss_found(depth, blocks, epochs):
    "facts/architectures.json, SSS: blocks left a stage; Scratch-B epochs of the reference's README, from 100"
    a, base = zoo.arch(f"preresnet50-imagenet-{depth}"), zoo.arch("preresnet50-imagenet")
    left = [[int(s.block[-1]) for s in a.sites() if s.stage == stage and s.name.endswith("inner1") and s.width] for stage in range(1, 5)]
    assert tuple(map(len, left)) == blocks and depth == 3*sum(blocks) + 2
    assert [1 in l for l in left] == {41: [False, True, True, True], 32: [False, True, True, True], 26: [False, False, False, True]}[depth]
    r = recipe("imagenet")
    assert scratch_b(r.scaled(epochs=100), base.count().flops/a.count().flops, 2).epochs == epochs


def test_channel_lists():
    "The lists of facts/architectures.md, layer by layer"
    free = lambda name: [s.width for s in zoo.arch(name).sites() if s.free]
    assert free("vgg16-A") == [32, 64, 128, 128] + [256]*9
    assert free("resnet56-A") == [14]*7 + [16, 14, 32] + [28]*8 + [64] + [57]*7 + [64]
    assert free("resnet56-B") == [6]*7 + [16, 16, 32] + [22]*6 + [32, 22, 64] + [57]*7 + [64]
    assert free("resnet110-A") == [8]*17 + [16] + [32]*18 + [64]*18
    assert free("resnet110-B") == [8]*17 + [16, 32] + [19]*17 + [64] + [44]*17
    assert free("vgg16-imagenet-conv") == [32]*2 + [64]*2 + [128]*3 + [256]*3 + [512]*3 + [4096]*2
    assert free("vgg16-imagenet-gap") == [32]*2 + [64]*2 + [128]*3 + [256]*3 + [512]*3
    assert free("vgg16-imagenet-tiny") == [16]*2 + [32]*2 + [64]*3 + [128]*5 + [256]
    assert free("vgg16-imagenet-5x") == [24, 22, 41, 51, 108, 89, 111, 184, 276, 228, 512, 512, 512, 4096, 4096]
    # bases of network slimming and of the unstructured studies
    assert free("vgg11-slimming-imagenet") == [64, 128, 256, 256, 512, 512, 512, 512, 4096, 4096]
    assert free("vgg19") == [64]*2 + [128]*2 + [256]*4 + [512]*8
    assert free("preresnet164") == [16]*36 + [32]*36 + [64]*36 and [s.width for s in zoo.arch("preresnet164").sites() if s.kind == "stream"] == [16, 64, 128, 256]
    assert len(free("preresnet110")) == 3*12*2
    assert free("densenet40") == [12]*36 and [s.width for s in zoo.arch("densenet40").sites() if s.kind == "stream"] == [24, 168, 312]
    assert len(free("densenet100-weight")) == 3*32 and len(free("densenet-bc-100")) == 2*3*16
    assert zoo.arch("resnet50-lottery").stages == (8, 8, 8)
    # triples of a bottleneck: what it reads, and its two inner widths
    a, at = zoo.arch("resnet50-thinet-2x"), [f"stage{s}.block{b}" for s, n in enumerate((3, 4, 6, 3), 1) for b in range(1, n + 1)]
    assert [a.site(f"{block}.{k}").width for block in at for k in ("in", "inner1", "inner2")] == [
        35, 64, 55, 101, 51, 39, 97, 50, 37, 144, 128, 106, 205, 105, 72, 198, 105, 72, 288, 128, 110, 278, 256, 225, 418, 209, 147, 407, 204, 158, 423, 212, 155, 412, 211, 148,
        595, 256, 213, 606, 512, 433, 1222, 512, 437, 1147, 512, 440]


def test_the_slimming_network_in_the_references_order():
    "Selecting after batch norm keeps its full size: two numbers more for each channel not selected"
    for name in ("preresnet164", "densenet40"):
        a, late = zoo.arch(name), zoo.arch(name, select_after_norm=True)
        assert a.count() == late.count() # nothing is selected yet
        keep = {s.name: tuple(range(0, s.width, 2)) for s in a.sites() if s.kind == "in"}
        small, small_late = (Plan(parent=x.id, keep=keep).arch(x).count() for x in (a, late))
        gone = sum(s.width - len(keep[s.name]) for s in a.sites() if s.kind == "in")
        assert small_late.params - small.params == 2*gone and small_late.macs == small.macs and small_late.flops > small.flops


def _reference_vgg(widths):
    "VGG's cost worked out from its widths alone, in the reference's convention"
    side, channels, flops, macs = 32, 3, 0, 0
    for w in widths:
        if w == "M": side //= 2; flops += 4*channels*side**2; continue
        macs += 9*channels*w*side**2
        flops += 2*9*channels*w*side**2 + 3*w*side**2 # batch norm 2, ReLU 1
        channels = w
    return macs, flops


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_by_a_second_way(depth):
    from rethink_nb.arch.zoo import _STAGES
    widths = [w for w, n in zip((64, 128, 256, 512, 512), _STAGES[f"vgg{depth}"]) for w in [w]*n + ["M"]][:-1]
    macs, flops = _reference_vgg(widths)
    c = zoo.arch(f"vgg{depth}", head="linear").count()
    assert (c.macs, c.flops) == (macs + 5120, flops + 2*5120 + 10)


def test_ids_stay():
    "An id that changes orphans every stored run: raise a schema number knowingly instead"
    from rethink_nb.study import Study
    s = Study(data="digits", arch="vgg-digits")
    assert (zoo.arch("vgg16").id, recipe("cifar").id) == ("b6b04b537f5a", "7df89b8272d4")
    assert [s.id, s.parent_run(1).id, s.prune_run("l1", .5, 1).id, s.prune_run("l1", .5, 1).group] == ["1f62b6423e1f", "82518e907312", "50dacb4eab52", "2114dd327e3c"]
    r = Study(data="digits", arch="resnet8-digits")
    assert [r.id, r.prune_run("l1", .5, 1).id, r.prune_run("random-channels", .5, 1).id] == ["cd7e1c165584", "29b2513d92d2", "8afa8ec5fa6e"]
    assert [zoo.arch(n).id for n in ("resnet56-B", "preresnet164", "densenet40")] == ["34b26d0d8a39", "ddbe495209d4", "39e7392ec5c7"]


def test_records_of_older_versions_are_read(tmp_path):
    "Files written before records said their kind and schema"
    (tmp_path/"arch.json").write_text('{"family": "resnet", "stages": [1, 1, 1], "widths": [8, 16, 32, 4, 16, 32], "input": [1, 8, 8]}')
    (tmp_path/"plan.json").write_text('{"parent": "17da336d07d0", "keep": {"stage1.block1": [0, 2, 5, 7]}, "method": "l1", "options": {"ratio": [0.5, 0.0, 0.0], "seed": 0}}')
    parent = zoo.arch("resnet8-digits")
    assert Arch.read(tmp_path/"arch.json") == Plan.read(tmp_path/"plan.json").arch(parent)



@pytest.mark.parametrize("ours,theirs", [("vgg11-imagenet", "vgg11"), ("vgg11-bn-imagenet", "vgg11_bn"), ("vgg16-imagenet", "vgg16"), ("vgg16-bn-imagenet", "vgg16_bn")])
def test_torchvisions_vggs(ours, theirs):
    "Weights both ways by name; the same parameters and costs; the same logits, from random weights with random batch norms"
    import torchvision
    from rethink_nb.arch.torchvision import from_torchvision, to_torchvision
    a = zoo.arch(ours)
    with torch.device("meta"): other = getattr(torchvision.models, theirs)(weights=None)
    other = random_bn(other.to_empty(device="cpu")).eval() # its own start of 138 M parameters takes ten seconds
    for p in other.parameters(): p.dim() > 1 and torch.nn.init.uniform_(p, -(w := (6/p[0].numel())**.5), w)
    for m in other.features: isinstance(m, torch.nn.Conv2d) and torch.nn.init.uniform_(m.bias, -1, 1)
    for m in other.classifier: isinstance(m, torch.nn.Linear) and torch.nn.init.uniform_(m.bias, -1, 1)
    state = other.state_dict()
    net = from_torchvision(a, state).eval()
    back = to_torchvision(net)
    assert back.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in back.items())
    c = count(other, a.input)
    assert (c.params, c.macs, c.flops) == (a.count().params, a.count().macs, a.count().flops)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad(): assert (net(x) - other(x)).abs().max() <= 1e-5*other(x).abs().max()
    x = torch.randn(1, 3, 96, 70) # pooled up to 7x7
    with torch.no_grad(): assert (net(x) - other(x)).abs().max() <= 1e-5*other(x).abs().max()


# facts/surgery_and_flops.md section 5: torchvision's own ResNets and VGG (no module for pooling, no bias in downsampling convolutions)
@pytest.mark.parametrize("name,flops,macs", [("resnet34", 7_340_368_872, 3_663_761_408), ("resnet50", 8_212_012_520, 4_089_184_256), ("resnext50_32x4d", 8_504_563_688 - 7*7*2048, 4_230_479_872),
                                             ("vgg16", 30_973_762_536, 15_470_264_320), ("mobilenet_v2", 614_905_768, 300_774_272)])
def test_the_counter_on_other_peoples_networks(name, flops, macs):
    import torchvision
    with torch.device("meta"): net = getattr(torchvision.models, name)()
    c = count(net, (3, 224, 224))
    assert (c.flops, c.macs) == (flops, macs)
    with FlopCounterMode(display=False) as counter, torch.no_grad(): net.eval()(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == 2*macs


def _changed(a, random):
    "An architecture with something changed, often wrongly"
    site, kind = random.choice(a.sites()), random.randrange(5)
    if kind == 0: return a.replace(widths=tuple(random.choice([w, w, w, -1, 0, 1, 9]) for w in a.widths))
    if kind == 1:
        chosen = sorted({random.randint(-2, 9) for _ in range(random.randint(0, 6))})
        return a.replace(selections=tuple(sorted((*(s for s in a.selections if s.site != site.name), Selection(site=site.name, channels=tuple(chosen))), key=lambda s: s.site)))
    if kind == 2:
        at = random.choice([*site.outs, *site.norms, *site.ins, f"{site.block}.rest", f"{site.block}.scatter", "pool", ""])
        shape = random.choice([(site.width, 1, 1), (site.width, 4, 4), (4, 8, 8), (10,), (0, 1, 1), ()])
        return a.replace(constants=(*a.constants, Constant(at=at, shape=shape, over=random.choice(["", site.name]))))
    if kind == 3: return a.replace(switches=a.switches.replace(**random.choice([dict(head="hidden"), dict(head="x"), dict(conv_init="fan"), dict(shortcut="projection"), dict(select_after_norm=True), dict(bottleneck=True)])))
    return a.replace(**random.choice([dict(input=(1, 1, 1)), dict(input=(3, 4, 6)), dict(stages=(1,)), dict(stages=()), dict(classes=0), dict(classes=1)]))


@pytest.mark.parametrize("family", toy_archs())
def test_what_check_accepts_can_be_built_run_and_cut(family):
    random, built = Random(family), 0
    for seed in range(250):
        a = toy_archs()[family]
        try:
            for _ in range(random.randint(1, 2)): a = _changed(a, random)
            a.check()
        except UserError: continue
        net = random_net(a.build(seed)).double().eval()
        for c in a.constants: torch.nn.init.normal_(net.get_submodule(c.at).constant)
        net(torch.randn(1, *a.input, dtype=torch.float64))
        plan = random_plan(net, seed)
        try: assert verify(masked(net, plan), cut(net, plan), torch.randn(2, *a.input, dtype=torch.float64), tolerance=1e-9).ok, (a, plan)
        except UserError as e: assert "would have 0 channels" in str(e)
        built += 1
    assert built > 15
