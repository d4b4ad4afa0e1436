"Arms of equal epochs and equal compute, schedules for every arm, a parent that is brought along, costs that add up."
from math import floor

import pytest

from rethink_nb.core.errors import UserError
from rethink_nb.core.files import write_bytes
from rethink_nb.study import Store, Study, execute
from rethink_nb.study.run import recipe_of
from rethink_nb.surgery import save
from rethink_nb.surgery.saved import weights_of
from rethink_nb.training import SCHEDULES, arms, recipe
from rethink_nb.training.arms import arm

DIGITS = dict(data="digits", arch="vgg-digits", ratios=[.5], seeds=1)
TOTALS = ("parent", "fine-tune-large", "scratch-e", "scratch-b", "scratch-e-total", "scratch-b-total", "pipeline-e", "pipeline-b")


def epochs_of(r): return next((n for n in (r.first, r.last) if n is not None), r.epochs)


def whole(run, store=None):
    "Epochs, and compute in units of the reference's FLOPs, from nothing to the final network"
    line = [run]
    while line[0].start: line.insert(0, line[0].start)
    trained = [(r, recipe_of(r, store) if store else r.recipe) for r in line if r.kind == "train"]
    flops = lambda r: (store.record(r.id)["flops"] if store else r.arch.count().flops)
    return sum(epochs_of(x) for _, x in trained), sum(epochs_of(x)*flops(r) for r, x in trained)


def test_total_epochs_and_total_compute_are_equal_both_ways():
    s = Study(**DIGITS, epochs=16, arms=TOTALS)
    runs = {c.arm: c.run for c in s.cells()}
    (epochs, compute), small = ({a: x for a, x in zip(runs, parts)} for parts in zip(*map(whole, runs.values()))), runs["scratch-e"].arch.count().flops
    assert epochs["pipeline-e"] == epochs["scratch-e"] == 16 and epochs["scratch-e-total"] == epochs["fine-tune-large"] == 20
    for a, b in (("pipeline-b", "scratch-b"), ("scratch-b-total", "fine-tune-large"), ("scratch-b", "parent")): assert abs(compute[a] - compute[b]) < small, (a, b)
    assert runs["pipeline-e"].start.start.recipe.epochs == runs["pipeline-b"].start.start.recipe.epochs == 12


@pytest.mark.parametrize("method,options", [("slimming", dict(strength=.01)), ("magnitude", {})])
def test_they_are_equal_too_where_the_widths_are_found(method, options, tmp_path):
    s, store = Study(**DIGITS, method=method, options=options, epochs=8, arms=TOTALS), Store(tmp_path/"runs")
    runs = {c.arm: c.run for c in s.cells()}
    for r in runs.values(): assert execute(r, store, device="cpu")["status"] == "done"
    found = {a: store.record(r.id)["epochs"] for a, r in runs.items()}
    record = store.record(runs["fine-tune-large"].start.id)
    saved = s.base.count().flops/record["flops"] if method == "slimming" else min(2, s.base.count().macs/record["nonzero_macs"])
    assert found["scratch-b"] == floor(8*saved) and found["scratch-b-total"] == floor(8*saved) + 2 and found["scratch-e-total"] == 10
    early = store.record(runs["pipeline-b"].start.id) # the shorter parent finds widths of its own
    saved = s.base.count().flops/early["flops"] if method == "slimming" else min(2, s.base.count().macs/early["nonzero_macs"])
    assert found["pipeline-b"] == floor(2*saved) and found["pipeline-e"] == 2


