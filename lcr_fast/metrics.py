"""Names of ranking metrics, of rewards and of the rules for ties."""

RANKING_KINDS = ("hr", "ndcg", "ndcg_exp", "mrr", "recall", "precision", "map", "rank")
_MOST_K = 2**31 - 1
TIES = ("pessimistic", "optimistic", "average")


def parse_metric(name: str) -> tuple[str, int]:
    """Split ``"ndcg@10"`` into ``("ndcg", 10)``; without a cut-off the number is 0.

    ``mrr``, ``map``, ``ndcg`` and ``ndcg_exp`` without ``@`` are over the whole list; ``rank`` has
    no cut-off. Any other name is a ValueError.
    """
    kind, at, k = name.partition("@") if isinstance(name, str) else ("", "", "")
    whole = kind in ("mrr", "map", "ndcg", "ndcg_exp", "rank") and not at
    cut = kind in RANKING_KINDS and kind != "rank" and k.isdecimal() and 0 < int(k) <= _MOST_K
    if not (whole or cut):
        raise ValueError(
            f"metric {name!r} is unknown: expected hr@k, ndcg@k, ndcg_exp@k, mrr@k, recall@k, "
            f"precision@k or map@k with k from 1 to {_MOST_K}, or mrr, map, ndcg, ndcg_exp or rank"
        )
    return kind, int(k) if at else 0


def parse_reward(name: str) -> tuple[tuple[float, str], ...]:
    """Split ``"0.5*hr@1 + 0.5*ndcg@10"`` into ((0.5, "hr@1"), (0.5, "ndcg@10")).

    A term is hr@k, ndcg@k or mrr, with a positive weight before it or without one (1). Anything
    else is a ValueError.
    """
    terms = []
    for term in name.split("+"):
        weight, times, metric = term.rpartition("*")
        metric = metric.strip()
        try:
            value = float(weight) if times else 1.0
            kind, cut = parse_metric(metric)
        except ValueError:
            value, kind, cut = 0.0, "", 0
        rewarding = (kind in ("hr", "ndcg") and cut) or metric == "mrr"
        if not rewarding or not 0 < value < float("inf"):
            raise ValueError(
                f"reward must be hr@k, ndcg@k, mrr or a sum of them with positive weights, such as "
                f"0.5*hr@1+0.5*ndcg@10, got {name!r}"
            )
        terms.append((value, metric))
    return tuple(terms)
