"Studies of methods that find in trained weights what stays: channels, single weights, tickets; in rounds; killed and taken up."
import pandas as pd
import pytest
import torch
from test_study import NUMBERS, command, kill_after, numbers, stamps

from rethink_nb.study import Store, Study, Trial, execute

SMALL = dict(data="digits", arch="vgg-digits", ratios=[.5], seeds=1, epochs=2, subset=300)
STUDIES = {
    "slimming": dict(method="slimming", options=dict(strength=.001)),
    "slimming rounds": dict(method="slimming", options=dict(strength=.001), rounds=2),
    "l1 global": dict(method="l1", options=dict(scope="global", min_keep=1)),
    "l1 rounds": dict(method="l1", rounds=3),
    "magnitude": dict(method="magnitude", options=dict(scope="layer")),
    "magnitude rounds": dict(method="magnitude", options=dict(linear=True), rounds=2, ratios=[.6]),
    "lottery": dict(method="lottery"),
    "lottery rounds": dict(method="lottery", rounds=3, rewind=7),
    "lottery filters": dict(method="lottery", options=dict(level="filter"), rounds=2, rewind=15),
}


def carried_out(study, at):
    "In this process: workers take longer to start than such a study takes"
    trial = Trial(study, Store(at/"runs"))
    for r in trial.runs: execute(r, trial.store, "cpu")
    assert not trial.unfinished(), trial.frame()
    return trial, {c.arm: c.run for c in trial.cells}


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm(name, tmp_path):
    "All arms of a ratio have the same size and keep it; Scratch has other numbers in it and its budget"
    s = Study(**SMALL | STUDIES[name])
    trial, runs = carried_out(s, tmp_path)
    frame = trial.frame().set_index("arm").drop("parent")
    assert frame.params.nunique() == 1 and (frame.macs < s.base.count().macs).all()
    method = next(r for r in runs["scratch-b"].lineage() if r is runs["scratch-b"].shape)
    masks = trial.store.masks(method.id)
    assert (masks is not None) == (s.counts == {})
    for arm, run in runs.items():
        net, own = trial.store.network(run.id), trial.store.masks((run.start or run).id) if arm == "shuffled-mask" else masks
        if arm != "parent" and own: assert not any(net.get_parameter(n)[~m].any() for n, m in own.items())
    base, small = s.base.count(), trial.store.record(method.id)
    saved = min(base.macs/small["nonzero_macs"], 2) if masks else base.flops/small["flops"]
    assert frame.epochs["scratch-b"] == int(s.epochs*saved) > s.epochs
    first = next(n for n, p in trial.store.network(method.id).named_parameters() if p.dim() == 4)
    weights = {a: trial.store.network(r.id).get_parameter(first) for a, r in runs.items() if a != "parent"}
    assert len({tuple(w.flatten()[:9].tolist()) for w in weights.values()}) == len({r.id for a, r in runs.items() if a != "parent"})
    assert trial.kept_figures() == ["weights" if masks else "widths"] and len(trial.figure(*trial.kept_figures()).data) and s.way in trial.summary() and "no result" not in trial.summary()


LOOKING = { # methods that look at images while they prune, or train for one ratio
    "thinet": dict(method="thinet", options=dict(variant="forward", images=200)),
    "thinet rounds": dict(method="thinet", rounds=2),
    "regression": dict(method="regression", options=dict(images=200)),
    "regression inputs": dict(method="regression", arch="resnet8-digits", options=dict(inputs=True, images=200)),
    "cross": dict(method="layerwise", options=dict(select="random", images=200)),
    "soft-filter": dict(method="soft-filter"),
    "soft-filter on streams": dict(method="soft-filter", arch="resnet8-digits", options=dict(mode="reference")),
    "soft-filter on": dict(method="soft-filter", pretrained="digits"),
    "sss": dict(method="sss", arch="resnet8-digits", ratios=(), prices=(.1,), options=dict(gates=("blocks", "neurons")), epochs=6),
    "slimming on": dict(method="slimming", options=dict(strength=.001), pretrained="digits"),
}


