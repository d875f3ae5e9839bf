"""Package metadata, read from settings.ini: requirements are written there and nowhere else."""
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
readme = here / "README.md"

# What a wheel brings inside the package; scenes and sentences are generated where they are wanted (samples.shipped).
BROUGHT = ("data_samples/README.md", "data_samples/*.json", "data_samples/teacher/*", "data_samples/blip/*")

# modules that register methods
ROOMS = ("tinyclip", "contrastive", "distil", "clip_kd", "clip_rd", "reinforced", "siglip", "clip_cid", "dime_fm", "blip_training", "dlip")
CURATION = settings["curation_requirements"].split()
METHODS = [f"{name} = vlkd_lab.methods.{name}" for name in ROOMS]


def user_notebooks() -> list[Path]:
    """What a person opens, without what somebody has put beside it; `vlkd-lab notebooks` copies it."""
    sidebar = here / "_quarto.yml"
    listed = sidebar.read_text(encoding="utf-8") if sidebar.exists() else ""
    names = re.findall(r"^ *- (?:href: )?(\w+\.ipynb) *$", listed, re.MULTILINE)
    return [here / "nbs" / name for name in names if (here / "nbs" / name).exists()]


class BuildWithSamples(build_py):
    """The modules, and beside them teacher, BLIP, stored numbers and notebooks; a working copy has them already."""

    def run(self):
        super().run()
        if not self.editable_mode:
            brought = [path for pattern in BROUGHT for path in sorted(here.glob(pattern))]
            for path in [*brought, *user_notebooks()]:
                target = Path(self.build_lib) / settings["lib_name"] / path.relative_to(here)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    url=settings["git_url"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    packages=find_namespace_packages(include=["vlkd_lab", "vlkd_lab.*"]),
    package_data={"vlkd_lab.static": ["*.js", "*.css"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={"curation": CURATION, "dev": settings["dev_requirements"].split() + CURATION},
    entry_points={
        "nbdev": ["vlkd_lab = vlkd_lab._modidx:d"],
        "vlkd_lab.methods": METHODS,
        "console_scripts": [settings["console_scripts"]],
    },
    cmdclass={"build_py": BuildWithSamples},
)
