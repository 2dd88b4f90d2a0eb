#if defined(__x86_64__)
#define LCR_TARGET __attribute__((target("avx2,fma")))
#define LCR_BYTES 32
#include "ranking_scan.h"

namespace lcr_fast {

constexpr RankingKernels kRankingAvx2 = {count<Float32>, count<Float64>, count<Float16>,
                                       count<BFloat16>, dots<float>, dots<double>};

}  // namespace lcr_fast
#endif
