#if defined(__x86_64__)
#define LCR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define LCR_BYTES 64
#include "ranking_scan.h"

namespace lcr_fast {

constexpr RankingKernels kRankingAvx512 = {count<Float32>, count<Float64>, count<Float16>,
                                       count<BFloat16>, dots<float>, dots<double>};

}  // namespace lcr_fast
#endif
