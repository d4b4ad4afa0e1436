"Networks of torchvision and timm: cut as masked, saved and loaded elsewhere, drawn by their own builder, carried through a trial."
import json
import sys

import pytest
import torch

pytest.importorskip("torch_pruning", reason="needs the extra `pruning`")
pytest.importorskip("timm", reason="needs timm")

import timm  # noqa: E402
from torchvision import models  # noqa: E402

from conftest import child  # noqa: E402
import rethink_nb.arch.count  # noqa: E402,F401 (gives Arch its count)
from rethink_nb import methods  # noqa: E402
from rethink_nb.arch import zoo  # noqa: E402
from rethink_nb.arch.external import builders, register_builder, stays  # noqa: E402
from rethink_nb.cli import main  # noqa: E402
from rethink_nb.core.errors import UserError  # noqa: E402
from rethink_nb.surgery import cut, fresh, masked, verify  # noqa: E402
from rethink_nb.surgery.plan import Plan  # noqa: E402
from rethink_nb.surgery.saved import load, save  # noqa: E402
from rethink_nb.testing.families import random_plan  # noqa: E402
from rethink_nb.testing.toys import random_bn  # noqa: E402

# the four networks that every user asks for, from both libraries, and a few that have something of their own
NETWORKS = {
    "torchvision:mobilenet_v2,width_mult=0.35": lambda: models.mobilenet_v2(num_classes=10, width_mult=.35),
    "torchvision:efficientnet_b0": lambda: models.efficientnet_b0(num_classes=10),
    "torchvision:regnet_x_400mf": lambda: models.regnet_x_400mf(num_classes=10),
    "torchvision:convnext_tiny": lambda: models.convnext_tiny(num_classes=10),
    "timm:mobilenetv2_035": lambda: timm.create_model("mobilenetv2_035", num_classes=10),
    "timm:efficientnet_b0": lambda: timm.create_model("efficientnet_b0", num_classes=10),
    "timm:regnety_002": lambda: timm.create_model("regnety_002", num_classes=10),
    "timm:convnext_atto": lambda: timm.create_model("convnext_atto", num_classes=10),
    "torchvision:squeezenet1_1": lambda: models.squeezenet1_1(num_classes=10),
    "torchvision:mobilenet_v3_small": lambda: models.mobilenet_v3_small(num_classes=10),
}


def scrambled(net, seed=0):
    "Everything that a fresh network hides: batch norms that do nothing, biases of zero, factors of a millionth"
    with torch.no_grad():
        for k, p in net.named_parameters():
            if p.dim() == 1 or "layer_scale" in k or k.endswith("gamma"): p.copy_(torch.rand(p.shape, generator=torch.Generator().manual_seed(seed + p.numel())) + .5)
    return random_bn(net, seed).double().eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_is_masked_and_saved(name, tmp_path):
    a = zoo.arch(name, classes=10, input=(3, 32, 32))
    theirs = NETWORKS[name]()
    assert sum(p.numel() for p in theirs.parameters()) == a.count().params
    net = a.build(seed=1)
    net.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert torch.equal(net.eval()(x), theirs.eval()(x))

    net = scrambled(net)
    keep = {s.name: tuple(range(k % 2, s.width, 2)) for k, s in enumerate(a.sites()) if s.width > 1}
    for plan in (Plan(parent=a.id, keep=keep), random_plan(net, seed=3)):
        small = cut(net, plan)
        verdict = verify(masked(net, plan), small, x.double(), tolerance=1e-9)
        assert verdict.ok and verdict.scale > 0, f"{verdict}"
    back = load(save(tmp_path/"small", small))
    with torch.no_grad(): assert torch.equal(back.eval()(x.double()), small(x.double()))


class Scale(torch.nn.Module):
    "A factor for each channel that no layer owns"
    def __init__(self): super().__init__(); self.scale = torch.nn.Parameter(torch.ones(4, 1, 1))
    def forward(self, x): return x*self.scale


register_builder("scaled", lambda name, classes, input: torch.nn.Sequential(
    torch.nn.Conv2d(3, 4, 3), Scale(), torch.nn.Conv2d(4, 6, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, classes)))


@pytest.mark.parametrize("name, why", [
    ("timm:convnext_atto", "LayerNorm"), ("torchvision:densenet121", "put together with others"), ("torchvision:shufflenet_v2_x0_5", "cannot trace this ShuffleNetV2"), ("timm:test_vit2", "put together with others"), ("scaled:it", "1.scale lies along them and belongs to no layer")])
def test_what_stays_is_said(name, why):
    try: told = stays(zoo.arch(name, classes=10, input=(3, 64, 64)))
    except UserError as e: told = {"": str(e)} # nothing is left
    assert any(why in w for w in told.values()), told


