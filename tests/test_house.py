"""The rules of the repository itself: what is generated matches its source, and what is published is whole."""
import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MUST_BE_STAGES = {"annotate", "sft", "merge", "evaluate", "report"}


def run(*command, cwd):
    # nbdev_export does nothing where nbdev_test's IN_TEST is set.
    env = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, text=True, capture_output=True)
    assert done.returncode == 0, f"{command} failed in {cwd}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def repository_files() -> list[Path]:
    """What git tracks, and what the next `git add .` would: relative paths."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return sorted(Path(name) for name in set(listed.split("\0")) if name and (ROOT / name).is_file())


def notebooks(root=ROOT) -> dict[Path, dict]:
    return {f: json.loads((root / f).read_text(encoding="utf-8")) for f in repository_files() if f.suffix == ".ipynb"}


def source(cell) -> str:
    return "".join(cell["source"])


def module(notebook) -> str | None:
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(map(source, notebook["cells"])), re.M)
    return found and found[1]


def stages(root=ROOT) -> set[str]:
    """The modules whose notebook has a cell tagged `parameters`."""
    return {
        module(notebook)
        for notebook in notebooks(root).values()
        if module(notebook) and any("parameters" in cell["metadata"].get("tags", []) for cell in notebook["cells"])
    }


def name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


# A wing, and the stages that are its own: nobody else below the next wing looks inside.
WINGS = {"teacher": {"annotate"}, "learn": {"sft", "distill"}, "measure": {"evaluate", "benchmark"}, "share": {"merge"}, "run": {"pipeline", "cli"}}
LONGEST_LINE = 120


def modules() -> dict[str, tuple[float, Path]]:
    """Each module's name: its place in reading order, and its file."""
    found = {}
    for place, (file, notebook) in enumerate(sorted(notebooks().items())):
        if name := module(notebook):
            found[name] = place, ROOT / "distill_nb" / (name.replace(".", "/") + ".py")
    return found


