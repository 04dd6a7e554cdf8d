// What csrc/cuda calls of torch's CUDA half, for CPU tensors. The library is linked so that it finds these first.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>
#include <cstring>

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char**) {
  return AOTI_TORCH_SUCCESS;  // launches throw their errors themselves
}
AOTITorchError torch_c10_cuda_free_error_msg(char*) { return AOTI_TORCH_SUCCESS; }

// New memory holds NaN in every floating dtype, and -1 in integers: an element that no thread wrote shows. Where none runs
// (blocks.cpp), that would be all of it, and the time of it no device's.
AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* tensor) {
  static const auto allocate =
      reinterpret_cast<decltype(&aoti_torch_empty_strided)>(dlsym(RTLD_NEXT, "aoti_torch_empty_strided"));
  const AOTITorchError error = allocate(dim, sizes, strides, dtype, device_type, device_index, tensor);
  static const char* const order = std::getenv("MIXUPE_EMULATED_ORDER");
  if (error != AOTI_TORCH_SUCCESS || (order && !std::strcmp(order, "none"))) return error;
  int64_t bytes = 0;
  void* data = nullptr;
  aoti_torch_get_storage_size(*tensor, &bytes);
  aoti_torch_get_data_ptr(*tensor, &data);
  if (bytes > 0) std::memset(data, 0xff, static_cast<size_t>(bytes));
  return error;
}
}
