"""How long a dashboard keeps one waiting: its first figure, and a changed choice, in JupyterLab in headless Chromium.

    python benchmarks/dash.py [--seeds 14] [--repeats 3] [--out FILE.json]

The store is that of benchmarks/store.py: some 2,000 runs that are MADE UP (no number means anything), two networks, four methods at three ratios.
First figure: from the start of the cell that opens the dashboard (the package is imported in a cell before it, as the notebook's own cells do) until plotly has drawn it; with it goes plotly.js itself, once a page.
A changed choice: from the click until another figure is drawn. Each in a new kernel; medians of the repeats.
"""
import argparse, json, os, platform, tempfile
from datetime import date
from pathlib import Path
from statistics import median

import torch
from store import make

from rethink_nb.testing.lab import browser, chromium, lab, open_notebook, plots, wait_for

BOARDS = {"architectures": ("Cost of each layer", "30%", "l1"), "curves": ("Final accuracy", "30%", "fine-tune-large", "l1"), "verdicts": ("Verdicts", "30%", "0", "fine-tune-large", "l1")} # a view, and choices to switch off (made-up seeds are alike in widths and curves, so that one less would not be seen)
SEEN = "[...document.querySelectorAll('.js-plotly-plot')].filter(e => e._fullData && e.offsetHeight).map(e => e._fullLayout.title.text + e._fullData.length + JSON.stringify(e.data.map(t => (t.y?.bdata ?? t.y)?.slice?.(0, 3)))).join()"
TIMED = f"""async button => {{
  const seen = () => {SEEN}, before = seen(), began = performance.now()
  button.click()
  while (seen() === before && performance.now() - began < 60000) await new Promise(requestAnimationFrame)
  return (performance.now() - began)/1000
}}"""


def notebook(at, board, store):
    "Imports in one cell, the dashboard in the next"
    cells = ["from rethink_nb import dash\nimport rethink_nb.dash.app, rethink_nb.report", f"dash.{board}({str(store)!r})"]
    code = [dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None, outputs=[], source=text) for i, text in enumerate(cells)]
    (at/f"{board}.ipynb").write_text(json.dumps(dict(cells=code, metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")), nbformat=4, nbformat_minor=5)))


def timed(page, address, board):
    "Seconds of the first figure and of each change"
    open_notebook(page, address, f"{board}.ipynb")
    page.evaluate("async () => { await jupyterapp.commands.execute('notebook:run-cell-and-select-next') }")
    began = page.evaluate("performance.now()")
    page.evaluate("jupyterapp.commands.execute('notebook:run-cell-and-select-next')")
    wait_for(lambda: plots(page), "no figure", 120)
    found = {"first figure": (page.evaluate("performance.now()") - began)/1000}
    page.wait_for_timeout(1000)
    view, *choices = BOARDS[board]
    for words in (*choices, view): found[f"{'view' if words == view else 'choice'} {words}"] = page.locator(".rethink-dash").get_by_role("button", name=words, exact=True).first.evaluate(TIMED)
    page.evaluate("jupyterapp.commands.execute('kernelmenu:shutdown')")
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("seeds", 14), ("repeats", 3)): p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--out")
    args = p.parse_args()
    if not chromium(): p.error("no Chromium here")
    with tempfile.TemporaryDirectory() as at:
        _, runs = make(Path(at)/"runs", args.seeds)
        found = {}
        for board in BOARDS: notebook(Path(at), board, Path(at)/"runs")
        with lab(at) as address:
            for board in BOARDS:
                for _ in range(args.repeats):
                    with browser() as (page, outside): times = timed(page, address, board)
                    for k, v in times.items(): found.setdefault(f"{board}: {k}", []).append(round(v, 2))
    for k, v in found.items(): print(f"{k:<40} {median(v):6.2f} s   {v}")
    if args.out:
        result = dict(date=str(date.today()), torch=torch.__version__, python=platform.python_version(), cores=os.cpu_count(), cpu=torch.backends.cpu.get_cpu_capability(), **vars(args), runs=runs, seconds=found)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__": main()
