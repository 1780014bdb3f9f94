"""The rules of the package's layout, each a search over its syntax trees."""

import ast
import functools
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rlhf_jax"
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}

# Imports point down or stay within a layer. A folder speaks for all of its files.
LAYERS = {
    "tools": 6,
    "tasks": 6,
    "launch.py": 5,
    "flags.py": 5,
    "workdir.py": 5,
    "pipeline.py": 5,
    "evaluation.py": 5,
    "texts.py": 5,
    "folders.py": 5,
    "plan.py": 5,
    "hlo.py": 5,
    "cost.py": 5,
    "abstract.py": 3.7,
    "sweep.py": 5,
    "distributed.py": 5,
    "algorithms": 4,
    "online.py": 3.5,
    "sizes.py": 3.5,
    "online_config.py": 3.45,
    "on_policy.py": 3.4,
    "rewards": 3,
    "sampling": 3,
    "data": 3,
    "models": 2,
    "training": 2,
    "losses.py": 1,
    "preference_losses.py": 1,
    "vocabulary.py": 1,
    "advantages.py": 1,
    "sharding.py": 0,
    "allocator.py": 0,
    "shards.py": 0,
    "chips.py": 0,
    "processes.py": 0,
    "storage.py": 0,
    "lock.py": 0,
    "stopping.py": 0,
    "together.py": 0,
    "config.py": 0,
}
DISK = (
    "storage.py",
    "lock.py",
    "distributed.py",
    "data/",
    "training/checkpoint.py",
    "training/metrics.py",
    "training/report.py",
    "training/figure.py",
    "models/huggingface/",
    "folders.py",
    "workdir.py",
    "launch.py",
    "sweep.py",
    "tasks/",
    "tools/",
)
DISK_METHODS = {
    "open",
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "mkdir",
    "makedirs",
    "unlink",
    "rmdir",
    "touch",
    "savefig",
    "safe_open",
    "save_file",
    "memmap",
}
DISK_MODULES = {"shutil", "tempfile", "pickle", "sqlite3"}
DISK_OF_OS = {"replace", "rename", "remove", "unlink", "makedirs", "mkdir", "rmdir", "link", "open"}
GRADIENTS = {
    "grad",
    "value_and_grad",
    "vjp",
    "jvp",
    "linearize",
    "jacobian",
    "jacfwd",
    "jacrev",
    "hessian",
}
# Only loaded by the functions that need them, so that `import rlhf_jax` stays quick.
LAZY = {
    "transformers",
    "huggingface_hub",
    "tensorflow_datasets",
    "matplotlib",
    "grain",
    "sacrebleu",
    "rouge_score",
}
NEVER = {"tensorflow", "torch"}
# Shifts of masks by one column. What a model says is shifted by `losses.align` alone.
SHIFTS = {
    ("losses.py", "align"),
    ("advantages.py", "extend_after_eos"),
    ("advantages.py", "of_next"),
    ("models/transformer.py", "positions"),
    ("sampling/rollout.py", "distinct_bigrams"),  # of what was written, not of what a model says
    ("models/rope.py", "rotate"),  # along the features
}


@functools.cache
def tree(name):
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def found(check, names=FILES):
    """`file:line what` of every node of the named files that `check(node)` finds fault with."""
    return [
        f"{name}:{node.lineno} {ast.unparse(node).splitlines()[0]}"
        for name in names
        for node in ast.walk(tree(name))
        if check(node)
    ]


def others(*allowed):
    return [name for name in FILES if not name.startswith(allowed)]


def functions(name):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree(name)) if isinstance(node, kinds)]


def dotted(node):
    """`a.b.c` of a name or attribute, else ""."""
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def imports(name):
    """(module, line, at module level) of every import of a file."""
    top = set(tree(name).body)
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, node in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} imports relatively"
            yield node.module, node.lineno, node in top
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno, node in top


def imported_files(name):
    """(file of the package, line) that a file imports."""
    for module, line, _ in imports(name):
        parts = module.split(".")
        if parts[0] == "rlhf_jax" and len(parts) > 1:
            path = "/".join(parts[1:])
            for file in (f"{path}.py", f"{path}/__init__.py"):
                if file in FILES and file != name:
                    yield file, line


def layer(name):
    return LAYERS[name.split("/")[0]]


