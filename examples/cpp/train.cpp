// Trains on the digits by a step that AOTInductor compiled: no Python, no autograd.
//
//     python examples/export_step.py DIR --to inductor
//     cmake -S examples/cpp -B build/cpp -DCMAKE_PREFIX_PATH=$(python -c \
//         'import torch; print(torch.utils.cmake_prefix_path)') && cmake --build build/cpp
//     build/cpp/train DIR [STEPS]
#include <ATen/ATen.h>
#include <torch/csrc/api/include/torch/serialize.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

// What export_step.py wrote by torch.save: tensors and lists of them by name.
static c10::IValue read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  TORCH_CHECK(!bytes.empty(), "cannot read ", path);
  return torch::pickle_load(bytes);
}

static void train(const std::string& folder, int64_t steps) {
  torch::inductor::AOTIModelPackageLoader step(folder + "/step.pt2");
  const auto saved = read(folder + "/arguments.pt").toGenericDict();
  const auto images = saved.at("images").toTensor();
  const auto labels = saved.at("labels").toTensor();
  std::vector<at::Tensor> arguments;
  for (const auto& each : saved.at("arguments").toListRef()) arguments.push_back(each.toTensor());
  // behind the state: the images, the labels, the seed and the rate
  const size_t first = arguments.size() - 4;
  const int64_t batch = arguments[first].size(0);
  const int64_t whole = images.size(0) / batch * batch;
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t start = batch * i % whole;
    arguments[first] = images.narrow(0, start, batch);
    arguments[first + 1] = labels.narrow(0, start, batch);
    const auto results = step.run(arguments);
    std::printf("%.9g\n", results[0].item<double>());
    // behind the loss and whether it is finite: what a step changes, in the arguments' order
    for (size_t k = 2; k < results.size(); ++k) arguments[k - 2] = results[k];
  }
}

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: train DIR [STEPS]\n");
    return 2;
  }
  // the package then refuses a batch of another size than it was compiled for
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 1);
  try {
    train(argv[1], argc > 2 ? std::atoll(argv[2]) : 2000);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
