// Counter-based noise and dropout; torch-free, so that any compiler can check it.
//
// The definition, which every backend shares, is in lcr_fast/noise.py.
#pragma once
#include <cstdint>

namespace lcr_fast {

// The normals of one (row, trajectory, stream), [length, dim] with rows `out_row` floats apart.
void normal_noise_rows(uint64_t seed, int64_t row, int64_t trajectory, int64_t stream,
                       int64_t length, int64_t dim, float* out, int64_t out_row);

// The mask of one (row, site), laid out likewise; `threshold` is the rate in units of 2^-16.
void dropout_mask_rows(uint64_t seed, int64_t row, int64_t site, uint32_t threshold, int64_t length,
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
  uint64_t seed;
  int64_t first_site;
  int64_t n_rows;
  int64_t length;
  int64_t dim;
  uint32_t threshold;  // rate in units of 2^-16
};

// Fill the blocks (site, row) numbered begin..end-1, row-major.
void dropout_masks_cpu(const DropoutArgs& args, int64_t begin, int64_t end);

}  // namespace lcr_fast