@pytest.mark.parametrize("name", LOOKING)
def test_every_arm_of_a_method_that_looks_or_trains(name, tmp_path):
    "All arms have one size, each is trained from where it says, and the network that was pruned cost what its training did"
    s = Study(**SMALL | LOOKING[name])
    trial, runs = carried_out(s, tmp_path)
    frame, cost = trial.frame().set_index("arm"), trial.costs().reset_index().set_index("arm").zero_macs
    assert frame.params.drop("parent").nunique() == 1 and frame.params.parent > frame.params.pruned
    pruned, parent = runs["pruned"], runs["parent"]
    assert not parent.method and (pruned.start == parent) == (not s.trains_apart and s.rounds == 1)
    if not s.trains_apart: return
    trained = pruned.start
    assert (trained.method, trained.start) == (s.method, parent if s.pretrained else None)
    if s.method == "soft-filter":
        assert trained.request["ratio"] == s.ratios[0] and trial.store.plan(pruned.id).constants
        big, small = (trial.store.record(r.id)["metrics"] for r in (trained, pruned)) # masked as it was trained, it is the smaller network already
        assert big["test_acc"] == small["test_acc"] and abs(big["test_loss"] - small["test_loss"]) < 1e-4
    assert cost.pruned == (2 if s.pretrained else 1)*cost.parent


@pytest.mark.parametrize("more", [dict(method="soft-filter"), dict(method="slimming", options=dict(strength=.001)), dict(method="sss", ratios=(), prices=(.1,))], ids=lambda m: m["method"])
def test_all_arms_go_back_to_one_training_of_the_method(more):
    "By the recipe that was named for it; an early arm shortens that recipe, a rewound one goes back in it"
    s = Study(**SMALL | dict(arch="resnet8-digits", epochs=None) | more, pretrained="cifar", arms=["pruned", "fine-tune", "scratch-e", "scratch-b", "random-channels", "weight-rewind", "pipeline-e"])
    trained = {c.arm: {r.recipe for r in c.run.lineage() if r.method == s.method and r.kind == "train"} for c in s.cells()}
    own = s.recipe_after
    assert own.epochs == 160 and all(trained[a] <= {own} for a in ("pruned", "fine-tune", "scratch-e", "scratch-b", "random-channels"))
    assert trained["pruned"] == {own} and trained["weight-rewind"] == {own, own.replace(first=40)}
    assert {r.epochs for r in trained["pipeline-e"] - {own}} == {120}


def test_shuffled_masks_have_the_counts_that_rounds_left(tmp_path):
    trial, runs = carried_out(Study(**SMALL | STUDIES["magnitude rounds"], arms=["pruned", "shuffled-mask"]), tmp_path)
    own, control = trial.store.masks(runs["pruned"].id), trial.store.masks(runs["shuffled-mask"].start.id)
    assert [m.sum() for m in own.values()] == [control[n].sum() for n in own] and not all(torch.equal(m, control[n]) for n, m in own.items())
    assert sum(m.sum() for m in own.values()) == sum(m.numel() for m in own.values()) - int(.6*sum(m.numel() for m in own.values()))


@pytest.mark.parametrize("arch", ["resnet8-digits", "resnet20", "preresnet20", "densenet40"])
def test_random_channels_at_found_widths(arch, tmp_path):
    "Where blocks may go, and where a block selects from its stream"
    s = Study(data="digits", arch=arch, method="slimming", ratios=[.6], seeds=1, epochs=1, subset=200, width=1. if "digits" in arch else .25, options=dict(strength=.01), arms=["pruned", "random-channels", "scratch-e"])
    trial, runs = carried_out(s, tmp_path)
    archs = [trial.store.arch(r.id).scratch() for r in runs.values()]
    size = lambda a: ([x.width for x in a.sites()], a.count().params, a.count().macs)
    assert size(archs[0]) == size(archs[1]) == size(archs[2]) and size(archs[0])[2] < s.base.count().macs


