// The attention kernel as a custom operator of ONNX Runtime: sparsify::BlockSparseAttention.
//
// ONNX Runtime's C interface is a table of functions to which each version only adds at the end. The part that is
// used here is declared here, so that the build needs no header of it. Version 8 of the table has all of it.

#include <cstdint>
#include <limits>
#include <vector>

#include <omp.h>

#include "problem.h"

struct FarField;
extern "C" bool sparsify_attention(const Problem* problem, const FarField* far);

namespace {

constexpr uint32_t kVersion = 8;

// Places in the table of functions.
enum Function {
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeFloat = 85,
  kKernelContextGetInputCount = 88,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseTensorTypeAndShapeInfo = 99,
  kFunctions = 100,
};

struct Api {
  void* functions[kFunctions];

  // Calls a function that returns a status: null if it succeeded.
  template <class... Arguments>
  void* call(Function which, Arguments... arguments) const {
    return reinterpret_cast<void* (*)(Arguments...)>(functions[which])(arguments...);
  }
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

// Types of elements, and kinds of inputs and outputs, as ONNX Runtime numbers them.
enum ElementType { kFloat = 1, kInt32 = 6, kHalf = 10 };
enum Characteristic { kRequired, kOptional };

struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const Api*, const void* info);
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void* kernel, void* context);
  void (*destroy_kernel)(void*);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
};

// Inputs in order.
enum Input { kQuery, kKey, kValue, kQBounds, kKvBounds, kKvNumBlocks, kKvIndices, kQOrder, kKvOrder, kKeyBias, kInputs };

struct Kernel {
  const Api* api;
  float scale;
  Dtype dtype;
};

struct Tensor {
  View view{};
  std::vector<int64_t> sizes;

  bool exists() const { return view.data != nullptr; }
  int64_t size(int place) const { return sizes[place]; }
};

// A contiguous tensor of 3 or 4 dimensions. A batch or head dimension of size 1 gets stride 0.
View view_of(void* data, const std::vector<int64_t>& sizes) {
  const int64_t row = sizes.size() == 4 ? sizes[3] : 1, head = sizes[2] * row;
  return {data, sizes[0] == 1 ? 0 : sizes[1] * head, sizes[1] == 1 ? 0 : head, row};
}

Tensor input(const Kernel& kernel, void* context, size_t place) {
  Tensor tensor;
  size_t count = 0;
  kernel.api->call(kKernelContextGetInputCount, (const void*)context, &count);
  const void* value = nullptr;
  if (place < count) kernel.api->call(kKernelContextGetInput, (const void*)context, place, &value);
  if (!value) return tensor;
  void* info = nullptr;
  size_t dims = 0;
  kernel.api->call(kGetTensorTypeAndShape, value, &info);
  kernel.api->call(kGetDimensionsCount, (const void*)info, &dims);
  tensor.sizes.resize(dims);
  kernel.api->call(kGetDimensions, (const void*)info, tensor.sizes.data(), dims);
  kernel.api->call(kReleaseTensorTypeAndShapeInfo, info);
  void* data = nullptr;
  kernel.api->call(kGetTensorMutableData, (void*)value, &data);
  if (dims == 3 || dims == 4) tensor.view = view_of(data, tensor.sizes);
  return tensor;
}

// The memory of an output; null for one that the node does not list.
void* output(const Kernel& kernel, void* context, size_t place, const std::vector<int64_t>& sizes) {
  void *value = nullptr, *data = nullptr;
  kernel.api->call(kKernelContextGetOutput, context, place, sizes.data(), sizes.size(), &value);
  if (value) kernel.api->call(kGetTensorMutableData, value, &data);
  return data;
}

// Whether a tensor has `dims` dimensions that begin with [1 or batch, 1 or heads] and end with `last`, if that is given.
bool fits(const Tensor& tensor, size_t dims, int64_t batch, int64_t heads, int64_t last = -1) {
  const auto& sizes = tensor.sizes;
  return sizes.size() == dims && (sizes[0] == 1 || sizes[0] == batch) && (sizes[1] == 1 || sizes[1] == heads) &&
         (last < 0 || sizes.back() == last);
}

