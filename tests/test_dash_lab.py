"The dashboards in real JupyterLab, in a headless browser: every control, against the store; a click; a page that is loaded anew; nothing that leaves the machine."
import json, os, shutil, signal, socket, subprocess, sys
from pathlib import Path

import pytest
from conftest import ROOT

from rethink_nb.dash import State, app # noqa: F401 (app registers the views)
from rethink_nb.dash.example import example_store
from rethink_nb.dash.views import VIEWS, shown
from rethink_nb.testing.lab import browser, free_port, install_chromium, lab, open_notebook, plots, ready, run_all, wait_for

pytestmark = pytest.mark.slow
BOARDS = ("architectures", "curves", "verdicts")


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    "A folder with a copy of the example, the dashboards on it, and a JupyterLab over it"
    if not install_chromium(): pytest.skip("no Chromium, and none could be installed")
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(example_store().path, folder/"runs")
    for board in BOARDS:
        nb = json.loads((ROOT/"nbs"/"dashboards"/f"{board}.ipynb").read_text())
        next(c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", []))["source"] = [f"store = {str(folder/'runs')!r}"]
        (folder/f"{board}.ipynb").write_text(json.dumps(nb))
    with lab(folder) as address: yield folder, address


@pytest.fixture
def page(at):
    with browser() as (page, outside):
        yield page
        assert not outside, f"left the machine: {outside}"


def opened(page, at, board):
    "The dashboard, and a state that shall be what it shows"
    open_notebook(page, at[1], f"{board}.ipynb")
    run_all(page)
    page.wait_for_selector(".rethink-dash", timeout=90_000)
    wait_for(lambda: plots(page), "no figure came", 60)
    return State(at[0]/"runs")


def numbers(traces): return sorted((t["name"], str([None if v != v else round(float(v), 6) if isinstance(v, (int, float)) else v for v in t["y"]])) for t in traces)


def agrees(page, board, view, state, **values):
    "Wait until the page shows the figures that the state gives"
    wanted = [p for p in shown(board, view, state, **values) if hasattr(p, "layout")]
    expected = [(f.layout.title.text, numbers([dict(name=t.name or "", y=_plain(t.y)) for t in f.data])) for f in wanted]
    now = lambda: [(p["title"], numbers(p["traces"])) for p in plots(page)]
    try: wait_for(lambda: now() == expected, f"{board}, {view}: the page shows something else")
    except AssertionError as e: raise AssertionError(f"{e}: {[(t, len(n)) for t, n in now()]}, not {[(t, len(n)) for t, n in expected]}") from None


def _plain(y): return [] if y is None else [v.item() if hasattr(v, "item") else v for v in y]


def press(page, words): page.locator(".rethink-dash").get_by_role("button", name=words, exact=True).first.click()
def choose(page, name, value): page.locator(f".rethink-{name} select").select_option(value)


@pytest.mark.parametrize("board", BOARDS)
def test_every_view_and_choice_shows_what_the_store_holds(page, at, board):
    state = opened(page, at, board)
    first = next(iter(VIEWS[board]))
    agrees(page, board, first, state)
    for method in state.options("methods")[1:]: press(page, method) # off
    state.choose(methods=state.options("methods")[:1])
    agrees(page, board, first, state)
    press(page, "30%")
    state.choose(ratios=[.5])
    agrees(page, board, first, state)
    press(page, "2") # a seed
    state.choose(seeds=[0, 1])
    agrees(page, board, first, state)
    if board != "architectures": # which asks for no arms
        press(page, "fine-tune-large")
        state.choose(arms=[a for a in state.options("arms") if a != "fine-tune-large"])
        agrees(page, board, first, state)
    choose(page, "network", next(n for n in state.options("network") if n != state.chosen["network"]))
    state.choose(network=next(n for n in state.options("network") if n != state.chosen["network"]))
    agrees(page, board, first, state)
    choose(page, "network", "vgg-digits")
    state.choose(network="vgg-digits")
    for name, v in VIEWS[board].items():
        if name in ("Found and uniform", "Places in kernels", "Two networks"): continue # not of L1 at one ratio
        press(page, name)
        page.wait_for_function("words => document.querySelector('.rethink-what')?.textContent === words", arg=v.what, timeout=30_000)
        if any(hasattr(p, "layout") for p in shown(board, name, state)): agrees(page, board, name, state)


def test_controls_of_the_curves(page, at):
    state = opened(page, at, "curves")
    choose(page, "control-x", "seconds")
    agrees(page, "curves", "Curves", state, x="seconds")
    choose(page, "control-y", "validation and training loss")
    agrees(page, "curves", "Curves", state, x="seconds", y=("val_loss", "train_loss"))
    page.locator(".rethink-control-each input").check()
    agrees(page, "curves", "Curves", state, x="seconds", y=("val_loss", "train_loss"), each=True)


def test_the_margin_moves_by_keys_and_verdicts_follow(page, at):
    state = opened(page, at, "verdicts")
    press(page, "Verdicts")
    agrees(page, "verdicts", "Verdicts", state)
    handle = page.locator(".rethink-control-margin .noUi-handle")
    handle.focus()
    for _ in range(10): page.keyboard.press("ArrowRight")
    wait_for(lambda: "chosen after looking" in page.locator(".rethink-dash").inner_text(), "no word on a margin chosen afterwards")
    said = page.locator(".rethink-line").first.inner_text()
    margin = float(said.split("within ")[1].split(" points")[0])
    assert margin > 2 and said == shown("verdicts", "Verdicts", state, margin=margin)[0]


def test_a_zoom_stays_while_choices_change(page, at):
    opened(page, at, "curves")
    page.evaluate("document.querySelector('.js-plotly-plot')._fullLayout && (e => { e.layout.xaxis.range = [1, 4]; e.layout.xaxis.autorange = false; e.emit('plotly_relayout', {}); return null })(document.querySelector('.js-plotly-plot'))")
    box = page.locator(".js-plotly-plot .nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + 10, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"]/2, box["y"] + 90, steps=5)
    page.mouse.up()
    page.wait_for_timeout(600)
    zoomed = plots(page)[0]["range"]
    press(page, "random-channels")
    wait_for(lambda: "random-channels" not in [t["name"] for t in plots(page)[0]["traces"]], "the arm is still there")
    assert plots(page)[0]["range"] == zoomed
    choose(page, "control-x", "seconds") # another axis: the zoom is void
    wait_for(lambda: plots(page)[0]["range"] != zoomed, "a zoom over epochs was kept for seconds")