def test_the_search_sees_the_package():
    assert len(FILES) > 20
    seen = {file for file, _ in imported_files("algorithms/ppo.py")}
    assert {"losses.py", "advantages.py", "training/state.py", "online.py"} <= seen
    assert ("jax", True) in {(module, top) for module, _, top in imports("losses.py")}


def test_every_file_has_a_layer():
    unknown = [name for name in FILES if name.split("/")[0] not in LAYERS | {"__init__.py": 0}]
    assert not unknown


def test_imports_only_point_down():
    upward = [
        f"{name}:{line} imports {file}"
        for name in FILES
        if name != "__init__.py"
        for file, line in imported_files(name)
        if file != "__init__.py" and layer(file) > layer(name)
    ]
    assert not upward


def test_no_imports_go_round_in_a_circle():
    graph = {name: {file for file, _ in imported_files(name)} for name in FILES}
    graph = {name: {f for f in to if not f.endswith("__init__.py")} for name, to in graph.items()}
    while free := [name for name, to in graph.items() if not to & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph


def test_the_foundations_import_nothing_of_the_package():
    foundations = ("config", "sharding", "chips", "processes", "storage", "losses")
    for name in (f"{x}.py" for x in foundations):
        assert not list(imported_files(name)), name
    # Its check that shapes match.
    assert {file for file, _ in imported_files("advantages.py")} == {"losses.py"}


# Functions to pass to `ppo.run`, and the loss that is PPO's without its clips.
KIN_OF_PPO = ("ppo_presets", "ppo_variants", "actor_critic")


def test_algorithms_do_not_import_each_other():
    kin = {f"algorithms/{name}.py" for name in KIN_OF_PPO}
    assert not [
        f"{name}:{line} imports {file}"
        for name in FILES
        if name.startswith("algorithms/") and name not in kin
        for file, line in imported_files(name)
        if file.startswith("algorithms/")
    ]


def test_only_sharding_and_shards_spell_mesh_axes_and_partition_specs():
    def spells(node):
        if isinstance(node, ast.Constant):
            return node.value in ("fsdp", "tensor", "data")
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("jax"):
            return {a.name for a in node.names} & {"PartitionSpec", "NamedSharding"}
        return dotted(node).endswith((".PartitionSpec", ".NamedSharding"))

    allowed_flag = re.compile(r"(launch|workdir|flags)\.py:\d+ 'data'$")  # the flag --data
    rest = [
        line
        for line in found(spells, others("sharding.py", "shards.py"))
        if not allowed_flag.match(line)
    ]
    assert not rest
    assert found(spells, ["sharding.py"])


def test_only_the_train_state_takes_gradients_and_calls_the_optimizer():
    def takes(node):
        if isinstance(node, ast.ImportFrom) and node.module == "jax":
            return {a.name for a in node.names} & GRADIENTS
        if not isinstance(node, ast.Call):
            return False
        *owner, name = dotted(node.func).split(".")
        if name in GRADIENTS:
            return owner in (["jax"], ["nn"])
        steps = name == "update" and any(re.search(r"optim|opt$|tx$|chain", x) for x in owner)
        return steps or name in ("apply_updates", "apply_gradients")

    assert not found(takes, others("training/state.py"))
    taken = " ".join(found(takes, ["training/state.py"]))
    assert "value_and_grad" in taken and "optimizer.update" in taken and "apply_updates" in taken


def test_only_align_shifts_what_a_model_says_against_its_tokens():
    def one_column(part):
        """`1:` or `:-1`."""
        if not isinstance(part, ast.Slice) or part.step is not None:
            return False
        bounds = tuple(None if x is None else ast.unparse(x) for x in (part.lower, part.upper))
        return bounds in (("1", None), (None, "-1"))

    def shifts(node):
        if isinstance(node, ast.Call):
            return (
                dotted(node.func).endswith(".roll")
                or "slice_in_dim" in dotted(node.func)
                and (ast.unparse(node.args[1]) in ("1", "-1"))
            )
        if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Tuple):
            return False
        return any(one_column(part) for part in node.slice.elts[1:])

    seen = {
        (name, function.name)
        for name in FILES
        for function in functions(name)
        if any(shifts(node) for node in ast.walk(function))
    }
    assert seen == SHIFTS


