"Packaging, with settings.ini as the one place where names, versions and dependencies stand."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
suffix = "_requirements"
extras = {key[: -len(suffix)]: value.split() for key, value in cfg.items() if key.endswith(suffix)}

# The experiment notebooks and study files ship in the wheel (package_dir below), so that batch work needs no checkout.

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    packages=[*find_packages(include=["rethink_nb", "rethink_nb.*"]), "rethink_nb.experiments", "rethink_nb.dashboards"],
    package_dir={"rethink_nb.experiments": "nbs/experiments", "rethink_nb.dashboards": "nbs/dashboards"},
    package_data={"rethink_nb": ["py.typed"], "rethink_nb.experiments": ["*.ipynb", "*.toml"], "rethink_nb.dashboards": ["*.ipynb"], "rethink_nb.dash": ["example.tar.xz", "plotly-cartesian.*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
