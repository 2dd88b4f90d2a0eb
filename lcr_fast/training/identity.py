"""Which data a model is of: the same, or data that goes on with the ids the model knows."""

import functools

from lcr_fast.config import LCRConfig
from lcr_fast.data.prepared import PreparedData, Sizes
from lcr_fast.model import LCRSER

# What a batch holds of each kind of id.
_FIELDS = {
    "users": "user",
    "items": "rec_items",
    "queries": "search_queries",
    "terms": "search_terms",
}


def assign(model: LCRSER, data: PreparedData) -> None:
    """Note down in a model that its ids are those of the data."""
    model.data_fingerprint = data.manifest.get("fingerprint")
    model.vocabulary = _vocabulary(data, _text(model.config))


@functools.lru_cache(maxsize=1)  # text vectors are large; one model after the other has the same
def _vocabulary(data: PreparedData, text: tuple[str, ...]) -> str:
    return data.vocabulary(text=text)


def is_of(model: LCRSER, data: PreparedData) -> bool:
    """Tell whether a model is of this data, or the data was prepared with its vocabulary."""
    if model.data_fingerprint == data.manifest.get("fingerprint"):
        return True
    config, known = model.config, model.vocabulary
    sizes = Sizes(config.n_users, config.n_items, config.n_queries, config.n_terms)
    return known is not None and data.continues(known, sizes, _text(config))


def _text(config: LCRConfig) -> tuple[str, ...]:
    """Name the text vectors that a model reads."""
    return tuple(name for name in ("item_text", "query_text") if getattr(config, f"{name}_dim"))


def count_unknown(config: LCRConfig, data: PreparedData) -> dict[str, int]:
    """Count the data's ids that a model reads but has no row for, by kind, where there are any."""
    read = config.largest_ids
    return {
        kind: size - read[field]
        for (kind, field), size in zip(_FIELDS.items(), data.sizes, strict=True)
        if read.get(field, size) < size
    }


def describe_unknown(config: LCRConfig, data: PreparedData) -> str:
    """Say in one line what of the data a model does not know and how it is read; "" for nothing."""
    counts = count_unknown(config, data)
    if not counts:
        return ""
    text = "without a row in the model: " + ", ".join(f"{n:,} {k}" for k, n in counts.items())
    if "items" in counts:
        left_out = {
            "events": [data.rec_items],
            "clicks in searches": [data.click_items],
            "held-out targets": [data.valid_items, data.test_items],
            "stored negatives": [data.valid_negatives, data.test_negatives],
        }
        text += "; left out are " + ", ".join(
            f"{sum(int((a > config.n_items).sum()) for a in arrays):,} of "
            f"{sum(a.size for a in arrays):,} {name}"
            for name, arrays in left_out.items()
        )
    return text + "; other unknown ids are read as none. `lcr-fast extend` appends rows"


def extend(model: LCRSER, data: PreparedData) -> LCRSER:
    """Give a model rows for all ids of data that goes on with its vocabulary: a copy.

    Raises ValueError for any other data.
    """
    if not is_of(model, data):
        raise ValueError(
            "the data does not go on with the model's ids: prepare it with the data that the model "
            "was trained on as its vocabulary"
        )
    extended = model.extended(**{f"n_{kind}": n for kind, n in data.sizes._asdict().items()})
    assign(extended, data)
    return extended