// False, without any access to memory of the tensors, if their sizes do not fit together.
bool describe(const Tensor (&in)[kInputs], Problem& p) {
  for (Input one : {kQuery, kKey, kValue, kKvIndices}) {
    if (in[one].sizes.size() != 4) return false;
  }
  const Tensor &query = in[kQuery], &key = in[kKey], &value = in[kValue];
  const int64_t batch = query.size(0), heads = query.size(1), blocks = in[kKvIndices].size(2);
  if (key.size(0) != batch || key.size(1) == 0 || heads % key.size(1) || key.size(3) != query.size(3)) return false;
  for (int place : {0, 1, 2}) {
    if (value.size(place) != key.size(place)) return false;
  }
  if (!fits(in[kKvIndices], 4, batch, heads) || !fits(in[kQBounds], 3, batch, heads, blocks + 1) ||
      !fits(in[kKvNumBlocks], 3, batch, heads, blocks) || !fits(in[kKvBounds], 3, batch, heads)) {
    return false;
  }
  const struct {
    Input which;
    int64_t tokens;
  } optional[] = {{kQOrder, query.size(2)}, {kKvOrder, key.size(2)}, {kKeyBias, key.size(2)}};
  for (const auto& [which, tokens] : optional) {
    if (in[which].exists() && !fits(in[which], 3, batch, heads, tokens)) return false;
  }
  p.query = query.view, p.key = key.view, p.value = value.view, p.key_bias = in[kKeyBias].view;
  p.q_bounds = in[kQBounds].view, p.kv_bounds = in[kKvBounds].view, p.kv_num_blocks = in[kKvNumBlocks].view;
  p.kv_indices = in[kKvIndices].view, p.q_order = in[kQOrder].view, p.kv_order = in[kKvOrder].view;
  p.batch = batch, p.heads = heads, p.kv_heads = key.size(1), p.q_tokens = query.size(2), p.kv_tokens = key.size(2);
  p.q_blocks = blocks, p.kv_blocks = in[kKvBounds].size(2) - 1, p.width = in[kKvIndices].size(3);
  p.head_dim = query.size(3), p.value_dim = value.size(3);
  return p.kv_blocks > 0;
}

// This version of the interface has no way to report an error: a table that does not fit gives NaN everywhere.
void compute(void* self, void* context) {
  const Kernel& kernel = *static_cast<Kernel*>(self);
  Tensor in[kInputs];
  for (size_t place = 0; place < kInputs; ++place) in[place] = input(kernel, context, place);
  std::vector<int64_t> sizes = in[kQuery].sizes, rows(sizes.begin(), sizes.begin() + std::min<size_t>(3, sizes.size()));
  Problem problem{};
  const bool described = describe(in, problem);
  if (described) sizes[3] = problem.value_dim;
  void *out = output(kernel, context, 0, sizes), *lse = output(kernel, context, 1, rows);
  int64_t count = 1;
  for (int64_t size : rows) count *= size;
  std::vector<float> spare(lse ? 0 : count);
  if (described) {
    problem.out = view_of(out, sizes);
    problem.lse = view_of(lse ? lse : spare.data(), rows);
    problem.scale = kernel.scale, problem.dtype = kernel.dtype, problem.threads = omp_get_max_threads();
    if (sparsify_attention(&problem, nullptr)) return;
  }
  if (!sizes.empty()) count *= sizes.back();
  if (kernel.dtype == kFloat32) {
    std::fill_n(static_cast<float*>(out), count, std::numeric_limits<float>::quiet_NaN());
  } else {
    std::fill_n(static_cast<uint16_t*>(out), count, uint16_t(0x7e00));
  }
}

template <ElementType element, Dtype dtype>
constexpr CustomOp make() {
  return {
      kVersion,
      [](const CustomOp*, const Api* api, const void* info) -> void* {
        auto* kernel = new Kernel{api, 0.0f, dtype};
        api->call(kKernelInfoGetAttributeFloat, info, (const char*)"scale", &kernel->scale);
        return kernel;
      },
      [](const CustomOp*) { return "BlockSparseAttention"; },
      [](const CustomOp*) -> const char* { return nullptr; },
      [](const CustomOp*, size_t i) -> int { return i <= kValue ? element : i == kKeyBias ? kFloat : kInt32; },
      [](const CustomOp*) -> size_t { return kInputs; },
      [](const CustomOp*, size_t i) -> int { return i ? kFloat : element; },
      [](const CustomOp*) -> size_t { return 2; },
      compute,
      [](void* kernel) { delete static_cast<Kernel*>(kernel); },
      [](const CustomOp*, size_t i) -> int { return i >= kQOrder ? kOptional : kRequired; },
      [](const CustomOp*, size_t i) -> int { return i ? kOptional : kRequired; },
  };
}

const CustomOp kOps[] = {make<kFloat, kFloat32>(), make<kHalf, kFloat16>()};

}  // namespace

// ONNX Runtime calls this for a library of custom operators. Returns a status: null if it succeeded.
extern "C" void* RegisterCustomOps(void* options, const ApiBase* base) {
  const Api* api = base->get_api(kVersion);
  void* domain = nullptr;
  if (void* status = api->call(kCreateCustomOpDomain, (const char*)"sparsify", &domain)) return status;
  for (const CustomOp& op : kOps) {
    if (void* status = api->call(kCustomOpDomainAdd, domain, &op)) return status;
  }
  return api->call(kAddCustomOpDomain, options, domain);
}
