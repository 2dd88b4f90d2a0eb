// Operator schemas and dispatch, on the LibTorch stable ABI only: one binary serves
// torch 2.10 and later, and Python 3.10 and later.
//
// An operator has one definer, the language that implements it: here `m.def`, in Python those of
// the Triton kernels. So a program without Python that loads this library, such as one that runs an
// exported model, finds every operator of it with its schema. Python defines none of these; it
// reads them, and does not use a library whose schemas differ from its own calls
// (lcr_fast/ops/_op.py).
#include <Python.h>

#include "noise.h"
#include "op_arguments.h"
#include "torch_api.h"

namespace lcr_fast {

uint64_t seed_of(const Tensor& t, const char* name) {
  check(t.dim() == 0 && t.scalar_type() == ScalarType::Long, name,
        " must be an int64 tensor without axes");
  return static_cast<uint64_t>(*t.const_data_ptr<int64_t>());
}

DropoutKey dropout_key(int64_t threshold, const Tensor& seed) {
  check(threshold >= 0 && threshold < 65536, "dropout_threshold must be in 0..65535, got ",
        threshold);
  return {static_cast<uint32_t>(threshold), threshold > 0 ? seed_of(seed, "dropout_seed") : 0};
}

namespace {

void check_rows(const Tensor& rows) {
  check(rows.dim() == 1 && rows.scalar_type() == ScalarType::Long && rows.is_contiguous(),
        "rows must be a contiguous int64 vector");
}

Tensor normal_noise(const Tensor& rows, const Tensor& seed, int64_t n_trajectories, int64_t stream,
                    int64_t length, int64_t dim) {
  check_rows(rows);
  check(n_trajectories >= 0 && length >= 0 && dim >= 0,
        "n_trajectories, length and dim must not be negative, got ", n_trajectories, ", ", length,
        " and ", dim);
  check(stream == 0 || stream == 1, "stream must be 0 or 1, got ", stream);
  Tensor out = torch::stable::new_empty(rows, {rows.size(0), n_trajectories, length, dim},
                                        ScalarType::Float);
  const NoiseArgs args{rows.const_data_ptr<int64_t>(),
                       out.mutable_data_ptr<float>(),
                       seed_of(seed, "seed"),
                       rows.size(0),
                       n_trajectories,
                       length,
                       dim,
                       stream};
  parallel(args.n_rows * n_trajectories,
           [&](int64_t begin, int64_t end) { normal_noise_cpu(args, begin, end); });
  return out;
}

Tensor dropout_masks(const Tensor& rows, const Tensor& seed, int64_t first_site, int64_t n_sites,
                     int64_t length, int64_t dim, int64_t threshold) {
  check_rows(rows);
  check(first_site >= 0 && n_sites >= 0 && length >= 0 && dim >= 0,
        "first_site, n_sites, length and dim must not be negative, got ", first_site, ", ", n_sites,
        ", ", length, " and ", dim);
  check(threshold >= 0 && threshold < 65536, "threshold must be in 0..65535, got ", threshold);
  Tensor out =
      torch::stable::new_empty(rows, {n_sites, rows.size(0), length, dim}, ScalarType::Float);
  const DropoutKey key{static_cast<uint32_t>(threshold), seed_of(seed, "seed")};
  const DropoutArgs args{rows.const_data_ptr<int64_t>(),
                         out.mutable_data_ptr<float>(),
                         key,
                         first_site,
                         rows.size(0),
                         length,
                         dim};
  parallel(n_sites * args.n_rows,
           [&](int64_t begin, int64_t end) { dropout_masks_cpu(args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lcr_fast, m) {
  m.def(
      "normal_noise(Tensor rows, Tensor seed, int n_trajectories, int stream, int length, int dim)"
      " -> Tensor");
  m.def(
      "dropout_masks(Tensor rows, Tensor seed, int first_site, int n_sites, int length, int dim,"
      " int threshold) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(lcr_fast, CPU, m) {
  m.impl("normal_noise", TORCH_BOX(&normal_noise));
  m.impl("dropout_masks", TORCH_BOX(&dropout_masks));
}

}  // namespace lcr_fast

// `import lcr_fast._C` loads the shared object, which runs the registrations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef def = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&def);
}
