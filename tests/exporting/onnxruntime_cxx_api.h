// The part of ONNX Runtime's C++ interface that the program in docs/export.md uses, for tests: wheels have no headers.
// The names are those of onnxruntime_cxx_api.h. The numbers are places in the C interface, which only grows at its end.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

enum OrtLoggingLevel { ORT_LOGGING_LEVEL_WARNING = 2 };
enum OrtAllocatorType { OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };

struct ApiBase {
  void* const* (*get_api)(uint32_t version);
  const char* (*get_version)();
};
extern "C" const ApiBase* OrtGetApiBase();

namespace Ort {

// Calls the function at a place, which returns a status: null if it succeeded.
template <class... Arguments>
void call(int place, Arguments... arguments) {
  static void* const* api = OrtGetApiBase()->get_api(8);
  void* status = reinterpret_cast<void* (*)(Arguments...)>(api[place])(arguments...);
  if (status) throw std::runtime_error(reinterpret_cast<const char* (*)(void*)>(api[2])(status));
}

struct Env {
  Env(OrtLoggingLevel level, const char* name) { call(3, int(level), name, &self); }
  void* self = nullptr;
};

struct SessionOptions {
  SessionOptions() { call(10, &self); }
  void RegisterCustomOpsLibrary(const char* path) {
    void* library = nullptr;
    call(29, self, path, &library);
  }
  void* self = nullptr;
};

struct TensorTypeAndShapeInfo {
  std::vector<int64_t> GetShape() const {
    size_t dims = 0;
    call(61, self, &dims);
    std::vector<int64_t> shape(dims);
    call(62, self, shape.data(), dims);
    return shape;
  }
  const void* self = nullptr;
};

struct TypeInfo {
  TensorTypeAndShapeInfo GetTensorTypeAndShapeInfo() const {
    TensorTypeAndShapeInfo info;
    call(55, (const void*)self, &info.self);
    return info;
  }
  void* self = nullptr;
};

struct MemoryInfo {
  static MemoryInfo CreateCpu(OrtAllocatorType allocator, OrtMemType type) {
    MemoryInfo info;
    call(69, int(allocator), int(type), &info.self);
    return info;
  }
  void* self = nullptr;
};

struct Value {
  template <class T>
  static Value CreateTensor(const MemoryInfo& memory, T* data, size_t count, const int64_t* shape, size_t dims) {
    static_assert(sizeof(T) == 4, "fp32 only");
    Value value;
    call(49, (const void*)memory.self, (void*)data, count * sizeof(T), shape, dims, 1, &value.self);
    return value;
  }
  template <class T>
  const T* GetTensorData() const {
    void* data = nullptr;
    call(51, self, &data);
    return static_cast<const T*>(data);
  }
  void* self = nullptr;
};

struct RunOptions {
  explicit RunOptions(std::nullptr_t) {}
};

struct Session {
  Session(const Env& env, const char* path, const SessionOptions& options) {
    call(7, (const void*)env.self, path, (const void*)options.self, &self);
  }
  TypeInfo GetInputTypeInfo(size_t place) const {
    TypeInfo info;
    call(33, (const void*)self, place, &info.self);
    return info;
  }
  std::vector<Value> Run(const RunOptions&, const char* const* inputs, const Value* values, size_t count,
                         const char* const* outputs, size_t results) {
    std::vector<const void*> given(count);
    for (size_t place = 0; place < count; ++place) given[place] = values[place].self;
    std::vector<Value> found(results);
    std::vector<void*> pointers(results);
    call(9, self, (const void*)nullptr, inputs, (const void* const*)given.data(), count, outputs, results,
         pointers.data());
    for (size_t place = 0; place < results; ++place) found[place].self = pointers[place];
    return found;
  }
  void* self = nullptr;
};

}  // namespace Ort