def test_late_tickets_replay_the_parent(tmp_path):
    "The ticket's start is what the parent was after so many steps, less what is gone; the tickets of more rounds have less"
    trial, runs = carried_out(Study(**SMALL | STUDIES["lottery rounds"], arms=["parent", "ticket"]), tmp_path)
    prunings, early = [r for r in runs["ticket"].lineage() if r.kind == "prune"], None
    early = trial.store.network(prunings[0].init.id).state_dict()
    left = []
    for r in prunings:
        masks = trial.store.masks(r.id)
        for n, v in trial.store.network(r.id).state_dict().items(): assert torch.equal(v, early[n]*masks[n] if n in masks else early[n])
        left.append(sum(int(m.sum()) for m in masks.values()))
    total = sum(m.numel() for m in masks.values())
    assert left == [total - int(total*(1 - .5**(k/3)) + 1e-9) for k in (1, 2, 3)]
    assert [trial.store.record(r.id)["cost"]["steps"] for r in runs["ticket"].lineage() if r.kind == "train"] == [20, 7, 13, 13, 13] # parent, to step 7, two tickets between, ticket
    assert {what: n for what, n in trial.spent().runs.droplevel([0, 1]).items()} == {"parent": 1, "parent's first steps": 1, "pruning": 3, "between rounds": 2, "ticket": 1}


def test_ids_stay():
    "An id that changes orphans every stored run: raise a schema number, or the method's version, knowingly instead"
    ids = {n: {c.arm: c.run.id for c in Study(**SMALL | more).cells()}["scratch-b"] for n, more in STUDIES.items()}
    assert ids == IDS


IDS = {"slimming": "0208aadf8d6c", "slimming rounds": "392989d388a6", "l1 global": "45ab08ec76a6", "l1 rounds": "582ee73a0918", "magnitude": "4b8dfe4f222c", "magnitude rounds": "3a2ba523d514",
       "lottery": "50585569b4d2", "lottery rounds": "227cbd71219a", "lottery filters": "6afcf5152ab6"}


@pytest.mark.parametrize("more, arms, why", [(dict(method="slimming", options=dict(strength=.001), ratios=[.2, .97]), {"pruned", "fine-tune", "fine-tune-large", "scratch-e", "scratch-b", "random-channels"}, "empty"),
                                             (dict(method="magnitude", options=dict(linear=True, scope="global"), ratios=[.2, .95]), {"scratch-e", "scratch-b"}, "keeps no weight")])
def test_a_run_that_cannot_be_is_failed_and_the_rest_goes_on(more, arms, why, tmp_path, capsys):
    "Trained weights would leave a layer empty: what hangs on that is told once a run, and the rest is done"
    trial = Trial(Study(**SMALL | more), Store(tmp_path/"runs")).run(workers=2, device="cpu", progress=False)
    frame, said = trial.frame(), capsys.readouterr().err
    assert set(frame[frame.status == "failed"].arm) == arms and set(frame[frame.status == "failed"].ratio) == {more["ratios"][1]}
    assert why in said and said.count("which failed:") == 0 and f"{len(arms)} of 13 cells have no result" in trial.summary()
    trial.page(tmp_path/"page.html")


@pytest.mark.slow # test_study has it for a predefined method
@pytest.mark.parametrize("name", ["slimming", "lottery"])
def test_killed_and_called_again(name, tmp_path):
    "Once in the parent's training, once after some runs; nothing finished is trained again; the end is the unbroken one"
    more = dict(slimming=["--options", "strength=0.001"], lottery=["--rounds", "2", "--rewind", "40"])[name]
    args = ["run", name, "--ratio", "0.5", "--seeds", "1", "--epochs", "4", "--store", "runs", *more]
    store, table = Store(tmp_path/"a"/"runs"), lambda at: next(p for p in (tmp_path/at).glob(f"{name}-digits-vgg-digits-*.csv") if not p.stem.endswith(("-runs", "-verdicts"))) # with options there is an id in its name
    for at in ("a", "b"): (tmp_path/at).mkdir()
    kill_after(args, tmp_path/"a", lambda: any((store/".work").glob("*/checkpoint.safetensors")))
    kill_after(args, tmp_path/"a", lambda: len(store.ids()) >= 3)
    before = stamps(store)
    for at in ("a", "b"): assert (done := command(args, tmp_path/at)).returncode == 0, done.output
    assert {id: stamps(store)[id] for id in before} == before
    pd.testing.assert_frame_equal(numbers(table("a")), numbers(table("b")))
    assert set(NUMBERS) <= set(pd.read_csv(table("a")))
