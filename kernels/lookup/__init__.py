"""What ids are looked up for, at both ends of a forward pass (docs/fused-kernel.md).

Events' vectors are gathered from the tables; candidates are searched for in the histories.
"""

from lcr_fast.kernels.lookup.ahead_of_time import variants
from lcr_fast.kernels.lookup.embed import embed_fwd
from lcr_fast.kernels.lookup.embed_backward import embed_bwd
from lcr_fast.kernels.lookup.seen import seen_bonus_bwd, seen_bonus_fwd

__all__ = ["embed_bwd", "embed_fwd", "seen_bonus_bwd", "seen_bonus_fwd", "variants"]
