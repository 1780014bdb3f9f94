"""Eight virtual CPU devices, before jax is imported; shared small fixtures."""

import os

# Compiling is most of the suite's time, and a third of it goes into machine code that runs faster.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Importing the package would keep compiled programs in the home folder. No test may depend on what
# another run of the tests has left there; `compile_cache` keeps them for one module of tests.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# A process of tests runs hundreds of programs and must give the memory of each back. With a setting
# of the user's own, `allocator.keep_freed_memory` does nothing.
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**27))

import functools
import importlib.util
import pathlib
import shutil
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def programs_are_freed():
    """After each module of tests its compiled programs are forgotten.

    On a CPU a program takes three memory maps, and Linux gives a process 65,530 of them: a process
    that keeps the programs of the whole suite ends in a segmentation fault inside the compiler.
    """
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of real public data; tests that need it skip by name where it is absent."""
    folder = os.environ.get("RLHF_JAX_DATA")
    if not folder:
        pytest.skip("needs RLHF_JAX_DATA")
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory):
    """A folder for compiled programs that all processes of this run of the tests share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def compile_cache(compiled_folder):
    """Programs that several runs share, of this module or of another, are compiled once."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(compiled_folder),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def no_shape_checks():
    """Annotations of shapes are not checked, as they are not outside of the tests."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium; `downloads` is its folder. Skips by name where it is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.add_experimental_option(
        "prefs", {"download.default_directory": str(tmp_path_factory.mktemp("downloads"))}
    )
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    profile = tmp_path_factory.mktemp("profile")
    off = ("gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage")
    for flag in ("headless", "no-sandbox", "no-first-run", "lang=en", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    for feature in off:
        options.add_argument(f"--disable-{feature}")
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.set_window_size(1180, 820)
    # Keys reach the page even while the browser shows a download.
    opened.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    opened.downloads = pathlib.Path(options.experimental_options["prefs"].popitem()[1])
    yield opened
    opened.quit()


@pytest.fixture
def caches(compile_cache, monkeypatch, tmp_path_factory):
    """Datasets go to a temporary cache, compiled programs to that of the test's module."""
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


@functools.cache
def load_program(name):
    """The file experiments/<name>.py as a module, which is registered because dataclasses look
    up the module that they are declared in."""
    file = REPOSITORY / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(file.parent)  # as for a program that is run
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def experiment(caches):
    """`experiment(name)` is the module of a program in experiments/, such as "quickstart"."""
    return load_program


class Programs:
    """The compiled programs that were called, each with the shapes of its arguments."""

    def __init__(self):
        self.called, self._recorders = set(), {}

    def recorder(self, function):
        """The function, or what stands in for it and remembers how it is called."""

        def recording(*args):
            self.called.add((recording, self.shapes(args)))
            return function(*args)

        return self._recorders.setdefault(function, recording)

    def of(self, planned):
        """The same of programs that are only planned."""
        return {(x.function, self.shapes(x.arguments)) for x in planned if x.function}

    @staticmethod
    def shapes(args):
        """Real numbers of configurations have no shape, and are constants or traced numbers."""
        import jax

        arrays = [x for x in jax.tree.leaves(args) if hasattr(x, "shape")]
        return tuple((tuple(x.shape), str(x.dtype)) for x in arrays)


@pytest.fixture
def called_programs(monkeypatch):
    """Records every call of a compiled program that a plan has to know."""
    from rlhf_jax.data import epoch
    from rlhf_jax.training import loop

    found, make, make_epoch = Programs(), loop._compiled, epoch.program
    monkeypatch.setattr(loop, "_compiled", lambda *args: found.recorder(make(*args)))
    monkeypatch.setattr(epoch, "program", lambda *args: found.recorder(make_epoch(*args)))
    return found
