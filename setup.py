"""Everything that this file tells setuptools is in settings.ini."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
PACKAGED = ["*.ipynb", "recipes/*", "prompts/*", "configs/*"]  # of nbs/
NOT_PACKAGED = "index.ipynb"  # it is the README

parser = ConfigParser()
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


class BuildWithNotebooks(build_py):
    """Put the notebooks, recipes and prompts inside the package that is built, as distill_nb/nbs.

    They are kept once, in nbs/. An editable install copies nothing: the library finds nbs/ beside the package.
    """

    def run(self):
        super().run()
        if self.editable_mode:
            return
        nbs, target = HERE / cfg["nbs_path"], Path(self.build_lib, cfg["lib_path"], "nbs")
        shutil.rmtree(target, ignore_errors=True)  # build/ outlives a renamed notebook
        for file in sorted(file for pattern in PACKAGED for file in nbs.glob(pattern)):
            if file.name == NOT_PACKAGED or file.name.startswith(".") or not file.is_file():
                continue
            to = target / file.relative_to(nbs)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)


readme = HERE / "README.md"
extra = "_requirements"
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    url=f"https://github.com/{cfg['user']}/{cfg['repo']}",
    license_expression={"apache2": "Apache-2.0"}[cfg["license"]],
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={key.removesuffix(extra): cfg[key].split() for key in cfg if key.endswith(extra)},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)
