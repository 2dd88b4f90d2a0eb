"""LCR-SER the slow, obvious way in float64: shares no code with lcr_fast.

One user, one event, one head, one candidate at a time. There are no batches and no masks: only
events that exist are looped over. A history is a list of vectors, a stream is 0 (search) or
1 (recommendation), packed weights are read under the names of lcr_fast/weights.py.

Dropout is a function ``drop(site, position)`` that gives the factors of one vector.
"""

import functools
import math
from types import SimpleNamespace

import numpy as np

SEARCH, REC = 0, 1


def no_drop(site, position):
    return 1.0


def packed(weights):
    """Copy a weights tuple of tensors to float64 arrays, under the same names."""

    def array(value):
        if isinstance(value, bool):
            return value
        if isinstance(value, tuple):
            return [array(v) for v in value]
        return value.detach().double().numpy()

    return SimpleNamespace(**{name: array(v) for name, v in weights._asdict().items()})


# -- the network ------------------------------------------------------------------------------


def softmax(logits):
    exp = np.exp(np.asarray(logits) - max(logits))
    return exp / exp.sum()


def layer_norm(x, weight, bias):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return (x - mean) / math.sqrt(variance + 1e-5) * weight + bias


def attend(query, memory, qkv_weight, qkv_bias, out_weight, out_bias, n_heads):
    """One query vector attends to a list of memory vectors."""
    dim = len(query)
    width = dim // n_heads
    q = qkv_weight[:dim] @ query + qkv_bias[:dim]
    keys = [qkv_weight[dim : 2 * dim] @ m + qkv_bias[dim : 2 * dim] for m in memory]
    values = [qkv_weight[2 * dim :] @ m + qkv_bias[2 * dim :] for m in memory]
    heads = []
    for head in range(n_heads):
        part = slice(head * width, (head + 1) * width)
        p = softmax([q[part] @ k[part] / math.sqrt(width) for k in keys])
        heads.append(sum(p_j * v[part] for p_j, v in zip(p, values, strict=True)))
    return out_weight @ np.concatenate(heads) + out_bias


def ffn(x, in_weight, in_bias, out_weight, out_bias):
    return out_weight @ np.maximum(in_weight @ x + in_bias, 0.0) + out_bias


def encode(events, weights, stream, n_heads, drop=no_drop):
    """Encode one user's events of one stream."""
    h = list(events)
    for layer in range(len(weights.qkv_weight)):
        w = SimpleNamespace(**{k: v[layer, stream] for k, v in vars(weights).items()})
        attended = [
            attend(x, h, w.qkv_weight, w.qkv_bias, w.out_weight, w.out_bias, n_heads) for x in h
        ]
        h = [
            layer_norm(x + drop(2 * layer, j) * y, w.norm_weight[0], w.norm_bias[0])
            for j, (x, y) in enumerate(zip(h, attended, strict=True))
        ]
        h = [
            layer_norm(
                x
                + drop(2 * layer + 1, j)
                * ffn(x, w.ffn_in_weight, w.ffn_in_bias, w.ffn_out_weight, w.ffn_out_bias),
                w.norm_weight[1],
                w.norm_bias[1],
            )
            for j, x in enumerate(h)
        ]
    return h


