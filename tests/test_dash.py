"Dashboards without a screen: what they show is what the store holds, whatever state the store is in."
import json, shutil

import pytest
from conftest import child

from rethink_nb import dash
from rethink_nb.core.errors import UserError
from rethink_nb.dash import State, app # noqa: F401 (app registers the views)
from rethink_nb.dash.example import example_store
from rethink_nb.dash.pages import lab_command
from rethink_nb.dash.views import VIEWS, shown
from rethink_nb.study import Store

EVERY = [(board, name) for board in VIEWS for name in VIEWS[board]]
TIMED = {("verdicts", "Under way")} # says something else each time


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Where no `runs` and no `demo/runs` lie, as `make demo` leaves in the checkout, so that a state without a store is the example's"
    monkeypatch.chdir(tmp_path)


def a_copy(to):
    "The example store, to be changed"
    shutil.copytree(example_store().path, to)
    return Store(to)


def texts(parts): return [p.to_json() if hasattr(p, "to_json") and hasattr(p, "layout") else str(p) for p in parts]


@pytest.mark.parametrize("board,name", EVERY)
def test_each_view_shows_something_of_the_example(board, name):
    parts = shown(board, name, State(network="vgg-digits"))
    assert parts and all(isinstance(p, str) or len(p.data if hasattr(p, "layout") else p) for p in parts)


@pytest.mark.parametrize("board,name", EVERY)
def test_the_python_of_a_view_makes_what_it_shows(board, name):
    "The code is run as a stranger would run it; a figure must be the very same"
    state, v = State(network="vgg-digits", ratios=[.5]), VIEWS[board][name]
    values = v.values(state)
    figures = [p for p in v.draw(state, **values) if hasattr(p, "layout")]
    *before, last = state.code(v.code(**values)).split("\n")
    space = {}
    exec("\n".join([*before, f"made = {last}"]), space)
    if figures and board != "verdicts": assert space["made"].to_json() == figures[0].to_json()
    elif (board, name) not in TIMED: assert space["made"] is not None


def test_arms_and_seeds_that_are_chosen_are_those_that_are_drawn():
    state = State(network="vgg-digits", methods=["l1"], ratios=[.3], arms=["fine-tune", "scratch-b"], seeds=[0, 2])
    fig, = shown("curves", "Final accuracy", state)
    dots = sorted(x for t in fig.data if t.marker.size == 8 for x in t.x)
    f = Store(state.store.path).frame()
    assert dots == sorted(state.trial().frame().test_acc) and set(dots) <= set(f.final_test_acc.dropna())
    assert len(dots) == 4 and {t.name for t in fig.data} == {"fine-tune", "scratch-b"}


@pytest.fixture(scope="module")
def hurt(tmp_path_factory):
    "A store in which things went wrong: a failed run, a diverged one, one that is gone, an unreadable record, a curve of NaN, a curve that is gone"
    store = a_copy(tmp_path_factory.mktemp("hurt")/"runs")
    trial = State(store, network="vgg-digits").trial()
    by = {(c.method, c.ratio, c.arm, c.seed): c.run.id for c in trial.cells}
    def status(id, **changes):
        path = store/id/"record.json"
        record = json.loads(path.read_text()) | changes
        for k in ("metrics", "cost"): record.pop(k, None) if changes["status"] == "failed" else None
        path.write_text(json.dumps(record))
    status(by["l1", .3, "fine-tune", 0], status="failed", error="RuntimeError: made up for the test")
    status(by["l1", .3, "scratch-e", 1], status="diverged", error="loss is nan after epoch 2")
    shutil.rmtree(store/by["l1", .5, "scratch-b", 2])
    curve = store/by["l1", .5, "fine-tune", 0]/"curve.csv"
    head, *rows = curve.read_text().splitlines()
    curve.write_text("\n".join([head, *(",".join([row.split(",")[0], *["nan"]*(row.count(","))]) for row in rows)]) + "\n")
    (store/by["l1", .5, "fine-tune", 1]/"curve.csv").unlink()
    return store


@pytest.mark.parametrize("board,name", EVERY)
@pytest.mark.parametrize("chosen", [{}, dict(seeds=[0]), dict(arms=["fine-tune"]), dict(arms=["scratch-e"], ratios=[.3], methods=["l1"], seeds=[1])], ids=["all", "one seed", "one arm", "a diverged run"])
def test_a_store_in_which_things_went_wrong_is_shown_or_refused_in_a_line(hurt, board, name, chosen):
    state = State(Store(hurt.path), network="vgg-digits", **chosen)
    try: assert shown(board, name, state)
    except UserError as e: assert "\n" not in str(e) and len(str(e)) > 20