def test_every_arm_takes_every_schedule_or_says_why_not():
    r = recipe("cifar")
    for name, plain in arms.items.items():
        for schedule in SCHEDULES:
            asked = f"{name}@{schedule}:24"
            if name in ("parent", "pruned", "ticket", "random-ticket"):
                with pytest.raises(UserError, match="takes no schedule"): arm(asked)
            elif schedule == "lr-rewind" and (plain.start == "fresh" or plain.stretched) or plain.rewound:
                with pytest.raises(UserError, match="trained weights|cannot be stretched|the parent's own schedule"): arm(asked)
            else:
                x = arm(asked).recipe(r, 2.)
                at = 24 if plain.trained == "short" else 160 if plain.total else 24
                assert epochs_of(x) == (48 if plain.stretched and plain.trained == "short" else 2*at if plain.stretched else at) + (24 if plain.total else 0)
                if schedule in ("cosine", "one-cycle"): assert x.schedule == schedule and x.lr == r.lr
                if schedule == "paper": assert (x.schedule, x.lr) == ("constant", .001)


def test_schedules_of_all_kinds_are_carried_out(tmp_path):
    names = ["parent", "fine-tune@one-cycle:2", "scratch-e@one-cycle", "scratch-b@cosine:1", "random-channels@lr-rewind:1", "fine-tune@lr-rewind:3", "weight-rewind:2", "lr-rewind:2"]
    s, store = Study(**DIGITS, epochs=3, arms=names), Store(tmp_path/"runs")
    for c in s.cells(): assert execute(c.run, store, device="cpu")["status"] == "done", c.arm
    f = s.frame(store).set_index("arm")
    assert f.epochs.to_dict() | {"scratch-b@cosine:1": 0} == {"parent": 3, "fine-tune@one-cycle:2": 2, "scratch-e@one-cycle": 3, "scratch-b@cosine:1": 0, "random-channels@lr-rewind:1": 1,
                                                             "fine-tune@lr-rewind:3": 3, "weight-rewind:2": 2, "lr-rewind:2": 2}
    curve = store.curve(next(c.run.id for c in s.cells() if c.arm == "lr-rewind:2"))
    assert curve.epoch.tolist() == [2, 3] and curve.lr.tolist() == [s.recipe.lr_at(2), s.recipe.lr_at(3)]
    assert any("scratch-e@one-cycle vs fine-tune@one-cycle:2" in line for line in s.trial(store).statements())


@pytest.mark.parametrize("method,rounds", [("l1", 2), ("magnitude", 1), ("magnitude", 2), ("slimming", 2)])
def test_weight_rewinding_cuts_the_early_weights_as_the_trained_ones_were(method, rounds, tmp_path):
    "In rounds too: the network has the masks, or the kept channels, of the last round"
    from rethink_nb.study.run import subject_of
    s, store = Study(**DIGITS, method=method, rounds=rounds, epochs=2, arms=["weight-rewind"]), Store(tmp_path/"runs")
    run = s.cells()[0].run
    assert execute(run, store, device="cpu")["status"] == "done"
    net, arch, masks = subject_of(run, store)
    early, late = store.network(run.init.id), store.network(run.start.id)
    assert net.arch == late.arch and (masks is None) == (method != "magnitude")
    for (name, w), v in zip(net.named_parameters(), late.parameters()):
        assert w.shape == v.shape
        if masks and name in masks: assert (w[~masks[name]] == 0).all() and (w == dict(early.named_parameters())[name]*masks[name]).all()
    if method != "magnitude": # every kept filter is one of the early network's
        inside = early.features.conv1.weight.flatten(1).sum(1).tolist()
        if rounds == 1: assert all(any(abs(a - b) < 1e-6 for b in inside) for a in net.features.conv1.weight.flatten(1).sum(1).tolist())


@pytest.mark.parametrize("more", [{}, dict(arms=["parent", "fine-tune@one-cycle:3", "scratch-b"], training=dict(batch=16, lr=.02, milestones=(.3, .6)), recipe_name="cifar"),
                                  dict(method="slimming", options=dict(strength=.001, skip=("conv1",)), rounds=2, reference=True, precision="bf16"), dict(subset=500, margin=1., alpha=.1, cap=1.5, width=.5, epochs=7)])
