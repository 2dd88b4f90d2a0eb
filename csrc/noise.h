// Counter-based noise and dropout; torch-free, so that any compiler can check it.
//
// The definition, which every backend shares, is in lcr_fast/noise.py.
#pragma once
#include <cstdint>

namespace lcr_fast {

// Dropout is at `threshold` / 2^16; its words come of the seed.
struct DropoutKey {
  uint32_t threshold;  // 0: no dropout
  uint64_t seed;
};

// What the kept ones are multiplied with.
constexpr float keep_scale(uint32_t threshold) {
  return 65536.0f / static_cast<float>(65536 - threshold);
}

// Where the dropout layers of each part start: the numbers of lcr_fast/ops/noise.py.
constexpr int64_t kStreamSites = 1 << 12;  // added for the recommendation stream
constexpr int64_t kEncoderSites = 0;
constexpr int64_t kReasoningSites = 1 << 13;
constexpr int64_t kHeadSites = 1 << 14;

// The third word of a site's counters; that of noise stays below.
constexpr uint32_t site_word(int64_t site) {
  return (uint32_t{1} << 31) + static_cast<uint32_t>(site);
}

// The normals of one (row, trajectory, stream), [length, dim] with rows `out_row` floats apart.
void normal_noise_rows(uint64_t seed, int64_t row, int64_t trajectory, int64_t stream,
                       int64_t length, int64_t dim, float* out, int64_t out_row);

// The mask of one (row, site), laid out likewise.
void dropout_mask_rows(const DropoutKey& key, int64_t row, int64_t site, int64_t length,
                       int64_t dim, float* out, int64_t out_row);

struct NoiseArgs {
  const int64_t* rows;  // [n_rows], the user row of each block of trajectories
  float* out;           // [n_rows, n_trajectories, length, dim]
  uint64_t seed;
  int64_t n_rows;
  int64_t n_trajectories;
  int64_t length;
  int64_t dim;
  int64_t stream;  // 0 search, 1 recommendation
};

// Fill the blocks (row, trajectory) numbered begin..end-1, row-major.
void normal_noise_cpu(const NoiseArgs& args, int64_t begin, int64_t end);

struct DropoutArgs {
  const int64_t* rows;  // [n_rows]
  float* out;           // [n_sites, n_rows, length, dim]
  DropoutKey key;
  int64_t first_site;
  int64_t n_rows;
  int64_t length;
  int64_t dim;
};

// Fill the blocks (site, row) numbered begin..end-1, row-major.
void dropout_masks_cpu(const DropoutArgs& args, int64_t begin, int64_t end);

}  // namespace lcr_fast
