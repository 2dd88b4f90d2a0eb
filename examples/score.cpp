// Score requests without Python: a package that `lcr-fast export MODEL --format aoti -o scorer.pt2`
// wrote, and the library of our operators, which registers them as it is loaded.
//
//     torch=$(python -c "import torch; print(torch.__path__[0])")
//     ops=$(python -c "import lcr_fast._C; print(lcr_fast._C.__file__)")
//     g++ -std=c++20 -O2 score.cpp -o score -I$torch/include -I$torch/include/torch/csrc/api/include
//         -L$torch/lib -Wl,-rpath,$torch/lib -ltorch -ltorch_cpu -lc10 -ldl
//     ./score scorer.pt2 $ops batch.pt
//
// batch.pt is the list of a Batch's tensors in the order of its fields, as torch.save writes it.
// A line of scores for each user; a sentence and status 1 where something is wrong.
#include <ATen/core/ivalue.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <vector>

namespace {

std::vector<at::Tensor> read_batch(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::List<c10::IValue> fields = torch::jit::pickle_load(bytes).toList();
  std::vector<at::Tensor> batch;
  // Compiled code reads every tensor as a contiguous one, without a look at its strides.
  for (const c10::IValue& field : fields) batch.push_back(field.toTensor().contiguous());
  return batch;
}

void print_rows(const at::Tensor& scores) {
  for (const at::Tensor& row : scores.unbind(0)) {
    for (int64_t c = 0; c < row.size(0); ++c)
      std::printf("%s%.9g", c > 0 ? " " : "", row[c].item<double>());
    std::printf("\n");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s PROGRAM.pt2 OPERATORS.so BATCH.pt\n", argv[0]);
    return 1;
  }
  // Lazily, because the library is also a Python module, whose one function nobody calls here.
  if (dlopen(argv[2], RTLD_LAZY | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  try {
    const c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader scorer(argv[1]);
    print_rows(scorer.run(read_batch(argv[3])).at(0));
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "%s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