def test_the_command_of_a_study_makes_it_again(more, monkeypatch, tmp_path):
    import shlex

    from rethink_nb import cli
    s, seen = Study(**{**DIGITS, **more}), []
    monkeypatch.setattr(cli, "_trial", lambda studies, *rest: seen.extend(studies))
    words = shlex.split(s.trial(Store(tmp_path/"runs")).commands()[0])
    assert words[0] == "rethink-nb" and cli.main(words[1:]) == 0 and seen == [s] and seen[0].id == s.id


# A parent that is brought along ---------------------------------------------------------------------------------------------------

def test_a_given_parent_gives_what_the_trained_one_gives(tmp_path):
    "Two files of the same weights are one parent; what is made from it has the same bits as from the run that trained it"
    own, store = Study(**DIGITS, epochs=2, arms=["parent", "fine-tune", "scratch-e"]), Store(tmp_path/"runs")
    own.run(store, workers=1, device="cpu", progress=False)
    net = store.network(own.parent_run(0).id)
    save(tmp_path/"net", net)
    write_bytes(tmp_path/"net.safetensors", weights_of(net))
    a, b = (own.replace(parent=str(tmp_path/p)) for p in ("net", "net.safetensors"))
    assert a.parent_sha256 == b.parent_sha256 and a.parent_run(0).id == b.parent_run(5).id != own.parent_run(0).id
    a.run(store, workers=1, device="cpu", progress=False)
    f, g = (s.frame(store).set_index("arm") for s in (own, a))
    assert f.test_acc.to_dict() == g.test_acc.to_dict() and f.run["scratch-e"] == g.run["scratch-e"] and f.run["fine-tune"] != g.run["fine-tune"]
    assert g.agreement["parent"] == 100 and g.total_macs["fine-tune"] == g.train_macs["fine-tune"]
    assert "given parent" in a.network
    from rethink_nb.study import stored_trials
    (tmp_path/"net.safetensors").unlink()
    assert any(t.studies[0].parent for t in stored_trials(store)) or any(s.parent for t in stored_trials(store) for s in t.studies) # the store tells it without the file


def test_a_given_parent_that_cannot_serve_is_refused(tmp_path):
    s = Study(**DIGITS)
    save(tmp_path/"net", s.base.build(seed=1))
    for more, why in ((dict(arms=["pipeline-e"]), "arm pipeline-e trains the parent in another way"), (dict(arms=["weight-rewind"]), "but the parent is given"), (dict(width=.5), "another network than the study's"),
                      (dict(method="lottery", arms=["ticket"]), "goes back to the weights before training")):
        with pytest.raises(UserError, match=why): s.replace(parent=str(tmp_path/"net"), **more)
    g, store = s.replace(parent=str(tmp_path/"net")), Store(tmp_path/"runs")
    save(tmp_path/"net", s.base.build(seed=2))
    with pytest.raises(UserError, match="its weights are others than when the study was made"): g.run(store, device="cpu", progress=False)
    with pytest.raises(UserError, match="run the study with parent= again"): execute(g.parent_run(0), store, device="cpu")


# Costs ----------------------------------------------------------------------------------------------------------------------------

def test_costs_add_up(tmp_path):
    s, store = Study(data="digits", arch="vgg-digits", method="magnitude", ratios=[.5, .8], seeds=2, epochs=2), Store(tmp_path/"runs")
    s.run(store, workers=2, device="cpu", progress=False)
    costs, spent, f = s.costs(store), s.spent(store), s.frame(store)
    assert abs(costs.shared_macs.sum()*s.seeds/spent.macs.sum() - 1) < 1e-9 # nothing is counted twice, nothing is left out
    assert abs(costs.shared_seconds.sum()*s.seeds/spent.seconds.sum() - 1) < 1e-9
    one = costs.droplevel([0, 1, 2]).loc[.8]
    assert one.nonzero_macs["fine-tune"] < .5*one.macs["fine-tune"] and one.zero_macs["fine-tune"] > one.macs["fine-tune"]
    assert (costs.forward_macs*3 - costs.macs).abs().max() < 3
    assert f.set_index("arm").total_macs["scratch-e"].min() > f.set_index("arm").train_macs["scratch-e"].max() # its masks came from a trained parent