def click_on(page, selector, at=0):
    "Click a plotly point or bar"
    box = page.locator(selector).nth(at).bounding_box()
    page.mouse.move(box["x"] + box["width"]/2, box["y"] + box["height"]/2)
    page.wait_for_timeout(400)
    page.mouse.click(box["x"] + box["width"]/2, box["y"] + box["height"]/2)


def test_a_click_on_a_layer_shows_its_channels(page, at):
    state = opened(page, at, "architectures")
    press(page, "Cost of each layer")
    agrees(page, "architectures", "Cost of each layer", state)
    click_on(page, ".js-plotly-plot .bars .point path", 1)
    agrees(page, "architectures", "Channels over seeds", state, site="conv2")
    assert page.locator(".rethink-control-site select").input_value() == "conv2"


def test_a_click_on_a_run_shows_its_record(page, at):
    state = opened(page, at, "curves")
    for method in state.options("methods")[1:]: press(page, method)
    state.choose(methods=state.options("methods")[:1])
    press(page, "Final accuracy")
    agrees(page, "curves", "Final accuracy", state)
    fig, = shown("curves", "Final accuracy", state)
    page.wait_for_timeout(500)
    n = len([t for t in fig.data if t.marker.size == 11 and t.visible != "legendonly" and len(t.x)])
    click_on(page, ".js-plotly-plot .scatterlayer .trace path.point", n) # first dot after the means
    wait_for(lambda: page.locator(".rethink-control-run select").count(), "no record came")
    run = page.locator(".rethink-control-run select").input_value()
    assert any(run in f"{label}" for label, _ in [(c.run.id, 0) for c in state.trial().cells]) or "(" in run
    assert str(at[0]/"runs") in page.locator(".rethink-dash").inner_text()


