#if defined(__x86_64__)
#define LCR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define LCR_BYTES 64
#include "ranking_scan.h"

namespace lcr_fast {

constexpr RankingKernels kRankingAvx512 = {kCount<Float32>,  kCount<Float64>, kCount<Float16>,
                                           kCount<BFloat16>, dots<float>,     dots<double>};

}  // namespace lcr_fast
#endif
