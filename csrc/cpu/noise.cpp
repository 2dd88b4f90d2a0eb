#include "../noise.h"

#include <algorithm>
#include <cmath>

#include "../philox.h"

namespace lcr_fast {
namespace {

constexpr float kTwoPi = 6.28318530717958647692f;

// The top 23 bits, centred in their cell: in (0, 1) and exact in float32.
float uniform(uint32_t word) { return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f; }

void box_muller(uint32_t a, uint32_t b, float* out) {
  const float radius = std::sqrt(-2.0f * std::log(uniform(a)));
  const float angle = kTwoPi * uniform(b);
  out[0] = radius * std::cos(angle);
  out[1] = radius * std::sin(angle);
}

}  // namespace

void normal_noise_cpu(const NoiseArgs& args, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const auto row = static_cast<uint32_t>(args.rows[block / args.n_trajectories]);
    const auto trajectory = static_cast<uint32_t>(block % args.n_trajectories);
    const uint32_t stream = 2 * trajectory + static_cast<uint32_t>(args.stream);
    float* out = args.out + block * args.length * args.dim;
    for (int64_t position = 0; position < args.length; ++position, out += args.dim) {
      for (int64_t d = 0; d < args.dim; d += 4) {
        const Words words =
            philox({static_cast<uint32_t>(d / 4), static_cast<uint32_t>(position), stream, row},
                   args.seed);
        float quad[4];
        box_muller(words[0], words[1], quad);
        box_muller(words[2], words[3], quad + 2);
        std::copy_n(quad, std::min<int64_t>(4, args.dim - d), out + d);
      }
    }
  }
}

}  // namespace lcr_fast