def reason(
    initial,
    weights,
    steps,
    n_heads,
    *,
    step_embedding=None,
    update="jacobi",
    cross_memory="post_msa",
    drop=(no_drop, no_drop),
):
    """Run K steps for one user; (search, rec) pairs: [h^(0) .. h^(K)], [a^(1) .. a^(K)]."""
    h, after, before = tuple(initial), [tuple(initial)], []
    for k in range(steps):
        set_number = 0 if len(weights.self_qkv_weight) == 1 else k
        w = [
            SimpleNamespace(**{name: v[set_number, x] for name, v in vars(weights).items()})
            for x in (SEARCH, REC)
        ]
        if step_embedding is not None:
            h = tuple([v + step_embedding[k, x] for v in h[x]] for x in (SEARCH, REC))

        a = []
        for x in (SEARCH, REC):
            p = w[x]
            a_x = []
            for j, v in enumerate(h[x]):
                y = attend(
                    v, h[x], p.self_qkv_weight, p.self_qkv_bias,
                    p.self_out_weight, p.self_out_bias, n_heads,
                )  # fmt: skip
                a_x.append(layer_norm(v + drop[x](3 * k, j) * y, p.norm_weight[0], p.norm_bias[0]))
            a.append(a_x)

        new = [None, None]
        for x in (REC, SEARCH) if update == "rec_first" else (SEARCH, REC):
            p, other = w[x], 1 - x
            if cross_memory == "initial":
                memory = initial[other]
            elif update != "jacobi" and new[other] is not None:
                memory = new[other]
            else:
                memory = {"post_msa": a, "step_input": h}[cross_memory][other]
            new[x] = []
            for j, v in enumerate(a[x]):
                c = v
                if len(memory):
                    y = attend(
                        v, memory, p.cross_qkv_weight, p.cross_qkv_bias,
                        p.cross_out_weight, p.cross_out_bias, n_heads,
                    )  # fmt: skip
                    c = v + drop[x](3 * k + 1, j) * y
                c = layer_norm(c, p.norm_weight[1], p.norm_bias[1])
                if p.ffn_in_weight.size:
                    y = ffn(c, p.ffn_in_weight, p.ffn_in_bias, p.ffn_out_weight, p.ffn_out_bias)
                    c = layer_norm(c + drop[x](3 * k + 2, j) * y, p.norm_weight[2], p.norm_bias[2])
                new[x].append(c)
        h = tuple(new)
        after.append(h)
        before.append(tuple(a))
    return after, before


def aggregate(h, item, target_weight):
    """Pool one history at one item: z and the attention over the events."""
    if not len(h):
        return np.zeros(len(item)), np.zeros(0)
    alpha = softmax([v @ target_weight @ item for v in h])
    return sum(p * v for p, v in zip(alpha, h, strict=True)), alpha


def score(h, item, user, weights, drop=no_drop, candidate=0):
    """Score one item from the final states (search, rec) of one user."""
    z_s, z_r = (aggregate(h[x], item, weights.target_weight[x])[0] for x in (SEARCH, REC))
    dot = (z_r + z_s) @ item
    if not len(weights.mlp_weights):
        return dot
    x = np.concatenate([z_r, z_s, item] + ([] if user is None else [user]))
    last = len(weights.mlp_weights) - 1
    for i, (w, b) in enumerate(zip(weights.mlp_weights, weights.mlp_biases, strict=True)):
        x = w @ x + b
        if i < last:
            x = drop(i, candidate) * np.maximum(x, 0.0)
    return x[0] + (dot if weights.dot else 0.0)


