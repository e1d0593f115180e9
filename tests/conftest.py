"""The option that says where real data and models lie, and what runs without a GPU."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import emulate
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


# The tests' tensors are small: a second thread costs more in waiting than it computes, and far more
# where the machine has other work.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--assets",
        default=str(ROOT.parent / "shared"),
        help="folder with data/, models/ and upstream/; tests on real files skip without it",
    )


@pytest.fixture(scope="session")
def assets(request) -> Path:
    """The folder of real data and models."""
    folder = Path(request.config.getoption("--assets"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no real data and models in {folder}; name their folder with --assets")
    return folder


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Callable[..., emulate.Library]:
    """`emulated(source, macros)`: a source of cuda/, compiled for the CPU once a test run."""
    if reason := emulate.why_not():
        pytest.skip(reason)
    return partial(emulate.load, folder=tmp_path_factory.getbasetemp() / "emulated")


@pytest.fixture
def one_configuration(monkeypatch) -> None:
    """Triton's autotuner takes one configuration of 4 warps unseen: to compile all of fla's takes
    minutes."""
    autotuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    prune = autotuner.prune_configs

    def first(self, options):
        fitting = sorted(prune(self, options), key=lambda c: (abs(c.num_warps - 4), c.num_stages))
        return fitting[:1]

    monkeypatch.setattr(autotuner, "prune_configs", first)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # one of several processes: none ends with a long one
        items.sort(key=lambda item: "in_the_interpreter" not in item.name)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
