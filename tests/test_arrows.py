"""Holds the arrows of the design: who may import whom, and the only file that imports X. Reads the source only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lad_dist"
FILES = sorted(PACKAGE.rglob("*.py"))

# Arrows point down only: a room imports from rooms of a greater number, or from itself.
LEVEL = {
    "cli": 0, "api": 0, "doctor": 1, "status": 1, "launch": 1, "view": 1, "plan": 2, "pipeline": 2, "starter": 2,
    "sharing": 2.5,
    "experts": 3, "distill": 3, "evaluate": 3, "report": 3, "exchange": 3,
    "teachers": 3.5,
    "trajectories": 4, "distilled": 4, "labeller": 4, "data": 4, "models": 4,
    "catalog": 5, "recipe": 5, "recipe_file": 5, "results": 5, "profile": 5, "rundir": 5, "progress": 5, "ranks": 5, "seeds": 5,
    "errors": 5, "interrupts": 5, "location": 5, "allocator": 5, "cores": 5, "environment": 5, "host_memory": 5,
    "callbacks": 5, "slurm_jobs": 5, "loggers": 5, "extras": 5, "plugins": 5, "methods": 5,
    "torch_file": 5,
}  # fmt: skip
STAGES = ("experts", "distill", "evaluate", "report")
SAME_LEVEL = {  # within a level, only these
    ("distilled", "data"), ("distilled", "labeller"), ("labeller", "models"), ("launch", "status"), ("view", "status"),
    ("doctor", "launch"),
    ("loggers", "callbacks"), ("loggers", "errors"), ("loggers", "plugins"), ("loggers", "progress"), ("loggers", "recipe"),
    ("extras", "errors"), ("slurm_jobs", "rundir"), ("slurm_jobs", "errors"),
    ("pipeline", "plan"),  # the number of threads
    ("recipe_file", "recipe"), ("recipe_file", "errors"),
    ("profile", "recipe"), ("rundir", "recipe"), ("rundir", "recipe_file"), ("rundir", "errors"), ("rundir", "location"),
    ("location", "errors"),
    ("results", "errors"), ("results", "plugins"),
    ("results", "rundir"), ("results", "recipe_file"), ("results", "recipe"), ("results", "seeds"), ("catalog", "errors"),
    ("progress", "errors"), ("progress", "callbacks"), ("plugins", "errors"),
    ("recipe", "plugins"), ("recipe", "methods"), ("recipe", "errors"), ("recipe_file", "methods"),
    ("methods", "plugins"), ("methods", "errors"),
    ("interrupts", "errors"), ("torch_file", "errors"), ("data", "recipe"), ("ranks", "environment"),
    ("ranks", "errors"), ("ranks", "interrupts"),
    ("models", "data"),  # torchvision, which one file of data/ imports
}  # fmt: skip


def name_of(file: Path) -> str:
    parts = ("lad_dist", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    """Every module that a file imports anywhere, functions and type checking included, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the arrows"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    """``lad_dist.distill.loop.State`` -> ``distill``; the package itself, and names in it, -> ``""``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else ""


def importers(package: str) -> set[str]:
    return {name_of(f) for f in FILES if any(m == package or m.startswith(package + ".") for m in imports(f))}


def test_there_is_something_to_look_at():
    assert len(FILES) > 30


def test_every_room_is_known():
    assert {name_of(f).split(".")[1] for f in FILES if name_of(f) != "lad_dist"} <= set(LEVEL)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_arrows_point_down(file):
    own = room(name_of(file))
    for module in imports(file):
        other = room(module)
        if not module.startswith("lad_dist.") or not other or other == own or not own:
            continue
        down = LEVEL[own] < LEVEL[other] or (own, other) in SAME_LEVEL
        assert down, f"{name_of(file)} imports {module}, which is not below it"


def test_importing_the_package_is_cheap():
    """Only ``load`` may reach into the package, when it is called."""
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    top = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert [n.module for n in top if isinstance(n, ast.ImportFrom)] == ["__future__", "typing"]


@pytest.mark.parametrize("stage", STAGES)
def test_stages_never_import_each_other(stage):
    for file in (PACKAGE / stage).rglob("*.py"):
        others = {m for m in imports(file) if room(m) in STAGES and room(m) != stage}
        assert others == set(), file


@pytest.mark.parametrize(("package", "allowed"), [
    ("ray", {"lad_dist.experts.fleet"}),
    ("submitit", {"lad_dist.launch.slurm"}),
    ("huggingface_hub", {"lad_dist.sharing.hub"}),
    ("numba", {"lad_dist.models.compiled"}),
    ("triton", {"lad_dist.models.compiled_gpu"}),
    ("torch.distributed", {"lad_dist.ranks"}),
    ("yaml", {"lad_dist.recipe_file"}),
])  # fmt: skip
def test_only_one_file_imports(package, allowed):
    assert importers(package) <= allowed


def test_only_the_command_line_imports_typer():
    found = importers("typer")
    assert found and {room(m) for m in found} == {"cli"}


def test_only_the_buffer_and_parquet_data_sets_import_pyarrow():
    assert {m for m in importers("pyarrow") if room(m) != "trajectories"} <= {"lad_dist.data.parquet"}


OWN_FILE = (
    "lad_dist.experts.fleet",
    "lad_dist.launch.slurm",
    "lad_dist.models.compiled",
    "lad_dist.models.compiled_gpu",
)


def test_slow_libraries_are_imported_where_they_are_used():
    """``lad-dist --help`` must not pay for them."""
    for file in FILES:
        body = ast.parse(file.read_text()).body
        top = {str(node.module) for node in body if isinstance(node, ast.ImportFrom)}
        top |= {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        heavy = {"torchvision", "sklearn", "ray", "submitit", "numba", "triton", "huggingface_hub"} & {
            m.split(".")[0] for m in top
        }
        assert not heavy or name_of(file) in OWN_FILE, (file, heavy)


def test_no_module_is_called_utils():
    assert [f for f in FILES if f.stem in ("utils", "util", "helpers", "common", "misc")] == []


def test_public_functions_are_typed_and_documented():
    bare = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.returns is None:
                bare.append(f"{name_of(file)}.{node.name}")
        module = ast.parse(file.read_text())
        if module.body and not ast.get_docstring(module):
            bare.append(name_of(file))
    assert bare == []
