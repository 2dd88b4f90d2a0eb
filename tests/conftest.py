"""Tiny prepared data and models, shared by the tests of training, evaluation and the CLI.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they or
the ops are imported.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lcr_fast.config import LCRConfig
from lcr_fast.data import synthetic
from lcr_fast.data.build import prepare
from lcr_fast.data.prepared import PreparedData
from lcr_fast.experiments.comparison import attach_text, fit_config
from lcr_fast.model import LCRSER

_WORLD = synthetic.World(n_users=24, n_topics=16, n_targets=14)
_MODEL = LCRConfig(
    dim=8, steps=2, max_search_len=4, max_rec_len=5, max_clicks=2, mlp_hidden=(8,)
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors this small only wait for each other on several threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(synthetic.generate(_WORLD), folder)
    return folder


@pytest.fixture(scope="session")
def prepared(prepared_folder) -> PreparedData:
    return PreparedData.open(prepared_folder)


@pytest.fixture(scope="session")
def make_model():
    """Return a function that makes a tiny model for a data set, the same one for the same seed."""

    def make(data: PreparedData, seed: int = 0, **changes) -> LCRSER:
        torch.manual_seed(seed)
        config = fit_config(data, _MODEL).replace(**changes)
        return attach_text(LCRSER(config), data)

    return make