def test_what_is_missing_is_named(hurt):
    lines = shown("verdicts", "What is missing", State(Store(hurt.path), network="vgg-digits", methods=["l1"]))
    assert lines[0].endswith("1 failed, 1 diverged, 1 missing") or all(w in lines[0] for w in ("1 failed", "1 diverged", "1 missing"))
    assert any("made up for the test" in str(x) for x in lines[1].error)
    assert lines[-1].startswith("rethink-nb run l1 ") and str(hurt.path) in lines[-1]


def test_a_damaged_record_is_named_and_the_rest_shown(tmp_path):
    store = a_copy(tmp_path/"runs")
    id = State(store, network="vgg-digits", methods=["l1"], arms=["scratch-b"]).trial().cells[0].run.id
    (store/id/"record.json").write_text("{ half")
    d = dash.curves(Store(store.path), network="vgg-digits")
    assert type(d.page.children[0]).__name__ == "Plot" and id not in d.page.plots[0].figure
    words, lost, *_ = shown("verdicts", "What is missing", State(store, network="vgg-digits"))
    assert "1 damaged" in words and lost.run.tolist() == [id] and "damaged" in lost.error[0]


def test_a_study_that_cannot_be_read_is_named_on_every_view(tmp_path):
    store = a_copy(tmp_path/"runs")
    study = sorted((store/"studies").glob("*.json"))[0]
    study.write_text("{ half")
    d = dash.verdicts(Store(store.path))
    assert study.name in d.page.children[0].value


def test_a_store_that_is_away_for_a_moment_is_shown_again(tmp_path):
    store = a_copy(tmp_path/"runs")
    d = dash.curves(Store(store.path), network="vgg-digits", methods=["l1"])
    shutil.move(store/"studies", tmp_path/"away")
    d.reload()
    assert "holds no study" in d.page.children[0].value
    shutil.move(tmp_path/"away", store/"studies")
    d.reload()
    assert type(d.page.children[0]).__name__ == "Plot" and d.state.chosen["methods"] == ("l1",)


def test_seeds_that_are_not_chosen_are_in_no_figure():
    for name in ("Widths", "Weights", "Places in kernels", "Found and uniform", "Sizes"):
        each = {str(texts(shown("architectures", name, State(network="vgg-digits", methods=["slimming", "magnitude"], seeds=s)))) for s in ([0], [1], [2], None)}
        assert len(each) >= (1 if name == "Weights" else 3), name # magnitude keeps as many in each layer, whatever the seed, or nearly


def test_a_store_that_was_only_begun_says_so(tmp_path):
    store = a_copy(tmp_path/"runs")
    for at in store.path.glob("*/record.json"): shutil.rmtree(at.parent)
    for board, name in EVERY:
        try: shown(board, name, State(Store(store.path), network="vgg-digits"))
        except UserError as e: assert "None" not in str(e), (board, name, e)


def test_a_view_that_breaks_leaves_the_others(monkeypatch):
    from dataclasses import replace
    broken = replace(VIEWS["curves"]["Final accuracy"], draw=lambda state, **values: 1/0)
    monkeypatch.setitem(VIEWS["curves"], "Final accuracy", broken)
    d = dash.curves(network="vgg-digits", view="Final accuracy")
    assert "ZeroDivisionError" in d.page.children[0].value
    d.go("Curves")
    assert type(d.page.children[0]).__name__ == "Plot"


def test_runs_that_come_while_one_looks_are_shown_when_read_anew(tmp_path):
    store = a_copy(tmp_path/"runs")
    id = State(store, network="vgg-digits", methods=["l1"], arms=["scratch-b"]).trial().cells[0].run.id
    shutil.move(store/id, tmp_path/"kept")
    d = dash.verdicts(Store(store.path), "What is missing", network="vgg-digits")
    assert "1 missing" in d.page.children[0].value
    shutil.move(tmp_path/"kept", store/id)
    d.reload()
    assert "have a result" in d.page.children[0].value


def test_a_state_needs_no_widgets():
    done = child("python", "-c", "import sys, rethink_nb.dash.state, rethink_nb.dash.answers, rethink_nb.dash.networks; print([m for m in ('ipywidgets', 'anywidget', 'itables') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.output


@pytest.mark.parametrize("words,answer", [
    (["curve"], "no dashboard 'curve': there are architectures, curves, verdicts"),
    (["curves", "--store", "nowhere"], "store nowhere: no such folder"),
    (["curves", "--port", "0"], "port 0: give a number from 1 to 65535"),
    (["curves", "--out", "here.txt"], "here.txt"),
])
def test_a_dashboard_that_cannot_be_opened_is_refused_in_a_line(tmp_path, words, answer):
    (tmp_path/"here.txt").write_text("")
    done = child("rethink-nb", "dash", *words, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and answer in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.output
    assert not (tmp_path/"dashboards").exists()


def test_without_voila_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path/"python"))
    with pytest.raises(UserError, match=r"voila is not installed: pip install 'rethink_nb\[dash\]'"): lab_command(tmp_path/"curves.ipynb", voila=True)