class Model:
    """An LCRSER rebuilt from its config and its tensors by name."""

    def __init__(self, model):
        self.config = model.config
        self.tensors = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
        self.text = {
            kind: None if table is None else table.double().numpy()
            for kind, table in (("item", model.item_text), ("query", model.query_text))
        }

    def part(self, prefix):
        return SimpleNamespace(
            **{k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix)}
        )

    def head(self):
        def numbered(name):
            keys = [k for k in self.tensors if k.startswith(f"head.{name}.")]
            return [self.tensors[f"head.{name}.{i}"] for i in range(len(keys))]

        return SimpleNamespace(
            target_weight=self.tensors["head.target_weight"],
            mlp_weights=numbered("mlp_weights"),
            mlp_biases=numbered("mlp_biases"),
            dot=self.config.score != "mlp",
        )

    def text_vector(self, kind, number):
        if self.text[kind] is None or number == 0:
            return 0.0
        return self.tensors[f"{kind}_text_projection.weight"] @ self.text[kind][number]

    def item(self, number):
        table = self.tensors["item_embedding.weight"]
        vector = table[number] if number else np.zeros(table.shape[1])
        return vector + self.text_vector("item", number)

    def query(self, number, terms):
        table = self.tensors["query_embedding.weight"]
        zero = np.zeros(table.shape[1])
        if self.config.query_encoder == "id":
            vector = table[number] if number else zero
        else:
            vectors = [table[t] for t in terms if t]
            vector = sum(vectors) / len(vectors) if vectors else zero
        return vector + self.text_vector("query", number)

    def user(self, batch, b):
        if not self.config.user_embedding:
            return None
        table = self.tensors["user_embedding.weight"]
        number = int(batch.user[b])
        return table[number] if number else np.zeros(table.shape[1])

    def embed(self, batch, b):
        search, rec = [], []
        for j in range(int(batch.search_lengths[b])):
            clicked = batch.search_clicks[b, j, : self.config.max_clicks].tolist()
            clicks = [self.item(i) for i in clicked if i]
            vector = self.query(int(batch.search_queries[b, j]), batch.search_terms[b, j].tolist())
            vector = vector + (sum(clicks) / len(clicks) if clicks else 0.0)
            search.append(vector + self.tensors["search_position"][j])
        for j in range(int(batch.rec_lengths[b])):
            item = self.item(int(batch.rec_items[b, j]))
            rec.append(item + self.tensors["rec_position"][j])
        return search, rec

    def _drop(self, batch, b, seed, first_site, dims):
        """Dropout of one part: ``dims(site)`` is the width of a vector there."""
        if seed is None:
            return no_drop
        rate, row = self.config.dropout, int(batch.row[b])
        return lambda site, j: dropout_mask(row, seed, first_site + site, j, dims(site), rate)

    def encode(self, batch, b, seed=None):
        weights, dim = self.part("encoder"), self.config.dim
        return tuple(
            encode(
                events,
                weights,
                x,
                self.config.n_heads,
                self._drop(batch, b, seed, 4096 * x, lambda site: dim),
            )
            for x, events in enumerate(self.embed(batch, b))
        )

    def reason(self, h0, batch, b, seed=None):
        dim = self.config.dim
        return reason(
            h0,
            self.part("reasoning"),
            self.config.steps,
            self.config.n_heads,
            step_embedding=self.tensors.get("step_embedding"),
            update=self.config.update,
            cross_memory=self.config.cross_memory,
            drop=[
                self._drop(batch, b, seed, 8192 + 4096 * x, lambda site: dim) for x in (SEARCH, REC)
            ],
        )

    def scores(self, h, batch, b, seed=None):
        weights = self.head()
        drop = self._drop(batch, b, seed, 16384, lambda site: self.config.mlp_hidden[site])
        return np.array(
            [
                score(h, self.item(i), self.user(batch, b), weights, drop, column)
                + self.bonus(batch, b, i)
                if i
                else -math.inf
                for column, i in enumerate(batch.candidates[b].tolist())
            ]
        )

    def bonus(self, batch, b, item):
        """Give what a candidate gains by standing in the histories of user ``b``."""
        if not self.config.seen_bonus:
            return 0.0
        searches = batch.search_clicks[b, : int(batch.search_lengths[b])].tolist()
        clicked = {i for clicks in searches for i in clicks[: self.config.max_clicks]}
        events = set(batch.rec_items[b, : int(batch.rec_lengths[b])].tolist())
        gains = self.tensors["head.seen_bonus"]
        return self.config.dim * ((item in clicked) * gains[0] + (item in events) * gains[1])

    def forward(self, batch, b, seed=None):
        """Scores [C] of user ``b``; with a seed, those of a training forward."""
        after, _ = self.reason(self.encode(batch, b, seed), batch, b, seed)
        return self.scores(self.read(after[0], after[-1]), batch, b, seed)

    def read(self, first, last):
        """Give what the aggregation reads, (search, rec), from h^(0) and h^(K)."""
        share = self.config.readout
        pairs = (zip(*streams, strict=True) for streams in zip(first, last, strict=True))
        return tuple([(1 - share) * u + share * v for u, v in pair] for pair in pairs)

    def rollout(self, batch, b, trajectory, noise_scale, seed):
        """States of one noisy trajectory of user ``b``."""
        row = int(batch.row[b])
        noisy = tuple(
            [
                v + noise_scale * normals(row, seed, trajectory, x, j, len(v))
                for j, v in enumerate(h)
            ]
            for x, h in enumerate(self.encode(batch, b))
        )
        return self.reason(noisy, batch, b)