@pytest.mark.parametrize("board", BOARDS)
def test_a_page_that_is_loaded_anew_shows_the_last_choice(page, at, board):
    "plotly's own FigureWidget shows the first figure then"
    state = opened(page, at, board)
    other = next(n for n in state.options("network") if n != state.chosen["network"])
    choose(page, "network", other)
    state.choose(network=other)
    first = next(iter(VIEWS[board]))
    agrees(page, board, first, state)
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_timeout(1500)
    page.reload()
    ready(page)
    wait_for(lambda: plots(page), "no figure after the reload", 60)
    agrees(page, board, first, state)
    assert page.locator(".rethink-network select").input_value() == other
    press(page, "30%") # and it still answers
    state.choose(ratios=[.5])
    agrees(page, board, first, state)


def test_what_is_saved(page, at, tmp_path):
    state = opened(page, at, "curves")
    for words, begins in (("Save this figure as SVG", b"<svg"), ("Save this figure as PNG", b"\x89PNG"), ("Save the numbers of this figure as CSV", b"trace,panel,x,y")):
        with page.expect_download(timeout=60_000) as got: press(page, words)
        path = tmp_path/got.value.suggested_filename
        got.value.save_as(path)
        assert path.read_bytes().startswith(begins), path.name
    rows = (tmp_path/"curves.csv").read_text().splitlines()
    fig, = shown("curves", "Curves", state)
    assert len(rows) - 1 == sum(len(t.x) for t in fig.data if t.fill is None)
    press(page, "Show the Python that makes this figure, and copy it")
    assert "trial.figure('curves'" in page.locator(".rethink-plot-code").inner_text()


def test_follow_shows_what_comes(page, at, tmp_path):
    "Read anew every ten seconds, while somebody looks"
    state = opened(page, at, "verdicts")
    press(page, "What is missing")
    said = lambda words: words in page.locator(".rethink-dash").inner_text()
    wait_for(lambda: said("have a result"), "not all there")
    run = next(c.run.id for c in state.trial().cells if c.arm == "scratch-b")
    shutil.move(at[0]/"runs"/run, tmp_path/"kept")
    try:
        press(page, "Follow")
        wait_for(lambda: said("1 missing"), "what went was not noticed", 40)
        assert said("rethink-nb run l1")
    finally: shutil.move(tmp_path/"kept", at[0]/"runs"/run)
    wait_for(lambda: said("have a result"), "what came was not noticed", 40)


def test_by_keys_alone(page, at):
    "Tab comes to a choice, space changes it"
    state = opened(page, at, "curves")
    page.locator(".rethink-network select").focus()
    for _ in range(3): page.keyboard.press("Tab")
    reached = page.evaluate("document.activeElement.textContent")
    assert reached in state.options("methods"), reached
    page.keyboard.press("Space")
    state.choose(methods=[m for m in state.options("methods") if m != reached])
    agrees(page, "curves", "Curves", state)


def test_voila_serves_a_page_that_asks_no_other_host(tmp_path):
    "Same checks, once: the figure is what the store holds, a choice changes it"
    if not install_chromium(): pytest.skip("no Chromium, and none could be installed")
    if not (Path(sys.executable).parent/"voila").exists(): pytest.skip("voila is not installed")
    port, state = free_port(), State(shutil.copytree(example_store().path, tmp_path/"runs"))
    words = [Path(sys.executable).parent/"rethink-nb", "dash", "curves", "--store", "runs", "--voila", "--no-browser", "--port", str(port)]
    with open(tmp_path/"log", "w") as log: p = subprocess.Popen(words, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        with browser() as (page, outside):
            wait_for(lambda: socket_open(port), "Voila does not listen", 90)
            page.goto(f"http://127.0.0.1:{port}/", timeout=90_000)
            wait_for(lambda: plots(page), f"no figure came: {(tmp_path/'log').read_text()[-500:]}", 90)
            agrees(page, "curves", "Curves", state)
            press(page, "scratch-b")
            agrees(page, "curves", "Curves", state.choose(arms=[a for a in state.options("arms") if a != "scratch-b"]))
            press(page, "Final accuracy")
            agrees(page, "curves", "Final accuracy", state)
            assert not outside, outside
    finally: os.killpg(p.pid, signal.SIGTERM)


def socket_open(port):
    with socket.socket() as s: return not s.connect_ex(("127.0.0.1", port))
