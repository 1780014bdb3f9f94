"""Eight virtual CPU devices, before jax is imported; shared small fixtures."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import importlib
import pathlib
import shutil

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of real public data; tests that need it skip by name where it is absent."""
    folder = os.environ.get("RLHF_JAX_DATA")
    if not folder:
        pytest.skip("needs RLHF_JAX_DATA")
    return pathlib.Path(folder)


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    """Programs that several runs of a module share are compiled once."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
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
def experiment(monkeypatch, tmp_path):
    """`experiment(name)` is a program of experiments/; its data go to a temporary cache."""
    from rlhf_jax import launch

    monkeypatch.syspath_prepend(str(REPOSITORY / "experiments"))
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "_set_up_jax", lambda: None)
    return importlib.import_module