def imports(name: str, file: Path) -> set[str]:
    """Our own modules that a module imports, at its top or inside a function."""
    package, found = ("distill_nb." + name).split(".")[:-1], set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            found |= {whole, *(f"{whole}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {f.removeprefix("distill_nb.") for f in found if f.startswith("distill_nb.")} & set(modules())


def test_a_module_imports_only_what_was_read_before_it():
    places = modules()
    assert len(places) > 20
    back = [
        f"{name} imports {other}"
        for name, (place, file) in places.items()
        for other in imports(name, file)
        if places[other][0] >= place
    ]
    assert not back, back


def test_a_wing_is_opened_only_by_its_own_stages_and_by_higher_wings():
    wing = {name: name.split(".")[0] for name in modules() if "." in name}
    assert set(wing.values()) == set(WINGS)
    order = list(dict.fromkeys(wing.values()))
    wrong = []
    for name, (_, file) in modules().items():
        for other in imports(name, file) & set(wing):
            inside = wing.get(name)
            higher = inside and order.index(inside) >= order.index(wing[other])
            if not higher and name not in WINGS[wing[other]]:
                wrong.append(f"{name} imports {other}")
    assert not wrong, wrong


def test_a_name_means_one_thing():
    """Modules are imported whole: of two that export one name, the later would hide the earlier."""
    exported = {}
    for name, (_, file) in modules().items():
        listed = re.search(r"^__all__ = (\[.*?\])", file.read_text(encoding="utf-8"), re.S | re.M)
        for found in ast.literal_eval(listed[1]):
            exported.setdefault(found, []).append(name)
    # The pipeline finds each stage's parameters under this name.
    twice = {found: names for found, names in exported.items() if len(names) > 1 and found != "Params"}
    assert not twice, twice


def test_a_module_says_in_full_what_goes_in_and_what_comes_out():
    """nbdev takes the first line of the notebook's quotation for the docstring, and the README shows it."""
    said = {name: file.read_text(encoding="utf-8").splitlines()[0] for name, (_, file) in modules().items()}
    torn = {name: line for name, line in said.items() if not re.fullmatch(r'"""Goes in: .*\. Comes out: .*\."""', line)}
    assert not torn, torn


def test_the_library_can_be_read_without_scrolling_sideways():
    long = [
        f"{file}:{number}: {len(line)}"
        for _, file in modules().values()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > LONGEST_LINE and not line.startswith(("__all__", '"""'))
    ]
    assert not long, f"{len(long)} lines of more than {LONGEST_LINE} characters:\n" + "\n".join(long)


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository, to run on it what writes in place."""
    target = tmp_path / "distill_nb"
    for file in repository_files():
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, target / file)
    return target


def test_exports_are_in_sync(copy):
    # Only __init__.py may hold lines that no notebook exports.
    for file in (copy / "distill_nb").rglob("*.py"):
        if file.name != "__init__.py":
            file.unlink()
    run(BIN / "nbdev_export", cwd=copy)
    exported, tree = (
        {f.relative_to(root).as_posix(): f.read_bytes() for f in (root / "distill_nb").rglob("*.py")}
        for root in (copy, ROOT)
    )
    assert sorted(tree) == sorted(exported), "run `make export`, and delete modules that have no notebook"
    different = [name for name in tree if tree[name] != exported[name]]
    assert not different, f"not what the notebooks export (run `make export`): {different}"


def test_notebooks_are_clean(copy):
    run(BIN / "nbdev_clean", cwd=copy)
    dirty = [str(f) for f in notebooks() if (copy / f).read_bytes() != (ROOT / f).read_bytes()]
    assert not dirty, f"run `make clean-notebooks`: {dirty}"


def test_readme_is_in_sync():
    run(sys.executable, ROOT / "nbs" / "render_readme.py", "--check", cwd=ROOT)


def test_stage_notebooks_keep_their_parameters(copy):
    assert stages() >= MUST_BE_STAGES, f"no cell tagged `parameters` in: {sorted(MUST_BE_STAGES - stages())}"
    run(BIN / "nbdev_clean", cwd=copy)
    assert stages(copy) == stages()

    # The setting that keeps them is what this test is about: without it nbdev_clean deletes every tag.
    ini = copy / "settings.ini"
    kept = [line for line in ini.read_text().splitlines() if not line.startswith("allowed_cell_metadata_keys")]
    ini.write_text("\n".join(kept))
    run(BIN / "nbdev_clean", cwd=copy)
    assert stages(copy) == set()


def test_no_path_of_one_machine():
    folders = "|".join(["root", "home", "tmp", "work"])
    # Only where the path starts: the same word inside a relative path or a web address is fine.
    absolute = re.compile(rf"(?<![\w.~$*%+\-\]}})])/({folders})/")
    found = []
    for file in repository_files():
        for number, line in enumerate((ROOT / file).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := absolute.search(line):
                found.append(f"{file}:{number}: ...{line[match.start():][:60]}")
    assert not found, "\n".join(found)


def test_no_notebook_shows_an_error():
    failed = [
        f"{file}, cell {cell['id']}: {output['ename']}"
        for file, notebook in notebooks().items()
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if output["output_type"] == "error"
    ]
    assert not failed, failed


def test_requirements_are_listed_once():
    ini = settings()
    lists = [ini[key].split() for key in ini if key == "requirements" or key.endswith("_requirements")]
    names = [name(requirement) for one in lists for requirement in one]
    assert len(names) == len(set(names)), f"listed twice: {sorted({n for n in names if names.count(n) > 1})}"

    pins = [name(pin) for key in ("cpu_torch", "cpu_unsloth") for pin in ini[key].split()]
    alternatives = "|".join(map(re.escape, {*names, *pins}))
    # A name with a version bound is a requirement, wherever it is written.
    bound = re.compile(rf"(?<![\w.-])({alternatives})(\[[\w,]*\])?\s*(==|>=|<=|~=|!=|<|>)\s*\d", re.I)
    found = [
        f"{file}: {match[0]}"
        for file in repository_files()
        if file.name not in ("settings.ini", "CHANGELOG.md") and file.suffix not in (".jsonl", ".csv")
        for match in bound.finditer((ROOT / file).read_text(encoding="utf-8", errors="replace"))
    ]
    assert not found, f"belongs in settings.ini: {found}"
    assert not [f for f in repository_files() if re.match(r"requirements.*\.txt|setup\.cfg|environment\.ya?ml", f.name)]


def wheel_contents(project: Path, out: Path) -> set[str]:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, project, cwd=out.parent)
    (wheel,) = out.glob("distill_nb-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_the_notebooks(copy, tmp_path):
    packed = [f for f in repository_files() if f.parent == Path("nbs") and f.suffix == ".ipynb" and f.name != "index.ipynb"]
    folders = {Path("nbs/recipes"), Path("nbs/prompts"), Path("nbs/configs")}
    packed += [f for f in repository_files() if f.parent in folders]
    assert {f.parent for f in packed} == {Path("nbs"), *folders}
    packed += [f for f in repository_files() if f.parts[0] == "distill_nb"]
    expected = {f.as_posix() if f.parts[0] == "distill_nb" else f"distill_nb/{f.as_posix()}" for f in packed}

    wheel = wheel_contents(copy, tmp_path / "wheel")
    assert {name for name in wheel if ".dist-info/" not in name} == expected

    # And the same from the source distribution, which is what MANIFEST.in decides.
    build = "import setuptools.build_meta as backend; backend.build_sdist('../sdist')"
    (tmp_path / "sdist").mkdir()
    run(sys.executable, "-c", build, cwd=copy)
    (sdist,) = (tmp_path / "sdist").glob("*.tar.gz")
    assert wheel_contents(sdist, tmp_path / "wheel-from-sdist") == wheel
