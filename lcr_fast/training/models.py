"""Models of prepared data: the sizes and text vectors that it gives them, and saved ones."""

from pathlib import Path

from lcr_fast.config import LCRConfig
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.training.identity import is_of

OTHER_DATA = "it is of other prepared data (--any-data uses it all the same)"


def fit_config(data: PreparedData, config: LCRConfig) -> LCRConfig:
    """Fill in the sizes that the data determines: ids and text widths."""
    sizes = {f"n_{kind}": n for kind, n in data.sizes._asdict().items()}
    for kind in ("item", "query"):
        vectors = data.arrays.get(f"{kind}_text")
        sizes[f"{kind}_text_dim"] = 0 if vectors is None else vectors.shape[1]
    return config.replace(**sizes)


def attach_text(model: LCRSER, data: PreparedData) -> LCRSER:
    """Give a model the data's frozen text vectors of its ids, where its config asks for them."""
    config = model.config
    rows = {"item_text": config.n_items + 1, "query_text": config.n_queries + 1}
    model.set_text(
        **{
            name: data.arrays[name][:n]
            for name, n in rows.items()
            if getattr(config, f"{name}_dim") and name in data.arrays
        }
    )
    return model


def load_model(
    path: Path,
    data: PreparedData,
    device: str,
    backend: str | None = None,
    *,
    any_data: bool = False,
) -> LCRSER:
    """Load a saved model and check that it is one of this data, or that the data continues its.

    Raises ValueError where the catalogue is another one, and without ``any_data`` where anything
    else of the data differs from what the model was trained on. Data that was prepared with the
    model's vocabulary may have more of everything (see ``identity``).
    """
    model = LCRSER.load(path, device=device, backend=backend)
    if not is_of(model, data):
        if model.config.n_items != data.n_items:
            raise ValueError(
                f"{path}: the model knows {model.config.n_items} items, the data has "
                f"{data.n_items}, and its ids do not go on with the model's (prepare --vocabulary)"
            )
        if not any_data:
            known = OTHER_DATA if model.data_fingerprint else "it does not say of which data it is"
            raise ValueError(f"{path}: {known}")
    return attach_text(model, data)