def test_scratch_is_drawn_by_the_builder():
    "He's rule over the outputs, for the channels that are left: 4 times fewer give twice the sd"
    a = zoo.arch("torchvision:mobilenet_v2", classes=10, input=(3, 32, 32))
    name = "features.17.conv.0.0"
    assert a.site(name).width == 960
    small = a.with_widths({name: 240})
    sd = lambda arch, m: fresh(arch, seed=2).get_submodule(m).weight.std().item()
    assert sd(small, name) == pytest.approx(2*sd(a, name), rel=.03)
    assert sd(small, "features.16.conv.0.0") == pytest.approx(sd(a, "features.16.conv.0.0"), rel=.03)
    assert fresh(small, seed=2).get_submodule(name).weight.equal(fresh(small, seed=2).get_submodule(name).weight)
    assert not fresh(small, seed=2).get_submodule(name).weight.equal(fresh(small, seed=3).get_submodule(name).weight)


def test_building_leaves_torch_as_it_was():
    inits = [c.__init__ for c in (torch.nn.Conv2d, torch.nn.Linear)]
    state = torch.get_rng_state()
    register_builder("broken", lambda name, classes, input: torch.nn.Linear(3, 4).no_such_thing)
    with pytest.raises(UserError, match="broken:it cannot be built for 10 classes"): zoo.arch("broken:it", classes=10)
    zoo.arch("timm:test_efficientnet", classes=7, input=(3, 40, 40))
    builders.items.pop("broken")
    assert inits == [c.__init__ for c in (torch.nn.Conv2d, torch.nn.Linear)] and state.equal(torch.get_rng_state())


@pytest.mark.parametrize("missing, name", [("torch_pruning", "timm:test_efficientnet"), ("timm", "timm:test_efficientnet")])
def test_what_is_not_installed_is_named(missing, name, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match="pip install"): zoo.arch(name, classes=3, input=(3, 48, 48))


@pytest.mark.parametrize("change, said", [
    (dict(builder=dict(name="os:system")), "unknown builder of networks 'os'"),
    (dict(builder=dict(name="timm:hf_hub:who/what")), "unknown network of timm"),
    (dict(builder=dict(name="timm:test_efficientnet", arguments=[["pretrained", True]])), "random weights"),
    (dict(builder=dict(name="timm:test_efficientnet", arguments=[["out_indices", [1, 2]]])), "arguments"),
    (dict(builder=None), "named by its builder"),
    (dict(widths=[4]), "widths are given"),
    (dict(family="vgg"), "a builder makes external networks"),
])
def test_a_file_cannot_call_what_it_likes(change, said, tmp_path):
    a = zoo.arch("timm:test_efficientnet", classes=10, input=(3, 32, 32))
    save(tmp_path/"net", a.build())
    told = json.loads((tmp_path/"net/arch.json").read_text())
    (tmp_path/"net/arch.json").write_text(json.dumps(told | {k: v for k, v in change.items()}))
    with pytest.raises(UserError, match=said): load(tmp_path/"net")


def test_commands(tmp_path, monkeypatch, capsys):
    "Pruned, counted and exported by name; each reads what the one before wrote"
    monkeypatch.chdir(tmp_path)
    assert main(["prune", "l1", "timm:test_efficientnet", "small", "--ratio", ".5"]) == 0
    assert main(["count", "small", "--sites"]) == 0
    assert "what stays" in capsys.readouterr().out
    assert main(["export", "small", "--out", "net.onnx", "--untimed"]) == 0
    assert "equal" in capsys.readouterr().out
    assert main(["count", "timm:test_efficientnett"]) == 2
    assert "did you mean test_efficientnet" in capsys.readouterr().err
    assert main(["count", "timm:test_efficientnet,width"]) == 2
    assert "write name=value" in capsys.readouterr().err


PLUGIN = '''
from torch import nn
from rethink_nb.arch.external import register_builder

class Net(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.a, self.bn, self.b, self.fc = nn.Conv2d(channels, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.Conv2d(12, 16, 3, 2, 1), nn.Linear(16, classes)
    def forward(self, x): return self.fc(self.b(self.bn(self.a(x)).relu()).relu().mean((2, 3)))

register_builder("mine", lambda name, classes, input: Net(classes, input[0]))
'''


def test_a_trial_of_ones_own_network(tmp_path):
    "A builder in a plugin, known to the processes that train: parent, pruned, fine-tuned, from scratch"
    (tmp_path/"mine.py").write_text(PLUGIN)
    done = child("rethink-nb", "run", "l1", "--arch", "mine:net", "--ratio", ".5", "--seeds", "1", "--epochs", "1", "--plugin", "mine.py", cwd=tmp_path)
    assert done.returncode == 0, done.output
    assert "mine:net" in done.stdout and "scratch-e" in done.stdout and "largest error" in done.stdout
    assert (tmp_path/"l1-digits-mine-net.html").is_file()