def test_align_is_called_where_outputs_become_per_token_arrays_and_nowhere_else():
    calls = {
        (name, function.name)
        for name in FILES
        for function in functions(name)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and dotted(node.func) in ("align", "losses.align")
    }
    assert calls == {
        ("losses.py", "token_logprobs"),
        ("losses.py", "chunked_token_logprobs"),
        ("vocabulary.py", "chunked"),
        ("models/heads.py", "token_values"),
    }


def test_only_the_modules_for_it_touch_the_disk():
    def touches(node):
        if isinstance(node, ast.Import):
            return {a.name.split(".")[0] for a in node.names} & DISK_MODULES
        if not isinstance(node, ast.Call):
            return False
        *owner, name = dotted(node.func).split(".")
        if not name and isinstance(node.func, ast.Attribute):
            name = node.func.attr  # (folder / "x").write_text(...)
        if owner == ["os"]:
            return name in DISK_OF_OS
        if owner in (["np"], ["jnp"]):
            return name in ("save", "savez", "load", "loadtxt", "savetxt")
        return name in DISK_METHODS

    assert not found(touches, others(*DISK))
    assert found(touches, ["training/metrics.py"])


def test_nothing_in_the_repository_edits_the_import_path():
    """What programs and notebooks share is in the package, which is installed."""
    edits = "sys" + ".path"  # in two parts, so that this file does not hold it
    repository = PACKAGE.parent
    files = [path for kind in ("*.py", "*.ipynb", "*.md") for path in repository.rglob(kind)]
    files = [path for path in files if not path.relative_to(repository).parts[0].startswith(".")]
    assert len(files) > 100
    assert not [path for path in files if edits in path.read_text(encoding="utf-8")]


def test_heavy_libraries_are_loaded_by_the_functions_that_need_them():
    eager = [
        f"{name}:{line} imports {module}"
        for name in FILES
        for module, line, top in imports(name)
        if top and module.split(".")[0] in LAZY
    ]
    assert not eager


def test_neither_torch_nor_tensorflow_is_ever_imported():
    assert not [
        f"{name}:{line} imports {module}"
        for name in FILES
        for module, line, _ in imports(name)
        if module.split(".")[0] in NEVER
    ]


def test_records_are_plain_tuples_not_flax_structs():
    assert not [f"{n}:{line}" for n in FILES for m, line, _ in imports(n) if m == "flax.struct"]


@pytest.mark.parametrize("name", FILES)
def test_files_have_at_most_500_lines_and_functions_60(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 500
    long = [
        f"{name}:{f.lineno} {f.name}: {f.end_lineno - f.lineno + 1} lines"
        for f in functions(name)
        if f.end_lineno - f.lineno + 1 > 60
    ]
    assert not long


def test_every_module_and_every_public_function_has_a_docstring():
    bare = [name for name in FILES if not ast.get_docstring(tree(name))]
    bare += [
        f"{name}:{node.lineno} {node.name}"
        for name in FILES
        for node in tree(name).body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare


def test_no_field_of_a_config_is_read_with_a_default():
    def reads(node):
        return (
            isinstance(node, ast.Call)
            and dotted(node.func) in ("getattr", "hasattr")
            and re.search(r"config|optimizer", ast.unparse(node.args[0]))
        )

    assert not found(reads)


def test_no_error_is_swallowed():
    def swallows(node):
        if not isinstance(node, ast.ExceptHandler):
            return False
        broad = node.type is None or dotted(node.type) in ("Exception", "BaseException")
        return broad and not any(map(passes_on, ast.walk(node)))

    def passes_on(node):
        """Raises, or hands the error to the thread that waits for a `Future`."""
        called = isinstance(node, ast.Call) and dotted(node.func).endswith(".set_exception")
        return called or isinstance(node, ast.Raise)

    assert not [
        f"{name}:{node.lineno}" for name in FILES for node in ast.walk(tree(name)) if swallows(node)
    ]


def test_nothing_is_left_to_do():
    assert not [
        f"{name}:{i}"
        for name, path in FILES.items()
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line)
    ]


def test_the_table_of_algorithms_has_the_lines_of_their_files():
    table = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    found = re.findall(r"\| `algorithms/(\w+)\.py` \| (\d+) \|", table)
    files = [name for name in FILES if name.startswith("algorithms/") and "__init__" not in name]
    assert {f"algorithms/{name}.py" for name, _ in found} == set(files)
    for name, lines in found:
        text = FILES[f"algorithms/{name}.py"].read_text(encoding="utf-8")
        assert len(text.splitlines()) == int(lines), name
