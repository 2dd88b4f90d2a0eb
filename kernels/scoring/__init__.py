"""Target-aware aggregation and head: candidates of a user, and the whole catalogue.

For candidate i of a user, its vector e, streams x (search s, recommendation r) with states h_j:

    k_x = W_x e;   p_xj = softmax_j( k_x . h_j );   z_x = sum_j p_xj h_j     (0 without an event)
    mlp: t1 = W1 [z_r; z_s; e; u] + b1;   t2 = W2 m1 relu(t1) + b2;   y = w3 . m2 relu(t2) + b3
    dot: y = (z_r + z_s) . e                                  m1, m2: dropout, 0 or 1 / (1 - rate)
    mlp_dot: the sum of both y

Forward in halves: one program scores one tile of candidates of one user, for a run of trajectories,
which share k_x. Events and hidden units are read in blocks, the softmax is the running one, and of
the hidden layer no more than one block of columns exists at a time. Nothing is stored but y. In
float32 the MLP is a kernel a layer over *rows*, the candidates of all trajectories of all users:
pool (z), hidden (t1), output (t2, y), for as many users at a time as ``call.SCRATCH_BYTES`` allows.

Backward, with g = dy and everything recomputed:

    dt2 = g w3 m2 [t2 > 0];   dt1 = W2^T dt2 m1 [t1 > 0];   [dz_r; dz_s; de; du] = W1^T dt1
    dot: dz_x += g e;   de += g (z_r + z_s)
    dl_xj = p_xj (dz_x . h_j - dz_x . z_x);   dk_x = sum_j dl_xj h_j;   de += W_x^T dk_x
    dh_j = sum_i p_xj dz_x + dl_xj k_x
    dW1 = dt1 [z_r; z_s; e; u]^T;   dW2 = dt2 (m1 relu(t1))^T;   dW_x = dk_x e^T

in kernels over the same rows: pool, hidden, and the gradients of the output's (dt2), the hidden
layer's (dt1) and the input's rows (dz, de); then over candidates (dk, de; one program a tile, over
all trajectories), states (dh; one program a block of events, over all candidates) and users (du).
The weights' gradients are products over all rows.

Sums are float32; products take the states' dtype (float32 as ``gpu.dot_precision`` says), to which
weights are cast once a call and vectors as they are read. No atomics: each program writes its own
partial sums, which are added in a fixed order.
"""

from lcr_fast.kernels.scoring.ahead_of_time import variants
from lcr_fast.kernels.scoring.backward import score_bwd
from lcr_fast.kernels.scoring.catalogue import score_rank, score_topk
from lcr_fast.kernels.scoring.config import obstacle
from lcr_fast.kernels.scoring.forward import score_fwd

__all__ = ["obstacle", "score_bwd", "score_fwd", "score_rank", "score_topk", "variants"]