class Base(torch.nn.Module):
    "Two convolutions and a classifier; what stands between them is each child's own"
    def __init__(self, classes):
        super().__init__()
        self.a, self.b, self.fc = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 6, 3, padding=1), torch.nn.Linear(6, classes)
    def between(self, x): return x.relu()
    def forward(self, x): return self.fc(self.b(self.between(self.a(x))).relu().mean((2, 3)))


def child_of(between, extra=lambda self: None):
    class Child(Base):
        def __init__(self, classes): super().__init__(classes); extra(self)
    Child.between = between
    return Child


def square(self): self.c = torch.nn.Conv2d(8, 8, 3, padding=1)
def tied(self): square(self); self.d = torch.nn.Conv2d(8, 8, 3, padding=1); self.d.weight = self.c.weight
def alias(self): square(self); self.d = self.c
def shifted(self): self.register_buffer("shift", torch.arange(8.).view(8, 1, 1))
def normed(self): self.a = torch.nn.utils.parametrizations.weight_norm(self.a)


ODD = { # what stands between, what is there beside, and which layers can go, or what is said
    "mean over channels": (lambda self, x: x.relu()/(1 + x.relu().mean(1, keepdim=True)), None, {"b"}),
    "softmax over channels": (lambda self, x: x.softmax(1), None, {"b"}),
    "channels counted": (lambda self, x: x.relu()/self.a.out_channels, None, {"b"}),
    "a buffer along channels": (lambda self, x: (x + self.shift).relu(), shifted, {"b"}),
    "numbers along channels": (lambda self, x: (x*torch.arange(x.shape[1]).view(-1, 1, 1)).relu(), None, {"b"}),
    "without a gradient": (lambda self, x: x.detach().relu(), None, {"b"}),
    "another way in training": (lambda self, x: (x + self.c(x) if self.training else x).relu(), square, {"b"}),
    "called twice": (lambda self, x: self.c(self.c(x.relu()).relu()).relu(), square, {"a", "b"}),
    "a gate of its own input": (lambda self, x: x*torch.tanh(self.c(x)), square, {"a", "b"}),
    "tied": (lambda self, x: self.d(self.c(x)), tied, "c.weight and d.weight are one and the same"),
    "two names": (lambda self, x: self.d(self.c(x)), alias, "c.weight and d.weight are one and the same"),
    "weight norm": (lambda self, x: x.relu(), normed, "a has hooks or a parametrisation"),
    "several outputs in training": (lambda self, x: x.no_such_thing() if self.training else x.relu(), None, "fails while it is trained"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_a_pass_does_not_tell(name):
    "What is pruned is equal, trains, and keeps its own initialisation; what cannot be stays, or is refused in a line"
    between, extra, can = ODD[name]
    register_builder("odd", lambda _, classes, input: child_of(between, extra or (lambda self: None))(classes)) # of a class that is new each time
    try:
        if isinstance(can, str):
            with pytest.raises(UserError, match=can): zoo.arch("odd:it", classes=5, input=(3, 8, 8))
            return
        a = zoo.arch("odd:it", classes=5, input=(3, 8, 8))
        assert {s.name for s in a.sites()} == can and "fc" in stays(a)
        net = scrambled(a.build(seed=1))
        small = cut(net, Plan(parent=a.id, keep={s.name: (1, 2, 4) for s in a.sites()}))
        assert verify(masked(net, Plan(parent=a.id, keep={s.name: (1, 2, 4) for s in a.sites()})), small, tolerance=1e-9).ok
        fresh(small.arch, seed=2).train()(torch.randn(2, 3, 8, 8)).sum().backward()
        assert a.count().params == sum(p.numel() for p in a.build().parameters())
    finally: builders.items.pop("odd")


def test_stages_have_no_gaps():
    "DenseNet's first convolution stands in a stage of which nothing can go: a ratio reaches what can"
    a = zoo.arch("torchvision:densenet121", classes=10, input=(3, 32, 32))
    assert sorted({s.stage for s in a.sites()}) == list(range(1, len(a.stages) + 1)) and sum(a.stages) == len(a.sites())
    assert a.with_widths({a.sites()[0].name: 64}).count().params < a.count().params
    with pytest.raises(UserError, match="add to streams, which widths= prunes"): methods.prune("l1", zoo.arch("timm:repvgg_a0", classes=10, input=(3, 32, 32)).build(), .5)