# -- objectives ---------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def rank_loss(scores, target, kind):
    """Loss of one user's list; candidates that score -inf do not exist."""
    positive = scores[target]
    negatives = [s for i, s in enumerate(scores) if i != target and s != -math.inf]
    if kind == "bce":
        losses = [-math.log(sigmoid(positive))] + [-math.log(1 - sigmoid(s)) for s in negatives]
        return sum(losses) / len(losses)
    if kind == "softmax":
        return -math.log(softmax([positive, *negatives])[0])
    losses = [-math.log(sigmoid(positive - s)) for s in negatives]
    return sum(losses) / len(losses) if losses else 0.0


def distance(a, b, kind):
    if kind == "l2":
        return math.sqrt(sum((a - b) ** 2))
    if not a.any() or not b.any():
        return 1.0
    return 1 - a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)


def tcl_distances(after, before, target, target_weight, kind):
    """Measure one user's pooled states at the target: (after, before) of every term of TCL."""
    return [
        tuple(
            distance(target, aggregate(h[x], target, target_weight[x])[0], kind)
            for h in (after[k + 1], before[k])
        )
        for k in range(len(before))
        for x in (SEARCH, REC)
        if len(before[k][1 - x])
    ]


def hinge(distances, margin):
    """Average [ after - before + m ]_+ over all terms of all users."""
    terms = [max(after - before + margin, 0.0) for after, before in distances]
    return sum(terms) / len(terms) if terms else 0.0


def tcl(users, target_weight, margin, kind):
    """TCL of a list of users, each (states after, states before, target vector)."""
    distances = [pair for user in users for pair in tcl_distances(*user, target_weight, kind)]
    return hinge(distances, margin)


# -- GRPO ---------------------------------------------------------------------------------------


def rank(scores, target):
    """Place of the target, from 1; ties count against it."""
    return sum(s >= scores[target] for s in scores)


def reward(scores, target, metric):
    place = rank(scores, target)
    if metric == "mrr":
        return 1 / place
    name, k = metric.split("@")
    if place > int(k):
        return 0.0
    return 1.0 if name == "hr" else 1 / math.log2(place + 1)


def advantages(rewards, scale=True):
    n = len(rewards)
    mean = sum(rewards) / n
    if len(set(rewards)) == 1:
        return [0.0] * n
    if not scale:
        return [r - mean for r in rewards]
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (n - 1))
    return [(r - mean) / (std + 1e-4) for r in rewards]


def list_log_probability(scores, places):
    """Plackett-Luce: log-probability that the list starts with ``places``."""
    left = [i for i, s in enumerate(scores) if s != -math.inf]
    total = 0.0
    for place in places:
        if place not in left:
            continue
        total += scores[place] - math.log(sum(math.exp(scores[i]) for i in left))
        left.remove(place)
    return total


def kl_exact(scores, reference_scores):
    p, q = softmax(scores), softmax(reference_scores)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def kl_k3(log_prob, reference_log_prob):
    ratio = math.exp(reference_log_prob - log_prob)
    return ratio - math.log(ratio) - 1


def policy_objective(log_prob, old_log_prob, advantage, clip):
    """Clipped surrogate of one trajectory."""
    ratio = math.exp(log_prob - old_log_prob)
    return min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


# -- noise --------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox-4x32-10 on Python integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def _words(counter, seed):
    seed %= 2**64
    return philox(counter, (seed % 2**32, seed // 2**32))


@functools.cache
def normals(row, seed, trajectory, stream, position, dim):
    """Draw the noise of one event, [dim]."""
    values = []
    for block in range(math.ceil(dim / 4)):
        words = _words((block, position, 2 * trajectory + stream, row % 2**32), seed)
        u = [(word // 2**9 + 0.5) / 2**23 for word in words]
        for radial, angular in ((u[0], u[1]), (u[2], u[3])):
            radius, angle = math.sqrt(-2 * math.log(radial)), 2 * math.pi * angular
            values += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(values[:dim])


@functools.cache
def dropout_mask(row, seed, site, position, dim, rate):
    """Draw the dropout factors of one vector, [dim]; float32 as documented."""
    threshold = round(rate * 65536)
    halves = []
    for block in range(math.ceil(dim / 8)):
        for word in _words((block, position, 2**31 + site, row % 2**32), seed):
            halves += [word % 2**16, word // 2**16]
    kept = np.float32(65536 / (65536 - threshold))
    return np.array([kept if half >= threshold else 0 for half in halves[:dim]], np.float32)
